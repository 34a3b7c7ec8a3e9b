"""Which backend serves a call, forced or by device and dtype; why others don't; and that no loss waits for a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_support import (
    DIVERGENCES,
    KERNELS,
    ON_GPU,
    TAILS,
    Engine,
    every_engine,
    every_kernel,
    logits,
    over,
    student_and_teacher,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

import pyalign
from pyalign import (
    _backends,
    _ops,
    best_of_n,
    distillation_loss,
    expected_win_rates,
    preference_metrics,
    reward_scores,
    sequence_logprobs,
    token_logprobs,
    topk_distillation_loss,
    topk_logprobs,
    win_probabilities,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CACHED = ("_decide", "_cuda_refusal", "_triton_refusal")


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of the caller's, and nothing remembered from or for other tests."""
    monkeypatch.delenv("PYALIGN_BACKEND", raising=False)
    monkeypatch.setattr(_backends, "_warned", set())

    def forget() -> None:
        for name in CACHED:
            getattr(_backends, name).cache_clear()

    forget()
    yield
    forget()


def chosen() -> str:
    """What serves a float32 tensor of the CPU now, and whether it was forced to."""
    choice = _backends.choose(CPU, torch.float32)
    return choice.reason.replace("by pyalign.backend", choice.backend)


# The default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cpu_tensors_go_to_the_cpp_kernels(dtype: torch.dtype):
    assert _backends.choose(CPU, dtype) == ("cpu", "default on cpu", "")


def test_tensors_of_a_device_without_kernels_go_to_plain_torch():
    for device in ("meta", "mps"):
        assert _backends.choose(torch.device(device), torch.float32) == (
            "reference", f"no kernels for {device}", "",
        )  # fmt: skip
    student = torch.zeros(4, 31, device="meta", requires_grad=True)
    loss = distillation_loss(student, student.detach())
    assert torch.autograd.grad(loss, student)[0].shape == (4, 31)


def built_for(monkeypatch: pytest.MonkeyPatch, *targets: str) -> None:
    """As if the native module held CUDA kernels for these targets (none: a build without nvcc)."""
    module = SimpleNamespace(build_info=lambda: {"cuda_archs": list(targets)})
    if targets:
        module.cuda = SimpleNamespace()
    monkeypatch.setattr(_backends, "native", lambda: (module, ""))


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))


RELEASE = ("80", "86", "90", "120", "120+PTX")
EVERYTHING = ("80", "86", "89", "90", "100", "120", "120+PTX")


