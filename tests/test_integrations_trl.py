"""pyalign under TRL's trainers: the same losses and gradients, loudly refused where TRL isn't what is known of it."""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyalign import dpo_loss
from pyalign.integrations import trl as integration
from pyalign.integrations.trl import AppliedToTRL, SeamError, apply_pyalign_to_trl

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

# TRL and what it imports use what torch, transformers and Python have deprecated.
pytestmark = [
    pytest.mark.usefixtures("single_thread", "unpoisoned"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

MODULES = integration._MODULES
ALL = tuple(MODULES)


def module(name: str) -> Any:
    return importlib.import_module(f"trl.{name}")


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# ---- Applying and undoing ----


def state() -> dict[str, Any]:
    """Everything that TRL's imported modules, and its trainers, hold by name."""
    found: dict[str, Any] = {}
    for name, held in list(sys.modules.items()):
        if name.partition(".")[0] != "trl":
            continue
        for key, value in list(vars(held).items()):
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__.startswith("trl."):
                found |= {f"{name}.{key}.{attribute}": x for attribute, x in vars(value).items()}
    return {name: value for name, value in found.items() if not name.endswith(("__", "_cache"))}


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if after.get(name) is not before[name]}


@pytest.fixture
def imported() -> None:
    for name in MODULES.values():
        module(name)


@pytest.mark.usefixtures("imported")
def test_undo_leaves_no_trace() -> None:
    before = state()
    applied = apply_pyalign_to_trl(ALL)
    names = {name for names in applied.replaced.values() for name in names}
    assert names
    assert names <= changed(before, state())
    assert set(applied.replaced) == set(ALL)
    applied.undo()
    assert not changed(before, state())
    applied.undo()  # nothing, a second time


@pytest.mark.usefixtures("imported")
def test_a_context_is_left_by_an_exception_too() -> None:
    before = state()
    with pytest.raises(KeyError), apply_pyalign_to_trl():
        raise KeyError
    assert not changed(before, state())


def test_the_report_says_what_is_replaced_and_what_is_left() -> None:
    with apply_pyalign_to_trl(["dpo", "reward"]) as applied:
        text = str(applied)
    assert f"pyalign in TRL {trl.__version__}" in text
    assert "reward: trl.trainer.reward_trainer.RewardTrainer.compute_loss" in text
    assert "dpo, left to TRL: the loss types" in text
    assert isinstance(applied, AppliedToTRL)
    assert set(applied.replaced) == {"dpo", "reward"}


def test_names_imported_from_us_are_put_back() -> None:
    """A module of TRL that is imported while pyalign is applied holds our function, and TRL's own afterwards."""
    utils = module("trainer.utils")
    original = utils.selective_log_softmax
    late = types.ModuleType("trl.late")
    with apply_pyalign_to_trl(["orpo"]):
        assert utils.selective_log_softmax is not original
        late.borrowed = utils.selective_log_softmax
        sys.modules["trl.late"] = late
    del sys.modules["trl.late"]
    assert late.borrowed is original
    assert module(MODULES["orpo"]).selective_log_softmax is original


def test_trainers_that_share_a_seam_may_be_imported_by_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("orpo", "cpo"):
        monkeypatch.delitem(sys.modules, f"trl.{MODULES[name]}", raising=False)
    with apply_pyalign_to_trl(["orpo", "cpo"]):
        ours = module("trainer.utils").selective_log_softmax
        assert ours.__module__ == integration.__name__
        assert all(module(MODULES[name]).selective_log_softmax is ours for name in ("orpo", "cpo"))


def test_trainers_are_applied_once_each() -> None:
    with apply_pyalign_to_trl(["reward"]), apply_pyalign_to_trl(["gkd"]):
        before = state()
        with pytest.raises(SeamError, match=r"RewardTrainer\.compute_loss leads to pyalign already: undo\(\)"):
            apply_pyalign_to_trl(["distillation", "reward"])
        assert not changed(before, state())


def test_a_replacement_of_somebody_else_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = module(MODULES["reward"]).RewardTrainer
    applied = apply_pyalign_to_trl(["reward"])
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "compute_loss", lambda self: None)
        with pytest.raises(RuntimeError, match=r"replaced again .*RewardTrainer\.compute_loss; undo that first"):
            applied.undo()
    applied.undo()


