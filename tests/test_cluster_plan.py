"""Which rows a Hopper GPU's clusters hold, and how: make_plan of csrc/cuda/clusters.cu worked out for an H100. What is
missing is the driver's word on how many clusters fit at once. Plans are the same for every divergence.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from cuda_support import ROOT, asserted
from gpu_limits import LIMITS_OF, blocks_per_processor

SOURCE = "".join((ROOT / "csrc/cuda" / name).read_text() for name in ("cluster.cuh", "clusters.cu"))
H100 = LIMITS_OF["90"]
REGISTERS = 128  # what __launch_bounds__ leaves a thread


def constant(name: str) -> int:
    (value,) = re.findall(rf"\b{name} = (\d+)[,;]", SOURCE)
    return int(value)


THREADS, LARGEST, BLOCKS = constant("kClusterThreads"), constant("kMostCluster"), constant("kClusterBlocks")
WISHES = [(int(blocks), int(stages)) for blocks, stages in re.findall(r"Wish\{(\d), (\d)\}", SOURCE)]


class Plan(NamedTuple):
    cluster: int
    stages: int
    blocks: int  # a multiprocessor
    shared: int  # bytes of a block


def plan(vocab: int, width: int, rows: int = 2) -> Plan | None:
    """For ``rows`` rows of ``vocab`` entries of ``width`` bytes: a pair or, with a bitmap beside it, one."""
    bitmap = (vocab + 32 + 127) // 128 * 16 if rows == 1 else 0
    for blocks, stages in WISHES:
        for cluster in (1, 2, 4, 8, 16):
            capacity = -(-(vocab * width // 16) // cluster) + 1
            shared = asserted("cluster.cuh", "sizeof(ClusterShared)") + bitmap + stages * rows * capacity * 16
            fits = blocks * (shared + H100.shared_reserved) <= H100.shared
            if shared <= H100.shared_of_block and fits:
                return Plan(cluster, stages, blocks, shared)
    return None


def test_the_plans_are_tried_from_the_best():
    assert WISHES == [(2, 2), (2, 1), (1, 2), (1, 1)]
    assert LARGEST == 16


@pytest.mark.parametrize(
    ("vocab", "width", "expected"),
    [
        (8192, 2, (1, 2, 2)),
        (32000, 2, (4, 2, 2)),
        (50257, 2, (4, 2, 2)),
        (128256, 2, (16, 2, 2)),
        (151936, 2, (16, 2, 2)),
        (262144, 2, (16, 1, 2)),
        (32000, 4, (8, 2, 2)),
        (50257, 4, (8, 2, 2)),
        (100000, 4, (16, 2, 2)),
        (128256, 4, (16, 1, 2)),
    ],
)
def test_rows_of_real_vocabularies_are_held_so(vocab: int, width: int, expected: tuple[int, int, int]):
    found = plan(vocab, width)
    assert found is not None
    assert (found.cluster, found.stages, found.blocks) == expected


@pytest.mark.parametrize(
    ("vocab", "width", "expected"),
    [(32000, 2, (2, 2, 2)), (128256, 2, (8, 2, 2)), (262144, 2, (16, 2, 2)), (128256, 4, (16, 2, 2))],
)
def test_rows_for_a_top_k_teacher_are_held_so(vocab: int, width: int, expected: tuple[int, int, int]):
    found = plan(vocab, width, rows=1)
    assert found is not None
    assert (found.cluster, found.stages, found.blocks) == expected


@pytest.mark.parametrize(("width", "longest"), [(2, 262_144), (4, 100_000)])
def test_every_row_up_to_the_promised_length_is_held(width: int, longest: int):
    """16-bit rows to 262,144 entries, float32 rows to 100,000: by two blocks a multiprocessor, even."""
    for vocab in range(8192 // width, longest + 1, 509):
        found = plan(vocab, width)
        assert found is not None, vocab
        assert found.blocks == 2, vocab


def test_rows_beyond_a_clusters_memory_are_left_to_the_general_kernel():
    """A cluster of 16 holds 3.7 MB of both rows."""
    assert plan(470_000, 4) is None
    assert plan(940_000, 2) is None


@pytest.mark.parametrize(("vocab", "width"), [(8192, 2), (128256, 2), (262144, 2), (100000, 4)])
def test_a_multiprocessor_has_room_for_as_many_blocks_as_the_plan_says(vocab: int, width: int):
    """With the dynamic shared memory that they ask for."""
    found = plan(vocab, width)
    assert found is not None
    assert blocks_per_processor(H100, THREADS, REGISTERS, found.shared) >= found.blocks == BLOCKS
