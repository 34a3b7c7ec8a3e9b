"""Choices and last words scored by tiny random models: against a plain loop in float64, and lm-eval's own functions."""

from __future__ import annotations

import math
import runpy
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")
from scorer_support import make_model, make_tokenizer, token_logprobs  # noqa: E402

from pyalign import PairScorer, preference_metrics  # noqa: E402
from pyalign._options import OptionError  # noqa: E402
from pyalign.context_distillation.collect import PromptedModel  # noqa: E402
from pyalign.context_distillation.language import load  # noqa: E402
from pyalign.evaluation import (  # noqa: E402
    ChoiceCalibration,
    LastWord,
    Question,
    Reader,
    alignment_tax,
    choice_calibration,
    choice_evaluation,
    choice_metrics,
    evaluate_last_words,
    evaluate_multiple_choice,
    plot_calibration,
)
from pyalign.evaluation.multiple_choice import SCORINGS  # noqa: E402
from pyalign.pair_scorer.batches import Sharing, collate, make_batches  # noqa: E402
from pyalign.pair_scorer.scorer import Likelihoods  # noqa: E402
from pyalign.pair_scorer.tokens import TokenGroup  # noqa: E402

pytestmark = pytest.mark.usefixtures("single_thread")

QUESTIONS = [
    Question("Q: one?\nA:", ("a", "bb", "na\u00efve"), (False, True, False), "x"),
    Question("Q: two? ", ("\tleft", "right side"), (True, False), "y"),
    Question("", ("nothing", "in front"), (False, True), "x"),
    Question("Q: three?\nA:", ("p", "q", "r", "ss"), (True, False, True, False), "y"),
    Question("Q: four?\nA:", ("more text here", "m"), (False, True)),
]
PROMPT = "Be kind, be honest.\n\n"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama").double()


def reader(model: Any, bos: bool = False, **options: Any) -> Reader:
    return Reader(model, make_tokenizer(bos=bos), **options)


def loop(
    model: Any, question: Question, *, prompt: str = "", null: str = "", bos: bool = False
) -> dict[str, list[float]]:
    """log P(a|q) and log P(a) of each choice, a sequence at a time; every byte is a token."""
    encode = make_tokenizer()
    found: dict[str, list[float]] = {"given": [], "alone": []}
    for text in question.continuations:
        for kind, context in (("given", question.context), ("alone", null)):
            ids = encode(prompt + context)["input_ids"] if prompt + context else []
            ids = [0, *ids] if bos or not ids else ids  # something has to stand in front
            after = encode(text)["input_ids"]
            found[kind].append(float(token_logprobs(model, ids + after, len(ids)).sum()))
    return found


# ---- Likelihoods ----


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("null", ["", "Answer:"])
@pytest.mark.parametrize("prompt", ["", PROMPT])
def test_likelihoods_are_those_of_a_plain_loop(model: Any, prompt: str, null: str, bos: bool):
    found = reader(model, bos, prompt=prompt, null_context=null).read([(q.context, q.continuations) for q in QUESTIONS])
    for question, likelihoods in zip(QUESTIONS, found, strict=True):
        expected = loop(model, question, prompt=prompt, null=null, bos=bos)
        assert likelihoods.logprobs == pytest.approx(expected["given"], rel=1e-9)
        assert likelihoods.null_logprobs == pytest.approx(expected["alone"], rel=1e-9)
        assert likelihoods.tokens == tuple(len(text.encode()) for text in question.continuations)
        assert likelihoods.greedy is None


def test_the_boundary_is_the_first_token_that_the_context_lacks(model: Any):
    """Where a space and "b" are one token, the choice behind "A: " begins with the space that the context had."""
    tokenizer = make_tokenizer(merges=("\u0120 b",))
    merged = tokenizer(" b")["input_ids"]
    assert len(merged) == 1
    (found,) = Reader(model, tokenizer, null_context=None).read([("A: ", ("b", "c"))])
    assert found.tokens == (1, 2 - 1)
    ids = tokenizer("A:")["input_ids"]
    assert found.logprobs[0] == pytest.approx(float(token_logprobs(model, ids + merged, len(ids)).sum()), rel=1e-9)


