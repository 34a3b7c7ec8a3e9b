"""Every Triton kernel compiles without a GPU, for NVIDIA's and AMD's, in 16-byte accesses and without spills.

Run as a program, this file compiles the kernels that the engine functions launch and prints a report in JSON. The
tests do so in a process of their own: with TRITON_INTERPRET=1, as other tests want it, nothing can be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyalign._types import (
    DIVERGENCES,
    GROUP_OPS,
    PAIR_LOSSES,
    RANK_METHODS,
    TAILS,
    MetricOptions,
    MetricTensors,
    Options,
    PairTensors,
    RankOptions,
    RankTensors,
    Tokens,
    pair_options,
)

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = 2
SET_ASIDE = 32  # bytes per thread that the widest cases may put aside: nothing in the loops over a row
KERNELS = {
    "count_kernel",
    "reduce_kernel",
    "distill_kernel",
    "topk_distill_kernel",
    "scatter_kernel",
    "outside_kernel",
    "lanes_kernel",
    "select_kernel",
    "order_kernel",
    "scale_kernel",
    "pair_kernel",
    "rank_kernel",
    "gradient_kernel",
    "logprob_kernel",
    "group_gradient_kernel",
    "reward_kernel",
    "reward_rows_kernel",
    "reward_columns_kernel",
    "group_kernel",
    "best_kernel",
    "metrics_kernel",
}


def plain_tokens() -> Tokens:
    return Tokens(mask=torch.ones(ROWS, dtype=torch.bool))


def all_tokens() -> Tokens:
    number = torch.zeros(ROWS, dtype=torch.int64)
    return Tokens(
        mask=torch.ones(ROWS, dtype=torch.bool),
        labels=number,
        teacher_rows=number,
        weight=torch.ones(ROWS),
        targets=number,
        upstream=torch.ones(ROWS),
        reduction="none",
    )


def logits(dtype: str, width: int = 128256) -> Tensor:
    return torch.zeros(ROWS, width, dtype=DTYPES[dtype])


def distill(
    divergence: str, dtype: str, vocab: int = 128256, width: int = 128256, full: bool = False, out: str = ""
) -> None:
    """``out``: the gradient's dtype, if not that of the logits, which it then overwrites."""
    from pyalign.kernels import distill as engine

    x = logits(dtype, width)
    options = Options(vocab, divergence, temperature=2.0, hard_weight=0.5) if full else Options(vocab, divergence)
    tokens = all_tokens() if full else plain_tokens()
    gradient = logits(out, width) if out else x
    engine.distill(x, x, tokens, options, gradient=gradient, want_loss=True, want_metrics=full)


def topk_distill(divergence: str, tail: str, dtype: str, k: int = 50, full: bool = False, out: str = "") -> None:
    from pyalign.kernels import distill as engine

    x = logits(dtype)
    options = Options(128256, divergence)
    if full:
        options = options._replace(temperature=2.0, hard_weight=0.5)
    engine.topk_distill(
        x,
        torch.zeros(ROWS, k, dtype=torch.float16),
        torch.zeros(ROWS, k, dtype=torch.int32),
        None if full else torch.zeros(ROWS, dtype=torch.float16),
        tail,
        all_tokens() if full else plain_tokens(),
        options,
        gradient=logits(out) if out else x,
        want_loss=True,
        want_metrics=full,
    )


def slice_stage(stage: str, divergence: str, dtype: str) -> None:
    """A call over rows that are split, with a hard term."""
    from pyalign.kernels import distill as engine

    x, options = logits(dtype), Options(128256, divergence, temperature=2.0, hard_weight=0.5)
    engine.distill(
        x,
        x,
        all_tokens(),
        options,
        gradient=x if stage == "map" else None,
        want_loss=stage == "fold",
        want_metrics=False,
        stage=stage,
        states=torch.zeros(ROWS, 5, dtype=torch.float64),
        sums=None if stage == "fold" else torch.zeros(ROWS, 2, dtype=torch.float64),
    )


