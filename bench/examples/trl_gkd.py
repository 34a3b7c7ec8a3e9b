"""TRL's GKDTrainer with pyalign's divergence of logits: `python bench/examples/trl_gkd.py`."""


def main() -> None:
    from datasets import Dataset
    from tiny import ANSWERS, QUESTIONS, SETTINGS, language_model, report, tokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from pyalign.integrations.trl import apply_pyalign_to_trl

    dialogues = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    trainer = GKDTrainer(
        model=language_model(),
        teacher_model=language_model(seed=1),
        args=GKDConfig(beta=0.5, lmbda=0.0, **SETTINGS),  # lmbda: the share of steps on the student's own answers
        train_dataset=Dataset.from_dict({"messages": dialogues}),
        processing_class=tokenizer(),
    )
    with apply_pyalign_to_trl(["gkd"]) as applied:
        print(applied)
        trainer.train()
    report(trainer)


if __name__ == "__main__":
    main()
