"""Context distillation with transformers' Trainer: the teacher, the same model, reads an instruction that its student
doesn't. Neither side's logits are ever held. `python bench/examples/transformers_distillation.py`."""

from typing import Any


def main() -> None:
    from tiny import ANSWERS, QUESTIONS, SETTINGS, language_model, report, tokenizer
    from transformers import Trainer, TrainingArguments

    from pyalign import ContextDistillationCollator
    from pyalign.integrations.transformers import DistillationMixin

    class Distiller(DistillationMixin, Trainer): ...

    encode: Any = tokenizer()
    texts = [question + answer for question, answer in zip(QUESTIONS, ANSWERS, strict=True)]
    trainer = Distiller(
        language_model(),
        TrainingArguments(gradient_accumulation_steps=2, **SETTINGS),
        teacher_model=language_model(),
        from_hidden_states=True,
        train_dataset=[{"input_ids": encode(text)["input_ids"]} for text in texts],
        data_collator=ContextDistillationCollator(
            pad_token_id=encode.pad_token_id,
            prompt_ids=[encode.bos_token_id],
            teacher_prompt_ids=[encode.bos_token_id, *encode("Be brief, and polite. ")["input_ids"]],
        ),
    )
    trainer.train()
    report(trainer)


if __name__ == "__main__":
    main()
