"""TRL's trainers with pyalign's losses, in one line that can be taken back::

    with apply_pyalign_to_trl(["dpo"]) as applied:
        DPOTrainer(model, args=args, ...).train()

What it replaces, in TRL 1.14 and 1.16 (where they differ it takes what the installed one has):

======================  =============================================================================================
trainer                 seam, layout, convention
======================  =============================================================================================
``reward``              ``RewardTrainer.compute_loss``: scores (2B, 1), the chosen half first; ``margin`` (B,) taken
                        from the difference, ``center_rewards_coefficient``; a mean over pairs
``dpo``                 the log-probs of tokens. 1.16: ``ChunkedLogProbFunction`` under ``add_fused_lm_head``, from
                        hidden states (N, H), which SFT, KTO, GRPO and RLOO use too. 1.14: ``selective_log_softmax``
                        and ``selective_log_softmax_and_entropy`` over logits (..., V), wherever TRL imported them
``distillation``        ``_chunked_divergence_loss`` of DistillationTrainer, from both models' hidden states (B, K, H)
``gkd``                 the static ``GKDTrainer.generalized_jsd_loss`` over logits (B, T, V), already shifted
``orpo``, ``cpo``       ``selective_log_softmax``, as for ``dpo`` in 1.14
``async_distillation``  ``_chunked_jsd_loss``: hidden states (n, H) against a served teacher's top k (n, K) and tail
======================  =============================================================================================

The last four are experimental in TRL: importing them makes it warn. ``beta`` means what it means there: 0 the forward
KL(teacher || student), 1 the reverse KL, between them ``beta KL(t || m) + (1 - beta) KL(s || m)`` with
``m = beta t + (1 - beta) s``. Denominators, label shifts and the scaling for data parallelism stay the trainers' own.

What is left to TRL: DPO's loss types, which are arithmetic on B numbers inside ``_compute_loss``
(:func:`pyalign.dpo_loss` computes the same), generation, and what is logged of all that.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import torch
from torch import Tensor

from pyalign import _checks, _dtensor
from pyalign.distill import TopKLogprobs, distillation_loss, linear_distillation_loss, linear_topk_distillation_loss
from pyalign.logprob import linear_token_logprobs, token_logprobs
from pyalign.ranking import pairwise_preference_loss

__all__ = ["AppliedToTRL", "SeamError", "apply_pyalign_to_trl"]

STABLE = ("reward", "dpo", "distillation")
_MODULES = {
    "reward": "trainer.reward_trainer",
    "dpo": "trainer.dpo_trainer",
    "distillation": "trainer.distillation_trainer",
    "gkd": "experimental.gkd.gkd_trainer",
    "orpo": "experimental.orpo.orpo_trainer",
    "cpo": "experimental.cpo.cpo_trainer",
    "async_distillation": "experimental.async_distillation.async_distillation_trainer",
}
_NO_TARGET = torch.iinfo(torch.int64).min  # a target that doesn't count; -100 is TRL's own affair


class SeamError(RuntimeError):
    """A place in TRL where pyalign would take over isn't what pyalign knows, or a trainer passed it by."""


# ---- Losses with TRL's signatures ----


def _divergence(beta: float) -> dict[str, Any]:
    """TRL's ``beta`` as options of our losses."""
    if beta == 0:
        return {"divergence": "forward_kl"}
    if beta == 1:
        return {"divergence": "reverse_kl"}
    return {"divergence": "jsd", "beta": float(beta)}


