"""A vocabulary that is split over 2, 3 and 4 processes gives the losses, and the gradients, of one process."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_support import Pools, WorkerError
from torch import Tensor

import pyalign
from pyalign import (
    TopKLogprobs,
    distillation_loss,
    linear_cross_entropy,
    linear_distillation_loss,
    linear_token_logprobs,
    linear_topk_distillation_loss,
    token_logprobs,
    topk_distillation_loss,
    topk_logprobs,
)
from pyalign.distributed import VocabularyShards

SIZES = {2: (7, 11), 3: (20, 13, 9), 4: (9, 0, 12, 8)}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
N, H, K = 9, 6, 5
Outcome = dict[str, Tensor]


def uniform_(x: Tensor, seed: int) -> Tensor:
    return x.uniform_(-3, 3, generator=torch.Generator().manual_seed(seed))


class World:
    """Both models' logits and hidden states, the same on every rank, and which entries this one holds."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
        vocab, rank = sum(sizes), dist.get_rank()
        self.sizes, self.dtype, self.vocab = sizes, dtype, vocab
        self.mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        tensors = [(N, vocab), (N, vocab), (N, H), (vocab, H), (vocab,), (N, H + 1), (vocab, H + 1)]
        made = [uniform_(torch.empty(shape, dtype=torch.float64), i) for i, shape in enumerate(tensors)]
        self.student, self.teacher, self.hidden, self.weight, self.bias, *rest = (x.to(device, dtype) for x in made)
        self.teacher_hidden, self.teacher_weight = rest
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(7)
        self.tokens: dict[str, Any] = {
            "mask": torch.rand(N, generator=generator) < 0.7,
            "weight": torch.rand(N, generator=generator).to(wide),
            "targets": torch.randint(0, vocab - 2, (N,), generator=generator),
            "teacher_rows": torch.randint(-1, N, (N,), generator=generator),
            "vocab_size": vocab - 2,
        }
        self.tokens["targets"][2] = -100
        self.tokens = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.tokens.items()}

    def stored(self, temperature: float) -> TopKLogprobs:
        """Entries on every rank, one of them missing."""
        logprobs, indices, residual, _ = topk_logprobs(self.teacher[:, :-2], K, temperature=temperature)
        logprobs[1, 2], indices[1, 2] = -math.inf, -1
        return TopKLogprobs(logprobs, indices, residual, temperature)


def dense(world: World, s: Tensor, t: Tensor, **options: Any) -> Any:
    return distillation_loss(s, t, return_metrics=True, **world.tokens, **options)


def top(world: World, s: Tensor, t: Tensor, temperature: float = 1.0, **options: Any) -> Any:
    return topk_distillation_loss(s, world.stored(temperature), return_metrics=True, **world.tokens, **options)


def logprobs(world: World, s: Tensor, t: Tensor, **options: Any) -> Any:
    return token_logprobs(s, world.tokens["targets"], **options)


def linear_dense(world: World, h: Tensor, w: Tensor, b: Tensor, tw: Tensor, **options: Any) -> Any:
    return linear_distillation_loss(
        h,
        w,
        world.teacher_hidden,
        tw,
        student_bias=b,
        student_softcap=4.0,
        return_metrics=True,
        **world.tokens,
        **options,
    )


def linear_top(
    world: World, h: Tensor, w: Tensor, b: Tensor, tw: Tensor, temperature: float = 1.0, **options: Any
) -> Any:
    stored = world.stored(temperature)
    return linear_topk_distillation_loss(h, w, stored, student_bias=b, return_metrics=True, **world.tokens, **options)


def linear_logprobs(world: World, h: Tensor, w: Tensor, b: Tensor, tw: Tensor, **options: Any) -> Any:
    return linear_token_logprobs(h, w, world.tokens["targets"], bias=b, **options)


def cross_entropy(world: World, h: Tensor, w: Tensor, b: Tensor, tw: Tensor, **options: Any) -> Any:
    return linear_cross_entropy(h, w, world.tokens["targets"], bias=b, **options)


LOGITS = {"dense": dense, "top": top, "logprobs": logprobs}
LINEAR = {
    "linear_dense": linear_dense,
    "linear_top": linear_top,
    "linear_logprobs": linear_logprobs,
    "cross_entropy": cross_entropy,
}


