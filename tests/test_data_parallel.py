"""Data-parallel training: whatever the ranks' share of the batch, their gradients are those of one process.

Each rank takes W * mean(..., num_items=N) of its own tokens (pairs, groups), N counted over the W ranks; DDP and FSDP2
average gradients over ranks. What is compared with is the plain mean over the whole batch, in one process, in float64.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_support import Pool, torchrun
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from training_support import (
    ANSWERS,
    LOSSES,
    UNITS,
    WIDTH,
    Batch,
    Model,
    Step,
    batch,
    counted_tokens,
    gradients,
    linear_cross_entropy,
)

import pyalign
from pyalign import _linear
from pyalign.distributed import global_num_items

GetPool = Callable[[int], Pool]
SHARES = {2: (2, 7), 3: (0, 5, 4)}  # units of each rank


def of_rank(x: Batch) -> Batch:
    shares, rank = SHARES[dist.get_world_size()], dist.get_rank()
    begin = sum(shares[:rank])
    return x.units(begin, begin + shares[rank])


DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6}


def outside(model: Any, head: nn.Linear, name: str) -> Callable[[Batch, Tensor | None], Tensor]:
    """The step of a loss that is called after the model's forward, on the parameters that its head then has."""

    def step(x: Batch, n: Tensor | None) -> Tensor:
        output = model(x.ids)
        return LOSSES[name].function(output, head, x, n)

    return step


def shard(model: Model) -> Model:
    """FSDP2 with the embedding and the head apart, as trainers do it."""
    if model.embedding.weight is model.head.weight:
        fully_shard([model.embedding, model.head])
    else:
        fully_shard(model.embedding)
        fully_shard(model.head)
    return fully_shard(model)


def wrap(wrapper: str, model: Model, name: str) -> Callable[[Batch, Tensor | None], Tensor]:
    if wrapper == "ddp":
        return outside(DistributedDataParallel(model), model.head, name)
    if wrapper == "ddp, loss inside":
        return DistributedDataParallel(Step(model, name))
    if wrapper == "fsdp":
        return outside(shard(model), model.head, name)
    if wrapper == "fsdp, head of the root":
        return outside(fully_shard(model), model.head, name)
    if wrapper == "fsdp, root resharded":
        return outside(fully_shard(model, reshard_after_forward=True), model.head, name)
    if wrapper == "fsdp, loss inside":
        return fully_shard(Step(model, name))
    raise ValueError(wrapper)


KINDS = ("distillation", "linear_distillation", "linear_cross_entropy", "policy_gradient", "pairwise", "ranked", "dpo")
WRAPPERS = ("ddp", "ddp, loss inside", "fsdp", "fsdp, head of the root", "fsdp, root resharded", "fsdp, loss inside")


def rank_gradients(wrapper: str, name: str, dtype: torch.dtype, tied: bool, silent: int) -> Any:
    """The mean loss over ranks, and the gradients that this rank ends up with."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # as nn.Linear does
    x = of_rank(batch(dtype, silent))
    model = Model(LOSSES[name].reads, dtype, tied)
    step = wrap(wrapper, model, name)
    size = dist.get_world_size()
    loss = size * step(x, global_num_items(LOSSES[name].count(x)))
    loss.backward()
    total = loss.detach() / size
    dist.all_reduce(total)
    return total, gradients(model)


def one_process(name: str, tied: bool = False, silent: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The same with the whole batch, in float64 and plain torch."""
    model = Model(LOSSES[name].reads, torch.float64, tied)
    with pyalign.backend("reference"):
        loss = Step(model, name)(batch(torch.float64, silent), None)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name].double(), x, rtol=0, atol=bound * float(x.abs().max()), msg=name)


def compare(pool: Pool, wrapper: str, name: str, tied: bool = False, silent: int = 0) -> None:
    expected, theirs = one_process(name, tied, silent)
    assert float(expected) != 0
    for dtype, bound in DTYPES.items():
        for loss, ours in pool.run(rank_gradients, wrapper, name, dtype, tied, silent):
            torch.testing.assert_close(loss.double(), expected, rtol=bound, atol=0)
            assert_same(ours, theirs, 8 * bound)


