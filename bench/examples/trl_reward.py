"""TRL's RewardTrainer with pyalign's pairwise loss: `python bench/examples/trl_reward.py`."""


def main() -> None:
    from datasets import Dataset
    from tiny import ANSWERS, OTHERS, QUESTIONS, SETTINGS, report, reward_model, tokenizer
    from trl import RewardConfig, RewardTrainer

    from pyalign.integrations.trl import apply_pyalign_to_trl

    pairs = {
        "chosen": [question + answer for question, answer in zip(QUESTIONS, ANSWERS, strict=True)],
        "rejected": [question + other for question, other in zip(QUESTIONS, OTHERS, strict=True)],
    }
    trainer = RewardTrainer(
        model=reward_model(),
        args=RewardConfig(center_rewards_coefficient=0.01, **SETTINGS),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
    )
    with apply_pyalign_to_trl(["reward"]) as applied:
        print(applied)
        trainer.train()
    report(trainer)


if __name__ == "__main__":
    main()