def outside(dtype: str, gradient: bool, k: int = 51) -> None:
    from pyalign.kernels import distill as engine

    x, indices = logits(dtype), torch.zeros(ROWS, k, dtype=torch.int64)
    mask = torch.ones(ROWS, dtype=torch.bool)
    if gradient:
        exponentials, values = torch.zeros(ROWS, 4, dtype=torch.float64), torch.zeros(ROWS, k)
        engine.outside(x, mask, indices, 128256, 2.0, exponentials=exponentials, values=values, gradient=x)
    else:
        engine.outside(x, mask, indices, 128256, 2.0, states=torch.zeros(ROWS, 3, dtype=torch.float64))


def logprob_slice(dtype: str) -> None:
    from pyalign.kernels import logprob as engine

    engine.logprob_slice(logits(dtype), torch.zeros(ROWS, dtype=torch.int64), -100, 2.0, 30.0, True, True)


def cross_entropy_slice(dtype: str) -> None:
    from pyalign.kernels import logprob as engine

    x, targets = logits(dtype), torch.zeros(ROWS, dtype=torch.int64)
    engine.cross_entropy_gradient(x, targets, -100, 0.1, 1e-4, 30.0, torch.zeros(ROWS, 3), torch.ones(()), 513024, x)


def topk(dtype: str, k: int, vocab: int) -> None:
    from pyalign.kernels import distill as engine

    engine.topk(logits(dtype, vocab), k, 1.0)


def scale(dtype: str) -> None:
    from pyalign.kernels import distill as engine

    engine.scale(logits(dtype), torch.ones(()))


def pair_loss(form: str, dtype: str, full: bool = False) -> None:
    from pyalign.kernels import ranking as engine

    x, number = torch.zeros(4096, dtype=DTYPES[dtype]), torch.zeros(4096)
    mask = torch.ones(4096, dtype=torch.bool)
    options = pair_options(form=form, label_smoothing=0.1)
    second = x if form not in ("binary", "kto") else None
    tensors = PairTensors(labels=mask if second is None else None)
    if full:
        reference = None if second is None else x
        tensors = tensors._replace(
            first_reference=x, second_reference=reference, margin=number, weight=number, mask=mask
        )
        options = options._replace(center=0.1, reduction="none")
    engine.pair_loss(x, second, tensors, options, want_gradient=True, want_rewards=full)


def ranked_loss(method: str, dtype: str, size: int | None = None, full: bool = False) -> None:
    from pyalign.kernels import ranking as engine

    offsets = torch.zeros(9, dtype=torch.int64) if size is None else None
    x = torch.zeros((4096,) if size is None else (8, size), dtype=DTYPES[dtype])
    tensors = RankTensors(torch.zeros(x.shape, dtype=torch.int64), offsets, torch.zeros(()) if full else None)
    options = RankOptions(method=method, over_groups=full or method != "pairwise")
    engine.ranked_loss(x, tensors, options, want_gradient=True)


def score_gradient(dtype: str, packed: bool) -> None:
    from pyalign.kernels import ranking as engine

    offsets, upstream = (torch.zeros(9, dtype=torch.int64), torch.zeros(8)) if packed else (None, torch.zeros(()))
    engine.score_gradient(torch.zeros(4096), upstream, torch.zeros(()), offsets, 1, DTYPES[dtype], 1 if packed else 2)


def logprob(dtype: str, vocab: int = 128256, softcap: float | None = None) -> None:
    from pyalign.kernels import logprob as engine

    x, targets = logits(dtype, vocab), torch.zeros(ROWS, dtype=torch.int64)
    engine.logprob(x, targets, -100, 1.0, softcap, want_entropy=True, want_state=True)


def logprob_gradient(dtype: str, vocab: int = 128256, softcap: float | None = None, entropy: bool = True) -> None:
    from pyalign.kernels import logprob as engine

    x, targets, each = logits(dtype, vocab), torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    engine.logprob_gradient(
        x, targets, -100, 1.0, softcap, torch.zeros(ROWS, 3), each, each if entropy else None, torch.empty_like(x)
    )