@pytest.mark.parametrize(
    ("trainers", "message"),
    [(["sft"], "trainers: got 'sft'; wanted one of 'reward'"), ([], r"trainers: got \[\]; wanted at least one")],
)
def test_unknown_trainers_are_named(trainers: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_pyalign_to_trl(trainers)


def test_without_trl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ModuleNotFoundError, match="trl is not installed: pip install trl"):
        apply_pyalign_to_trl()


# ---- Seams that aren't what is known ----


def original_of(trainer: str) -> tuple[Any, str]:
    """Where a trainer's seam is, and its name."""
    home = module(MODULES[trainer])
    if trainer == "reward":
        return home.RewardTrainer, "compute_loss"
    if trainer == "gkd":
        return home.GKDTrainer, "generalized_jsd_loss"
    if trainer in ("dpo", "orpo", "cpo"):
        utils = module("trainer.utils")
        return utils, "_ChunkedLogProbFunction" if "add_fused_lm_head" in vars(home) else "selective_log_softmax"
    return home, "_chunked_divergence_loss" if trainer == "distillation" else "_chunked_jsd_loss"


def scaled(result: Any) -> Any:
    """A loss of another convention."""
    return (result[0] * 2, *result[1:]) if isinstance(result, tuple) else result * 2


def broken(original: Any, how: str) -> Any:
    if isinstance(original, type):  # an autograd function
        if how == "signature":
            return type("Other", (), {"forward": staticmethod(lambda ctx, hidden, weight: None), "apply": None})
        forward, apply = original.forward, original.apply
        return type("Other", (), {"forward": forward, "apply": staticmethod(lambda *x: scaled(apply(*x)))})
    static = isinstance(original, staticmethod)
    function = original.__func__ if static else original

    def other(*args: Any, **kwargs: Any) -> Any:
        return scaled(function(*args, **kwargs))

    other.__signature__ = integration.inspect.signature(function)
    if how == "signature":
        other.__signature__ = integration.inspect.signature(lambda student, teacher, alpha: None)
    return staticmethod(other) if static else other


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("how", ["signature", "values", "missing"])
@pytest.mark.parametrize("trainer", ALL)
def test_a_seam_of_another_kind_is_refused_and_nothing_is_replaced(
    monkeypatch: pytest.MonkeyPatch, trainer: str, how: str
) -> None:
    owner, name = original_of(trainer)
    original = vars(owner)[name]
    if how == "missing":
        monkeypatch.delattr(owner, name)
    else:
        replacement = broken(original, how)
        monkeypatch.setattr(owner, name, replacement)
    before = state()
    others = [x for x in ALL if x != trainer]
    reason = {"signature": r"it takes \(", "values": "on probe 0", "missing": "there is no such name"}[how]
    with pytest.raises(SeamError, match=rf"TRL {trl.__version__}: .*{name.strip('_')}.* {reason}") as error:
        apply_pyalign_to_trl([*others[:3], trainer])
    assert "nothing was replaced" in str(error.value)
    assert not changed(before, state())


def test_a_failure_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(type):
        def __setattr__(cls, name: str, value: object) -> None:
            raise AttributeError("read-only")

    class Owner(metaclass=Stubborn):
        function = None

    def plan(planner: Any) -> None:
        planner.add(integration._Change(Owner, "function", None, 1), "stubborn")

    monkeypatch.setitem(integration._PLANS, "stubborn", plan)
    monkeypatch.setitem(integration._MODULES, "stubborn", "trainer.utils")
    before = state()
    with pytest.raises(AttributeError, match="read-only"):
        apply_pyalign_to_trl(["reward", "dpo", "stubborn"])
    assert not changed(before, state())


def test_a_loss_past_the_seam_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fused path of somebody else's: the step that computed its loss without us raises."""
    trainer = trainer_of("gkd", tmp_path)
    monkeypatch.setattr(trainer, "generalized_jsd_loss", lambda student_logits, **_: student_logits.sum())
    with (
        apply_pyalign_to_trl(["gkd"]),
        pytest.raises(SeamError, match=r"GKDTrainer computed a loss without generalized_jsd_loss.*use_liger_kernel"),
    ):
        trainer.train()


