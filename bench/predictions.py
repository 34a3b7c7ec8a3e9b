"""What we expect of the kernels on an H100, written down before they run there.

    python bench/predictions.py             writes bench/PREDICTIONS.md
    python bench/predictions.py measure     on a GPU: each case beside its prediction; bench/gpu_check.sh runs it
    python bench/predictions.py measure -k "linear"

A prediction is made of what the work must move and multiply, of the passes over memory that the kernel makes by its
source, and of the instructions in its loops as compiled (tests/budgets/cuda.json).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pyalign
from pyalign.benchmark import copy_function, interleaved

HERE = Path(__file__).resolve().parent
BYTES_PER_S, FLOP_PER_S = 3.0e12, 8.0e14  # an H100's copy and bfloat16 products, as measured
ISSUED_PER_S = 132 * 4 * 32 * 1.755e9  # instructions of threads: 132 multiprocessors, 4 warps a cycle, 1.755 GHz
OF_COPY, OF_GEMM = 0.85, 0.88  # the share of these rates that we expect
SPECIAL_PER_S = ISSUED_PER_S / 8  # exponentials, logarithms, reciprocals: 16 a cycle and multiprocessor
OF_ISSUE = 0.75  # the share of either rate that we expect
CALL = 40e-6  # forward and backward of the Python layer, beside which a small kernel is nothing
REFUTED = 1.5  # times the expected time


class Case(NamedTuple):
    name: str
    kernel: str  # as in tests/budgets/cuda.json; empty: products of the vendor's library
    loops: tuple[tuple[int, int], ...]  # which of its hot loops run over every element, and elements a round
    elements: int
    needed: int  # bytes that the work must move
    moved: int  # bytes that our kernels move
    flops: int
    passes: str
    why: str
    run: Callable[[], Callable[[], object]]
    launch_bound: bool = False
    unrolled: tuple[tuple[int, int], ...] = ()  # which of its unrolled passes, as of the loops

    @property
    def floor(self) -> float:
        return max(self.needed / BYTES_PER_S, self.flops / FLOP_PER_S)

    def total(self, of_loops: str, of_unrolled: str) -> float:
        """The sum of a figure over all elements."""
        per_element = 0.0
        for figure, passes in ((of_loops, self.loops), (of_unrolled, self.unrolled)):
            per_element += sum(BUDGETS[self.kernel][figure][i] / elements for i, elements in passes)
        return per_element * self.elements

    @property
    def issue(self) -> float:
        """Seconds to issue what the loops run."""
        return self.total("ways round", "unrolled passes") / ISSUED_PER_S

    @property
    def special(self) -> float:
        """Seconds of the units that take exponentials, logarithms and reciprocals."""
        return self.total("special functions", "unrolled special functions") / SPECIAL_PER_S

    @property
    def expected(self) -> float:
        """The larger of memory and arithmetic, and a quarter of the smaller for what doesn't overlap; products after or
        before, never beside them."""
        memory = self.moved / BYTES_PER_S / OF_COPY
        arithmetic = max(self.issue, self.special) / OF_ISSUE
        rows = max(memory, arithmetic) + min(memory, arithmetic) / 4
        return max(rows + self.flops / FLOP_PER_S / OF_GEMM, CALL if self.launch_bound else 0.0)


BUDGETS: dict[str, Any] = json.loads((HERE.parent / "tests" / "budgets" / "cuda.json").read_text())["sections"]["90"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = False  # set by tests: every case at a size that a CPU runs in a moment


def size(*shape: int) -> tuple[int, ...]:
    return tuple(min(n, 24) for n in shape) if SMALL else shape


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*size(*shape), device=DEVICE, dtype=torch.float32).to(dtype)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return normal(*shape, dtype=dtype).requires_grad_()


def training(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> Callable[[], object]:
    def run() -> None:
        for x in leaves:
            x.grad = None
        loss().backward()

    return run


def indices(count: int, bound: int) -> torch.Tensor:
    (count, bound) = size(count, bound)
    return torch.randint(0, bound, (count,), device=DEVICE)


# ---- Cases ----


def distillation(
    rows: int,
    vocab: int,
    divergence: str,
    struct: str,
    loops: tuple[tuple[int, int], ...],
    why: str,
    unrolled: tuple[tuple[int, int], ...] = (),
) -> Case:
    def run() -> Callable[[], object]:
        student, teacher = leaf(rows, vocab), normal(rows, vocab)
        return training(lambda: pyalign.distillation_loss(student, teacher, divergence=divergence), student)

    needed = 3 * 2 * rows * vocab
    return Case(
        f"{divergence} loss + gradient, {rows} x {vocab}",
        f"distill_clusters<bfloat16, bfloat16, {struct}>",
        loops,
        rows * vocab,
        needed,
        needed,
        0,
        f"1 read of both rows into a cluster's shared memory, {len(loops + unrolled)} passes over it, 1 write",
        why,
        run,
        unrolled=unrolled,
    )


def topk_case(rows: int, vocab: int, dtype: torch.dtype, name: str) -> Case:
    def run() -> Callable[[], object]:
        x = normal(rows, vocab, dtype=dtype)
        return lambda: pyalign.topk_logprobs(x, min(50, x.shape[1]))

    width, vector = dtype.itemsize, 16 // dtype.itemsize
    needed, sampled = width * rows * vocab, 4  # one round of so many
    return Case(
        f"topk_logprobs k = 50, {name}, {rows} x {vocab}",
        f"topk_rows<{'float' if name == 'float32' else name}>",
        ((0, 4 * sampled * vector), (1, 3 * vector)),
        rows * vocab,
        needed,
        needed,
        0,
        "1 read of the row; the quarter of it that is the sample once more, from L1 or L2",
        "two blocks of 512 threads a multiprocessor: the selection in one row overlaps with the loads of another",
        run,
    )


def topk_loss(rows: int, vocab: int) -> Case:
    def run() -> Callable[[], object]:
        student = leaf(rows, vocab)
        stored = pyalign.topk_logprobs(normal(rows, vocab), min(50, student.shape[1] - 1))
        return training(lambda: pyalign.topk_distillation_loss(student, stored), student)

    needed = 2 * 2 * rows * vocab + 50 * 12 * rows
    return Case(
        f"top-k loss + gradient, k = 50, {rows} x {vocab}",
        "topk_distill_clusters<bfloat16, bfloat16>",
        ((3, 8), (-1, 8)),
        rows * vocab,
        needed,
        needed,
        0,
        "1 read of the row into a cluster's shared memory, 2 passes over it, 1 write",
        "two blocks a multiprocessor, one row at work while the next arrives; a row's entries are one block's work",
        run,
    )


def logprob_case(rows: int, vocab: int, backward: bool) -> Case:
    def run() -> Callable[[], object]:
        logits = leaf(rows, vocab) if backward else normal(rows, vocab)
        targets = indices(rows, vocab)
        if not backward:
            return lambda: pyalign.token_logprobs(logits, targets, return_entropy=True)

        def loss() -> torch.Tensor:
            logprob, entropy = pyalign.token_logprobs(logits, targets, return_entropy=True)
            return logprob.sum() + 0.01 * entropy.sum()

        return training(loss, logits)

    needed = (3 if backward else 1) * 2 * rows * vocab
    return Case(
        f"token_logprobs with entropy{', forward + backward' if backward else ''}, {rows} x {vocab}",
        "logprob_rows<bfloat16, bfloat16, false>",
        ((0, 16), (2, 16)) if backward else ((0, 16),),
        rows * vocab,
        needed,
        needed,
        0,
        "1 read forward, 1 read and 1 write backward, from the stored state" if backward else "1 read",
        "4 blocks of 256 threads, 2 vectors each in flight: 32 KB a multiprocessor; rows end while others stream",
        run,
    )


def linear_case(name: str, sides: int, products: int, hidden: int, vocab: int, tokens: int) -> Case:
    def run() -> Callable[[], object]:
        x, weight, other = leaf(tokens, hidden), leaf(vocab, hidden), normal(vocab, hidden)
        targets, teacher = indices(tokens, vocab), normal(tokens, hidden)
        losses: dict[str, Callable[[], torch.Tensor]] = {
            "linear_distillation_loss": lambda: pyalign.linear_distillation_loss(x, weight, teacher, other),
            "linear_token_logprobs": lambda: pyalign.linear_token_logprobs(x, weight, targets).sum(),
            "linear_cross_entropy": lambda: pyalign.linear_cross_entropy(x, weight, targets),
        }
        return training(losses[name], x, weight)

    # float32 logits: each projection writes them, the row kernels read them and write the gradient in 16 bits, as its
    # products read it; the weight's gradient in float32, per chunk
    matrix, head = 4 * tokens * vocab, 4 * vocab * hidden
    projections = products - 2
    moved = 2 * projections * matrix + matrix // 2 + 2 * 2 * head
    needed = 2 * sides * hidden * (tokens + vocab) + 2 * hidden * (tokens + vocab)
    return Case(
        f"{name} forward + backward, {tokens} x {hidden} -> {vocab}",
        "",
        (),
        tokens * vocab,
        needed,
        moved,
        products * 2 * tokens * hidden * vocab,
        f"{products} products by the vendor's library in chunks of 4096 tokens, float32 logits between them",
        "products at 88 % of 800 TFLOP/s; logits in float32 pass through memory between them, which doesn't overlap",
        run,
    )


def pairs_case(pairs: int) -> Case:
    def run() -> Callable[[], object]:
        chosen, rejected = leaf(pairs), leaf(pairs)
        return training(lambda: pyalign.pairwise_preference_loss(chosen, rejected), chosen, rejected)

    moved = pairs * (2 * 2 + 4 + 4 + 2 * 2)
    return Case(
        f"pairwise_preference_loss forward + backward, {pairs} pairs",
        "pair_items<bfloat16>",
        ((0, 1),),
        pairs,
        pairs * 8,
        moved,
        0,
        "1 launch forward (loss, gradient, sum), 1 backward",
        "kernels take a few microseconds: the time is the Python layer's",
        run,
        True,
    )


def groups_case(groups: int, members: int) -> Case:
    def run() -> Callable[[], object]:
        scores = leaf(groups, members, dtype=torch.float32)
        ranks = torch.arange(scores.shape[1], device=DEVICE).expand_as(scores).contiguous()
        return training(lambda: pyalign.ranked_preference_loss(scores, ranks), scores)

    entries, threads = groups * members, 4 if members < 256 else 16
    return Case(
        f"ranked_preference_loss forward + backward, {groups} x {members}",
        f"rank_pairs<float, {threads}>",
        ((1, 4),),
        entries * members,
        entries * (4 + 8 + 4),
        entries * (4 + 8 + 3 * 4 + 2 * 4),
        0,
        "1 launch forward, each ordered pair computed by both of its entries; 1 backward",
        "small groups are the Python layer's time; one group of thousands is arithmetic",
        run,
        True,
    )


def reward_case(sequences: int, length: int, width: int) -> Case:
    def run() -> Callable[[], object]:
        hidden, head = leaf(sequences, length, width), leaf(width, dtype=torch.float32)
        return training(lambda: pyalign.reward_scores(hidden, head).sum(), hidden, head)

    moved = 2 * sequences * length * width + 3 * 2 * sequences * width
    return Case(
        f"reward_scores forward + backward, {sequences} x {length} x {width}",
        "reward_heads<bfloat16>",
        (),
        sequences * length * width,
        moved,
        moved,
        0,
        "reads the last tokens' rows; backward clears the hidden states' gradient and writes those rows",
        "a memset and small launches",
        run,
        True,
    )


def wins_case(members: int) -> Case:
    def run() -> Callable[[], object]:
        scores = normal(1, members, dtype=torch.float32)
        return lambda: pyalign.win_probabilities(scores)

    moved = 4 * members * members
    return Case(
        f"win_probabilities, one group of {members}",
        "win_matrix<float>",
        (),
        members * members,
        moved,
        moved,
        0,
        "scores stay in cache; 1 write of the matrix in 4-byte stores, a warp's side by side",
        "writes alone, beside an exponential and a division per entry",
        run,
        True,
    )


def metrics_case(pairs: int) -> Case:
    def run() -> Callable[[], object]:
        chosen, rejected = normal(pairs, dtype=torch.float32), normal(pairs, dtype=torch.float32)
        return lambda: pyalign.preference_metrics(chosen, rejected)

    cells, warps = 11, 8
    return Case(
        f"preference_metrics, {pairs} pairs",
        "pair_metrics<float>",
        ((0, 1), (1, 1)),
        # every pair is looked at by the warp of each cell, 11 cells over 8 warps; most of them stop at once
        pairs * -(-cells // warps),
        8 * pairs,
        8 * pairs,
        0,
        "1 read; tiles of 1024 pairs in shared memory, each looked through once per bin",
        "arithmetic over tiles, not memory",
        run,
        True,
    )


def cases() -> list[Case]:
    kl = "two blocks a multiprocessor, one row pair at work while the next arrives; memory bounds it"
    reverse = "the loss is known from the fold: no third pass, and one exponential less in the second"
    third = "a third pass: the slope needs a sum over the row first; it finds q - p's sign in registers"
    longer = "rows of 1 MB leave room for one stage: copies overlap with the other block's arithmetic alone"
    jsd = "a third pass, which finds log m/q in registers: 6 values of MUFU a pair, 8 if it took them again"
    two, fold, sum_and_map = ((1, 8), (9, 8)), ((1, 8),), ((0, 8), (9, 8))
    bfloat16 = torch.bfloat16
    return [
        distillation(8192, 128256, "forward_kl", "ForwardKL", two, kl),
        distillation(8192, 151936, "forward_kl", "ForwardKL", two, kl),
        distillation(4096, 262144, "forward_kl", "ForwardKL", two, longer),
        distillation(8192, 128256, "reverse_kl", "ReverseKL", two, reverse),
        distillation(8192, 128256, "jsd", "JensenShannon", fold, jsd, sum_and_map),
        distillation(8192, 128256, "tvd", "TotalVariation", fold, third, sum_and_map),
        topk_case(8192, 128256, bfloat16, "bfloat16"),
        topk_case(8192, 128256, torch.float32, "float32"),
        topk_loss(8192, 128256),
        logprob_case(8192, 151936, False),
        logprob_case(8192, 151936, True),
        linear_case("linear_distillation_loss", 2, 4, 4096, 128256, 8192),
        linear_case("linear_token_logprobs", 1, 4, 4096, 128256, 8192),
        linear_case("linear_cross_entropy", 1, 3, 4096, 128256, 8192),
        pairs_case(4096),
        groups_case(4096, 16),
        groups_case(1, 4096),
        reward_case(64, 512, 1024),
        wins_case(4096),
        metrics_case(10_000_000),
    ]


# ---- The page ----

HEAD = """# Predictions for an H100