def test_the_prompt_is_read_as_context_distillation_reads_it(tmp_path):
    """The same tokens, and the same log-probs as the teacher's."""
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer(bos=True, merges=("\u010a Q",)).save_pretrained(tmp_path)  # "\nQ" would be one token
    lm = load(str(tmp_path), dtype="float32", device="cpu")
    context, answer = "Q: one?\nA:", " yes"
    teacher = PromptedModel(lm, PROMPT)
    ids = [lm.bos, *lm.encode(context + answer)]
    with torch.no_grad():
        features = teacher.features(torch.tensor([ids]))[0]
        logprobs = lm.head(features).double().log_softmax(-1)
    start = 1 + len(lm.encode(context))
    expected = sum(float(logprobs[t - 1, ids[t]]) for t in range(start, len(ids)))
    (found,) = Reader(tmp_path, prompt=PROMPT, null_context=None, device="cpu").read([(context, (answer, " no"))])
    assert found.logprobs[0] == pytest.approx(expected, rel=1e-5)


def test_a_long_context_loses_its_beginning_and_the_prompt_nothing(model: Any):
    short = Reader(model, make_tokenizer(bos=True), prompt="Be kind. ", null_context=None, max_length=40)
    (found,) = short.read([("0123456789" * 5, ("abc", "d"))])
    assert short.truncation.prompts == 1
    encode = make_tokenizer()
    kept = encode("0123456789" * 5)["input_ids"][-(40 - 1 - 9 - 3) :]
    ids = [0, *encode("Be kind. ")["input_ids"], *kept]
    expected = float(token_logprobs(model, ids + encode("abc")["input_ids"], len(ids)).sum())
    assert found.logprobs[0] == pytest.approx(expected, rel=1e-9)
    with pytest.raises(OptionError, match="prefix: got 10 tokens; wanted fewer than 9, which a sequence may have"):
        Reader(model, make_tokenizer(bos=True), prompt="Be kind. ", max_length=9)


@pytest.mark.parametrize("options", [{"token_budget": 32}, {"window": 2}, {"share_prefix": False}])
def test_batches_change_nothing(model: Any, options: dict[str, Any]):
    one, other = (
        evaluate_multiple_choice(model, QUESTIONS, make_tokenizer(), prompt=PROMPT, **x) for x in ({}, options)
    )
    for name, values in one.values.items():
        np.testing.assert_allclose(other.values[name], values, rtol=1e-9, atol=1e-12, err_msg=name)


# ---- Scorings and metrics ----


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(s) for s in scores)
    return [math.exp(s) / total for s in scores]


def test_metrics_are_their_formulas(model: Any):
    found = evaluate_multiple_choice(model, QUESTIONS, make_tokenizer(bos=True), null_context="Answer:")
    for i, question in enumerate(QUESTIONS):
        logprobs = loop(model, question, null="Answer:", bos=True)
        given, alone = logprobs["given"], logprobs["alone"]
        tokens = [len(text.encode()) for text in question.continuations]
        scores = {
            "sum_logprob": given,
            "mean_logprob": [x / n for x, n in zip(given, tokens, strict=True)],
            "per_character": [x / len(text) for x, text in zip(given, question.choices, strict=True)],
            "per_byte": [x / len(text.encode()) for x, text in zip(given, question.choices, strict=True)],
            "information": [x - y for x, y in zip(given, alone, strict=True)],
        }
        for name, row in scores.items():
            probabilities = softmax(row)
            right = sum(p for p, target in zip(probabilities, question.targets, strict=True) if target)
            brier = sum((p - t) ** 2 for p, t in zip(probabilities, question.targets, strict=True))
            expected = {
                "accuracy": float(question.targets[row.index(max(row))]),
                "probability": right,
                "log_loss": -math.log(right),
                "brier": brier if sum(question.targets) == 1 else math.nan,
            }
            for metric, value in expected.items():
                assert found.values[f"{name}/{metric}"][i] == pytest.approx(value, rel=1e-6, nan_ok=True), (
                    name,
                    metric,
                )
        lengths = [len(text) for text in question.choices]
        for name, best in (("longest", max(lengths)), ("shortest", min(lengths))):
            tied = [t for t, n in zip(question.targets, lengths, strict=True) if n == best]
            assert found.values[f"{name}/accuracy"][i] == sum(tied) / len(tied)
    assert [*found.groups()] == ["overall", "x", "y"]
    assert found.estimate("sum_logprob/brier").n == 4
    assert set(found.scores) == set(SCORINGS)


