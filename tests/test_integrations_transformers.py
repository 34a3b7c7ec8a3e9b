"""Adapters to transformers' Trainer: they learn what the Trainer's own losses learn, from the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_support import torchrun
from torch import Tensor

from pyalign import ContextDistillationCollator, distillation_loss, ranked_preference_loss
from pyalign.integrations.transformers import (
    DistillationMixin,
    LinearCrossEntropyMixin,
    RankingCollator,
    RankingMixin,
    causal_lm_loss,
    causal_lm_loss_func,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# transformers' own imports and accelerate's hooks use what torch has deprecated; a CPU has nothing to pin memory for.
pytestmark = [
    pytest.mark.usefixtures("single_thread", "unpoisoned"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*pin_memory"),
]

V = 97
Trainer = transformers.Trainer


class LinearTrainer(LinearCrossEntropyMixin, Trainer): ...


class Distiller(DistillationMixin, Trainer): ...


class Ranker(RankingMixin, Trainer): ...


def model_of(kind: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A random causal language model: a vocabulary of 97, two layers."""
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, **special)
    else:
        name = {"llama": "Llama", "gemma2": "Gemma2", "cohere": "Cohere", "granite": "Granite"}[kind]
        if kind == "granite":
            heads.pop("head_dim")
        config = getattr(transformers, f"{name}Config")(**sizes, **heads, **special, **options)
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # away from the uniform distribution
    return model


def rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Sequences of one length, whose labels count in parts of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Any]] = []
    for i in range(count):
        ids = torch.randint(3, V, (16,), generator=generator)
        labels = ids.clone()
        labels[: 1 + 3 * (i % 4)] = -100
        found.append({"input_ids": ids, "attention_mask": torch.ones(16, dtype=torch.int64), "labels": labels})
    return found