def test_the_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    apply_pyalign_to_trl(ALL).undo()
    assert torch.equal(torch.get_rng_state(), before)


# ---- Losses, against float64 ----


def capped(logits: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    logits = logits * scale
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


def divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """(...) TRL's divergence of log-probs p of the teacher and q of the student."""
    if beta == 0:
        return (p.exp() * (p - q)).sum(-1)
    if beta == 1:
        return (q.exp() * (q - p)).sum(-1)
    m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def no_worse(ours: Any, theirs: Any, truth: Any, leaves: list[Tensor], exact: list[Tensor]) -> None:
    """Our loss and gradients err from float64 no more than TRL's, plus 1e-6 of their size."""
    expected = torch.autograd.grad(truth, exact)
    errors: list[list[float]] = []
    for loss in (ours, theirs):
        gradients = torch.autograd.grad(loss, leaves)
        errors.append(
            [(x.double() - y).abs().max().item() for x, y in zip((loss, *gradients), (truth, *expected), strict=True)]
        )
    for mine, other, x in zip(*errors, (truth, *expected), strict=True):
        assert mine <= other + 1e-6 * x.abs().max().item()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("num_items", [None, 5, torch.tensor(5)])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_generalized_jsd_loss_is_trls(beta: float, num_items: Any, labelled: bool) -> None:
    torch.manual_seed(0)
    exact = (4 * torch.randn(3, 7, 101, dtype=torch.float64)).requires_grad_()
    teacher = 4 * torch.randn(3, 7, 101, dtype=torch.float64)
    labels = torch.randint(0, 101, (3, 7))
    labels[0, :5] = labels[2, 3:] = -100
    counted = labels != -100 if labelled else torch.ones_like(labels, dtype=torch.bool)
    per_token = divergence((teacher / 1.3).log_softmax(-1), (exact / 1.3).log_softmax(-1), beta)
    truth = per_token[counted].sum() / (5 if num_items is not None else counted.sum() if labelled else 3)
    logits = exact.detach().float().requires_grad_()
    theirs = module(MODULES["gkd"]).GKDTrainer.generalized_jsd_loss
    results = [
        function(logits, teacher.float(), labels if labelled else None, beta, 1.3, num_items_in_batch=num_items)
        for function in (integration._generalized_jsd_loss, theirs)
    ]
    no_worse(*results, truth, [logits], [exact])


def test_a_loss_per_vocabulary_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction: got 'none'; wanted 'batchmean', 'sum' or 'mean'"):
        integration._generalized_jsd_loss(torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), reduction="none")