# What DDP and FSDP2 do to each loss, and what the ways to wrap a model do to one of each kind.
CASES = [
    *((wrapper, name, size) for wrapper in ("ddp", "fsdp") for name in LOSSES for size in SHARES),
    *((wrapper, name, 2) for wrapper in WRAPPERS if wrapper not in ("ddp", "fsdp") for name in KINDS),
]


@pytest.mark.parametrize(("wrapper", "name", "size"), CASES, ids=str)
def test_gradients_of_ragged_ranks_are_those_of_one_process(pool: GetPool, wrapper: str, name: str, size: int):
    compare(pool(size), wrapper, name)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_rank_on_which_nothing_counts_takes_part(pool: GetPool, wrapper: str, name: str):
    compare(pool(2), wrapper, name, silent=SHARES[2][0])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_tied_embeddings_get_both_gradients(pool: GetPool, wrapper: str):
    compare(pool(2), wrapper, "linear_cross_entropy", tied=True)


# Gradient accumulation


def accumulated_gradients(wrapper: str, name: str) -> dict[str, Tensor]:
    """Two micro-batches, whose gradients are reduced after the second, except of a DTensor head."""
    x = of_rank(batch(torch.float64))
    model = Model(LOSSES[name].reads, torch.float64)
    step = wrap(wrapper, model, name)
    items = global_num_items(LOSSES[name].count(x))
    half = (x.ids.shape[0] + 1) // 2
    for part, is_last in ((x.units(0, half), False), (x.units(half, len(x.ids)), True)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(is_last)
            (dist.get_world_size() * step(part, items)).backward()
            continue
        assert isinstance(step, DistributedDataParallel)
        with contextlib.nullcontext() if is_last else step.no_sync():
            (dist.get_world_size() * step(part, items)).backward()
    return gradients(model)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_distillation", "dpo"])
@pytest.mark.parametrize("wrapper", ["ddp, loss inside", "fsdp", "fsdp, head of the root"])
def test_micro_batches_add_up(pool: GetPool, wrapper: str, name: str):
    _, theirs = one_process(name)
    for ours in pool(2).run(accumulated_gradients, wrapper, name):
        assert_same(ours, theirs, 1e-12)


# One sequence over several ranks


def tokens_of_rank(x: Tensor) -> Tensor:
    """(..., T) or (..., T, H) cut along T, unevenly."""
    dim = 2
    return x.tensor_split(dist.get_world_size(), dim)[dist.get_rank()]


def split_sequences(x: Batch) -> Batch:
    cut = {name: tokens_of_rank(getattr(x, name)) for name in ("ids", "labels", "teacher_hidden")}
    return x._replace(**cut)


def weighted_distillation(hidden: Tensor, head: Any, x: Batch, total: Callable[[Tensor], Tensor]) -> Tensor:
    each = pyalign.linear_distillation_loss(
        hidden, head.weight, x.teacher_hidden, x.teacher_weight, student_bias=head.bias, labels=x.labels,
        reduction="none",
    )  # fmt: skip
    return (each * (1 + x.teacher_hidden[..., 0] ** 2)).sum() / total(counted_tokens(x))


def mean_cross_entropy(hidden: Tensor, head: Any, x: Batch, total: Callable[[Tensor], Tensor]) -> Tensor:
    return linear_cross_entropy(hidden, head, x, total(counted_tokens(x)))


def sequence_dpo(hidden: Tensor, head: Any, x: Batch, total: Callable[[Tensor], Tensor]) -> Tensor:
    """A sequence's log-prob is a sum over the ranks that hold it; each rank has the gradient of its own part."""
    logprobs = pyalign.linear_token_logprobs(hidden, head.weight, x.labels, bias=head.bias)
    sequences = total(pyalign.sequence_logprobs(logprobs.flatten(0, 1))).view(-1, ANSWERS)
    return pyalign.dpo_loss(*sequences[:, :2].unbind(1), *x.reference[:, :2].unbind(1), mask=x.mask).loss


SEQUENCE_LOSSES = {x.__name__: x for x in (weighted_distillation, mean_cross_entropy, sequence_dpo)}


def over_ranks(x: Tensor) -> Tensor:
    """The sum, with the gradient of this rank's own term."""
    total = x.detach().clone()
    dist.all_reduce(total)
    return x + (total - x.detach())


def split_gradients(name: str) -> dict[str, Tensor]:
    model = Model("hidden", torch.float64)
    wrapped = DistributedDataParallel(model)
    x = split_sequences(batch(torch.float64))
    loss = SEQUENCE_LOSSES[name](wrapped(x.ids), model.head, x, over_ranks)
    (dist.get_world_size() * loss).backward()
    return gradients(model)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", SEQUENCE_LOSSES)
def test_sequences_split_over_ranks(pool: GetPool, name: str, size: int):
    model, x = Model("hidden", torch.float64), batch(torch.float64)
    with pyalign.backend("reference"):
        SEQUENCE_LOSSES[name](model(x.ids), model.head, x, lambda total: total).backward()
    for ours in pool(size).run(split_gradients, name):
        assert_same(ours, gradients(model), 1e-12)


# A sharded head


def collectives(wrapper: str, name: str, rows: int) -> tuple[str, int, dict[str, int], dict[str, int]]:
    """What the head is after the model's forward, the chunks, and collectives of the loss's forward and backward."""
    model = Model("hidden", torch.float64)
    shard(model) if wrapper == "fsdp" else fully_shard(model)
    x = of_rank(batch(torch.float64))
    x = x._replace(labels=x.ids)
    hidden = model(x.ids).detach()
    chunks: list[int] = []
    project = _linear.Products.project

    def counting(self: Any, given: Tensor, buffers: Any) -> Tensor:
        chunks.append(len(given))
        return project(self, given, buffers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear, "chunk_rows", lambda layout, count, workspace, device: rows)
        patch.setattr(_linear.Products, "project", counting)
        with CommDebugMode() as forward:
            loss = LOSSES[name].function(hidden, model.head, x, torch.tensor(7))
    with CommDebugMode() as backward:
        loss.backward()
    counts = [{str(op): count for op, count in mode.get_comm_counts().items()} for mode in (forward, backward)]
    return type(model.head.weight).__name__, len(chunks), counts[0], counts[1]


@pytest.mark.parametrize("name", ["linear_distillation", "linear_topk_distillation", "linear_cross_entropy"])
def test_a_sharded_head_is_gathered_once_whatever_the_number_of_chunks(pool: GetPool, name: str):
    gather, scatter = "c10d_functional.all_gather_into_tensor", "c10d_functional.reduce_scatter_tensor"
    for kind, chunks, forward, backward in pool(2).run(collectives, "fsdp", name, 4):
        assert kind == "DTensor"
        assert chunks >= 8
        assert forward == {gather: 2}  # weight and bias
        assert backward == {scatter: 2}
    for kind, chunks, forward, _ in pool(2).run(collectives, "fsdp, head of the root", name, 4):
        assert kind == "Parameter"  # FSDP2 keeps what the root holds until backward
        assert chunks >= 8
        assert forward == {}


def mesh_gradients(shape: tuple[int, ...], placements: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    """Of a head on this mesh, each rank with tokens of its own; averaged by hand over the ranks."""
    mesh = init_device_mesh("cpu", shape)
    model = Model("hidden", dtype)
    x = of_rank(batch(dtype)) if dist.get_world_size() in SHARES else batch(dtype).units(*_quarter())
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    one = tuple(y if isinstance(y, Replicate) else Shard(0) for y in placements)
    head = nn.Module()
    head.weight = nn.Parameter(distribute_tensor(weight, mesh, placements))
    head.bias = nn.Parameter(distribute_tensor(bias, mesh, one))
    hidden = model(x.ids).detach()
    total = global_num_items(counted_tokens(x))
    loss = dist.get_world_size() * linear_cross_entropy(hidden, head, x, total)
    loss.backward()
    assert head.weight.grad.placements == tuple(placements)
    return [head.weight.grad.full_tensor(), head.bias.grad.full_tensor()]


def _quarter() -> tuple[int, int]:
    begin = (0, 1, 4, 6, UNITS)
    return begin[dist.get_rank()], begin[dist.get_rank() + 1]


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((2,), (Shard(0),)),
        ((2,), (Shard(1),)),
        ((3,), (Shard(0),)),
        ((2,), (Replicate(),)),
        ((2, 2), (Replicate(), Shard(0))),
    ],
    ids=["rows over 2", "columns over 2", "rows over 3", "replicated over 2", "hybrid over 2 x 2"],
)
def test_the_gradient_of_a_head_is_averaged_over_its_mesh(
    pool: GetPool, shape: tuple[int, ...], placements: tuple[Any, ...]
):
    _, theirs = one_process("linear_cross_entropy")
    size = 4 if len(shape) == 2 else shape[0]
    for weight, bias in pool(size).run(mesh_gradients, shape, placements, torch.float64):
        ours = {"head.weight": weight, "head.bias": bias}
        assert_same(ours, {name: theirs[name] for name in ours}, 1e-12)


