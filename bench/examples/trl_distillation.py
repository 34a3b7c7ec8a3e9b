"""TRL's DistillationTrainer, on the student's own answers, with pyalign's divergence straight from hidden states:
`python bench/examples/trl_distillation.py`."""


def main() -> None:
    from datasets import Dataset
    from tiny import QUESTIONS, SETTINGS, language_model, report, tokenizer
    from trl import DistillationConfig, DistillationTrainer

    from pyalign.integrations.trl import apply_pyalign_to_trl

    trainer = DistillationTrainer(
        model=language_model(),
        teacher_model=language_model(seed=1),
        args=DistillationConfig(beta=0.5, max_completion_length=8, **SETTINGS),
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
        processing_class=tokenizer(),
    )
    with apply_pyalign_to_trl(["distillation"]) as applied:
        print(applied)
        trainer.train()
    report(trainer)


if __name__ == "__main__":
    main()