def _over(total: Tensor, num_items: int | Tensor) -> Tensor:
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A head's weight or bias as one whole tensor of the hidden states' dtype, differentiable.

    Under autocast dtypes are left alone: products are computed in autocast's.
    """
    if x is None:
        return None
    if hasattr(x, "ds_id"):
        _checks.refuse("lm_head", "a parameter sharded by DeepSpeed ZeRO-3", "DDP, FSDP2, ZeRO-1 or 2, or one process")
    x = _dtensor.whole("lm_head", x)  # FSDP2's are DTensors
    assert x is not None
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _transform(scale: float, softcap: float | None, temperature: float) -> tuple[float | None, float]:
    """Soft cap and temperature of logits that are scaled first: cap(s z, c) / T = cap(z, c / s) / (T / s)."""
    scale = _checks.positive("logit_scale", float(scale))
    return None if softcap is None else softcap / scale, temperature / scale


def _generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """GKDTrainer's: "batchmean" is over counted tokens (without labels over the first dimension), "mean" over their
    elements, and ``num_items_in_batch`` replaces either."""
    if reduction not in ("batchmean", "sum", "mean") and num_items_in_batch is None:
        wanted = "'batchmean', 'sum' or 'mean': a fused loss has no values per vocabulary entry"
        _checks.refuse("reduction", repr(reduction), wanted)
    options = _divergence(beta)
    total = distillation_loss(
        student_logits, teacher_logits, labels=labels, temperature=temperature, reduction="sum", **options
    )
    if num_items_in_batch is not None:
        return _over(total, num_items_in_batch)
    if reduction == "sum":
        return total
    counted = (labels != -100).sum() if labels is not None else student_logits.shape[:-1].numel()
    if reduction == "mean":
        return total / (counted * student_logits.shape[-1])
    return total / (counted.clamp(min=1) if isinstance(counted, Tensor) else max(student_logits.shape[0], 1))


def _chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: int | Tensor | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """DistillationTrainer's: the loss, the sum of the student's entropies, the number of counted tokens."""
    if student_logit_scale != teacher_logit_scale:
        # One temperature serves both sides: what is left of the teacher's scale goes to its hidden states, and cap.
        ratio = _checks.positive("teacher_logit_scale", float(teacher_logit_scale)) / float(student_logit_scale)
        teacher_hidden_states = teacher_hidden_states * ratio
        teacher_lm_head_bias = None if teacher_lm_head_bias is None else teacher_lm_head_bias * ratio
    student_softcap, divisor = _transform(student_logit_scale, student_final_logit_softcapping, temperature)
    teacher_softcap, _ = _transform(student_logit_scale, teacher_final_logit_softcapping, temperature)
    dtype, teacher_dtype = student_hidden_states.dtype, teacher_hidden_states.dtype
    weight, teacher_weight = _plain(student_lm_head_weight, dtype), _plain(teacher_lm_head_weight, teacher_dtype)
    assert weight is not None
    assert teacher_weight is not None
    valid = completion_mask != 0
    total, metrics = linear_distillation_loss(
        student_hidden_states[valid],  # (N, H): a GPU waits for their number here, as it does in TRL
        weight,
        teacher_hidden_states[valid],
        teacher_weight,
        student_bias=_plain(student_lm_head_bias, dtype),
        teacher_bias=_plain(teacher_lm_head_bias, teacher_dtype),
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        temperature=divisor,
        reduction="sum",
        return_metrics=True,
        **_divergence(beta),
    )
    count = valid.sum()
    loss = total / count.clamp(min=1) if num_items_in_batch is None else _over(total, num_items_in_batch)
    return loss, metrics.entropy.sum(), count


def _chunked_jsd_loss(
    hidden_valid: Tensor,
    lm_head_weight: Tensor,
    lm_head_bias: Tensor | None,
    logit_scale: float,
    final_logit_softcapping: float | None,
    target_ids: Tensor,
    teacher_target_logps: Tensor,
    valid_candidate_mask: Tensor,
    beta: float,
    temperature: float,
    add_tail_bucket: bool,
    teacher_id_idx: Tensor | None,
    num_teachers: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """AsyncDistillationTrainer's: the loss, the sums of divergences and of both entropies, and (count, divergence,
    teacher's entropy) of each teacher. ``chunk_size`` is TRL's bound on memory; our workspace has its own."""
    softcap, divisor = _transform(logit_scale, final_logit_softcapping, temperature)
    weight = _plain(lm_head_weight, hidden_valid.dtype)
    assert weight is not None
    logps = teacher_target_logps.float().masked_fill(~valid_candidate_mask, float("-inf"))
    total = logps.logsumexp(-1, keepdim=True)
    # TRL's bound keeps the tail's mass above 1e-7
    tail = torch.log(-torch.expm1(total.clamp(max=-1e-7))) if add_tail_bucket else torch.full_like(total, -torch.inf)
    teacher = TopKLogprobs(logps, target_ids.masked_fill(~valid_candidate_mask, -1), tail[:, 0], divisor)
    per_token, metrics = linear_topk_distillation_loss(
        hidden_valid,
        weight,
        teacher,
        student_bias=_plain(lm_head_bias, hidden_valid.dtype),
        student_softcap=softcap,
        tail="bucket" if add_tail_bucket else "renormalize",
        reduction="sum" if teacher_id_idx is None else "none",
        return_metrics=True,
        **_divergence(beta),
    )
    loss = per_token.sum()
    known = torch.cat([logps, tail], dim=-1)
    known = known - (0.0 if add_tail_bucket else total)
    entropies = torch.special.entr(known.exp()).sum(-1)
    stats = hidden_valid.new_zeros(3 * num_teachers, dtype=torch.float32)
    if teacher_id_idx is not None:
        members = teacher_id_idx == torch.arange(num_teachers, device=teacher_id_idx.device)[:, None]  # (teachers, n)
        ones = torch.ones_like(entropies)
        stats = (members[:, None] * torch.stack([ones, per_token.detach(), entropies])).sum(-1).flatten()
    return loss, loss.detach(), metrics.entropy.sum(), entropies.sum(), stats


def _selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """TRL's, in float32 for 16-bit logits, as its kernel for GPUs gives them."""
    targets = index if row_mask is None else index.masked_fill(row_mask == 0, _NO_TARGET)
    logprobs, entropy = token_logprobs(
        logits, targets, ignore_index=_NO_TARGET, temperature=temperature, return_entropy=True
    )
    return logprobs, entropy if entropy_requires_grad else entropy.detach()