def likelihoods(logprobs: list[float], nulls: list[float] | None = None) -> Likelihoods:
    return Likelihoods(tuple(logprobs), None if nulls is None else tuple(nulls), (1,) * len(logprobs), None)


def test_ties_share_the_credit_or_go_to_the_first():
    scores, targets = [[1.0, 1.0, 0.0], [2.0, 2.0, 2.0], [0.0, 3.0, 3.0]], [[False, True, False]] * 3
    np.testing.assert_allclose(choice_metrics(scores, targets)["accuracy"], [1 / 2, 1 / 3, 1 / 2])
    np.testing.assert_allclose(choice_metrics(scores, targets, ties="first")["accuracy"], [0, 0, 1])


def test_a_file_whose_right_choice_is_always_first_gives_a_constant_model_no_credit():
    """As BIG-bench's files are: an argmax that takes the first would be right every time."""
    questions = [Question("q", ("aa", "bb", "cc"), (True, False, False))] * 3
    found = choice_evaluation(questions, [likelihoods([-1, -1, -1])] * 3, scorings=["sum_logprob"])
    assert found.estimate("sum_logprob/accuracy").value == pytest.approx(1 / 3)
    assert found.estimate("longest/accuracy").value == pytest.approx(1 / 3)


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=6), st.floats(-1e4, 1e4), st.data())
def test_metrics_dont_change_with_a_constant_or_the_order(scores: list[float], shift: float, data: st.DataObject):
    right = data.draw(st.integers(0, len(scores) - 1))
    order = data.draw(st.permutations(range(len(scores))))
    targets = [i == right for i in range(len(scores))]
    one = choice_metrics([scores], [targets])
    other = choice_metrics([[scores[i] for i in order]], [[targets[i] for i in order]])
    moved = choice_metrics([[s + shift for s in scores]], [targets])
    for name in one:
        np.testing.assert_allclose(other[name], one[name], rtol=1e-12)
        if name != "accuracy":  # the shift may round unequal scores to equal ones
            np.testing.assert_allclose(moved[name], one[name], rtol=1e-6, atol=1e-9)
    assert 0 <= one["probability"][0] <= 1
    assert one["log_loss"][0] >= 0
    assert 0 <= one["brier"][0] <= 2


def test_metrics_at_the_extremes():
    found = choice_metrics([[-1e5, 0.0], [-math.inf, 0.0], [math.nan, 0.0], [-math.inf] * 2], [[True, False]] * 4)
    np.testing.assert_array_equal(found["accuracy"], [0, 0, np.nan, 0.5])
    np.testing.assert_array_equal(found["probability"], [0, 0, np.nan, 0.5])
    np.testing.assert_array_equal(found["log_loss"], [1e5, np.inf, np.nan, math.log(2)])
    np.testing.assert_array_equal(found["brier"], [2, 2, np.nan, 0.5])


