"""A reward model on rankings of three answers with transformers' Trainer:
`python bench/examples/transformers_reward.py`."""

from typing import Any


def main() -> None:
    from tiny import ANSWERS, OTHERS, QUESTIONS, SETTINGS, report, reward_model, tokenizer
    from transformers import Trainer, TrainingArguments

    from pyalign.integrations.transformers import RankingCollator, RankingMixin

    class RewardTrainer(RankingMixin, Trainer): ...

    encode: Any = tokenizer()
    rankings = [
        {"responses": [encode(question + text)["input_ids"] for text in (answer, other, "")], "ranks": [0, 1, 2]}
        for question, answer, other in zip(QUESTIONS, ANSWERS, OTHERS, strict=True)
    ]
    trainer = RewardTrainer(
        reward_model(),
        TrainingArguments(**SETTINGS),
        train_dataset=rankings,
        data_collator=RankingCollator(pad_token_id=encode.pad_token_id),
    )
    trainer.train()
    report(trainer)


if __name__ == "__main__":
    main()