def test_no_labelled_token_is_a_differentiable_zero() -> None:
    logits = torch.randn(2, 3, 11, requires_grad=True)
    loss = integration._generalized_jsd_loss(logits, torch.randn(2, 3, 11), torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.count_nonzero(logits.grad) == 0


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 0.25), (0.3, 2.0)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_chunked_divergence_loss_is_trls(beta: float, scales: tuple[float, float]) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((2, 5, 16), (101, 16), (101,))
    )
    teacher = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(101, 12, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    q = capped(hidden @ weight.T + bias, scales[0], 5.0, 0.8).log_softmax(-1)
    p = capped(teacher[0] @ teacher[1].T, scales[1], None, 0.8).log_softmax(-1)
    truth = (divergence(p, q, beta) * mask).sum() / 3.5
    leaves = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    arguments = (leaves[0], teacher[0].float(), leaves[1], teacher[1].float(), mask, beta)
    options: dict[str, Any] = {
        "num_items_in_batch": torch.tensor(3.5), "student_lm_head_bias": leaves[2], "student_logit_scale": scales[0],
        "teacher_logit_scale": scales[1], "student_final_logit_softcapping": 5.0, "temperature": 0.8,
    }  # fmt: skip
    home = module(MODULES["distillation"])
    chunks = {"chunk_size": 4} if "chunk_size" in integration._parameters(home._chunked_divergence_loss) else {}
    ours = integration._chunked_divergence_loss(*arguments, **options)
    theirs = home._chunked_divergence_loss(*arguments, **options, **chunks)
    no_worse(ours[0], theirs[0], truth, leaves, [hidden, weight, bias])
    entropy = -(q.exp() * q).sum(-1)
    assert ours[1].item() == pytest.approx((entropy * mask).sum().item(), rel=1e-5)
    assert not ours[1].requires_grad
    assert int(ours[2]) == 5


@pytest.mark.parametrize("teachers", [False, True])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_chunked_jsd_loss_is_trls(beta: float, tail: bool, teachers: bool) -> None:
    """A served teacher's sparse log-probs, some candidates missing, one row with all of the mass."""
    torch.manual_seed(0)
    hidden = torch.randn(9, 16).requires_grad_()
    weight = torch.randn(101, 16).requires_grad_()
    logps, ids = (3 * torch.randn(9, 101)).log_softmax(-1).topk(6)
    ids, logps = ids.clone(), logps.clone()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 3:] = mask[5, 1:] = False
    ids[~mask], logps[~mask] = -1, float("-inf")
    logps[7] = torch.log_softmax(torch.randn(6), 0)
    which = torch.randint(0, 3, (9,)) if teachers else None
    arguments = (hidden, weight, None, 1.0, None, ids, logps, mask, beta, 0.9, tail, which, 3, 4)
    results: list[list[Tensor]] = []
    for function in (module(MODULES["async_distillation"])._chunked_jsd_loss, integration._chunked_jsd_loss):
        values = function(*arguments)
        results.append([*values, *torch.autograd.grad(values[0], (hidden, weight))])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_selective_log_softmax_is_trls(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(2, 5, 101)).to(dtype).requires_grad_()
    truth = logits.detach().double().log_softmax(-1)
    index = torch.randint(0, 101, (2, 5))
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    expected = truth.gather(-1, index[..., None]).squeeze(-1)
    tolerance = {"rtol": 1e-6, "atol": 2e-6}
    found, entropy = integration._selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    torch.testing.assert_close(found.double(), expected * mask, **tolerance)
    torch.testing.assert_close(entropy.double(), -(truth.exp() * truth).sum(-1) * mask, **tolerance)
    torch.testing.assert_close(integration._selective_log_softmax(logits, index).double(), expected, **tolerance)
    several = torch.randint(0, 101, (2, 5, 3))
    found = integration._selective_log_softmax(logits, several, temperature=0.5, row_mask=mask[..., None])
    warm = (logits.detach().double() / 0.5).log_softmax(-1).gather(-1, several)
    torch.testing.assert_close(found.double(), warm * mask[..., None], **tolerance)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with pytest.raises((ValueError, IndexError), match="-100"):
        integration._selective_log_softmax(logits, index.masked_fill(mask == 0, -100))


@pytest.mark.parametrize("num_items", [None, torch.tensor(3.0)])
def test_a_divergence_over_nothing_is_a_differentiable_zero(num_items: Any) -> None:
    hidden, weight = (torch.randn(*shape).requires_grad_() for shape in ((2, 3, 8), (19, 8)))
    mask = torch.zeros(2, 3, dtype=torch.int64)
    results = integration._chunked_divergence_loss(hidden, hidden, weight, weight.detach(), mask, 0.5, num_items)
    assert [x.item() for x in results] == [0, 0, 0]
    results[0].backward()
    assert torch.count_nonzero(hidden.grad) == torch.count_nonzero(weight.grad) == 0


def test_a_fused_head_over_nothing_is_empty_and_differentiable() -> None:
    hidden, weight = torch.zeros(0, 8, requires_grad=True), torch.randn(19, 8, requires_grad=True)
    results = integration._FusedLogprobs.apply(hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, 16)
    assert [tuple(x.shape) for x in results if x is not None] == [(0,)] * 5
    results[0].sum().backward()
    assert torch.count_nonzero(weight.grad) == 0