Written by `python bench/predictions.py` before any of these kernels ran on a GPU. On a GPU machine,
`bench/gpu_check.sh build predictions` builds for its GPU, measures every line and prints it beside its prediction and
the copy's rate in the same run; `python bench/predictions.py measure` does so where pyalign is built.

- **needed**: bytes that the work must move, inputs read and results written once. **floor**: the larger of that at
  {bandwidth:.1f} TB/s (copied) and the products at {flops:.0f} TFLOP/s bfloat16.
- **issue**: time to issue the instructions that aligned rows without targets run in the kernel's loops ("ways round" in
  `tests/budgets/cuda.json`, sm_90), at the peak of {issued:.1f} T a second. **MUFU**: that of their exponentials,
  logarithms and reciprocals in the units that take them, {special:.2f} T a second. We expect {of_issue:.0%} of either
  rate. Losses are those of rows that differ: near convergence a JSD takes twice the instructions.
- **expected**: the larger of memory at {of_copy:.0%} of a copy and arithmetic, and a quarter of the smaller; products
  at {of_gemm:.0%} of their rate are added. Small calls take {call:.0f} us of Python.
- **refuted** by more than {refuted} x the expected time: then the reason in the last column is wrong, and a profile
  says what is right. Less than the floor means that the measurement is wrong.