def arguments(directory: Path, **options: Any) -> Any:
    given = {
        "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "seed": 0,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    }  # fmt: skip
    return transformers.TrainingArguments(str(directory), **{**given, **options})


def losses(trainer: Any) -> Tensor:
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def same_parameters(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    """Adam divides by gradients' sizes, so that rounding in tiny ones shows: a fiftieth of a step of 1e-3."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- Cross-entropy ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7), torch.tensor([7.0])])
def test_causal_lm_loss_is_transformers_own(dtype: torch.dtype, num_items: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 11, V, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (3, 11))
    labels[0, :4] = labels[2, -3:] = -100
    truth = logits.detach().double().requires_grad_()
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = F.cross_entropy(truth.flatten(0, 1), targets.flatten(), reduction="sum")
    expected = expected / ((targets != -100).sum() if num_items is None else int(num_items))
    expected.backward()

    loss = causal_lm_loss(logits=logits, labels=labels, vocab_size=V, num_items_in_batch=num_items, use_cache=False)
    loss.backward()
    theirs = ForCausalLMLoss(logits, labels, V, num_items)
    error = abs(loss.item() - expected.item())
    assert error <= abs(theirs.item() - expected.item()) + 1e-6 * expected.item()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(logits.grad.double(), truth.grad, rtol=tolerance, atol=tolerance / 10)
    func = causal_lm_loss_func({"logits": logits}, labels, num_items_in_batch=num_items)
    torch.testing.assert_close(func, loss, rtol=0, atol=0)


def test_shifted_labels_are_taken_as_they_are() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    alone = causal_lm_loss(logits, None, V, shift_labels=shifted)
    torch.testing.assert_close(alone, causal_lm_loss(logits, labels, V), rtol=0, atol=0)


def test_another_ignored_label() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, V), torch.randint(1, V, (2, 5))
    labels[0, 2] = 0
    expected = causal_lm_loss(logits, labels.masked_fill(labels == 0, -100), V)
    torch.testing.assert_close(causal_lm_loss(logits, labels, V, ignore_index=0), expected, rtol=0, atol=0)


def test_nothing_to_predict_is_a_differentiable_zero() -> None:
    logits = torch.randn(2, 5, V, requires_grad=True)
    loss = causal_lm_loss(logits, torch.full((2, 5), -100), V)
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(logits.grad) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 5, V), torch.zeros(2, 5, dtype=torch.int64), V + 1), r"logits: got a vocabulary of 97.*98"),
        ((torch.zeros(2, 5, V), None, V), r"labels: got None; wanted .*shift_labels="),
        (
            (torch.zeros(2, 5, V), torch.zeros(2, 5, dtype=torch.int64), V, torch.ones(2)),
            r"num_items_in_batch: .*\(2,\)",
        ),
        ((torch.zeros(2, 5, V), torch.zeros(2, 4, dtype=torch.int64), V), r"targets: got shape \(2, 4\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        causal_lm_loss(*arguments)


def test_outputs_without_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="outputs: got dict without logits"):
        causal_lm_loss_func({"loss": torch.zeros(())}, torch.zeros(2, 5, dtype=torch.int64))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("way", ["compute_loss_func", "loss_function", "hidden states"])
def test_a_run_has_the_trainers_own_losses(tmp_path: Path, way: str, accumulation: int) -> None:
    """20 steps with gradient accumulation: float32 losses agree to 1e-5 of their size, a few hundred roundings."""
    args = arguments(tmp_path, max_steps=20, gradient_accumulation_steps=accumulation)
    data = rows(32)
    theirs = model_of()
    expected = losses(Trainer(theirs, args, train_dataset=data))
    ours = model_of()
    if way == "hidden states":
        trainer: Any = LinearTrainer(ours, args, train_dataset=data)
    elif way == "compute_loss_func":
        trainer = Trainer(ours, args, train_dataset=data, compute_loss_func=causal_lm_loss_func)
    else:
        ours.loss_function = causal_lm_loss
        trainer = Trainer(ours, args, train_dataset=data)
    assert len(expected) == 20
    assert expected[-1] < expected[0]
    torch.testing.assert_close(losses(trainer), expected, rtol=1e-5, atol=0)
    same_parameters(ours, theirs, 1e-4)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def one_step(trainer: Any, batches: list[Any]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of one optimizer step over the batches, as the Trainer's loop makes them."""
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = len(batches)
    samples, num_items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    total = sum(trainer.training_step(trainer.model, batch, num_items).item() for batch in samples)
    return total, {name: x.grad.clone() for name, x in trainer.model.named_parameters()}


def same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=tolerance * scale, msg=name)


def collated(data: list[dict[str, Any]]) -> dict[str, Tensor]:
    return transformers.default_data_collator(data)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hidden_states_give_the_gradients_of_the_logits(tmp_path: Path, kind: str, smoothing: float) -> None:
    options = {"final_logit_softcapping": 5.0} if kind == "gemma2" else {}
    args = arguments(tmp_path, label_smoothing_factor=smoothing)
    ours, theirs = model_of(kind, **options), model_of(kind, **options)
    for model in (ours, theirs):
        model.config.use_cache = False
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    batches = [collated(rows(3)), collated(rows(2, seed=2))]
    expected = one_step(Trainer(theirs, args), [dict(batch) for batch in batches])
    found = one_step(LinearTrainer(ours, args), batches)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    same_gradients(found[1], expected[1], 2e-5)
    if kind == "gemma2":
        assert ours.config.final_logit_softcapping == 5.0  # put back


def test_hidden_states_make_no_logits(tmp_path: Path) -> None:
    """No tensor of tokens x vocabulary: the head is never called for logits, in training or evaluation."""
    model = model_of()
    seen: list[tuple[int, ...]] = []
    trainer = LinearTrainer(model, arguments(tmp_path), train_dataset=rows(8), eval_dataset=rows(4))
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(tuple(outputs.logits.shape)))
    trainer.train()
    evaluated = trainer.evaluate()["eval_loss"]
    assert set(seen) == {(1, 1, 2)}
    with torch.no_grad():
        batch = collated(rows(4))
        assert evaluated == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "options"), [("cohere", {"logit_scale": 0.3}), ("granite", {"logits_scaling": 2.0})])