def test_autocast_and_mixed_dtypes_are_taken() -> None:
    """Hidden states in bfloat16 against a float32 head, as TRL's kernels take them: gradients keep their dtypes."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 16), torch.randn(101, 16)
    targets = torch.randint(0, 101, (5,))
    truth = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    for autocast in (False, True):
        head = weight.clone().requires_grad_()
        states = hidden.to(torch.bfloat16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logprobs, *_ = integration._FusedLogprobs.apply(states, head, None, targets, 1.0, 16)
        torch.testing.assert_close(logprobs, truth, rtol=0.02, atol=0.05)
        logprobs.sum().backward()
        assert head.grad.dtype == torch.float32
        assert states.grad.dtype == torch.bfloat16


def test_sharded_heads_are_gathered_or_refused(tmp_path: Path) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 8), torch.randn(19, 8), torch.randint(0, 19, (5,))
    expected, *_ = integration._FusedLogprobs.apply(hidden, weight, None, targets, 1.0, 16)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(weight, init_device_mesh("cpu", (1,)), [Replicate()]).requires_grad_()
        found, *_ = integration._FusedLogprobs.apply(hidden, sharded, None, targets, 1.0, 16)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.sum().backward()
        assert sharded.grad is not None
    finally:
        torch.distributed.destroy_process_group()
    weight.ds_id = 3
    with pytest.raises(ValueError, match=r"lm_head: got a parameter sharded by DeepSpeed ZeRO-3"):
        integration._FusedLogprobs.apply(hidden, weight, None, targets, 1.0, 16)


# ---- Whole runs ----


def tokenizer() -> Any:
    """Bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    bytewise = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = tokenizers.decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise, **special)
    found.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return found


def model_of(seed: int = 0, reward: bool = False) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip
    transformers.set_seed(seed)
    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    return kind.from_config(config)


QUESTIONS = [f"What is {i} plus {i}? " for i in range(16)]
ANSWERS = [f"It is {2 * i}." for i in range(16)]
OTHERS = ["No idea" + "!" * (i % 5) for i in range(16)]