def _selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """TRL's: index (...), or (..., K) for K entries of each row."""
    if index.dim() == logits.dim():
        top = logits.detach().argmax(-1)
        logprob = token_logprobs(logits, top, temperature=temperature)
        picked = torch.cat([top[..., None], index], -1)
        wide = logits.gather(-1, picked).to(logprob.dtype) / temperature
        several = logprob[..., None] + (wide[..., 1:] - wide[..., :1])
        return several if row_mask is None else several.masked_fill(row_mask == 0, 0.0)
    targets = index if row_mask is None else index.masked_fill(row_mask == 0, _NO_TARGET)
    return token_logprobs(logits, targets, ignore_index=_NO_TARGET, temperature=temperature)


_METRICS = ("log_sum_sq_probs", "mean_logits", "is_top1")


def _head_metrics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float | None,
    temperature: float,
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """What TRL logs of each token's logits, from a projection of its own, by chunks of the size of our losses' own."""
    rows = 4096 if hidden.device.type == "cuda" else 512
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for chunk, target in zip(hidden.split(rows), targets.split(rows), strict=True):
        logits = torch.nn.functional.linear(chunk, weight, bias).float()
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        logits.div_(temperature)
        for name, found in parts.items():
            if name == "mean_logits":
                found.append(logits.mean(-1))
            elif name == "is_top1":
                found.append(logits.argmax(-1) == target)
            else:
                found.append((2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1))
    return {name: torch.cat(found) for name, found in parts.items()}


class _FusedLogprobs:
    """In place of TRL's ``ChunkedLogProbFunction``, of which ``apply`` is all that is used."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *_METRICS),
    ) -> tuple[Tensor | None, ...]:
        """Log-probs, entropies (differentiable both), log sum p^2, mean logits and whether the target is the first of
        the largest; None for what isn't in ``outputs``. ``chunk_size`` is TRL's; our workspace has its own."""
        softcap, divisor = _transform(logit_scale, final_logit_softcapping, temperature)
        plain_weight, plain_bias = _plain(weight, hidden.dtype), _plain(bias, hidden.dtype)
        assert plain_weight is not None
        options: dict[str, Any] = {"bias": plain_bias, "softcap": softcap, "temperature": divisor}
        entropy = None
        if "entropy" in outputs:
            logprobs, entropy = linear_token_logprobs(hidden, plain_weight, targets, return_entropy=True, **options)
        else:
            logprobs = linear_token_logprobs(hidden, plain_weight, targets, **options)
        wanted = [name for name in _METRICS if name in outputs]
        found: dict[str, Tensor] = {}
        if wanted:
            with torch.no_grad():
                found = _head_metrics(hidden, plain_weight, plain_bias, targets, softcap, divisor, wanted)
        return logprobs, entropy, *(found.get(name) for name in _METRICS)


def _reward_loss(original: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    """RewardTrainer's ``compute_loss``: its forward pass and metrics, and our loss of the scores."""

    @functools.wraps(original)
    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        _, outputs = original(self, model, inputs, True, num_items_in_batch)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        loss = pairwise_preference_loss(
            chosen,
            rejected,
            margin=inputs.get("margin"),
            center_coefficient=self.args.center_rewards_coefficient or 0.0,
        )
        count()
        return (loss, outputs) if return_outputs else loss

    return compute_loss


# ---- Seams ----


@dataclass
class _Change:
    """One attribute of a module or class and what takes its place."""

    owner: Any
    name: str
    original: Any  # as it stands in vars(owner)
    replacement: Any

    def __str__(self) -> str:
        owner = self.owner
        where = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"
        return f"{where}.{self.name}"

    def in_place(self) -> bool:
        return vars(self.owner).get(self.name) is self.replacement