def test_a_scale_after_the_head_is_noticed(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    trainer = LinearTrainer(model_of(kind, **options), arguments(tmp_path), train_dataset=rows(8))
    with pytest.raises(ValueError, match=r"ForCausalLM changes its logits after the head"):
        trainer.train()


def test_a_head_that_is_no_plain_linear_is_refused(tmp_path: Path) -> None:
    model = model_of()
    model.lm_head.register_forward_hook(lambda *_: None)
    trainer = LinearTrainer(model, arguments(tmp_path), train_dataset=rows(8))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM with the head Linear; wanted an nn.Linear without hooks"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "keywords", "message"),
    [
        ({"use_liger_kernel": True}, {}, "use_liger_kernel: got True"),
        ({"torch_compile": True}, {}, "torch_compile: got True"),
        ({}, {"compute_loss_func": causal_lm_loss_func}, "compute_loss_func: got <function"),
        ({}, {"compute_metrics": lambda prediction: {}}, "compute_metrics: got <function"),
    ],
)
def test_what_would_bypass_the_loss_is_refused(
    tmp_path: Path, options: dict[str, Any], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LinearTrainer(model_of(), arguments(tmp_path, **options), train_dataset=rows(8), **keywords)


def test_auxiliary_losses_of_experts_are_refused(tmp_path: Path) -> None:
    model = model_of()
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits: got True"):
        LinearTrainer(model, arguments(tmp_path), train_dataset=rows(8)).train()


# ---- Distillation ----


def context_rows(count: int) -> list[dict[str, Any]]:
    """Continuations of different lengths: micro-batches have different numbers of tokens."""
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, V, (3 + 2 * (i % 5),), generator=generator).tolist()} for i in range(count)]


def context_collator() -> ContextDistillationCollator:
    return ContextDistillationCollator(pad_token_id=0, prompt_ids=[1], teacher_prompt_ids=[1, 5, 6, 7, 8])


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("batch_kind", ["context", "labels"])
def test_accumulated_batches_are_the_big_batch(tmp_path: Path, hidden: bool, batch_kind: str) -> None:
    """Also where no batch has labels for the Trainer to count; micro-batches weigh by their tokens."""
    if batch_kind == "context":
        data, collate = context_rows(6), context_collator()
    else:
        data, collate = rows(6), collated
    trainer = Distiller(
        model_of(),
        arguments(tmp_path),
        teacher_model=model_of(seed=5),
        hard_weight=0.3,
        temperature=2.0,
        from_hidden_states=hidden,
    )
    parts = [collate(data[:1]), collate(data[1:4]), collate(data[4:])]
    found = one_step(trainer, parts)
    expected = one_step(trainer, [collate(data)])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    same_gradients(found[1], expected[1])


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_context_distillation_is_the_loss_by_hand(tmp_path: Path, hidden: bool, divergence: str) -> None:
    student, teacher = model_of(), model_of("gemma2", seed=5, final_logit_softcapping=8.0)
    trainer = Distiller(
        student, arguments(tmp_path), teacher_model=teacher, divergence=divergence, from_hidden_states=hidden
    )
    batch = context_collator()(context_rows(5))
    loss, gradients = one_step(trainer, [dict(batch)])
    student.zero_grad()
    with torch.no_grad():
        teacher_logits = teacher(batch["teacher_input_ids"], batch["teacher_attention_mask"]).logits
    logits = student(batch["input_ids"], batch["attention_mask"]).logits
    expected = distillation_loss(logits, teacher_logits, teacher_rows=batch["teacher_rows"], divergence=divergence)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    same_gradients(gradients, {name: x.grad for name, x in student.named_parameters()}, 2e-5)