def test_pairs_agree_with_preference_metrics():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    scores[:5, 1] = scores[:5, 0]
    expected = preference_metrics(scores[:, 0].contiguous(), scores[:, 1].contiguous())
    found = choice_metrics(scores.tolist(), [[True, False]] * 50)
    assert found["accuracy"].mean() == pytest.approx(float(expected.accuracy))
    assert found["log_loss"].mean() == pytest.approx(float(expected.log_loss))
    assert found["brier"].mean() == pytest.approx(2 * float(expected.brier))
    questions = [Question("q", ("a", "b"), (True, False)), Question("r", ("a", "b"), (False, True))] * 25
    rows = [likelihoods(row if i % 2 == 0 else row[::-1]) for i, row in enumerate(scores.tolist())]
    evaluation = choice_evaluation(questions, rows, scorings=["sum_logprob"])
    assert float(evaluation.calibration("sum_logprob").ece) == pytest.approx(float(expected.ece))


# ---- Calibration ----


def test_calibration_bins_by_the_highest_probability(tmp_path):
    # Confidences 0.5 (right), 0.7 (wrong), 0.7 (right), 0.95 (right); the fifth has no score.
    rows = [[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.7, 0.2, 0.1], [0.03, 0.95, 0.02]]
    scores = [[math.log(p) for p in row] for row in rows] + [[math.nan, 0, 0]]
    targets = [
        [True, False, False],
        [True, False, False],
        [True, False, False],
        [False, True, False],
        [True, False, False],
    ]
    found = choice_calibration(scores, targets, bins=5)
    assert isinstance(found, ChoiceCalibration)
    assert (found.questions, found.accuracy) == (4, 0.75)
    assert found.calibration.weight.tolist() == [0, 0, 1, 2, 1]
    assert found.calibration.confidence[2:].tolist() == pytest.approx([0.5, 0.7, 0.95])
    assert found.calibration.accuracy[2:].tolist() == pytest.approx([1, 0.5, 1])
    assert found.ece == pytest.approx((0.5 * 1 + 0.2 * 2 + 0.05 * 1) / 4)
    pytest.importorskip("matplotlib")
    figure = plot_calibration({"three": found}, tmp_path / "plot.png", title="choices")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[0].get_xlim() == (0.0, 1.0)
    assert "max p" in figure.axes[1].get_xlabel()


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_has_not():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(4000, 4))
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    truth = [generator.choice(4, p=p) for p in probabilities]
    targets = [[i == t for i in range(4)] for t in truth]
    assert choice_calibration(scores.tolist(), targets).ece < 0.03
    assert choice_calibration((5 * scores).tolist(), targets).ece > 0.25


def test_calibration_of_nothing():
    found = choice_calibration([], [])
    assert found.questions == 0
    assert math.isnan(found.ece)


# ---- Last words ----


def likelihoods_of(bare: Reader, groups: list[TokenGroup]) -> list[list[float]]:
    """(log P, whether greedy decoding writes it) of token sequences: random models write what no text encodes to."""
    found: dict[int, list[float]] = {}
    for batch in make_batches(groups, 64, Sharing(False)):
        rows = bare.scorer.likelihoods(collate(batch, groups), greedy=True).tolist()
        found |= {group: row for (group, _), row in zip(batch.sequences, rows, strict=True)}
    return [found[i] for i in range(len(groups))]


def test_greedy_is_what_greedy_decoding_writes(model: Any):
    tokenizer = make_tokenizer(bos=True)
    groups: list[TokenGroup] = []
    for context in ("once upon a", "in the", "they"):
        ids = tokenizer(context, return_tensors="pt")["input_ids"]
        options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
        with torch.no_grad():
            written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
        start = ids.shape[1]
        groups += [TokenGroup([written], [start]), TokenGroup([[*written[:-1], (written[-1] + 1) % 200]], [start])]
        groups += [TokenGroup([[*written[:start], (written[start] + 1) % 200, *written[start + 1 :]]], [start])]
    found = likelihoods_of(reader(model, null_context=None), groups)
    for i, (group, row) in enumerate(zip(groups, found, strict=True)):
        expected = token_logprobs(model, group.sequences[0], group.starts[0]).sum()
        assert row == [pytest.approx(float(expected), rel=1e-9), float(i % 3 == 0)]