| case | needed | GFLOP | floor | issue | MUFU | expected | refuted beyond | share of floor |
|---|---|---|---|---|---|---|---|---|
"""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-4 else f"{seconds * 1e3:.2f} ms"


def amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def page(found: Sequence[Case]) -> str:
    head = HEAD.format(
        bandwidth=BYTES_PER_S / 1e12,
        flops=FLOP_PER_S / 1e12,
        issued=ISSUED_PER_S / 1e12,
        special=SPECIAL_PER_S / 1e12,
        of_issue=OF_ISSUE,
        of_copy=OF_COPY,
        of_gemm=OF_GEMM,
        call=CALL * 1e6,
        refuted=REFUTED,
    )
    lines = [
        f"| {x.name} | {amount(x.needed)} | {f'{x.flops / 1e9:.0f}' if x.flops else ''} | {milliseconds(x.floor)} | "
        f"{milliseconds(x.issue) if x.loops else ''} | {milliseconds(x.special) if x.loops else ''} | "
        f"{milliseconds(x.expected)} | "
        f"{milliseconds(REFUTED * x.expected)} | {x.floor / x.expected:.0%} |"
        for x in found
    ]
    reasons = ["", "| case | kernel | over memory | why |", "|---|---|---|---|"]
    reasons += [f"| {x.name} | {x.kernel or 'products'} | {x.passes} | {x.why} |" for x in found]
    return head + "\n".join([*lines, *reasons]) + "\n"


# ---- Measuring ----


def verdict(case: Case, seconds: float) -> str:
    if seconds < 0.95 * case.floor:
        return "FASTER THAN ITS FLOOR: the measurement or the floor is wrong"
    return "REFUTED" if seconds > REFUTED * case.expected else "as expected"


def measure(found: Sequence[Case]) -> None:
    """Each case alone, in turns with a copy that says what this GPU reaches."""
    device = torch.device(DEVICE)
    for case in found:
        step = case.run()
        copy, copied = copy_function(torch.empty(size(1 << 28)[0], device=device))
        times = interleaved({"ours": step, "copy": copy}, device, rounds=11)
        rate = copied / times["copy"] / 1e12
        print(
            f"{case.name:<64} {times['ours'] * 1e3:9.3f} ms, expected {case.expected * 1e3:9.3f}, floor "
            f"{case.floor * 1e3:9.3f}: {verdict(case, times['ours'])} (copy {rate:.2f} TB/s)",
            flush=True,
        )
        del step, copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["write", "measure"], default="write")
    parser.add_argument("-k", default="", help="only the cases whose name holds this")
    options = parser.parse_args()
    found = [case for case in cases() if options.k in case.name]
    if options.action == "write":
        (HERE / "PREDICTIONS.md").write_text(page(cases()))
    elif DEVICE != "cuda":
        sys.exit("no GPU that torch sees: predictions of an H100 are measured on one")
    else:
        measure(found)


if __name__ == "__main__":
    main()