@pytest.mark.parametrize(
    ("targets", "served", "refused"),
    [
        (
            RELEASE,
            [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (12, 0), (12, 1), (13, 0)],
            [(7, 5), (10, 0), (10, 3), (11, 0)],
        ),
        (EVERYTHING, [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 1), (13, 0)], [(7, 5), (11, 0)]),
        (("86", "86+PTX"), [(8, 6), (8, 9), (9, 0), (10, 3), (12, 0), (13, 0)], [(7, 5), (8, 0)]),
        (("90+PTX",), [(9, 0), (10, 0), (12, 1)], [(8, 9)]),
        (("90",), [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        (("90a",), [(9, 0)], [(8, 9), (10, 0), (12, 0)]),
        (("100", "103"), [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (("100a",), [(10, 0)], [(10, 3), (9, 0), (12, 0)]),
    ],
    ids=lambda x: ",".join(x) if x and isinstance(x[0], str) else "",
)
def test_cuda_kernels_serve_their_generation_from_the_target_on_and_ptx_every_later_gpu(
    monkeypatch: pytest.MonkeyPatch,
    targets: tuple[str, ...],
    served: list[tuple[int, int]],
    refused: list[tuple[int, int]],
):
    """What was compiled for x.y runs on x.z with z >= y; "a" on that GPU alone; PTX is compiled for what came later."""
    built_for(monkeypatch, *targets)
    for capability in [*served, *refused]:
        gpu(monkeypatch, *capability)
        _backends._cuda_refusal.cache_clear()
        _backends._decide.cache_clear()
        reason = _backends.refusal("cuda", torch.device("cuda", 0), torch.float32)
        choice = _backends.choose(torch.device("cuda", 0), torch.float32)
        if capability in served:
            assert (reason, choice.backend, choice.reason) == ("", "cuda", "default on cuda"), capability
        else:
            built = f"the CUDA kernels were built for {', '.join(targets)}, not for compute capability "
            assert reason == built + f"{capability[0]}.{capability[1]}"
            assert (choice.backend, choice.reason) == ("triton", f"default on cuda; not cuda: {reason}"), capability


def test_the_gpu_asked_is_the_one_that_holds_the_tensors(monkeypatch: pytest.MonkeyPatch):
    built_for(monkeypatch, "80", "90")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: [(9, 0), (12, 0)][device or 0])
    assert _backends.choose(torch.device("cuda", 0), torch.float32).backend == "cuda"
    assert _backends.choose(torch.device("cuda", 1), torch.float32).backend == "triton"


def test_a_gpu_goes_to_triton_without_cuda_kernels_and_to_plain_torch_without_triton(monkeypatch: pytest.MonkeyPatch):
    built_for(monkeypatch)
    choice = _backends.choose(CUDA, torch.bfloat16)
    assert choice.backend == "triton"
    assert choice.reason.startswith("default on cuda; not cuda: this build of pyalign has no CUDA kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in CACHED:
        getattr(_backends, name).cache_clear()
    choice = _backends.choose(CUDA, torch.bfloat16)
    assert choice.backend == "reference"
    assert "not cuda: this build of pyalign has no CUDA kernels" in choice.reason
    assert "not triton: triton is not installed" in choice.reason


def test_float64_on_a_gpu_goes_to_plain_torch(monkeypatch: pytest.MonkeyPatch):
    built_for(monkeypatch, "90")
    gpu(monkeypatch, 9, 0)
    choice = _backends.choose(CUDA, torch.float64)
    assert choice.backend == "reference"
    assert "torch.float64 has no GPU kernel" in choice.reason
    assert not choice.warning


def test_a_module_that_cannot_load_leaves_plain_torch_with_a_warning_that_says_why(monkeypatch: pytest.MonkeyPatch):
    """Once for each kind of call: silently off is how a fused path is lost (trl#7253)."""
    monkeypatch.setattr(_backends, "native", lambda: (None, "pyalign._C can't be imported (no such file)"))
    student, teacher = student_and_teacher(4, 31)
    with pytest.warns(RuntimeWarning, match=r"plain torch serves torch.float32 .*can't be imported \(no such file\)"):
        loss = distillation_loss(student, teacher)
    again = distillation_loss(student, teacher)  # a second warning would be an error
    with pyalign.backend("reference"):
        assert torch.equal(loss, distillation_loss(student, teacher))
    assert torch.equal(loss, again)


# Forced


@every_engine
def test_a_forced_backend_serves_and_says_who_forced_it(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    device = torch.device(engine.device)
    with pyalign.backend(engine.name):
        assert _backends.choose(device, torch.float32)[:2] == (engine.name, "forced by pyalign.backend")
    monkeypatch.setenv("PYALIGN_BACKEND", engine.name)
    assert _backends.choose(device, torch.float32)[:2] == (engine.name, "forced by PYALIGN_BACKEND")


DEFAULT = "default on cpu"


def test_contexts_nest_and_restore_also_when_an_error_leaves_them():
    assert chosen() == DEFAULT
    with pyalign.backend("reference"):
        assert chosen() == "forced reference"
        with pyalign.backend("cpu"):
            assert chosen() == "forced cpu"
            with pyalign.backend(None):
                assert chosen() == DEFAULT
            assert chosen() == "forced cpu"
        with pytest.raises(KeyError), pyalign.backend("cpu"):
            raise KeyError
        assert chosen() == "forced reference"
    assert chosen() == DEFAULT


def test_the_context_goes_before_the_variable_and_none_restores_the_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYALIGN_BACKEND", "reference")
    assert chosen() == "forced by PYALIGN_BACKEND"
    with pyalign.backend("cpu"):
        assert chosen() == "forced cpu"
        with pyalign.backend(None):
            assert chosen() == "forced by PYALIGN_BACKEND"
    monkeypatch.setenv("PYALIGN_BACKEND", "")
    assert chosen() == DEFAULT


def test_an_unknown_name_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch):
    wanted = "got 'gpu'; wanted one of cpu, cuda, triton, reference"
    with pytest.raises(ValueError, match=f"name: {wanted}"), pyalign.backend("gpu"):
        pass
    monkeypatch.setenv("PYALIGN_BACKEND", "gpu")
    x = logits(2, 5)
    for call in calls(x):
        with pytest.raises(ValueError, match=f"PYALIGN_BACKEND: {wanted}"):
            call()


def test_an_unknown_op_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="op: got 'dpo'; wanted one of distillation_loss, topk_distillation_loss"):
        _ops.explain("dpo", "cpu")


def test_a_context_holds_for_its_thread_alone():
    """Another thread has the default, and what it forces is not seen here."""
    seen: list[str] = []

    def work() -> None:
        seen.append(chosen())
        with pyalign.backend("cpu"):
            inside.set()
            leave.wait(30)
            seen.append(chosen())

    inside, leave = threading.Event(), threading.Event()
    with pyalign.backend("reference"):
        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(30)
        assert chosen() == "forced reference"
        leave.set()
        thread.join(30)
    assert seen == [DEFAULT, "forced cpu"]


def test_a_context_holds_for_its_task_and_the_tasks_it_starts():
    async def force(name: str) -> list[str]:
        with pyalign.backend(name):
            for _ in range(3):  # the other task runs in between
                await asyncio.sleep(0)
            child = await asyncio.create_task(read())
            return [chosen(), child]

    async def read() -> str:
        return chosen()

    async def both() -> list[list[str]]:
        return list(await asyncio.gather(force("reference"), force("cpu")))

    assert asyncio.run(both()) == [["forced reference"] * 2, ["forced cpu"] * 2]
    assert chosen() == DEFAULT


@every_kernel
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_runs_on_the_backend_of_its_forward(engine: Engine, reduction: str, monkeypatch: pytest.MonkeyPatch):
    """Outside the context that forced it, too."""
    used: list[str] = []
    real = _ops.engine
    monkeypatch.setattr(_ops, "engine", lambda name: used.append(name) or real(name))
    student, teacher = student_and_teacher(2, 5, device=engine.device)
    leaf = student.requires_grad_()
    with pyalign.backend(engine.name):
        loss = distillation_loss(leaf, teacher, reduction=reduction)
    with pyalign.backend("reference"):
        loss.sum().backward()
    assert used == [engine.name, engine.name]


ENVIRONMENT = """
import torch, pyalign
from pyalign import _ops
used = []
real = _ops.engine
_ops.engine = lambda name: used.append(name) or real(name)
x = torch.randn(2, 5, requires_grad=True)
try:
    pyalign.distillation_loss(x, x.detach()).backward()
    pyalign.topk_distillation_loss(x, pyalign.topk_logprobs(x, 2)).backward()
    print(*sorted(set(used)) or ["none"])
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PYALIGN_BACKEND": "reference"}, "none"),
        (
            {"PYALIGN_BACKEND": "triton"},
            "RuntimeError backend 'triton', forced by PYALIGN_BACKEND, can't serve this call: Triton runs on a CPU"
            " through its interpreter alone: set TRITON_INTERPRET=1",
        ),
        (
            {"PYALIGN_BACKEND": "gpu"},
            "ValueError PYALIGN_BACKEND: got 'gpu'; wanted one of cpu, cuda, triton, reference",
        ),
    ],
    ids=lambda x: ",".join(x.values()) or "unset" if isinstance(x, dict) else "",
)
def test_the_variable_forces_a_backend_for_the_whole_process(variables: dict[str, str], expected: str):
    kept = {key: value for key, value in os.environ.items() if key not in ("PYALIGN_BACKEND", "TRITON_INTERPRET")}
    result = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT], env={**kept, **variables}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == expected


WITHOUT_C = """
import sys
sys.modules["pyalign._C"] = None
import torch, warnings, pyalign
warnings.simplefilter("ignore")
print(pyalign.pairwise_preference_loss(torch.ones(2), torch.zeros(2)).item())
try:
    pyalign.bradley_terry([0, 1], [1, 0], num_players=2)
except RuntimeError as error:
    print(str(error).partition(":")[0])
"""


def test_without_the_compiled_module_plain_torch_serves_and_what_it_cannot_serve_says_so():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_C], capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    loss, refusal = result.stdout.splitlines()
    assert math.isclose(float(loss), 0.31326168751822286, rel_tol=1e-6)
    assert refusal == "bradley_terry has no other solver than the compiled one"


# Refusals


def calls(x: Tensor, k: int = 2) -> list[Callable[[], Any]]:
    """Every op on this tensor."""
    stored = pyalign.TopKLogprobs(x[..., :k], torch.arange(k, device=x.device).expand(*x.shape[:-1], k))
    return [
        lambda: distillation_loss(x, x),
        lambda: topk_distillation_loss(x, stored),
        lambda: topk_logprobs(x, k),
        lambda: token_logprobs(x, torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)),
    ]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "reason"),
    [
        ("cuda", "cpu", torch.float32, "the tensors are on cpu"),
        ("cuda", "meta", torch.float32, "the tensors are on meta"),
        ("cuda", "cpu", torch.float64, "torch.float64 has no GPU kernel"),
        ("triton", "cpu", torch.float64, "torch.float64 has no GPU kernel"),
        ("triton", "meta", torch.float32, "the tensors are on meta"),
        ("cpu", "meta", torch.float32, "the tensors are on meta"),
    ],
)
def test_a_forced_backend_that_cannot_serve_raises_saying_why(name: str, device: str, dtype: torch.dtype, reason: str):
    for call in calls(torch.zeros(2, 5, dtype=dtype, device=device)):
        with (
            pyalign.backend(name),
            pytest.raises(RuntimeError, match=f"backend '{name}', forced by pyalign.backend, can't serve .*: {reason}"),
        ):
            call()


def test_triton_without_its_interpreter_is_refused_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pyalign.backend("triton"), pytest.raises(RuntimeError, match="alone: set TRITON_INTERPRET=1"):
        distillation_loss(logits(2, 5), logits(2, 5))


def test_triton_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pyalign.backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        distillation_loss(logits(2, 5), logits(2, 5))


def test_the_cpp_kernels_that_cannot_load_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_backends, "native", lambda: (None, "pyalign._C can't be imported (no such file)"))
    for name in ("cpu", "cuda"):
        assert "no such file" in _backends.refusal(name, CPU if name == "cpu" else CUDA, torch.float32)
    with pyalign.backend("cpu"), pytest.raises(RuntimeError, match="no such file"):
        distillation_loss(logits(2, 5), logits(2, 5))


def test_more_entries_than_a_gpu_kernel_extracts_are_refused_or_go_to_plain_torch(monkeypatch: pytest.MonkeyPatch):
    built_for(monkeypatch, "90")
    gpu(monkeypatch, 9, 0)
    for name in ("cuda", "triton"):
        assert _backends.refusal(name, CUDA, torch.float32, 256) == ""
        assert "k = 257 is over the GPU kernels' limit of 256" in _backends.refusal(name, CUDA, torch.float32, 257)
    x = logits(2, 300)
    with pyalign.backend("triton"), pytest.raises(RuntimeError, match="k = 257 is over"):
        topk_logprobs(x, 257)
    with pyalign.backend("cpu"):
        assert topk_logprobs(x, 300).logprobs.shape == (2, 300)


# No waiting for a device


def options_of(device: str, reduction: str) -> Iterator[dict[str, Any]]:
    """All that a loss takes per token, on ``device``; beside nothing at all."""
    numbers = torch.arange(6, device=device).view(2, 3)
    yield {"reduction": reduction, "num_items": 7 if reduction == "mean" else None}
    yield {
        "reduction": reduction, "mask": numbers % 5, "labels": numbers - 100, "teacher_rows": (numbers + 2) % 6 - 1,
        "weight": numbers / 3, "targets": numbers + 20, "hard_weight": 0.25, "temperature": 1.5,
        "temperature_squared": True, "vocab_size": 30, "return_metrics": True,
        "num_items": torch.ones((), device=device) if reduction == "mean" else None,
    }  # fmt: skip


def train(student: Tensor, teacher: Tensor) -> None:
    """Forward and backward of every public loss, with and without every option."""
    for n, (reduction, divergence) in enumerate(
        (reduction, divergence) for reduction in ("mean", "sum", "none") for divergence in DIVERGENCES
    ):
        for options in options_of(str(student.device), reduction):
            stored = topk_logprobs(teacher, 5, temperature=options.get("temperature", 1.0))
            for function, other, extra in (
                (distillation_loss, teacher, {}),
                (topk_distillation_loss, stored, {"tail": TAILS[n % 3]}),
                (topk_distillation_loss, stored._replace(residual=None), {"tail": "bucket"}),
            ):
                leaf = student.detach().requires_grad_()
                result = function(leaf, other, divergence=divergence, **options, **extra)
                loss = result[0] if isinstance(result, tuple) else result
                loss.sum().backward(retain_graph=True)
                loss.sum().backward()
                assert leaf.grad is not None
                assert leaf.grad.shape == student.shape
    train_logprobs(student)
    train_scores(student)


def train_logprobs(logits: Tensor) -> None:
    """Forward and backward of token and sequence log-probs, with and without every option."""
    numbers = torch.arange(6, device=logits.device)
    targets = (numbers - 1).view(2, 3)
    for options in ({}, {"temperature": 1.5, "softcap": 5.0}):
        leaf = logits.detach().requires_grad_()
        logprob, entropy = token_logprobs(leaf, targets, ignore_index=-1, return_entropy=True, **options)
        loss = sequence_logprobs(logprob, mask=targets > 1, average=True).sum() + entropy.sum()
        if logits.device.type != "cpu":  # whose offsets are looked at, which is no waiting
            loss = loss + sequence_logprobs(logprob.flatten()[:5], offsets=numbers[::5]).sum()
        loss.backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == logits.shape


def train_scores(hidden: Tensor) -> None:
    """Forward and backward of what reads and compares scores; packed groups are padded in plain torch, to a size that
    the host reads, and packed matrices have it from the host anywhere."""
    device = hidden.device
    offsets, mask = torch.tensor([0, 2, 2, 6], device=device), torch.arange(6, device=device).view(2, 3) % 3
    leaf, head = hidden.detach().requires_grad_(), torch.ones(2, 31, device=device, requires_grad=True)
    padded = reward_scores(leaf, head, head_bias=head[:, 0], mask=mask)
    if device.type == "meta":
        rates = padded.sum()
    else:
        packed = reward_scores(leaf.view(6, 31), head[0], offsets=offsets)
        rates = expected_win_rates(leaf[0, 0, :6], offsets).sum() + packed.sum()
        assert best_of_n(leaf[0, 0, :6], offsets).shape == (3,)
    loss = win_probabilities(padded, scale=0.5).sum() + expected_win_rates(padded).sum() + rates
    metrics = preference_metrics(leaf[0, 0], leaf[0, 1], margin=leaf[1, 0].detach(), weight=leaf[1, 1].detach())
    assert best_of_n(padded).shape == metrics.calibration.weight[:2].shape
    loss.backward()
    assert leaf.grad is not None
    assert head.grad is not None


def test_plain_torch_reads_no_number_back_on_a_device():
    """Tensors without data: an ``item()``, a ``bool()`` or a shape that depends on values raises."""
    for dtype in (torch.float32, torch.float16):
        student, teacher = (torch.empty(2, 3, 31, dtype=dtype, device="meta") for _ in range(2))
        train(student, teacher)
        with pytest.raises(RuntimeError, match="meta"):
            bool(student.sum() > 0)


@pytest.mark.usefixtures("unpoisoned")
@every_kernel
def test_kernel_paths_trace_without_data(engine: Engine):
    """Fake tensors: everything around the raw ops, autograd included, depends on shapes and dtypes alone."""
    with FakeTensorMode(), engine():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            student, teacher = (torch.empty(2, 3, 31, dtype=dtype, device=engine.device) for _ in range(2))
            train(student, teacher)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            bool(student.sum() > 0)


@contextlib.contextmanager
def no_reading_back() -> Iterator[None]:
    """Tensors whose value Python asks for raise."""

    def refuse(self: Tensor, *arguments: Any) -> Any:
        raise AssertionError("a tensor's value was read on the host")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__"):
            patch.setattr(Tensor, name, refuse)
        for name in ("equal", "allclose", "is_nonzero"):
            patch.setattr(torch, name, refuse)
        yield


@every_kernel
def test_kernels_and_their_launches_read_no_tensor_in_python(engine: Engine):
    student, teacher = student_and_teacher(2, 3, 31, device=engine.device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=engine.device)
    with no_reading_back():
        with pytest.raises(AssertionError, match="read on the host"):
            bool(mask.any())
        with engine():
            if not engine.slow:
                train(student, teacher)
            leaf = student.requires_grad_()
            for reduction in ("mean", "none"):
                loss = distillation_loss(leaf, teacher, mask=mask, reduction=reduction).sum()
                loss = (
                    loss + topk_distillation_loss(leaf, topk_logprobs(teacher, 3), mask=mask, reduction=reduction).sum()
                )
                loss.backward()


@over(ON_GPU)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_step_on_a_gpu_waits_for_nothing(engine: Engine):
    student, teacher = student_and_teacher(2, 3, 31, device=engine.device)
    with engine():
        train(student, teacher)  # compiles, and loads modules
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(student, teacher)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_kernels_of_this_file_are_there():
    assert "cpu" in {engine.name for engine in KERNELS}