def evaluate(world: World, name: str, group: Any, options: dict[str, Any]) -> Outcome:
    """Results and gradients: this rank's slices of the latter, whether it computed all of them or its own."""
    cut = slice(None) if group is None else world.mine
    if name in LOGITS:
        leaves = {"logits": world.student[:, cut].clone().requires_grad_()}
        given = LOGITS[name](world, leaves["logits"], world.teacher[:, cut], process_group=group, **options)
    else:
        leaves = {
            "hidden": world.hidden.clone().requires_grad_(),
            "head": world.weight[cut].clone().requires_grad_(),
            "bias": world.bias[cut].clone().requires_grad_(),
        }
        teacher = world.teacher_weight[cut]
        given = LINEAR[name](world, *leaves.values(), teacher, process_group=group, **options)
    loss, extra = (given, ()) if isinstance(given, Tensor) else (given[0], given[1:])
    extra = tuple(x for part in extra for x in (part if isinstance(part, tuple) else (part,)))
    results = {"loss": loss.detach(), **{f"extra {i}": x.detach().double() for i, x in enumerate(extra)}}
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    total = (loss * upstream.view(loss.shape)).sum()
    total = sum((0.3 * x.sum() for x in extra if x.requires_grad), total)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    for key, gradient in zip(leaves, gradients, strict=True):
        own = gradient if group is not None or key == "hidden" else gradient[..., world.mine]
        own = gradient[world.mine] if group is None and key in ("head", "bias") else own
        results[f"d {key}"] = own
    return results


def difference(a: Outcome, b: Outcome) -> dict[str, float]:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].shape == b[key].shape
        assert a[key].dtype == b[key].dtype
    return {key: distance(a[key].double(), b[key].double()) for key in a}


def distance(a: Tensor, b: Tensor) -> float:
    """Of equal infinities and NaNs nothing."""
    assert torch.equal(a.isnan(), b.isnan()), (a, b)
    same = (a == b) | a.isnan()
    return (a - b).masked_fill(same, 0.0).abs().max().item() if a.numel() else 0.0


def worst(
    sizes: tuple[int, ...], dtype: torch.dtype, backend: str, cases: list[tuple[str, dict[str, Any]]]
) -> list[tuple[float, str, dict[str, Any], str]]:
    """The largest differences between what this rank has of a split vocabulary and of a whole one."""
    world, found = World(sizes, dtype), []
    with pyalign.backend(backend):
        for name, options in cases:
            whole = evaluate(world, name, None, options)
            split = evaluate(world, name, dist.group.WORLD, options)
            found += [(x, name, options, key) for key, x in difference(whole, split).items()]
    return sorted(found, key=lambda x: -x[0])[:3]