def trainer_of(kind: str, directory: Path, **options: Any) -> Any:
    """A trainer with everything seeded: 20 steps of 4 examples by default."""
    given: dict[str, Any] = {
        "output_dir": str(directory), "max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "dataloader_pin_memory": False, "bf16": False, "gradient_checkpointing": False, **options,
    }  # fmt: skip
    columns = {"prompt": QUESTIONS, "chosen": ANSWERS, "rejected": OTHERS}
    home, common = module(MODULES[kind]), {"processing_class": tokenizer()}
    if kind == "reward":
        whole = {
            "chosen": [q + a for q, a in zip(QUESTIONS, ANSWERS, strict=True)],
            "rejected": [q + a for q, a in zip(QUESTIONS, OTHERS, strict=True)],
            "margin": [0.1 * len(x) for x in OTHERS],
        }
        args = trl.RewardConfig(**given)
        data = datasets.Dataset.from_dict(whole)
        return home.RewardTrainer(model=model_of(reward=True), args=args, train_dataset=data, **common)
    if kind == "gkd":
        turns = [
            [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
            for q, a in zip(QUESTIONS, ANSWERS, strict=True)
        ]
        args = home.GKDConfig(**{"lmbda": 0.0, "max_new_tokens": 8, **given})
        data = datasets.Dataset.from_dict({"messages": turns})
        teacher = model_of(seed=7)
        return home.GKDTrainer(model=model_of(), teacher_model=teacher, args=args, train_dataset=data, **common)
    if kind == "distillation":
        args = trl.DistillationConfig(**{"max_completion_length": 8, **given})
        data = datasets.Dataset.from_dict({"prompt": QUESTIONS})
        teacher = model_of(seed=7)
        return home.DistillationTrainer(
            model=model_of(), teacher_model=teacher, args=args, train_dataset=data, **common
        )
    data = datasets.Dataset.from_dict(columns)
    name = kind.upper()
    reference = {"ref_model": model_of(seed=7)} if kind == "dpo" else {}
    config = getattr(home, f"{name}Config")(**given)
    return getattr(home, f"{name}Trainer")(model=model_of(), args=config, train_dataset=data, **reference, **common)


def logged(trainer: Any) -> dict[str, Tensor]:
    """What a run logs at each step."""
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = [name for name, value in steps[0].items() if isinstance(value, (int, float)) and "time" not in name]
    return {name: torch.tensor([step[name] for step in steps], dtype=torch.float64) for name in names}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("reward", {"center_rewards_coefficient": 0.01}),
        slow("reward", {"gradient_accumulation_steps": 2, "max_steps": 6}),
        ("dpo", {}),
        ("dpo", {"gradient_accumulation_steps": 2, "max_steps": 6, "use_weighting": True}),
        ("gkd", {}),
        slow("gkd", {"gradient_accumulation_steps": 2, "max_steps": 6, "beta": 0.0, "lmbda": 0.5}),
        ("distillation", {}),
        slow("distillation", {"gradient_accumulation_steps": 2, "max_steps": 6, "beta": 0.5, "temperature": 0.9}),
        slow("orpo", {"max_steps": 6}),
        slow("cpo", {"max_steps": 6}),
    ],
)
def test_a_run_has_trls_own_curve(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """Losses agree to 5e-5 of their size and 1e-6: float32 rounding, through 20 steps of AdamW, of losses that for a
    distillation are differences of logarithms near 6 (an ulp of 5e-7). So do gradients' norms and all that is logged;
    a mean that nearly cancels (rewards) is held to 1e-5 alone."""
    theirs = trainer_of(kind, tmp_path, **options)
    expected = logged(theirs)
    with apply_pyalign_to_trl([kind]) as applied:
        ours = trainer_of(kind, tmp_path, **options)
        found = logged(ours)
    assert len(found["loss"]) == options.get("max_steps", 20)
    assert expected["loss"][-1] != expected["loss"][0]
    assert sum(applied.calls.values()) >= len(found["loss"])
    for name, values in expected.items():
        absolute = 1e-6 if name in ("loss", "grad_norm") else 2e-5
        torch.testing.assert_close(found[name], values, rtol=5e-5, atol=absolute, msg=lambda t, n=name: f"{n}: {t}")
    assert ours.model.state_dict().keys() == theirs.model.state_dict().keys()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}")  # of 20 steps of 1e-3


DPO_LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("sigmoid", {}), ("hinge", {}), ("robust", {"label_smoothing": 0.1}), ("exo_pair", {"label_smoothing": 0.1}),
    ("nca_pair", {}), ("bco_pair", {}), ("sppo_hard", {}), ("apo_zero", {}), ("apo_down", {}), ("discopop", {}),
]  # fmt: skip


@pytest.mark.parametrize(("loss_type", "options"), DPO_LOSSES, ids=[name for name, _ in DPO_LOSSES])
def test_dpos_loss_types_are_ours(tmp_path: Path, loss_type: str, options: dict[str, Any]) -> None:
    """What TRL makes of our log-probs is what :func:`pyalign.dpo_loss` makes of the batch's float64 log-probs."""
    trainer = trainer_of("dpo", tmp_path, loss_type=[loss_type], beta=0.3, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    logps: list[Tensor] = []
    for model in (trainer.model, trainer.ref_model):
        plain = model_of(seed=0 if model is trainer.model else 7).double()
        with torch.no_grad():
            logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        logps += (picked * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
    expected = dpo_loss(*logps, beta=0.3, loss_type=loss_type, **options).loss
    with apply_pyalign_to_trl(["dpo"]):
        found = trainer.compute_loss(trainer.model, batch)
    assert found.item() == pytest.approx(expected.item(), rel=2e-5, abs=1e-6)


# ---- Examples ----

EXAMPLES = Path(__file__).parent.parent / "bench" / "examples"


@pytest.mark.parametrize(
    "name", ["trl_reward", "trl_dpo", "trl_gkd", "trl_distillation", "transformers_distillation", "transformers_reward"]
)
def test_examples_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Each prints a loss before and after, the second smaller."""
    import runpy

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    first, last = map(float, capsys.readouterr().out.splitlines()[-1].rpartition("loss ")[2].split(" -> "))
    assert last < first