def test_last_word_figures(model: Any):
    tokenizer = make_tokenizer(bos=True)
    examples = [LastWord("once upon a", " time", "x"), LastWord("in the", " end"), LastWord("say", "\nno", "x")]
    found = evaluate_last_words(model, examples, tokenizer)
    for i, example in enumerate(examples):
        ids, after = tokenizer(example.context)["input_ids"], make_tokenizer()(example.target)["input_ids"]
        logprobs = token_logprobs(model, ids + after, len(ids))
        assert found.values["log_loss"][i] == pytest.approx(-float(logprobs.sum()), rel=1e-9)
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids + after])).logits[0].argmax(-1)[len(ids) - 1 : -1]
        assert found.values["accuracy"][i] == float(best.tolist() == after)
    assert found.perplexity() == pytest.approx(math.exp(found.values["log_loss"].mean()))
    assert found.estimate("accuracy", subset="x").n == 2


def test_equal_logits_go_to_the_lowest_token():
    """A model whose logits are all equal writes token 0 alone."""
    model = make_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    groups = [TokenGroup([[5, 0]], [1]), TokenGroup([[5, 7]], [1])]
    assert [row[1] for row in likelihoods_of(reader(model, null_context=None), groups)] == [1.0, 0.0]


# ---- lm-eval ----


def processed(question: Question, results: list[tuple[float, bool]], *metrics: str) -> dict[str, Any]:
    """lm-eval's figures of a question, by its own ``process_results``."""
    gold = [i for i, right in enumerate(question.targets) if right]
    task = types.SimpleNamespace(
        config=types.SimpleNamespace(process_results=None),
        _metric_fn_list=dict.fromkeys(metrics),
        OUTPUT_TYPE="multiple_choice",
        multiple_input=0,
        multiple_target=len(gold) > 1,
        doc_to_choice=lambda document: list(question.choices),
        doc_to_target=lambda document: gold if len(gold) > 1 else gold[0],
    )
    return pytest.importorskip("lm_eval.api.task").ConfigurableTask.process_results(task, {}, results)


def test_accuracies_are_lm_evals(model: Any):
    metrics = {
        "acc": "sum_logprob", "acc_norm": "per_character", "acc_bytes": "per_byte", "acc_mutual_info": "information",
    }  # fmt: skip
    questions = [q for q in QUESTIONS if sum(q.targets) == 1]
    found = evaluate_multiple_choice(model, questions, make_tokenizer(bos=True), ties="first")
    brier: list[Any] = []
    for i, question in enumerate(questions):
        logprobs = loop(model, question, bos=True)
        results = [(x, False) for x in logprobs["given"] + logprobs["alone"]]
        theirs = processed(question, results, *metrics, "brier_score")
        for name, ours in metrics.items():
            assert found.values[f"{ours}/accuracy"][i] == theirs[name], (i, name)
        brier.append(theirs["brier_score"])
    aggregate = pytest.importorskip("lm_eval.api.metrics")
    for i, item in enumerate(brier):
        assert found.values["sum_logprob/brier"][i] == pytest.approx(aggregate.brier_score([item]), rel=1e-6)
    accuracy = found.values["sum_logprob/accuracy"].tolist()
    assert found.estimate("sum_logprob/accuracy").standard_error == pytest.approx(aggregate.mean_stderr(accuracy))


def test_probability_is_lm_evals_mc2(model: Any):
    utils = pytest.importorskip("lm_eval.tasks.truthfulqa.utils")
    found = evaluate_multiple_choice(model, QUESTIONS, make_tokenizer(bos=True), scorings=["sum_logprob"])
    for i, question in enumerate(QUESTIONS):
        logprobs = loop(model, question, bos=True)["given"]
        document = {"mc2_targets": {"labels": [int(x) for x in question.targets]}}
        theirs = utils.process_results_mc2(document, [(x, False) for x in logprobs])["acc"]
        assert found.values["sum_logprob/probability"][i] == pytest.approx(theirs, rel=1e-6)


# ---- The tax, and what is refused ----