def product(**options: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


TAILS, SOFTCAPS = ("bucket", "renormalize", "drop"), (None, 4.0)
OPTIONS = {
    "dense": {
        "divergence": DIVERGENCES,
        "reduction": ("mean", "none"),
        "temperature": (1.0, 2.0),
        "hard_weight": (0.0, 0.3, 1.0),
        "beta": (0.3,),
        "temperature_squared": (True,),
    },
    "top": {
        "divergence": DIVERGENCES,
        "tail": TAILS,
        "temperature": (1.0, 2.0),
        "hard_weight": (0.0, 0.3),
        "reduction": ("sum", "none"),
    },
    "logprobs": {"temperature": (1.0, 2.0), "softcap": SOFTCAPS, "return_entropy": (False, True)},
    "linear_dense": {"divergence": DIVERGENCES, "reduction": ("mean", "none"), "hard_weight": (0.0, 0.3)},
    "linear_top": {"divergence": ("forward_kl", "jsd"), "reduction": ("mean", "none"), "hard_weight": (0.0, 0.3)},
    "linear_logprobs": {"softcap": SOFTCAPS, "return_entropy": (False, True)},
    "cross_entropy": {
        "softcap": SOFTCAPS,
        "label_smoothing": (0.0, 0.2),
        "z_loss": (0.0, 0.1),
        "reduction": ("mean", "none"),
    },
}
WHOLE_CASES = [(name, case) for name, options in OPTIONS.items() for case in product(**options)]
FEW_CASES = [case for i, case in enumerate(WHOLE_CASES) if i % 7 == 0]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_losses_and_gradients_are_those_of_one_process_in_float64(pool: Pools, ranks: int):
    for found in pool(ranks).run(worst, SIZES[ranks], torch.float64, "cpu", WHOLE_CASES):
        assert found[0][0] < 1e-13, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_fewer_bits_they_agree_to_rounding(pool: Pools, dtype: torch.dtype):
    for found in pool(3).run(worst, SIZES[3], dtype, "cpu", FEW_CASES):
        # Gradients up to 4 are rounded to the operands' dtype.
        assert found[0][0] < (2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps), found


def test_plain_torch_gathers_the_vocabulary(pool: Pools):
    for found in pool(2).run(worst, SIZES[2], torch.float64, "reference", FEW_CASES):
        assert found[0][0] < 1e-13, found


def over_nccl(sizes: tuple[int, ...]) -> list[tuple[float, str]]:
    device = f"cuda:{dist.get_rank()}"
    torch.cuda.set_device(device)
    group, world = dist.new_group(backend="nccl"), World(sizes, torch.float32, device)
    found = []
    for name, options in FEW_CASES:
        errors = difference(evaluate(world, name, None, options), evaluate(world, name, group, options))
        found += [(error, f"{name} {options} {key}") for key, error in errors.items()]
    dist.destroy_process_group(group)
    return sorted(found, reverse=True)[:3]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_nccl_on_two_gpus(pool: Pools):
    for found in pool(2).run(over_nccl, SIZES[2]):
        assert found[0][0] < 2e-5, found


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles for the GPU")
def test_triton(pool: Pools):
    cases = [
        ("dense", {"divergence": "jsd", "hard_weight": 0.3, "temperature": 2.0}),
        ("top", {"tail": "bucket"}),
        ("cross_entropy", {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 4.0}),
    ]
    for found in pool(2).run(worst, SIZES[2], torch.float32, "triton", cases):
        assert found[0][0] < 1e-5, found


# Rows longer than a kernel's block, and many enough for several chunks


def long_rows(dtype: torch.dtype) -> dict[str, float]:
    sizes = (700, 1301)
    begin, end = ((0, 700), (700, 2001))[dist.get_rank()]
    hidden, weight = uniform_(torch.empty(300, 8, dtype=dtype), 0), uniform_(torch.empty(2001, 8, dtype=dtype), 1)
    teacher = uniform_(torch.empty(2001, 8, dtype=dtype), 2)
    labels = torch.arange(300) % 50 - 1
    errors: dict[str, float] = {}
    for divergence in ("forward_kl", "jsd"):
        gradients = []
        for cut, group in ((slice(None), None), (slice(begin, end), VocabularyShards(dist.group.WORLD, sizes))):
            h, w = hidden.clone().requires_grad_(), weight[cut].clone().requires_grad_()
            loss = linear_distillation_loss(
                h, w, hidden, teacher[cut], divergence=divergence, labels=labels, ignore_index=-1, process_group=group,
                workspace_bytes=70 * 2001 * 2 * hidden.element_size(),
            )  # fmt: skip
            loss.backward()
            assert h.grad is not None
            assert w.grad is not None
            gradients.append((loss.detach(), h.grad, w.grad if group else w.grad[begin:end]))
        errors[divergence] = max(distance(a, b) for a, b in zip(*gradients, strict=True))
    return errors


def test_chunks_of_uneven_slices_are_the_same_on_all_ranks(pool: Pools):
    for errors in pool(2).run(long_rows, torch.float64):
        assert max(errors.values()) < 1e-13, errors


# Accuracy


def near_convergence() -> list[dict[str, float]]:
    """Errors against float64, of ours over 3 ranks and of plain torch in float32."""
    rank, vocab = dist.get_rank(), 3000
    t = 4 * uniform_(torch.empty(16, vocab, dtype=torch.float64), 0).float() + 100
    s = t + 1e-3 * uniform_(torch.empty(16, vocab, dtype=torch.float64), 1).float()
    cut = slice(1000 * rank, 1000 * rank + 1000)
    found = []
    for divergence in DIVERGENCES:
        x = s.double().requires_grad_()
        with pyalign.backend("reference"):
            truth = distillation_loss(x, t.double(), divergence=divergence, reduction="none")
        (exact,) = torch.autograd.grad(truth.sum(), x)
        y = s.clone().requires_grad_()
        with pyalign.backend("reference"):
            plain = distillation_loss(y, t, divergence=divergence, reduction="none")
        (theirs,) = torch.autograd.grad(plain.sum(), y)
        z = s[:, cut].clone().requires_grad_()
        loss = distillation_loss(z, t[:, cut], divergence=divergence, reduction="none", process_group=dist.group.WORLD)
        (ours,) = torch.autograd.grad(loss.sum(), z)
        found.append(
            {
                "least": loss.min().item(),
                "loss": (loss - truth).abs().max().item(),
                "torch": (plain - truth).abs().max().item(),
                "gradient": (ours - exact[:, cut]).abs().max().item(),
                "torch's gradient": (theirs - exact).abs().max().item(),
            }
        )
    return found


def test_near_convergence_no_less_accurate_than_torch_and_never_negative(pool: Pools):
    for rank in pool(3).run(near_convergence):
        for errors in rank:
            assert errors["least"] >= 0
            assert errors["loss"] <= errors["torch"] + 1e-9
            assert errors["gradient"] <= errors["torch's gradient"] + 1e-9


# Torch's own tensor-parallel cross-entropy


def against_loss_parallel(dtype: torch.dtype) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    ranks, rank, vocab = dist.get_world_size(), dist.get_rank(), 30
    mesh = init_device_mesh("cpu", (ranks,))
    logits, targets = uniform_(torch.empty(N, vocab, dtype=dtype), 0), torch.arange(N) * 3
    targets[4] = -100
    theirs = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        expected = torch.nn.functional.cross_entropy(theirs, targets, ignore_index=-100)
        expected.backward()
    assert isinstance(theirs.grad, DTensor)

    # A DTensor, and a slice beside the group
    errors = []
    ours = distribute_tensor(logits, mesh, [Shard(1)]).requires_grad_()
    part = logits.chunk(ranks, -1)[rank].clone().requires_grad_()
    for x, group in ((ours, None), (ours, mesh), (part, mesh), (part, mesh.get_group())):
        loss = -token_logprobs(x, targets, process_group=group).sum() / 8
        (gradient,) = torch.autograd.grad(loss, x)
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        assert isinstance(gradient, DTensor) == isinstance(x, DTensor)
        errors += [distance(loss.detach(), expected.detach().full_tensor()), distance(local, theirs.grad.to_local())]
    return errors


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_cross_entropy_is_that_of_loss_parallel(pool: Pools, ranks: int):
    for errors in pool(ranks).run(against_loss_parallel, torch.float64):
        assert max(errors) < 1e-14


def head_as_dtensor() -> list[float]:
    """A column-parallel head, whose hidden states are a replicated DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight = uniform_(torch.empty(N, H).double(), 0), uniform_(torch.empty(10, H).double(), 1)
    bias, targets = uniform_(torch.empty(10).double(), 2), torch.arange(N)
    plain = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    expected = linear_cross_entropy(*plain[:2], targets, bias=plain[2])
    expected.backward()
    shared = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    split = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in (weight, bias)]
    loss = linear_cross_entropy(shared, split[0], distribute_tensor(targets, mesh, [Replicate()]), bias=split[1])
    loss.backward()
    errors = [distance(loss.detach(), expected.detach())]
    for ours, theirs in zip((shared, *split), plain, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        errors.append(distance(ours.grad.full_tensor(), theirs.grad))
    with pytest.raises(ValueError, match=r"process_group: got (another split|sizes)"):
        linear_cross_entropy(hidden, split[0], targets, process_group=VocabularyShards(mesh, [0, 4, 6]))
    return errors


def test_heads_that_are_dtensors_beside_hidden_states_that_are(pool: Pools):
    for errors in pool(3).run(head_as_dtensor):  # 10 entries over 3 ranks: 4, 4, 2
        assert max(errors) < 1e-14


# What passes between the ranks


def collectives(name: str, options: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """The collectives of forward and backward, and the most numbers per token in one of the former."""
    calls: list[str] = []
    widest = 0
    originals = {kind: getattr(dist, kind) for kind in ("all_gather", "all_reduce")}

    def counted(kind: str, *arguments: Any, **more: Any) -> Any:
        nonlocal widest
        calls.append(kind)
        tensor = arguments[1] if kind == "all_gather" else arguments[0]
        widest = max(widest, tensor.numel() // N)
        return originals[kind](*arguments, **more)

    sizes = (20, 20)
    world = World(sizes, torch.float64)
    for kind in originals:
        setattr(dist, kind, functools.partial(counted, kind))
    try:
        shards = VocabularyShards(dist.group.WORLD, sizes)
        if name in LOGITS:
            x = world.student[:, world.mine].clone().requires_grad_()
            result = LOGITS[name](world, x, world.teacher[:, world.mine], process_group=shards, **options)
        else:
            x = world.hidden.clone().requires_grad_()
            heads = (world.weight[world.mine], world.bias[world.mine], world.teacher_weight[world.mine])
            result = LINEAR[name](world, x, *heads, process_group=shards, **options)
        result = result if isinstance(result, Tensor) else result[0]
        forward, calls, most = calls, [], widest
        result.sum().backward()
    finally:
        for kind, original in originals.items():
            setattr(dist, kind, original)
    return forward, calls, most


@pytest.mark.parametrize(
    ("name", "options", "gathers", "reduces", "numbers"),
    [
        ("dense", {"divergence": "forward_kl"}, 1, (0, 0), 9),
        ("dense", {"divergence": "reverse_kl", "reduction": "none"}, 1, (0, 0), 9),
        ("dense", {"divergence": "jsd"}, 2, (0, 0), 9),
        ("dense", {"divergence": "tvd", "hard_weight": 0.5}, 2, (0, 0), 10),
        ("top", {"hard_weight": 0.5}, 1, (0, 0), K + 8),
        ("top", {"divergence": "jsd"}, 1, (0, 0), K + 7),
        ("logprobs", {"return_entropy": True}, 1, (0, 0), 4),
        ("linear_dense", {}, 1, (1, 0), 9),  # d hidden in the forward pass, which holds the logits
        ("linear_dense", {"reduction": "none"}, 1, (0, 1), 9),  # in the backward pass
        ("linear_logprobs", {}, 1, (0, 1), 6),
        ("cross_entropy", {"label_smoothing": 0.1}, 1, (1, 0), 6),
    ],
)
def test_one_collective_in_forward_and_none_in_backward_but_that_of_hidden_states(
    pool: Pools, name: str, options: dict[str, Any], gathers: int, reduces: tuple[int, int], numbers: int
):
    for forward, backward, most in pool(2).run(collectives, name, options):
        assert sorted(forward) == ["all_gather"] * gathers + ["all_reduce"] * reduces[0]
        assert backward == ["all_reduce"] * reduces[1]
        assert most <= numbers


# Edges


def edges() -> dict[str, dict[str, float]]:
    """Rows with infinities and NaN, slices that are -inf, targets without probability, no tokens, none that count."""
    inf = math.inf
    sizes = (4, 3, 5)
    rank, vocab = dist.get_rank(), 12
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    s = uniform_(torch.empty(10, vocab).double(), 0)
    t = uniform_(torch.empty(10, vocab).double(), 1)
    s[0, 4:7] = t[0, 4:7] = -inf  # a slice that neither has
    s[1, :4] = -inf  # p > 0 where q = 0
    t[2, 7:] = -inf  # q > 0 where p = 0
    s[3] = -inf
    t[4] = -inf
    s[5, 5] = math.nan
    t[6, 2] = inf
    s[7, 7:] = t[7, 7:] = -inf
    s[7, 2], t[8, 3] = -inf, -inf
    targets = torch.tensor([5, 1, 0, 3, 4, 5, 6, 2, 11, 10])

    def both(function: Callable[..., Any], *tensors: Tensor) -> dict[str, float]:
        found = []
        for group in (None, dist.group.WORLD):
            x, *others = (y[:, mine] if group else y for y in tensors)
            x = x.clone().requires_grad_()
            result = function(x, *others, process_group=group)
            (gradient,) = torch.autograd.grad(result.sum(), x)
            found.append((result.detach(), gradient if group else gradient[:, mine]))
        return {"loss": distance(found[0][0], found[1][0]), "gradient": distance(found[0][1], found[1][1])}

    stored = topk_logprobs(t[9:], 3)
    some = TopKLogprobs(*(x.expand(10, *x.shape[1:]).contiguous() for x in stored[:3]))
    every = topk_logprobs(uniform_(torch.empty(10, vocab).double(), 2), vocab)
    results = {
        divergence: both(
            lambda x, y, divergence=divergence, **more: distillation_loss(
                x, y, divergence=divergence, reduction="none", **more
            ), s, t,
        )
        for divergence in DIVERGENCES
    }  # fmt: skip
    results["hard"] = both(
        lambda x, y, **more: distillation_loss(
            x, y, targets=targets, hard_weight=0.5, temperature=2.0, reduction="none", **more
        ), s, t,
    )  # fmt: skip
    for tail in ("bucket", "renormalize", "drop"):
        results[tail] = both(
            lambda x, tail=tail, **more: topk_distillation_loss(
                x, some, tail=tail, reduction="none", targets=targets, hard_weight=0.5, **more
            ), s,
        )  # fmt: skip
    results["all entries"] = both(lambda x, **more: topk_distillation_loss(x, every, reduction="none", **more), s)
    results["all entries, no residual"] = both(
        lambda x, **more: topk_distillation_loss(x, every._replace(residual=None), reduction="none", **more), s
    )
    results["logprobs"] = both(lambda x, **more: token_logprobs(x, targets, **more), s)
    results["entropies"] = both(lambda x, **more: token_logprobs(x, targets, return_entropy=True, **more)[1], s)
    nothing = torch.zeros(10, dtype=torch.bool)
    results["masked"] = both(lambda x, y, **more: distillation_loss(x, y, mask=nothing, **more), s, t)
    results["ignored"] = both(lambda x, **more: token_logprobs(x, torch.full((10,), -100), **more), s)
    results["no tokens"] = both(lambda x, y, **more: distillation_loss(x, y, **more), s[:0], t[:0])
    return results


def test_infinities_nan_and_nothing(pool: Pools):
    for found in pool(3).run(edges):
        for name, errors in found.items():
            assert max(errors.values()) < 1e-12, (name, errors)


def cross_entropy_of_impossible_slices() -> list[float]:
    """A head whose bias makes a slice, or the target alone, impossible; smoothing then has an infinite loss."""
    rank = dist.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    hidden, weight = uniform_(torch.empty(6, H).double(), 0), uniform_(torch.empty(8, H).double(), 1)
    bias = torch.zeros(8).double()
    bias[4:] = -math.inf
    errors = []
    for smoothing in (0.0, 0.1):
        for targets in (torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 5, 2, 7, -100, 4])):
            results = [
                linear_cross_entropy(
                    hidden, w, targets, bias=b, label_smoothing=smoothing, reduction="none", process_group=group
                )
                for w, b, group in ((weight, bias, None), (weight[mine], bias[mine], dist.group.WORLD))
            ]
            errors.append(distance(*results))
    return errors


def test_cross_entropy_where_a_slice_is_impossible(pool: Pools):
    for errors in pool(2).run(cross_entropy_of_impossible_slices):
        assert max(errors) < 1e-12


# Extraction


def extraction(dtype: torch.dtype) -> list[tuple[float, bool, float]]:
    sizes = (4, 0, 7, 3)
    rank = dist.get_rank()
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    logits = uniform_(torch.empty(8, 14).double(), 0).to(dtype)
    logits[1] = logits[1].round()  # ties over slices: the lowest index first
    logits[2, 4:] = -math.inf
    logits[3] = 2.0
    logits[4, 5] = math.nan
    found = []
    for k, temperature in ((1, 1.0), (5, 2.0), (13, 1.0), (14, 1.0)):
        whole = topk_logprobs(logits, k, temperature=temperature)
        split = topk_logprobs(logits[:, mine], k, temperature=temperature, process_group=dist.group.WORLD)
        real = ~whole.logprobs.isnan().any(-1)
        same = torch.equal(whole.indices[real], split.indices[real])
        assert split.temperature == temperature
        assert split.logprobs.dtype == whole.logprobs.dtype
        found.append((distance(whole.logprobs, split.logprobs), same, distance(whole.residual, split.residual)))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_k_largest_of_all_slices(pool: Pools, dtype: torch.dtype):
    for found in pool(4).run(extraction, dtype):
        for error, same, residual_error in found:
            assert same
            assert max(error, residual_error) < (1e-13 if dtype == torch.float64 else 2e-6)


# Groups


def part_of_the_world() -> float | None:
    """Ranks 0 and 2 share a vocabulary, rank 1 has nothing to do with it."""
    group = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        return None
    s, t = uniform_(torch.empty(5, 8).double(), 0), uniform_(torch.empty(5, 8).double(), 1)
    cut = slice(0, 3) if dist.get_rank() == 0 else slice(3, 8)
    loss = distillation_loss(s[:, cut], t[:, cut], process_group=group)
    return distance(loss, distillation_loss(s, t))


def test_a_group_of_some_ranks(pool: Pools):
    errors = pool(3).run(part_of_the_world)
    assert errors[1] is None
    assert max(errors[0], errors[2]) < 1e-15


def alone() -> bool:
    s, t = uniform_(torch.empty(5, 8), 0), uniform_(torch.empty(5, 8), 1)
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    own = groups[dist.get_rank()]
    shards = VocabularyShards(own, [8])
    return all(torch.equal(distillation_loss(s, t, process_group=g), distillation_loss(s, t)) for g in (own, shards))


def test_a_group_of_one_is_a_whole_vocabulary(pool: Pools):
    assert pool(2).run(alone) == [True, True]


# Autograd


def graphs() -> list[bool]:
    world = World((20, 20), torch.float64)
    shards = VocabularyShards(dist.group.WORLD, world.sizes)
    x = world.student[:, world.mine].clone().requires_grad_()
    teacher = world.teacher[:, world.mine]
    loss = distillation_loss(x, teacher, process_group=shards)
    twice = [torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2)]
    found = [torch.equal(*twice)]
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    with torch.no_grad():
        found.append(not distillation_loss(x, teacher, process_group=shards).requires_grad)
    functional = torch.func.grad(lambda y: distillation_loss(y, teacher, process_group=shards))(x.detach())
    found.append(torch.equal(functional, twice[0]))
    checkpointed = torch.utils.checkpoint.checkpoint(
        lambda y: distillation_loss(2 * y, teacher, process_group=shards), x, use_reentrant=False
    )
    direct = distillation_loss(2 * x, teacher, process_group=shards)
    found.append(torch.equal(*(torch.autograd.grad(value, x)[0] for value in (checkpointed, direct))))
    return found


def test_repeated_backward_checkpointing_and_torch_func(pool: Pools):
    assert pool(2).run(graphs) == [[True] * 4] * 2


def compiled() -> list[float]:
    warnings.simplefilter("ignore")  # of torch.compile's own
    world = World((20, 13), torch.float32)
    shards = VocabularyShards(dist.group.WORLD, world.sizes)
    found = []
    for name, options in (
        ("dense", {"divergence": "jsd", "hard_weight": 0.3}),
        ("top", {"reduction": "none"}),
        ("logprobs", {"return_entropy": True}),
        ("linear_dense", {}),
        ("linear_logprobs", {"return_entropy": True}),
        ("cross_entropy", {"reduction": "none"}),
    ):
        cut = world.mine
        if name in LOGITS:
            leaves = [world.student[:, cut].clone().requires_grad_()]
            run = functools.partial(LOGITS[name], world)
            inputs = [*leaves, world.teacher[:, cut].clone()]
        else:
            leaves = [x.clone().requires_grad_() for x in (world.hidden, world.weight[cut], world.bias[cut])]
            run = functools.partial(LINEAR[name], world)
            inputs = [*leaves, world.teacher_weight[cut].clone()]

        def step(*inputs: Tensor, run: Any = run, options: Any = options) -> Tensor:
            given = run(*inputs, process_group=shards, **options)
            return (given if isinstance(given, Tensor) else given[0]).sum()

        torch.compiler.reset()
        whole = torch.compile(step, fullgraph=True, backend="aot_eager")
        for a, b in zip(*(torch.autograd.grad(f(*inputs), leaves) for f in (step, whole)), strict=True):
            found.append(distance(a, b))
    return found


def test_one_graph_of_torch_compile(pool: Pools):
    for errors in pool(2).run(compiled):
        assert max(errors) < 1e-6


# What is refused, on all ranks


def refusals() -> list[str]:
    rank = dist.get_rank()
    logits = torch.zeros(3, (4, 6)[rank])
    world, hidden = dist.group.WORLD, torch.zeros(3, 2)
    targets = torch.tensor([1, 2, 10])
    twice = TopKLogprobs(torch.zeros(3, 2), torch.tensor([[1, 2], [9, 9], [0, 1]]))
    far = TopKLogprobs(torch.zeros(3, 2), torch.tensor([[1, 2], [9, 8], [0, 10]]))
    messages = []
    for call in (
        lambda: distillation_loss(logits, logits, process_group="world"),
        lambda: distillation_loss(logits, logits, process_group=VocabularyShards(world, [5, 5])),
        lambda: distillation_loss(logits, torch.zeros(3, 7), process_group=world),
        lambda: distillation_loss(logits, logits, process_group=world, vocab_size=11),
        lambda: distillation_loss(logits, logits, process_group=world, targets=targets, hard_weight=0.5),
        lambda: distillation_loss(logits.clone().requires_grad_() * 1, logits, process_group=world, inplace=True),
        lambda: topk_distillation_loss(logits, twice, process_group=world),
        lambda: topk_distillation_loss(logits, far, process_group=world),
        lambda: topk_logprobs(logits, 11, process_group=world),
        lambda: token_logprobs(logits, targets, process_group=world),
        lambda: linear_cross_entropy(hidden, torch.zeros(logits.shape[1], 2), targets, process_group=world),
        lambda: linear_cross_entropy(
            hidden, torch.zeros(logits.shape[1], 2), torch.zeros(3, dtype=torch.int64), process_group=world,
            workspace_bytes=70,
        ),
        lambda: VocabularyShards(world, [5]),
        lambda: VocabularyShards(world, [0, 0]),
        lambda: VocabularyShards(None, [5, 5]),
    ):  # fmt: skip
        try:
            call()
        except (ValueError, TypeError) as error:
            messages.append(str(error))
        else:
            messages.append("nothing")
    return messages


def test_refusals_reach_every_rank(pool: Pools):
    wanted = [
        "process_group: got str; wanted a torch.distributed process group",
        r"process_group: got sizes \(5, 5\) on rank .; wanted . there, this rank's slice",
        "teacher_logits: got a slice of 7; wanted the student's . entries",
        "vocab_size: got 11; wanted an int with 0 < vocab_size <= 10, the entries of all ranks",
        "targets: row 2 holds 10; wanted 0 <= targets < 10",
        "inplace: not available with process_group",
        "teacher.indices: row 1 holds an index twice",
        "teacher.indices: row 2 holds 10; wanted 0 <= teacher.indices < 10",
        "k: got 11; wanted an int with 0 < k <= 10",
        "targets: row 2 holds 10; wanted 0 <= targets < 10",
        "targets: row 2 holds 10; wanted 0 <= targets < 10",
        "workspace_bytes: got 70; wanted ",
        r"sizes: got \[5\]; wanted an int >= 0 for each of the group's 2 ranks",
        r"sizes: got \[0, 0\]; wanted an int >= 0 for each of the group's 2 ranks, not all of them 0",
        "process_group: got NoneType; wanted a torch.distributed process group",
    ]
    for messages in pool(2).run(refusals):
        for message, pattern in zip(messages, wanted, strict=True):
            with pytest.raises(ValueError, match=pattern):
                raise ValueError(message)


def layouts() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    logits = torch.zeros(4, 6)
    rows, columns = (distribute_tensor(logits, mesh, [Shard(dim)]) for dim in (0, 1))
    square = init_device_mesh("cpu", (1, 2))
    both = distribute_tensor(logits, square, [Shard(0), Shard(1)])
    messages = []
    for call in (
        lambda: distillation_loss(rows, rows),
        lambda: distillation_loss(both, both),
        lambda: distillation_loss(columns, distribute_tensor(logits, mesh, [Replicate()])),
        lambda: distillation_loss(columns, columns, mask=distribute_tensor(torch.ones(4), mesh, [Shard(0)])),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    copies = distribute_tensor(logits, mesh, [Replicate()])
    assert distillation_loss(copies, copies).item() == 0
    return messages


def test_layouts_of_dtensors_that_say_something_else(pool: Pools):
    for messages in pool(2).run(layouts):
        assert [message.partition(":")[0] for message in messages] == [
            "student_logits", "student_logits", "teacher_logits", "mask"
        ]  # fmt: skip


def out_of_range_on_one_rank() -> None:
    raise_on = dist.get_rank()
    logits = torch.zeros(2, 3)
    distillation_loss(logits, logits, process_group=dist.group.WORLD, temperature=-1.0 if raise_on == 0 else 1.0)


def test_a_rank_that_raises_alone_does_not_go_unnoticed(pool: Pools):
    with pytest.raises(WorkerError, match=r"temperature: got -1\.0"):
        pool(2).run(out_of_range_on_one_rank)


def test_cuda_kernels_do_not_take_slices():
    from pyalign._backends import refusal

    assert "not a vocabulary that is split" in refusal("cuda", torch.device("cuda"), torch.float32, split=True)
