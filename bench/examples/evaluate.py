"""The alignment tax of a prompt: the same questions, plain and prompted, `python bench/examples/evaluate.py`."""

from typing import Any


def main() -> None:
    from tiny import ANSWERS, OTHERS, QUESTIONS, language_model, tokenizer

    from pyalign.evaluation import Question, alignment_tax, evaluate_multiple_choice

    questions = [
        Question(question, (answer, other), (True, False))  # read_multiple_choice(paths) reads them from files
        for question, answer, other in zip(QUESTIONS, ANSWERS, OTHERS, strict=True)
    ]
    model, encode = language_model().eval(), tokenizer()
    options: dict[str, Any] = {"scorings": ["mean_logprob", "information"]}
    plain = evaluate_multiple_choice(model, questions, encode, **options)
    prompted = evaluate_multiple_choice(model, questions, encode, prompt="Answer with the sum.\n\n", **options)
    tax = alignment_tax(prompted, plain)
    for scoring in (*options["scorings"], "longest"):  # "the longer answer is right" is the baseline
        print(f"{scoring}: {plain.estimate(f'{scoring}/accuracy')}")
        print(f"    prompted - plain: {tax[f'{scoring}/accuracy']}")


if __name__ == "__main__":
    main()
