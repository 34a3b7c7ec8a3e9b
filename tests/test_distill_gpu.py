"""What only a GPU can show: long rows and the kernels that they choose, many rows, streams, graphs, no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distill_support import (
    GPU,
    ON_GPU,
    Engine,
    assert_close,
    evaluate,
    every_divergence,
    name_of,
    over,
    student_and_teacher,
    truth,
)

import pyalign
from pyalign import _backends, _tables, distillation_loss, topk_distillation_loss, topk_logprobs
from pyalign._types import Options, Tokens

pytestmark = pytest.mark.skipif(not GPU, reason="no GPU")
on_gpu = over(ON_GPU)
in_cuda = over(tuple(engine for engine in ON_GPU if engine.name == "cuda"))

# From 8 KiB a row the Hopper kernel holds a pair of rows in clusters of 1 to 16 blocks; what fits nowhere goes through
# L2. Odd lengths have ragged ends, and rows that start anywhere.
LONG = [2048, 4097, 16384, 32000, 50257, 65536, 128256, 151936, 262144, 300001]


@pytest.mark.parametrize("vocab", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@every_divergence
@on_gpu
def test_long_rows(engine: Engine, divergence: str, dtype: torch.dtype, vocab: int):
    student, teacher = student_and_teacher(5, vocab, dtype=dtype, device=engine.device)
    mask = torch.tensor([True, True, False, True, True], device=engine.device)
    options = {"divergence": divergence, "mask": mask, "temperature": 1.5, "return_metrics": True}
    with engine():
        ours = evaluate(student, teacher, **options)
    # A sum over V float32 terms in a fixed order: its rounding grows with the logarithm of V.
    assert_close(ours, truth(student, teacher, **options), dtype, slack=2.0)


@pytest.mark.parametrize("vocab", [4097, 32000, 50257, 128256, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@every_divergence
@in_cuda
def test_every_layout_gives_the_same(engine: Engine, divergence: str, dtype: torch.dtype, vocab: int):
    student, teacher = student_and_teacher(5, vocab, dtype=dtype, device=engine.device)
    exact = truth(student, teacher, divergence=divergence)
    layouts = _backends.engine("cuda").distill_layouts(vocab, dtype, divergence, 0)
    assert _tables.ONE_BLOCK in layouts
    for layout in layouts:
        with engine(), _tables.use(distill=_tables.layout_name(layout)):
            ours = evaluate(student, teacher, divergence=divergence)
        assert_close(ours, exact, dtype, slack=2.0)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("vocab", [4097, 50257, 128256, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@in_cuda
def test_every_layout_for_a_top_k_teacher_gives_the_same(engine: Engine, dtype: torch.dtype, vocab: int, tail: str):
    student, teacher = student_and_teacher(5, vocab, dtype=dtype, device=engine.device)
    with pyalign.backend("reference"):
        stored = topk_logprobs(teacher.float(), 50)
    options: dict[str, Any] = {"tail": tail, "return_metrics": True}
    exact = truth(student, stored, **options)
    layouts = _backends.engine("cuda").topk_distill_layouts(vocab, dtype, 0)
    assert _tables.ONE_BLOCK in layouts
    for layout in layouts:
        with engine(), _tables.use(distill=_tables.layout_name(layout)):
            ours = evaluate(student, stored, **options)
        assert_close(ours, exact, dtype, slack=2.0)


@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, torch.float16], ids=name_of)
@in_cuda
def test_every_layout_writes_a_gradient_of_16_bits(engine: Engine, gradient_dtype: torch.dtype):
    """Of float32 logits, as losses from hidden states have it written."""
    student, teacher = student_and_teacher(5, 50257, device=engine.device)
    kernels, found = _backends.engine("cuda"), []
    for layout in kernels.distill_layouts(50257, torch.float32, "forward_kl", 0):
        gradient = torch.empty_like(student, dtype=gradient_dtype)
        with _tables.use(distill=_tables.layout_name(layout)):
            kernels.distill(
                student, teacher, Tokens(reduction="none"), Options(50257), gradient=gradient, want_loss=True,
                want_metrics=False,
            )  # fmt: skip
        found.append(gradient.float())
    for x in found[1:]:
        torch.testing.assert_close(x, found[0], rtol=2 * torch.finfo(gradient_dtype).eps, atol=1e-6)


@in_cuda
def test_a_layout_that_does_not_fit_is_refused_by_name(engine: Engine):
    student, teacher = student_and_teacher(5, 262144, device=engine.device)
    with (
        engine(),
        _tables.use(distill="cluster of 1, 2 stages"),
        pytest.raises(ValueError, match=r"layout: got a cluster of 1 with stages 2; wanted one of distill_layouts\(\)"),
    ):
        distillation_loss(student, teacher)


@pytest.mark.smoke
@pytest.mark.parametrize("vocab", [4097, 32000])
@every_divergence
@on_gpu
def test_long_rows_under_the_sanitizer(engine: Engine, divergence: str, vocab: int):
    student, teacher = student_and_teacher(3, vocab, dtype=torch.bfloat16, device=engine.device)
    with engine():
        ours = evaluate(student, teacher, divergence=divergence)
    assert_close(ours, truth(student, teacher, divergence=divergence), torch.bfloat16, slack=2.0)


@pytest.mark.smoke
@pytest.mark.parametrize("vocab", [4097, 32000])
@pytest.mark.parametrize("k", [50, 256])
@on_gpu
def test_top_k_of_long_rows_under_the_sanitizer(engine: Engine, k: int, vocab: int):
    student, teacher = student_and_teacher(3, vocab, dtype=torch.bfloat16, device=engine.device)
    with engine():
        stored = topk_logprobs(teacher, k)
        ours = evaluate(student, stored)
    assert_close(ours, truth(student, stored), torch.bfloat16, slack=2.0)


@pytest.mark.parametrize("vocab", [4096, 32001, 128256])
@on_gpu
def test_long_rows_in_place(engine: Engine, vocab: int):
    leaf, teacher = student_and_teacher(2, 5, vocab, dtype=torch.bfloat16, device=engine.device)
    leaf.requires_grad_()
    with engine():
        for rows in (slice(None), slice(None, -1)):
            expected = torch.autograd.grad(distillation_loss(leaf[:, rows], teacher[:, rows]), leaf)[0]
            logits = leaf * 1
            loss = distillation_loss(logits[:, rows], teacher[:, rows], inplace=True)
            assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


@pytest.mark.parametrize("k", [1, 50, 256])
@pytest.mark.parametrize("vocab", [4097, 128256, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@on_gpu
def test_top_k_of_long_rows(engine: Engine, dtype: torch.dtype, vocab: int, k: int):
    student, teacher = student_and_teacher(3, vocab, dtype=dtype, device=engine.device)
    with engine():
        stored = topk_logprobs(teacher, k)
        ours = evaluate(student, stored)
    with pyalign.backend("reference"):
        expected = topk_logprobs(teacher.double().cpu(), k)
    assert torch.equal(stored.indices.cpu(), expected.indices)
    torch.testing.assert_close(stored.logprobs.cpu().double(), expected.logprobs, rtol=0, atol=4e-6)
    torch.testing.assert_close(stored.residual.cpu().double(), expected.residual, rtol=0, atol=4e-6)
    assert_close(ours, truth(student, stored), dtype, slack=2.0)


# Around 8 vectors a thread, from where on a sample is a part of the row, and beyond; rows that start anywhere.
@pytest.mark.parametrize("k", [50, 256])
@pytest.mark.parametrize("vocab", [16383, 32768, 32801, 128257, 200_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@on_gpu
def test_top_k_wherever_the_large_logits_are(engine: Engine, dtype: torch.dtype, vocab: int, k: int):
    """The largest, equals by lowest index, and the same bits every time, in whatever order threads find candidates."""
    place, noise = torch.arange(vocab), student_and_teacher(vocab)[0]
    rows = torch.stack(
        [
            noise,
            place / 1000,
            -place / 1000,
            torch.zeros(vocab),
            noise.masked_fill(place % (vocab // 10) != 7, -torch.inf),
            noise + 30 * (place // (vocab // 7) == 3),
            noise - 20 * (place // 2048 % 4 == 0),
            noise - 20 * (place // 4096 % 4 == 0),
        ]
    ).to(dtype)
    x = rows.to(engine.device).repeat(40, 1)
    with engine():
        logprobs, indices, residual, _ = topk_logprobs(x, k)
        again = topk_logprobs(x, k)
    with pyalign.backend("reference"):
        expected = topk_logprobs(rows.double(), k)
    assert residual is not None
    assert again.residual is not None
    assert expected.residual is not None
    assert torch.equal(logprobs, again.logprobs)
    assert torch.equal(indices, again.indices)
    assert torch.equal(residual, again.residual)
    assert torch.equal(indices.cpu(), expected.indices.repeat(40, 1))
    torch.testing.assert_close(logprobs.cpu().double(), expected.logprobs.repeat(40, 1), rtol=0, atol=4e-6)
    torch.testing.assert_close(residual.cpu().double(), expected.residual.repeat(40), rtol=0, atol=4e-6)


@on_gpu
def test_more_rows_than_a_grid_dimension_holds(engine: Engine):
    student, teacher = student_and_teacher(70_000, 17, device=engine.device)
    with engine():
        ours = evaluate(student, teacher, reduction="none")
    assert_close(ours, truth(student, teacher, reduction="none"), torch.float32)


@pytest.mark.large
@on_gpu
def test_more_than_2_31_elements(engine: Engine):
    """The last row of 17,000 x 128,256 gets the loss and gradient that it gets alone."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(17_000, 128_256, device=engine.device, dtype=torch.bfloat16) for _ in range(2))
    with engine():
        ours = evaluate(student, teacher, reduction="none")
        alone = evaluate(student[-1:], teacher[-1:], reduction="none")
    assert torch.equal(ours.loss[-1:], alone.loss)
    assert torch.equal(ours.gradient[-1:], alone.gradient)