def cross_entropy(dtype: str, out: str, full: bool = False) -> None:
    from pyalign.kernels import logprob as engine

    x, targets = logits(dtype), torch.zeros(ROWS, dtype=torch.int64)
    options = (0.1, 1e-4, 30.0, torch.ones(())) if full else (0.0, 0.0, None, None)
    engine.cross_entropy(x, targets, -100, *options, x if out == dtype else logits(out))


def reward_scores(dtype: str, packed: bool, width: int = 4096) -> None:
    from pyalign.kernels import scoring as engine

    hidden = torch.zeros((64, width) if packed else (8, 16, width), dtype=DTYPES[dtype])
    head, bias = torch.zeros(2, width), torch.zeros(2)
    offsets, mask = torch.zeros(9, dtype=torch.int64), torch.ones(8, 16, dtype=torch.bool)
    engine.reward_scores(hidden, head, bias, offsets if packed else None, None if packed else mask)


def reward_gradient(dtype: str, width: int = 4096) -> None:
    from pyalign.kernels import scoring as engine

    hidden, head, last = torch.zeros(64, width, dtype=DTYPES[dtype]), torch.zeros(2, width), torch.arange(8)
    engine.reward_gradient(torch.zeros(8, 2), last, hidden, head, 64, DTYPES[dtype], True)


def score_groups(op: str, dtype: str, size: int | None = None) -> None:
    from pyalign.kernels import scoring as engine

    x = torch.zeros((4096,) if size is None else (8, size), dtype=DTYPES[dtype])
    offsets = torch.zeros(9, dtype=torch.int64) if size is None else None
    result = torch.zeros(
        1, dtype=torch.int64 if op == "best_of_n" else DTYPES[dtype if "gradient" in op else "float32"]
    )
    upstream = torch.zeros(1) if "gradient" in op else None
    engine.score_groups(op, x, offsets, offsets if "probabilities" in op else None, upstream, 1.0, result)


def preference_metrics(dtype: str, full: bool = False) -> None:
    from pyalign.kernels import scoring as engine

    x, number, mask = torch.zeros(4096, dtype=DTYPES[dtype]), torch.zeros(4096), torch.ones(4096, dtype=torch.bool)
    tensors = MetricTensors(number, number, mask, torch.zeros(4096, dtype=torch.int64)) if full else MetricTensors()
    engine.preference_metrics(x, x, tensors, MetricOptions(3 if full else 1, 10, 1.0, 0.0))