@dataclass
class AppliedToTRL:
    """What :func:`apply_pyalign_to_trl` did; a context manager that takes it back at its end."""

    trl_version: str
    replaced: dict[str, tuple[str, ...]]
    """By trainer, the names in TRL that lead to pyalign."""
    left: dict[str, str]
    """By trainer, what is TRL's own still."""
    calls: dict[str, int]
    """By seam, how often pyalign was called since."""
    _changes: list[_Change] = field(repr=False)

    def undo(self) -> None:
        """Puts TRL's own functions back, also where they were imported since. A second time does nothing.

        Raises:
            RuntimeError: somebody else has replaced what pyalign had put in; nothing is changed then.
        """
        taken = [str(change) for change in self._changes if not change.in_place()]
        if taken:
            raise RuntimeError(f"replaced again since pyalign was applied: {', '.join(taken)}; undo that first")
        for change in reversed(self._changes):
            if isinstance(change.owner, ModuleType):
                for module, name in _references(change.replacement):
                    setattr(module, name, change.original)
            else:
                setattr(change.owner, change.name, change.original)
        self._changes.clear()

    def __enter__(self) -> AppliedToTRL:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"pyalign in TRL {self.trl_version}"]
        lines += [f"  {trainer}: {', '.join(names)}" for trainer, names in self.replaced.items()]
        lines += [f"  {trainer}, left to TRL: {what}" for trainer, what in self.left.items()]
        return "\n".join(lines)


def _references(value: object) -> list[tuple[ModuleType, str]]:
    """Where TRL's imported modules hold ``value``: it is imported by name."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "trl"]
    return [(module, name) for module in modules for name, held in list(vars(module).items()) if held is value]


def _marked(function: Any, original: object) -> Any:
    """``function``, by which :meth:`_Planner.get` knows that pyalign is there already."""
    function.pyalign_original = original
    return function


class _Planner:
    """Looks at each seam before anything is replaced, and collects the changes."""

    def __init__(self, version: str):
        self.version = version
        self.changes: list[_Change] = []
        self.replaced: dict[str, tuple[str, ...]] = {}
        self.left: dict[str, str] = {}
        self.calls: dict[str, int] = defaultdict(int)
        self.shared: dict[str, list[_Change]] = {}

    def fail(self, seam: str, reason: str) -> SeamError:
        return SeamError(
            f"TRL {self.version}: {seam} is not what pyalign knows: {reason}; nothing was replaced. pyalign is tested "
            "with TRL 1.14 and 1.16: leave this trainer out, or install one of them"
        )

    def module(self, name: str) -> Any:
        try:
            return importlib.import_module(f"trl.{name}")
        except ModuleNotFoundError as error:
            raise self.fail(f"trl.{name}", f"it can't be imported ({error})") from error

    def get(self, owner: Any, name: str) -> Any:
        if name not in vars(owner):
            raise self.fail(f"{owner.__name__}.{name}", "there is no such name")
        found = vars(owner)[name]
        if getattr(found, "__module__", None) == __name__ or hasattr(found, "pyalign_original"):
            raise SeamError(f"{owner.__name__}.{name} leads to pyalign already: undo() that first")
        return found

    def check_signature(self, seam: str, function: Callable[..., Any], *wanted: tuple[str, ...]) -> None:
        given = _parameters(function)
        if given not in wanted:
            raise self.fail(seam, f"it takes ({', '.join(given)}), not ({', '.join(wanted[0])})")

    def check_probe(self, seam: str, theirs: Callable[[Any], Any], ours: Callable[[Any], Any], cases: Any) -> None:
        """Both compute the same values and gradients from each case's inputs, which ``cases`` makes anew."""
        with torch.inference_mode(False), torch.device("cpu"):
            made = [cases() for _ in (theirs, ours)]
        for number in range(len(made[0])):
            results: list[list[Tensor | None]] = []
            for function, mine in zip((theirs, ours), made, strict=True):
                case, leaves = mine[number]
                try:
                    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
                        results.append(_values_and_gradients(function(case), leaves))
                except SeamError:
                    raise
                except Exception as error:
                    whose = "TRL's" if function is theirs else "pyalign's"
                    raise self.fail(seam, f"{whose} fails on a probe: {type(error).__name__}: {error}") from error
            reason = _difference(*results)
            if reason:
                raise self.fail(seam, f"on probe {number} {reason}")

    def function(self, module: Any, name: str, replacement: Callable[..., Any], trainer: str, seam: str) -> None:
        """Plans a module's function to be replaced wherever it was imported."""
        original = vars(module)[name]
        counted = self.counting(original, replacement, seam)
        for owner, alias in _references(original):
            self.add(_Change(owner, alias, original, counted), trainer)

    def add(self, change: _Change, trainer: str) -> None:
        self.changes.append(change)
        self.replaced[trainer] = (*self.replaced.get(trainer, ()), str(change))

    def count(self, seam: str) -> Callable[[], None]:
        calls = self.calls

        def counted() -> None:
            calls[seam] += 1

        return counted

    def counting(self, original: Any, replacement: Callable[..., Any], seam: str) -> Callable[..., Any]:
        count = self.count(seam)

        def counted(*args: Any, **kwargs: Any) -> Any:
            count()
            return replacement(*args, **kwargs)

        functools.update_wrapper(counted, replacement)
        return _marked(counted, original)

    def guard(self, trainer_class: Any, trainer: str, *seams: str) -> None:
        """Plans ``compute_loss`` to notice a loss that was computed past the seams, by Liger's kernels for instance."""
        original = self.get(trainer_class, "compute_loss")
        calls, version = self.calls, self.version

        @functools.wraps(original)
        def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            before = sum(calls[seam] for seam in seams)
            result = original(self, *args, **kwargs)
            if sum(calls[seam] for seam in seams) == before:
                liger = getattr(self.args, "use_liger_kernel", False)
                raise SeamError(
                    f"TRL {version}: {type(self).__name__} computed a loss without {' or '.join(seams)}, so without "
                    f"pyalign (use_liger_kernel={liger}): switch off what replaces the loss, or leave {trainer!r} out"
                )
            return result

        self.add(_Change(trainer_class, "compute_loss", original, _marked(compute_loss, original)), trainer)