def test_the_alignment_tax_is_the_difference_of_prompted_and_plain(model: Any):
    plain, prompted = (
        evaluate_multiple_choice(model, QUESTIONS, make_tokenizer(), prompt=p, scorings=["sum_logprob"])
        for p in ("", PROMPT)
    )
    assert prompted.ids == plain.ids
    tax = alignment_tax(prompted, plain)["sum_logprob/probability"]
    difference = prompted.values["sum_logprob/probability"] - plain.values["sum_logprob/probability"]
    assert np.abs(difference).max() > 1e-3
    assert (tax.value, tax.n) == (pytest.approx(difference.mean()), 5)


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    examples = Path(__file__).parent.parent / "bench" / "examples"
    monkeypatch.syspath_prepend(str(examples))
    runpy.run_path(str(examples / "evaluate.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[::2]] == ["mean_logprob", "information", "longest"]
    assert lines[-1].startswith("    prompted - plain: +0.0000")  # no prompt changes the length of an answer


def test_a_reader_serves_several_evaluations(model: Any):
    used = reader(model)
    one = evaluate_multiple_choice(used, QUESTIONS)
    other = evaluate_multiple_choice(model, QUESTIONS, make_tokenizer())
    assert all(np.array_equal(one.values[name], x, equal_nan=True) for name, x in other.values.items())
    with pytest.raises(OptionError, match="got a Reader and options beside it"):
        evaluate_multiple_choice(used, QUESTIONS, prompt="p")
    with pytest.raises(OptionError, match=r"got a Reader without log P\(a\); wanted one with a null_context"):
        evaluate_multiple_choice(reader(model, null_context=None), QUESTIONS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: evaluate_multiple_choice(m, QUESTIONS, make_tokenizer(), scorings=[]),
            r"scorings: got \[\]; wanted one",
        ),
        (
            lambda m: evaluate_multiple_choice(m, QUESTIONS, make_tokenizer(), scorings=["acc"]),
            "scorings: got 'acc'; wanted",
        ),
        (
            lambda m: evaluate_multiple_choice(m, QUESTIONS, make_tokenizer(), ties="half"),
            "ties: got 'half'; wanted one of",
        ),
        (lambda m: Reader(m, make_tokenizer(), score="dpo"), "score: got 'dpo'; wanted prompt, null_context and a"),
        (lambda m: Question("q", ("a",), (True,)), "choices: got 1; wanted two or more"),
        (lambda m: Question("q", ("a", "b"), (True,)), "targets: got 1; wanted 2, one per choice"),
        (lambda m: Question("q", ("a", "b"), (True, True)), "targets: got 2 right choices of 2; wanted some, not all"),
        (lambda m: choice_evaluation(QUESTIONS, []), "likelihoods: got 0; wanted 5, one per question"),
        (
            lambda m: choice_evaluation(QUESTIONS[:1], [likelihoods([0, 1, 2])], scorings=["information"]),
            r"likelihoods: got none without a context; wanted log P\(a\)",
        ),
        (lambda m: choice_metrics([[1.0, 2.0]], [[False, False]]), r"targets\[0\]: got \[False, False\]; wanted 2"),
        (lambda m: choice_metrics([[1.0, 2.0]], []), "targets: got 0 questions; wanted 1"),
        (lambda m: choice_calibration([], [], bins=0), "bins: got 0; wanted an int >= 1"),
    ],
)
def test_bad_arguments_are_named(model: Any, call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_reward_model_takes_no_prefix():
    model = make_model("llama", head="ForSequenceClassification", num_labels=1)
    with pytest.raises(OptionError, match="prefix: got a text; wanted none: a reward model reads prompts as it was"):
        PairScorer(model, make_tokenizer(), prefix="Be kind. ")


def test_messages_take_no_prefix(model: Any):
    scorer = PairScorer(model, make_tokenizer(), prefix="Be kind. ")
    with pytest.raises(OptionError, match="prefix: got a text, and prompts that are messages; wanted prompts that are"):
        scorer([([{"role": "user", "content": "hi"}], ["hello"])])