def cases(everything: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of engine functions, each under a name."""
    for divergence in DIVERGENCES:
        yield f"distill {divergence}", lambda d=divergence: distill(d, "bfloat16")
    yield "distill float32", lambda: distill("forward_kl", "float32")
    yield "distill narrowed", lambda: distill("forward_kl", "float32", out="bfloat16")
    yield "distill full", lambda: distill("jsd", "bfloat16", full=True)
    yield "distill padded", lambda: distill("reverse_kl", "bfloat16", 50257, 50304)
    yield "distill odd", lambda: distill("forward_kl", "bfloat16", 50257, 50257)
    for tail in TAILS:
        yield f"topk_distill {tail}", lambda t=tail: topk_distill("forward_kl", t, "bfloat16")
    yield "topk_distill narrowed", lambda: topk_distill("forward_kl", "bucket", "float32", out="bfloat16")
    yield "topk_distill full", lambda: topk_distill("jsd", "bucket", "bfloat16", full=True)
    for stage in ("fold", "sum", "map"):
        yield f"distill {stage}", lambda s=stage: slice_stage(s, "jsd", "bfloat16")
    yield "outside", lambda: outside("bfloat16", gradient=False)
    yield "outside gradient", lambda: outside("bfloat16", gradient=True)
    yield "logprob slice", lambda: logprob_slice("bfloat16")
    yield "cross_entropy slice", lambda: cross_entropy_slice("float32")
    yield "topk", lambda: topk("bfloat16", 50, 32000)
    yield "scale", lambda: scale("bfloat16")
    for form in PAIR_LOSSES:
        yield f"pair_loss {form}", lambda f=form: pair_loss(f, "bfloat16")
    yield "pair_loss full", lambda: pair_loss("logistic", "bfloat16", full=True)
    for method in RANK_METHODS:
        yield f"ranked_loss {method}", lambda m=method: ranked_loss(m, "bfloat16", 16)
        yield f"ranked_loss packed {method}", lambda m=method: ranked_loss(m, "float32")
    yield "score_gradient", lambda: score_gradient("bfloat16", packed=False)
    yield "score_gradient packed", lambda: score_gradient("bfloat16", packed=True)
    yield "logprob", lambda: logprob("bfloat16")
    yield "logprob float32", lambda: logprob("float32")
    yield "logprob softcap", lambda: logprob("bfloat16", softcap=30.0)
    yield "logprob odd", lambda: logprob("bfloat16", 50257)
    yield "logprob_gradient", lambda: logprob_gradient("bfloat16")
    yield "cross_entropy", lambda: cross_entropy("bfloat16", "bfloat16")
    yield "cross_entropy narrowed", lambda: cross_entropy("float32", "bfloat16")
    yield "cross_entropy full", lambda: cross_entropy("float32", "bfloat16", full=True)
    yield "reward_scores", lambda: reward_scores("bfloat16", packed=False)
    yield "reward_scores packed", lambda: reward_scores("float32", packed=True)
    yield "reward_gradient", lambda: reward_gradient("bfloat16")
    for op in GROUP_OPS:
        yield op, lambda o=op: score_groups(o, "bfloat16", 16)
        yield f"{op} packed", lambda o=op: score_groups(o, "float32")
    yield "preference_metrics", lambda: preference_metrics("float32")
    yield "preference_metrics full", lambda: preference_metrics("bfloat16", full=True)
    if not everything:
        return
    for dtype, divergence, full in product(DTYPES, DIVERGENCES, (False, True)):
        name = f"{divergence} {dtype}{' full' if full else ''}"
        yield f"distill {name}", lambda a=(divergence, dtype), f=full: distill(*a, full=f)
        for tail in TAILS:
            yield (
                f"topk_distill {tail} {name}",
                lambda a=(divergence, tail, dtype), f=full: topk_distill(*a, k=256, full=f),
            )
    for dtype, divergence, stage in product(DTYPES, DIVERGENCES, ("fold", "sum", "map")):
        yield f"distill {stage} {divergence} {dtype}", lambda a=(stage, divergence, dtype): slice_stage(*a)
    for dtype, gradient in product(DTYPES, (False, True)):
        yield f"outside {gradient} {dtype}", lambda a=(dtype, gradient): outside(*a)
    for dtype in DTYPES:
        yield f"logprob slice {dtype}", lambda d=dtype: logprob_slice(d)
        yield f"cross_entropy slice {dtype}", lambda d=dtype: cross_entropy_slice(d)
    for dtype, (k, vocab) in product(DTYPES, ((1, 128256), (50, 151936), (256, 262144))):
        yield f"topk {k} {dtype}", lambda a=(dtype, k, vocab): topk(*a)
        yield f"scale {dtype}", lambda d=dtype: scale(d)
    for dtype, form in product(DTYPES, PAIR_LOSSES):
        yield f"pair_loss {form} {dtype} full", lambda a=(form, dtype): pair_loss(*a, full=True)
    for dtype, method, size in product(DTYPES, RANK_METHODS, (4, 4096, None)):
        yield f"ranked_loss {method} {size} {dtype} full", lambda a=(method, dtype, size): ranked_loss(*a, full=True)
    for dtype, width in product(DTYPES, (64, 577, 4096)):
        yield f"reward_scores {width} {dtype}", lambda a=(dtype, True, width): reward_scores(*a)
        yield f"reward_scores padded {width} {dtype}", lambda a=(dtype, False, width): reward_scores(*a)
        yield f"reward_gradient {width} {dtype}", lambda a=(dtype, width): reward_gradient(*a)
    for dtype, op, size in product(DTYPES, GROUP_OPS, (4, 4096, None)):
        yield f"{op} {size} {dtype}", lambda a=(op, dtype, size): score_groups(*a)
    for dtype, full in product(DTYPES, (False, True)):
        yield f"preference_metrics {dtype} {full}", lambda a=(dtype, full): preference_metrics(*a)
    for dtype, vocab, softcap in product(DTYPES, (4096, 50257, 128256), (None, 30.0)):
        yield f"logprob {vocab} {softcap} {dtype}", lambda a=(dtype, vocab, softcap): logprob(*a)
        yield f"logprob_gradient {vocab} {softcap} {dtype}", lambda a=(dtype, vocab, softcap): logprob_gradient(*a)
    for dtype, out, full in product(DTYPES, DTYPES, (False, True)):
        yield f"cross_entropy {dtype} {out} {full}", lambda a=(dtype, out, full): cross_entropy(*a)


def compile_kernel(kernel: Any, warps: int, arguments: dict[str, Any], target: Any) -> Any:
    """What a launch with these arguments would compile, for another target than this machine's."""
    import triton
    from triton.compiler import ASTSource

    pointers = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int64: "*i64",
        torch.int32: "*i32",
        torch.uint8: "*u8",
        torch.float64: "*fp64",
    }
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    assert set(arguments) == set(kernel.arg_names)
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if name in constants or value is None:
            signature[name], values[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = pointers[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": True})


def spilled_bytes(compiled: Any) -> int:
    """Bytes of local memory per thread."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        spills = re.findall(r"\.vgpr_spill_count:\s+(\d+)", assembly)
        return sum(map(int, spills + re.findall(r"\.private_segment_fixed_size:\s+(\d+)", assembly)))
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert found, usage
    return sum(map(int, found))


def accesses(compiled: Any) -> dict[str, int]:
    """How many loads and stores of global memory move 16 bytes, and how many 2 bytes or fewer."""
    if "ptx" in compiled.asm:
        found = re.findall(r"\b(ld|st)\.global((?:\.\w+)*)", compiled.asm["ptx"])
        sizes = [(kind, "wide" if ".v4.b32" in size or ".v2.b64" in size else size) for kind, size in found]
        named = [(kind, "narrow" if size in (".b16", ".b8") else size) for kind, size in sizes]
    else:
        found = re.findall(r"\b(?:global|buffer)_(load|store)_(\w+)", compiled.asm["amdgcn"])
        size_names = {"dwordx4": "wide", "ushort": "narrow", "short": "narrow", "short_d16": "narrow"}
        named = [({"load": "ld", "store": "st"}[kind], size_names.get(size, size)) for kind, size in found]
    return {
        f"{size} {kind}": sum(one == (kind, size) for one in named)
        for kind in ("ld", "st")
        for size in ("wide", "narrow")
    }


def code(compiled: Any) -> dict[str, Any]:
    """Registers, shared memory and instructions; the SASS itself where it is NVIDIA's."""
    found = {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_count:\s+(\d+)", assembly)
        instructions = re.findall(r"^\t(?:v|s|ds|global|buffer)_\w+", assembly, re.MULTILINE)
        return {**found, "registers": int(registers), "instructions": len(instructions), "sass": ""}
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,) = re.findall(r"\bREG:(\d+)", said)
    opcodes = re.findall(r"/\*[0-9a-f]{4,6}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", said)
    instructions = sum(opcode != "NOP" for opcode in opcodes)
    return {**found, "registers": int(registers), "instructions": instructions, "sass": said}


def report(everything: bool, with_code: bool = False) -> list[dict[str, Any]]:
    """Compiles all kernels of all cases for all targets, each once."""
    from pyalign.kernels import common, logprob, ranking, scoring
    from pyalign.kernels import distill as engine
    from triton.backends.compiler import GPUTarget

    launches: list[tuple[Any, int, dict[str, Any]]] = []
    results: list[dict[str, Any]] = []

    def record(kernel: Any, programs: int, warps: int, **arguments: Any) -> None:
        launches.append((kernel, warps, arguments))

    for module in (common, engine, ranking, logprob, scoring):
        module.launch = record
    for name, (backend, architecture, warp_size) in TARGETS.items():
        engine.warp_size = logprob.warp_size = lambda device, size=warp_size: size
        seen: set[str] = set()
        for case, call in cases(everything):
            launches.clear()
            call()
            for kernel, warps, arguments in launches:
                compiled = compile_kernel(kernel, warps, arguments, GPUTarget(backend, architecture, warp_size))
                if compiled.hash in seen:
                    continue
                seen.add(compiled.hash)
                results.append(
                    {
                        "case": case,
                        "target": name,
                        "kernel": kernel.__name__,
                        "spilled": spilled_bytes(compiled),
                        **accesses(compiled),
                        **(code(compiled) if with_code else {}),
                    }
                )
    return results


def compiled_elsewhere(everything: bool) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, *(["everything"] if everything else [])]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout)


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    return compiled_elsewhere(everything=False)