def _values_and_gradients(result: Any, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    outputs: list[Tensor | None] = list(result) if isinstance(result, tuple) else [result]
    weights = torch.linspace(0.5, 1.5, 64, dtype=torch.float32, device="cpu")
    total = torch.zeros_like(weights[0])
    for x in outputs:
        if x is not None and x.requires_grad:
            total = total + (x * weights[: x.numel()].reshape(x.shape)).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*(None if x is None else x.detach() for x in outputs), *gradients]


def _difference(theirs: Sequence[Tensor | None], ours: Sequence[Tensor | None]) -> str:
    """What tells two results apart, in words; nothing where they agree to float32's rounding."""
    if len(theirs) != len(ours):
        return f"TRL's gives {len(theirs)} results, pyalign's {len(ours)}"
    for number, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if (a is None) != (b is None):
            return f"result {number} of TRL's is {a}, pyalign's {b}"
        if a is None or b is None:
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {a.dtype} {tuple(a.shape)} in TRL, {b.dtype} {tuple(b.shape)} in pyalign"
        if not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5):
            return f"result {number} is off by {(a.double() - b.double()).abs().max().item():.2g}"
    return ""


def _random(seed: int = 0) -> Callable[..., Tensor]:
    """Normal numbers from a generator of their own: a run's random state stays as it is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    return draw


# ---- What is known of each trainer ----


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names and defaults, in order."""
    empty = inspect.Parameter.empty
    return tuple(str(x.replace(annotation=empty)) for x in inspect.signature(function).parameters.values())


def _itself(x: Any) -> Any:
    return x


