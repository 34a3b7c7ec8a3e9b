"""TRL's DPOTrainer with pyalign's log-probs, straight from hidden states: `python bench/examples/trl_dpo.py`."""


def main() -> None:
    from datasets import Dataset
    from tiny import ANSWERS, OTHERS, QUESTIONS, SETTINGS, language_model, report, tokenizer
    from trl import DPOConfig, DPOTrainer

    from pyalign.integrations.trl import apply_pyalign_to_trl

    trainer = DPOTrainer(
        model=language_model(),
        ref_model=language_model(),
        args=DPOConfig(**SETTINGS),
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": OTHERS}),
        processing_class=tokenizer(),
    )
    with apply_pyalign_to_trl(["dpo"]) as applied:
        print(applied)
        trainer.train()
    report(trainer)


if __name__ == "__main__":
    main()