def of(compiled: list[dict[str, Any]], target: str, case: str, kernel: str) -> dict[str, Any]:
    (one,) = [x for x in compiled if (x["target"], x["case"], x["kernel"]) == (target, case, kernel)]
    return one


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(compiled: list[dict[str, Any]], target: str):
    kernels: defaultdict[str, set[str]] = defaultdict(set)
    for one in compiled:
        kernels[one["target"]].add(one["kernel"])
    assert kernels[target] == KERNELS


def test_registers_suffice(compiled: list[dict[str, Any]]):
    assert [x for x in compiled if x["spilled"] > (SET_ASIDE if x["kernel"] == "select_kernel" else 0)] == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("case", "kernel", "scalars"),
    [
        *((f"distill {divergence}", "distill_kernel", 0) for divergence in DIVERGENCES),
        ("distill float32", "distill_kernel", 0),
        ("distill full", "distill_kernel", 1),  # the target's logit
        ("distill padded", "distill_kernel", 0),  # a ragged vocabulary in rows that are not
        ("topk_distill bucket", "topk_distill_kernel", 2),  # the logits of the entries, the residual
        ("topk_distill drop", "topk_distill_kernel", 1),
        ("distill map", "distill_kernel", 1),
        ("outside gradient", "outside_kernel", 0),
        ("topk", "lanes_kernel", 0),
        ("scale", "scale_kernel", 0),
        ("logprob", "logprob_kernel", 1),  # the target's logit
        ("logprob_gradient", "logprob_kernel", 0),
        ("cross_entropy", "logprob_kernel", 1),
    ],
)
def test_rows_are_read_and_written_in_16_byte_vectors(
    compiled: list[dict[str, Any]], target: str, case: str, kernel: str, scalars: int
):
    found = of(compiled, target, case, kernel)
    masks = 1  # of a byte per row
    agreement = 2  # written per row, or cleared
    log_probs = 1 if "topk_distill" in case else 0
    assert found["wide ld"] > 0
    assert found["narrow ld"] <= scalars + masks + log_probs
    if kernel == "lanes_kernel" or case == "logprob":
        return
    assert found["wide st"] > 0
    assert found["narrow st"] <= (agreement if "full" in case else 0)


@pytest.mark.slow
def test_everything_compiles_and_registers_suffice():
    pytest.importorskip("triton")
    results = compiled_elsewhere(everything=True)
    assert {x["kernel"] for x in results} == KERNELS
    assert [x for x in results if x["spilled"] > SET_ASIDE] == []


if __name__ == "__main__":
    json.dump(report("everything" in sys.argv[1:], "code" in sys.argv[1:]), sys.stdout)