def test_labels_say_which_tokens_a_distillation_counts(tmp_path: Path) -> None:
    """Position i counts where label i + 1 does: the loss is that of plain torch over those positions."""
    student, teacher = model_of(), model_of(seed=5)
    batch = collated(rows(4))
    loss, _ = one_step(Distiller(student, arguments(tmp_path), teacher_model=teacher, hard_weight=0.5), [dict(batch)])
    with torch.no_grad():
        inputs = batch["input_ids"], batch["attention_mask"]
        q, p = (model(*inputs).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
        targets = batch["labels"][:, 1:]
        counted = targets != -100
        divergence = (p.exp() * (p - q)).sum(-1)[counted].mean()
        hard = F.nll_loss(q[counted], targets[counted])
    assert loss == pytest.approx((0.5 * divergence + 0.5 * hard).item(), rel=1e-5)


@pytest.mark.parametrize("hidden", [False, True], ids=["logits", "hidden"])
def test_a_distillation_run_nears_its_teacher(tmp_path: Path, hidden: bool) -> None:
    """The whole loop, the dataset's columns and evaluation included; the teacher stays as it is."""
    student, teacher = model_of(), model_of(seed=5)
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    data = [{**row, "teacher_prompt_ids": [1, 5, 6]} for row in context_rows(12)]
    trainer = Distiller(
        student,
        arguments(tmp_path, max_steps=12, gradient_accumulation_steps=2, learning_rate=3e-3),
        teacher_model=teacher,
        train_dataset=data,
        eval_dataset=data,
        data_collator=ContextDistillationCollator(pad_token_id=0, prompt_ids=[1]),
        from_hidden_states=hidden,
    )
    first = trainer.evaluate()["eval_loss"]
    found = losses(trainer)
    assert trainer.evaluate()["eval_loss"] < 0.8 * first
    assert found[0] == pytest.approx(first, rel=0.2)
    assert student.state_dict().keys() == before.keys()
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, before[name])
        assert not teacher.training
    assert all(x.grad is None for x in teacher.parameters())


def test_bfloat16_autocast_distils_from_hidden_states(tmp_path: Path) -> None:
    def step(**options: Any) -> float:
        args = arguments(tmp_path, bf16=options.pop("bf16"))
        trainer = Distiller(model_of(), args, teacher_model=model_of(seed=5), **options)
        return one_step(trainer, [context_collator()(context_rows(4))])[0]

    exact = step(bf16=False)
    assert step(bf16=True, from_hidden_states=True) == pytest.approx(exact, rel=0.03)
    assert step(bf16=True) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher_model": "name"}, TypeError, "teacher_model: got str"),
        ({"divergence": "kl"}, ValueError, "divergence: got 'kl'; wanted one of 'forward_kl'"),
        ({"compute_loss_func": causal_lm_loss_func}, ValueError, "compute_loss_func"),
    ],
)
def test_wrong_options_of_a_distillation_are_named(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Distiller(model_of(), arguments(tmp_path), **{"teacher_model": model_of(), **options})


def test_a_batch_without_what_counts_is_refused(tmp_path: Path) -> None:
    trainer = Distiller(model_of(), arguments(tmp_path), teacher_model=model_of())
    batch = context_collator()(context_rows(2))
    del batch["teacher_rows"]
    with pytest.raises(ValueError, match=r"inputs: got .*; wanted teacher_rows among them"):
        one_step(trainer, [batch])
    with pytest.raises(ValueError, match="inputs: got input_ids; wanted labels"):
        one_step(trainer, [{"input_ids": batch["input_ids"]}])


def test_logits_are_not_to_be_had_from_hidden_states(tmp_path: Path) -> None:
    trainer = LinearTrainer(model_of(), arguments(tmp_path))
    with pytest.raises(ValueError, match="return_outputs: got True"):
        trainer.compute_loss(trainer.model, collated(rows(2)), return_outputs=True)


# ---- Rankings ----


def reward_model(labels: int = 1) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0, num_labels=labels,
    )  # fmt: skip
    transformers.set_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def groups(count: int) -> list[dict[str, Any]]:
    """Groups of 2 to 4 responses, every third with a tie and an absent one."""
    generator = torch.Generator().manual_seed(4)
    found: list[dict[str, Any]] = []
    for i in range(count):
        size = 2 + i % 3
        lengths = torch.randint(2, 9, (size,), generator=generator).tolist()
        responses = [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]
        example: dict[str, Any] = {"responses": responses}
        if i % 3 == 2:
            example["ranks"] = [1, 0, 0, -1]
        else:
            example["ranks"] = list(range(size))
        found.append(example)
    return found