@on_gpu
def test_losses_never_wait_for_the_gpu(engine: Engine):
    student, teacher = student_and_teacher(6, 131, device=engine.device)
    student.requires_grad_()
    mask, rows = (torch.arange(6, device=engine.device) > 1), torch.arange(6, device=engine.device)
    with engine():
        stored = topk_logprobs(teacher, 4)
        for warm in (True, False):  # Triton compiles on the first call, and waits
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("default" if warm else "error")
            try:
                for reduction in ("mean", "sum", "none"):
                    options = {"mask": mask, "teacher_rows": rows, "reduction": reduction}
                    distillation_loss(student, teacher, **options).sum().backward()
                    topk_distillation_loss(student, stored, **options).sum().backward()
                topk_logprobs(teacher, 4)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_step_is_captured_in_a_cuda_graph(engine: Engine):
    """Replayed over new logits, the graph gives their loss and gradient."""
    student, teacher = student_and_teacher(6, 4100, device=engine.device)
    student.requires_grad_()

    def step() -> torch.Tensor:
        student.grad = None
        loss = distillation_loss(student, teacher)
        loss.backward()
        return loss

    with engine():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        other, _ = student_and_teacher(6, 4100, device=engine.device)
        with torch.no_grad():
            student.copy_(other.flip(0))
        graph.replay()
        expected = evaluate(student, teacher)
    assert torch.equal(loss.detach(), expected.loss)
    assert student.grad is not None
    assert torch.equal(student.grad, expected.gradient)


@on_gpu
def test_work_is_queued_on_the_current_stream(engine: Engine):
    """Logits that another stream is still writing are read after it has."""
    student, teacher = student_and_teacher(64, 32000, device=engine.device)
    stream = torch.cuda.Stream()
    with engine():
        expected = distillation_loss(student, teacher)
        late = torch.zeros_like(student)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(student)
            ours = distillation_loss(late, teacher)
        stream.synchronize()
    assert torch.equal(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@on_gpu
def test_tensors_on_another_gpu_than_the_current_one(engine: Engine):
    student, teacher = student_and_teacher(5, 4100, device="cuda:1")
    with engine(), torch.cuda.device(0):
        ours = evaluate(student, teacher)
    assert_close(ours, truth(student, teacher), torch.float32, slack=2.0)
