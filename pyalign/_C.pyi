"""The compiled module: pointers as integers, sizes, strides and dtype codes; pyalign/_native.py calls it."""

from typing import Any

class _Engine:
    """What the submodules ``cpu`` and ``cuda`` offer; ``execution`` is a thread count or a stream."""

    def distill(
        self,
        student: tuple[int, ...],
        teacher: tuple[int, ...],
        tokens: tuple[int, ...],
        outputs: tuple[Any, ...],
        options: tuple[Any, ...],
        execution: int,
        /,
    ) -> None: ...
    def topk_distill(
        self,
        student: tuple[int, ...],
        teacher: tuple[Any, ...],
        tail: int,
        tokens: tuple[int, ...],
        outputs: tuple[Any, ...],
        options: tuple[Any, ...],
        execution: int,
        /,
    ) -> None: ...
    def topk(
        self,
        logits: tuple[int, ...],
        count: int,
        vocab: int,
        k: int,
        temperature: float,
        logprobs: int,
        indices: int,
        residual: int,
        execution: int,
        /,
    ) -> None: ...
    def scale(self, x: tuple[int, ...], count: int, width: int, factor: int, execution: int, /) -> None: ...
    def logprob(
        self,
        logits: tuple[int, ...],
        gradient: tuple[int, ...],
        tensors: tuple[int, ...],
        options: tuple[Any, ...],
        outputs: tuple[int, ...],
        execution: int,
        /,
    ) -> None: ...
    def pair_loss(
        self, tensors: tuple[int, ...], options: tuple[Any, ...], outputs: tuple[int, ...], execution: int, /
    ) -> None: ...
    def ranked_loss(
        self, tensors: tuple[int, ...], options: tuple[Any, ...], outputs: tuple[int, ...], execution: int, /
    ) -> None: ...
    def score_gradient(self, tensors: tuple[int, ...], execution: int, /) -> None: ...
    def reward_scores(
        self, hidden: tuple[int, ...], tensors: tuple[int, ...], outputs: tuple[int, ...], execution: int, /
    ) -> None: ...
    def reward_gradient(
        self, hidden: tuple[int, ...], tensors: tuple[int, ...], outputs: tuple[int, ...], execution: int, /
    ) -> None: ...
    def score_groups(self, arguments: tuple[Any, ...], execution: int, /) -> None: ...
    def preference_metrics(self, arguments: tuple[Any, ...], execution: int, /) -> None: ...

class _Cpu(_Engine):
    def widen(
        self, out: tuple[int, ...], count: int, width: int, a: int, b: int, dtype: int, add: bool, threads: int, /
    ) -> None: ...
    def bradley_terry(
        self,
        design: tuple[int, ...],
        units: tuple[int, ...],
        draw: tuple[int, ...],
        options: tuple[Any, ...],
        outputs: tuple[int, ...],
        threads: int,
        /,
    ) -> None: ...
    def invert(self, matrix: int, n: int, /) -> bool: ...
    def isa(self) -> str: ...
    def isas(self) -> list[str]: ...

class _Cuda(_Engine):
    pair_blocks: int  # kPairBlocks, kSharedEntries and kSortedBytes of csrc/common/ranking_args.h
    shared_entries: int
    sorted_bytes: int
    def laid_out_distill(
        self,
        student: tuple[int, ...],
        teacher: tuple[int, ...],
        tokens: tuple[int, ...],
        outputs: tuple[Any, ...],
        options: tuple[Any, ...],
        layout: tuple[int, int],
        stream: int,
        /,
    ) -> None: ...
    def laid_out_topk_distill(
        self,
        student: tuple[int, ...],
        teacher: tuple[Any, ...],
        tail: int,
        tokens: tuple[int, ...],
        outputs: tuple[Any, ...],
        options: tuple[Any, ...],
        layout: tuple[int, int],
        stream: int,
        /,
    ) -> None: ...
    def distill_layouts(self, vocab: int, dtype: int, divergence: int, device: int, /) -> list[tuple[int, int]]: ...
    def topk_distill_layouts(self, vocab: int, dtype: int, device: int, /) -> list[tuple[int, int]]: ...
    def explain_distill(self, vocab: int, dtype: int, layout: tuple[int, int], device: int, /) -> str: ...

cpu: _Cpu
cuda: _Cuda  # only where CUDA was compiled

def build_info() -> dict[str, Any]: ...
def getenv(name: str, /) -> str | None: ...