def test_the_collator_pads_and_packs() -> None:
    batch = RankingCollator(pad_token_id=0, padding_side="left", max_length=3)(
        [{"responses": [[5, 6, 7, 8], [9]]}, {"responses": [[4, 4]], "ranks": [-1]}]
    )
    assert batch["input_ids"].tolist() == [[6, 7, 8], [0, 0, 9], [0, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert batch["ranks"].tolist() == [0, 1, -1]
    assert batch["group_offsets"].tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    "example", [{"input_ids": [1]}, {"responses": [[1], [2]], "ranks": [0]}, {"responses": [[]]}, {"responses": [1]}]
)
def test_the_collator_names_a_wrong_example(example: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="example 1: "):
        RankingCollator(pad_token_id=0)([{"responses": [[1]]}, example])


@pytest.mark.parametrize(
    "options",
    [{}, {"margin": 0.5, "scale": 2.0}, {"group_reduction": "groups"}, {"method": "plackett_luce", "ties": "efron"}],
)
def test_accumulated_groups_are_the_big_batch(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = Ranker(reward_model(), arguments(tmp_path), **options)
    collate, data = RankingCollator(pad_token_id=0), groups(6)
    found = one_step(trainer, [collate(data[:2]), collate(data[2:3]), collate(data[3:])])
    expected = one_step(trainer, [collate(data)])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    same_gradients(found[1], expected[1])
    with torch.no_grad():
        batch = collate(data)
        scores = trainer.model(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
        mean = ranked_preference_loss(scores, batch["ranks"], batch["group_offsets"], **options)
        assert found[0] == pytest.approx(mean.item(), rel=1e-5)  # the loss by hand is in test_ranking.py


def test_a_reward_run_learns_its_order(tmp_path: Path) -> None:
    data = groups(9)
    trainer = Ranker(
        reward_model(),
        arguments(tmp_path, max_steps=20, learning_rate=1e-2),
        train_dataset=data,
        eval_dataset=data,
        data_collator=RankingCollator(pad_token_id=0),
    )
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.3 * first


def test_two_scores_per_response_are_refused(tmp_path: Path) -> None:
    trainer = Ranker(reward_model(labels=2), arguments(tmp_path))
    with pytest.raises(ValueError, match=r"outputs: got logits of shape \(2, 2\); wanted \(2, 1\)"):
        one_step(trainer, [RankingCollator(pad_token_id=0)(groups(1))])


def test_wrong_options_of_a_ranking_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"margin: got 1\.0; wanted None with method 'plackett_luce'"):
        Ranker(reward_model(), arguments(tmp_path), method="plackett_luce", margin=1.0)
    with pytest.raises(ValueError, match="method: got 'listwise'"):
        Ranker(reward_model(), arguments(tmp_path), method="listwise")


# ---- Data parallelism and examples ----

TWO_PROCESSES = """
import gc
import os
import sys

sys.path[:0] = sys.argv[1:2]
from test_integrations_transformers import *

torch.set_num_threads(1)


def runs(directory, world):
    args = arguments(directory, max_steps=3, per_device_train_batch_size=4 // world, gradient_accumulation_steps=2,
                     ddp_backend="gloo", dataloader_drop_last=True)
    context = {"train_dataset": context_rows(24), "data_collator": context_collator()}
    ranked = {"train_dataset": groups(24), "data_collator": RankingCollator(pad_token_id=0)}
    found = {}
    for name, trainer in {
        "linear": LinearTrainer(model_of(), args, train_dataset=rows(24)),
        "logits": Distiller(model_of(), args, teacher_model=model_of(seed=5), **context),
        "hidden": Distiller(model_of(), args, teacher_model=model_of(seed=5), from_hidden_states=True, **context),
        "ranking": Ranker(reward_model(), args, **ranked),
    }.items():
        trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[name] = logged, trainer.model.state_dict()
    if trainer.is_world_process_zero():
        torch.save(found, directory / f"{world}.pt")


runs(Path(sys.argv[2]), int(os.environ["WORLD_SIZE"]))
gc.collect()  # DDP must not outlive its process group: its end would wait for gloo's threads, and they for the GIL
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """The losses and the parameters of three steps under DDP are those of one process with twice the batch."""
    script = tmp_path / "run.py"
    script.write_text(TWO_PROCESSES)
    for world in (1, 2):
        torchrun(script, Path(__file__).parent, tmp_path, size=world)
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for name, (losses, state) in one.items():
        assert two[name][0] == pytest.approx(losses, rel=2e-4), name
        for key, expected in state.items():
            torch.testing.assert_close(two[name][1][key], expected, rtol=0, atol=2e-5, msg=f"{name}: {key}")