def tensor_and_data_parallel() -> tuple[Tensor, Tensor]:
    """A head cut over 2 tensor-parallel ranks, which see the same tokens, and FSDP2's shards of these."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    x, model = batch(torch.float64), Model("hidden", torch.float64)
    hidden, plain = model(x.ids).detach(), model.head.weight.detach().clone().requires_grad_()
    parallelize_module(model.head, mesh["tensor"], ColwiseParallel())
    fully_shard(model.head, mesh=mesh["data"])
    shares = (slice(0, 2), slice(2, UNITS))
    for share in shares:
        (pyalign.linear_cross_entropy(hidden[share], plain, x.labels[share]) / 2).backward()
    share = shares[mesh["data"].get_local_rank()]
    pyalign.linear_cross_entropy(hidden[share], model.head.weight, x.labels[share]).backward()
    return model.head.weight.grad.full_tensor(), plain.grad


def test_a_head_sharded_over_two_meshes(pool: GetPool):
    for ours, theirs in pool(4).run(tensor_and_data_parallel):
        torch.testing.assert_close(ours, theirs)


def compiled_gradients() -> list[tuple[Tensor, Tensor]]:
    """Eager, and as one graph."""
    warnings.simplefilter("default")  # torch.compile's own
    mesh = init_device_mesh("cpu", (2,))
    x, model = of_rank(batch(torch.float64)), Model("hidden", torch.float64)
    weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)]))
    hidden = model(x.ids).detach().requires_grad_()

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        items = global_num_items((labels != -100).sum())
        return 2 * pyalign.linear_cross_entropy(hidden, weight, labels, num_items=items)

    results: list[tuple[Tensor, Tensor]] = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        weight.grad = hidden.grad = None
        function(hidden, weight, x.labels).backward()
        assert isinstance(weight.grad, DTensor)
        assert hidden.grad is not None
        results.append((weight.grad.full_tensor(), hidden.grad))
    return results


def test_a_step_with_a_sharded_head_and_global_count_compiles_as_one_graph(pool: GetPool):
    for eager, compiled in pool(2).run(compiled_gradients):
        torch.testing.assert_close(compiled, eager)


def compiled_steps(wrapper: str, name: str) -> list[dict[str, Tensor]]:
    """Gradients of two steps of a compiled module under DDP or FSDP2."""
    warnings.simplefilter("ignore")  # torch.compile's own
    torch._dynamo.reset()
    step = Step(Model(LOSSES[name].reads, torch.float64), name)
    if wrapper == "ddp":
        module: Any = torch.compile(DistributedDataParallel(step), backend="aot_eager")
    else:
        shard(step.model)
        fully_shard(step)
        module = torch.compile(step, backend="aot_eager")
    x, found = of_rank(batch(torch.float64)), []
    items = global_num_items(LOSSES[name].count(x))
    for _ in range(2):
        step.zero_grad()
        (dist.get_world_size() * module(x, items)).backward()
        found.append({key: y.clone() for key, y in gradients(step.model).items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_distillation", "pairwise", "dpo"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_compiled_modules_under_ddp_and_fsdp(pool: GetPool, wrapper: str, name: str):
    _, theirs = one_process(name)
    for steps in pool(2).run(compiled_steps, wrapper, name):
        for ours in steps:
            assert_same(ours, theirs, 1e-12)


def frozen_sharded_teacher() -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    x, model = batch(torch.float64), Model("hidden", torch.float64)
    hidden = model(x.ids).detach()
    arguments = (hidden, model.head.weight.detach(), x.teacher_hidden)
    with torch.no_grad():
        plain = pyalign.linear_distillation_loss(*arguments, x.teacher_weight)
        sharded = pyalign.linear_distillation_loss(*arguments, distribute_tensor(x.teacher_weight, mesh, [Shard(0)]))
    return plain, sharded


def test_a_sharded_teacher(pool: GetPool):
    for plain, sharded in pool(2).run(frozen_sharded_teacher):
        assert torch.equal(plain, sharded)


def reward_gradient() -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    hidden = batch(torch.float64).teacher_hidden.flatten(0, 1)
    weight = nn.Parameter(distribute_tensor(torch.ones(4, WIDTH, dtype=torch.float64), mesh, [Shard(0)]))
    share = hidden.tensor_split(2)[dist.get_rank()]
    pyalign.reward_scores(share, weight).square().sum().backward()
    assert isinstance(weight.grad, DTensor)
    return weight.grad.full_tensor()


def test_a_sharded_reward_head(pool: GetPool):
    hidden = batch(torch.float64).teacher_hidden.flatten(0, 1)
    weight = torch.ones(4, WIDTH, dtype=torch.float64).requires_grad_()
    pyalign.reward_scores(hidden, weight).square().sum().backward()
    assert weight.grad is not None
    for ours in pool(2).run(reward_gradient):
        torch.testing.assert_close(2 * ours, weight.grad)


def mixed_precision_gradients(wrapper: str) -> tuple[str, dict[str, Tensor]]:
    """Parameters in float32, computed with in bfloat16; of a sharded head the caller chooses the dtype."""
    model = Model("hidden", torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if wrapper == "fsdp":
        fully_shard(model.head, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    x = of_rank(batch(torch.float32))
    hidden, message = model(x.ids), ""
    weight, bias = model.head.weight, model.head.bias
    if wrapper == "fsdp":
        with pytest.raises(TypeError) as error:
            pyalign.linear_cross_entropy(hidden, weight, x.labels)
        message = str(error.value)
        weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    items = global_num_items(counted_tokens(x))
    loss = 2 * pyalign.linear_cross_entropy(hidden, weight, x.labels, bias=bias, num_items=items)
    loss.backward()
    return message, gradients(model)


@pytest.mark.parametrize("wrapper", ["fsdp", "fsdp, head of the root"])
def test_mixed_precision(pool: GetPool, wrapper: str):
    """A sharded head in float32 is refused beside bfloat16 hidden states, and taken when it is cast, before it is
    gathered; what the root holds FSDP2 has cast."""
    model, x = Model("hidden", torch.float64), batch(torch.float64)
    with pyalign.backend("reference"):
        pyalign.linear_cross_entropy(model(x.ids), model.head.weight, x.labels, bias=model.head.bias).backward()
    wanted = "weight: got torch.float32; wanted torch.bfloat16, that of hidden (or autocast)"
    for message, ours in pool(2).run(mixed_precision_gradients, wrapper):
        assert message == (wanted if wrapper == "fsdp" else "")
        assert all(y.dtype == torch.float32 for y in ours.values())
        assert_same(ours, gradients(model), 3e-2)


def frozen_head() -> list[tuple[Tensor, Tensor | None, dict[str, int]]]:
    """Of a sharded head without and with a gradient: d hidden, d head, and the collectives of backward."""
    mesh = init_device_mesh("cpu", (2,))
    x, model = batch(torch.float64), Model("hidden", torch.float64)
    results: list[tuple[Tensor, Tensor | None, dict[str, int]]] = []
    for learns in (False, True):
        hidden = model(x.ids).detach().requires_grad_()
        weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)]), requires_grad=learns)
        loss = pyalign.linear_cross_entropy(hidden, weight, x.labels)
        with CommDebugMode() as mode:
            loss.backward()
        assert hidden.grad is not None
        gradient = None if weight.grad is None else weight.grad.to_local()
        results.append((hidden.grad, gradient, {str(op): count for op, count in mode.get_comm_counts().items()}))
    return results


def test_a_frozen_sharded_head_costs_no_collective_in_backward(pool: GetPool):
    for (frozen, no_gradient, none), (learning, gradient, counts) in pool(2).run(frozen_head):
        assert torch.equal(frozen, learning)
        assert no_gradient is None
        assert gradient is not None
        assert none == {}
        assert counts == {"c10d_functional.reduce_scatter_tensor": 1}


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    hidden, weight = torch.zeros(4, 3), torch.zeros(6, 3)
    targets = torch.zeros(4, dtype=torch.int64)
    sharded = distribute_tensor(hidden, mesh, [Shard(0)])
    partial = DTensor.from_local(weight, mesh, [Partial()])
    messages: list[str] = []
    for call in (
        lambda: pyalign.linear_cross_entropy(sharded, weight, targets),
        lambda: pyalign.linear_token_logprobs(hidden, partial, targets),
        lambda: pyalign.linear_distillation_loss(hidden, weight, sharded, weight),
        lambda: pyalign.linear_distillation_loss(hidden, weight, hidden, partial),
        lambda: pyalign.reward_scores(hidden[None], partial),
    ):
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_what_is_neither_a_head_nor_a_ranks_tokens_is_refused_by_name(pool: GetPool):
    for messages in pool(2).run(refusals):
        names = ("hidden", "weight", "teacher_hidden", "teacher_weight", "head_weight")
        for name, message in zip(names, messages, strict=True):
            assert message.startswith(f"{name}: got a DTensor with placements")
            assert "plain tensor" in message


def sharded_scores() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    scores, ranks = (
        distribute_tensor(x, mesh, [Shard(0)]) for x in (torch.zeros(4, 3), torch.arange(12).view(4, 3) % 3)
    )
    messages: list[str] = []
    for call in (
        lambda: pyalign.ranked_preference_loss(scores, ranks),
        lambda: pyalign.pairwise_preference_loss(*scores.unbind(1)[:2]),
        lambda: pyalign.win_probabilities(scores),
        lambda: pyalign.best_of_n(scores),
    ):
        with pytest.raises((NotImplementedError, RuntimeError)) as error:
            call()
        messages.append(str(error.value))
    return messages


def test_raw_ops_refuse_sharded_scores(pool: GetPool):
    """Torch says so: the loss over a rank's share isn't the loss."""
    for messages in pool(2).run(sharded_scores):
        for message in messages:
            assert "pyalign" in message
            assert "sharding strategy" in message


# Counting


class NoReading(TorchDispatchMode):
    """Refuses to let the host see a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def sums() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = torch.tensor(3 + dist.get_rank())
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    own = groups[dist.get_rank() // 2]
    with NoReading():
        total = global_num_items(count)
        part = global_num_items(count, own)
        fraction = global_num_items(count.double() / 2)
    return count, total, part, fraction


def test_counts_are_summed_over_ranks_and_left_as_they_are(pool: GetPool):
    for rank, (count, total, part, fraction) in enumerate(pool(3).run(sums)):
        assert int(count) == 3 + rank
        assert total.dtype == torch.int64
        assert int(total) == 3 + 4 + 5
        assert int(part) == (7 if rank < 2 else 5)
        assert float(fraction) == 6.0


def test_without_a_process_group_the_count_is_the_process_own():
    assert int(global_num_items(torch.tensor(5))) == 5


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (5, TypeError, "count: got int; wanted a 0-dim tensor"),
        (torch.tensor([5]), ValueError, r"count: got shape \(1,\); wanted a 0-dim tensor"),
        (torch.tensor(True), TypeError, "count: got torch.bool; wanted an integer or floating dtype"),
    ],
)
def test_a_bad_count_is_named(count: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        global_num_items(count)


# Examples


EXAMPLES = Path(__file__).resolve().parent.parent / "bench" / "examples"


def losses_of(example: str, size: int) -> list[float]:
    """What it prints under torchrun."""
    output = torchrun(EXAMPLES / f"{example}.py", size=size)
    return [float(x) for x in re.findall(r"step \d+: ([\d.]+) nats a token", output)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "example", ["ddp_distillation", "fsdp2_linear_distillation", "vocabulary_parallel_distillation"]
)
def test_an_example_learns_the_same_on_one_process_and_on_two(example: str):
    one, two = losses_of(example, 1), losses_of(example, 2)
    assert len(one) == 4
    assert one[-1] < 0.95 * one[0]
    assert two == pytest.approx(one, abs=2e-4)