def _plan_reward(plan: _Planner) -> None:
    seam = "RewardTrainer.compute_loss"
    trainer_class = plan.module(_MODULES["reward"]).RewardTrainer
    original = plan.get(trainer_class, "compute_loss")
    plan.check_signature(seam, original, ("self", "model", "inputs", "return_outputs=False", "num_items_in_batch=None"))

    def cases() -> list[Any]:
        found: list[Any] = []
        for margin, center in ((False, None), (True, 0.1)):
            draw = _random()
            logits, inputs = draw(6, 1).requires_grad_(), {"attention_mask": torch.ones(6, 4)}
            if margin:
                inputs["margin"] = draw(3)
            found.append(((logits, inputs, center), [logits]))
        return found

    def run(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def call(case: Any) -> Any:
            logits, inputs, center = case
            metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
            trainer = SimpleNamespace(
                model=SimpleNamespace(training=True),
                accelerator=SimpleNamespace(gather=_itself, gather_for_metrics=_itself),
                args=SimpleNamespace(center_rewards_coefficient=center),
                _metrics=metrics,
                _total_train_tokens=0,
                _tp_size=1,
            )

            def model(**inputs: Any) -> Any:
                return SimpleNamespace(logits=logits)

            loss, outputs = function(trainer, model, dict(inputs), True)
            return loss, outputs.logits

        return call

    replacement = _reward_loss(original, plan.count(seam))
    plan.check_probe(seam, run(original), run(_reward_loss(original, lambda: None)), cases)
    plan.add(_Change(trainer_class, "compute_loss", original, _marked(replacement, original)), "reward")


_FUSED_HEAD = "ChunkedLogProbFunction"


def _plan_fused_head(plan: _Planner, trainer: str) -> None:
    """TRL 1.16's head from hidden states."""
    utils = plan.module("trainer.utils")
    original = plan.get(utils, "_ChunkedLogProbFunction")
    forward = getattr(original, "forward", None)
    if forward is None:
        raise plan.fail(_FUSED_HEAD, "it has no forward")
    plan.check_signature(_FUSED_HEAD, forward, ("ctx", *_parameters(_FusedLogprobs.apply)))

    def cases() -> list[Any]:
        found: list[Any] = []
        for bias, temperature, cap, scale, outputs in (
            (False, 1.0, None, 1.0, ("log_probs", "entropy", "mean_logits", "is_top1")),
            (True, 0.7, 3.0, 0.5, ("log_probs", "entropy", *_METRICS)),
            (False, 1.0, None, 1.0, ("log_probs",)),
        ):
            draw = _random()
            hidden, weight = draw(6, 8).requires_grad_(), draw(19, 8).requires_grad_()
            vector = draw(19).requires_grad_() if bias else None
            targets = torch.tensor([3, 18, 0, 7, 7, 11])
            leaves = [x for x in (hidden, weight, vector) if x is not None]
            found.append(((hidden, weight, vector, targets, temperature, 16, cap, scale, outputs), leaves))
        return found

    plan.check_probe(_FUSED_HEAD, lambda case: original.apply(*case), lambda case: _FusedLogprobs.apply(*case), cases)
    compact = plan.get(utils, "_use_triton")
    plan.check_signature("_use_triton", compact, ("device",))
    if compact(torch.device("cpu")) is not False:
        raise plan.fail("_use_triton", "it answers for a CPU")

    count = plan.count(_FUSED_HEAD)

    class Counted(_FusedLogprobs):
        pyalign_original = original

        @staticmethod
        def apply(*args: Any, **kwargs: Any) -> Any:
            count()
            return _FusedLogprobs.apply(*args, **kwargs)

    def labelled_only(device: torch.device) -> bool:
        """Whether a fused head is given the labelled tokens alone; TRL itself gives a CPU all of them."""
        return device.type == "cpu" or compact(device)

    for name, was, becomes in (
        ("_ChunkedLogProbFunction", original, Counted),
        ("_use_triton", compact, _marked(labelled_only, compact)),
    ):
        plan.add(_Change(utils, name, was, becomes), trainer)


def _plan_selective(plan: _Planner, trainer: str) -> None:
    """Log-probs from logits."""
    utils = plan.module("trainer.utils")
    for name, replacement in (
        ("selective_log_softmax", _selective_log_softmax),
        ("selective_log_softmax_and_entropy", _selective_log_softmax_and_entropy),
    ):
        original = plan.get(utils, name)
        plan.check_signature(name, original, _parameters(replacement))

        def cases(alone: bool = name == "selective_log_softmax") -> list[Any]:
            found: list[Any] = []
            for options, several in (
                ({}, False),
                ({"temperature": 0.7, "row_mask": torch.tensor([[1, 0, 1], [0, 1, 1]])}, False),
                *([({"temperature": 1.5}, True)] if alone else [({"entropy_requires_grad": False}, False)]),
            ):
                logits = _random()(2, 3, 19, scale=3.0).requires_grad_()
                index = torch.tensor([[3, 18, 0], [7, 7, 11]])
                found.append(((logits, torch.stack([index, 18 - index], -1) if several else index, options), [logits]))
            return found

        def run(function: Callable[..., Any]) -> Callable[[Any], Any]:
            return lambda case: function(case[0], case[1], **case[2])

        plan.check_probe(name, run(original), run(replacement), cases)
        plan.function(utils, name, replacement, trainer, name)


def _plan_logprobs(plan: _Planner, trainer: str, class_name: str) -> None:
    """The trainer's log-probs, by whichever of the two ways its module takes."""
    home = plan.module(_MODULES[trainer])
    if "add_fused_lm_head" in vars(home):
        seams: tuple[str, ...] = (_FUSED_HEAD,)
        _plan_once(plan, "fused head", trainer, _plan_fused_head)
    else:
        seams = ("selective_log_softmax", "selective_log_softmax_and_entropy")
        if not any(name in vars(home) for name in seams):
            raise plan.fail(f"trl.{_MODULES[trainer]}", f"it uses neither add_fused_lm_head nor {' nor '.join(seams)}")
        _plan_once(plan, "selective", trainer, _plan_selective)
    plan.guard(getattr(home, class_name), trainer, *seams)


def _plan_once(plan: _Planner, key: str, trainer: str, make: Callable[[_Planner, str], None]) -> None:
    """Two trainers may share a seam."""
    if key in plan.shared:
        names = tuple(str(change) for change in plan.shared[key])
        plan.replaced[trainer] = (*plan.replaced.get(trainer, ()), *names)
        return
    before = len(plan.changes)
    make(plan, trainer)
    plan.shared[key] = plan.changes[before:]


def _plan_dpo(plan: _Planner) -> None:
    _plan_logprobs(plan, "dpo", "DPOTrainer")
    plan.left["dpo"] = "the loss types, arithmetic on one number per pair"


def _plan_orpo(plan: _Planner) -> None:
    _plan_logprobs(plan, "orpo", "ORPOTrainer")
    plan.left["orpo"] = "the odds ratio, and the cross-entropy of the chosen responses"


def _plan_cpo(plan: _Planner) -> None:
    _plan_logprobs(plan, "cpo", "CPOTrainer")
    plan.left["cpo"] = "the loss types, and the cross-entropy of the chosen responses"


def _plan_distillation(plan: _Planner) -> None:
    seam = "_chunked_divergence_loss"
    home = plan.module(_MODULES["distillation"])
    original = plan.get(home, seam)
    names = _parameters(_chunked_divergence_loss)
    chunked = (*names[:6], "chunk_size", *names[6:])  # TRL 1.14
    plan.check_signature(seam, original, names, chunked)
    signature = inspect.signature(original)
    takes_chunks = "chunk_size" in signature.parameters

    def replacement(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        given.pop("chunk_size", None)  # TRL's bound on memory; our workspace has its own
        return _chunked_divergence_loss(**given)

    def cases() -> list[Any]:
        found: list[Any] = []
        capped = {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0, "student_final_logit_softcapping": 3.0}
        for beta, options in (
            (0.0, {"num_items_in_batch": torch.tensor(9.0)}),
            (1.0, {"temperature": 0.7, **capped, "teacher_final_logit_softcapping": 4.0}),
            (0.3, {"student_lm_head_bias": True, "temperature": 2.0}),
        ):
            draw = _random()
            hidden, weight = draw(2, 3, 8).requires_grad_(), draw(19, 8).requires_grad_()
            teacher, teacher_weight, bias = draw(2, 3, 5), draw(19, 5), draw(19).requires_grad_()
            options = dict(options)
            leaves = [hidden, weight]
            if options.pop("student_lm_head_bias", None):
                options.update(student_lm_head_bias=bias, teacher_lm_head_bias=draw(19))
                leaves.append(bias)
            mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
            arguments = (hidden, teacher, weight, teacher_weight, mask, beta, *([2] if takes_chunks else []))
            found.append(((arguments, options), leaves))
        return found

    def run(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def call(case: Any) -> Any:
            loss, entropy, count = function(*case[0], **case[1])
            return loss, entropy.detach(), count  # by the trainer, in every release

        return call

    plan.check_probe(seam, run(original), run(replacement), cases)
    plan.function(home, seam, replacement, "distillation", seam)
    plan.guard(home.DistillationTrainer, "distillation", seam)


def _plan_gkd(plan: _Planner) -> None:
    seam = "generalized_jsd_loss"
    trainer_class = plan.module(_MODULES["gkd"]).GKDTrainer
    raw = plan.get(trainer_class, seam)
    if not isinstance(raw, staticmethod):
        raise plan.fail(f"GKDTrainer.{seam}", "it is no static method")
    original: Callable[..., Any] = raw.__func__
    plan.check_signature(f"GKDTrainer.{seam}", original, _parameters(_generalized_jsd_loss))

    def cases() -> list[Any]:
        labels = torch.tensor([[3, -100, 4], [-100, 5, -100]])
        found: list[Any] = []
        for options in (
            {"beta": 0.0, "labels": labels, "num_items_in_batch": torch.tensor(7)},
            {"beta": 1.0, "labels": labels, "temperature": 0.7},
            {"beta": 0.3, "temperature": 2.0},
            {"labels": labels, "reduction": "mean"},
            {"beta": 0.9, "labels": labels, "reduction": "sum"},
        ):
            draw = _random()
            logits = draw(2, 3, 19, scale=2.0).requires_grad_()
            found.append(((logits, draw(2, 3, 19, scale=2.0), options), [logits]))
        return found

    def run(function: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda case: function(case[0], case[1], **case[2])

    plan.check_probe(f"GKDTrainer.{seam}", run(original), run(_generalized_jsd_loss), cases)
    counted = staticmethod(plan.counting(raw, _generalized_jsd_loss, seam))
    plan.add(_Change(trainer_class, seam, raw, counted), "gkd")
    plan.guard(trainer_class, "gkd", seam)


def _plan_async(plan: _Planner) -> None:
    seam = "_chunked_jsd_loss"
    home = plan.module(_MODULES["async_distillation"])
    original = plan.get(home, seam)
    plan.check_signature(seam, original, _parameters(_chunked_jsd_loss))

    def cases() -> list[Any]:
        found: list[Any] = []
        for beta, tail, teachers in ((0.0, True, False), (0.4, True, True), (1.0, True, False), (0.0, False, False)):
            draw = _random()
            hidden, weight, bias = (x.requires_grad_() for x in (draw(5, 8), draw(19, 8), draw(19)))
            ids = torch.tensor([[3, 7, 1], [18, 0, 2], [4, 5, 6], [9, 1, 0], [2, 8, 4]])
            teacher = (2 * draw(5, 19)).log_softmax(-1).gather(-1, ids)
            mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]) != 0
            which = torch.tensor([0, 1, 1, 0, 1]) if teachers else None
            settings = (beta, 0.8, tail, which, 2, 3)
            found.append(((hidden, weight, bias, 0.5, 6.0, ids, teacher, mask, *settings), [hidden, weight, bias]))
        return found

    def run(function: Callable[..., Any]) -> Callable[[Any], Any]:
        return lambda case: function(*case)

    plan.check_probe(seam, run(original), run(_chunked_jsd_loss), cases)
    plan.function(home, seam, _chunked_jsd_loss, "async_distillation", seam)
    left = "the narrowing of candidates; a step is not checked for having used the seam, which it may skip"
    plan.left["async_distillation"] = left


_PLANS: dict[str, Callable[[_Planner], None]] = {
    "reward": _plan_reward,
    "dpo": _plan_dpo,
    "distillation": _plan_distillation,
    "gkd": _plan_gkd,
    "orpo": _plan_orpo,
    "cpo": _plan_cpo,
    "async_distillation": _plan_async,
}


def apply_pyalign_to_trl(trainers: Iterable[str] = STABLE) -> AppliedToTRL:
    """Makes TRL's trainers compute their losses by pyalign, until it is taken back.

    Trainers that exist already are served too. Before anything is replaced, each seam is looked at: its signature, and
    its values and gradients on a few tiny inputs, in float32 on the CPU, against pyalign's. Where one differs, nothing
    is replaced at all. A trainer that then computes a loss past its seam (as Liger's kernels do in TRL 1.14) raises at
    its first step. See the module for the seams and for what is left to TRL.

    Args:
        trainers: names among ``reward``, ``dpo``, ``distillation`` (all three by default), and TRL's experimental
            ``gkd``, ``orpo``, ``cpo``, ``async_distillation``.

    Returns:
        :class:`AppliedToTRL`: ``replaced``, ``left``, ``calls``, ``undo()``; a context manager.

    Raises:
        SeamError: a seam isn't what pyalign knows (it names the seam and TRL's version), or is pyalign's already.
        ModuleNotFoundError: TRL isn't installed.
        ValueError, TypeError: no such trainer.
    """
    names = [trainers] if isinstance(trainers, str) else list(trainers)
    if not names:
        _checks.refuse("trainers", names, "at least one of " + ", ".join(_PLANS))
    for name in names:
        _checks.one_of("trainers", name, tuple(_PLANS))
    try:
        trl = importlib.import_module("trl")
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ModuleNotFoundError("trl is not installed: pip install trl", name="trl") from error
    plan = _Planner(trl.__version__)
    for name in names:
        plan.module(_MODULES[name])  # all of them first: each may have imported a function that another one shares
    for name in dict.fromkeys(names):
        _PLANS[name](plan)
    done: list[_Change] = []
    try:
        for change in plan.changes:
            setattr(change.owner, change.name, change.replacement)
            done.append(change)
    except BaseException:
        for change in reversed(done):
            setattr(change.owner, change.name, change.original)
        raise
    return AppliedToTRL(plan.version, plan.replaced, plan.left, plan.calls, plan.changes)
