"""The pool of processes that the tests of more than one rank run in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from distributed_support import Pool, WorkerError
from torch import Tensor

GetPool = Callable[[int], Pool]


class Answer(NamedTuple):
    rank: int
    total: Tensor


def total(values: Tensor, factor: int) -> Answer:
    result = values * factor * (1 + dist.get_rank())
    dist.all_reduce(result)
    return Answer(dist.get_rank(), result)


def process_id() -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def raises_on(rank: int, waits: bool) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"a message of rank {rank}")
    if waits:
        dist.barrier()


def waits_for_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(60)
    dist.barrier()


def dies() -> None:
    os._exit(3)


@pytest.fixture
def own_pool():
    pool = Pool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("size", [2, 3])
def test_functions_run_on_every_rank_with_a_process_group(pool: GetPool, size: int):
    answers = pool(size).run(total, torch.tensor([1.0, 2.0]), 2)
    assert [x.rank for x in answers] == list(range(size))
    for x in answers:
        assert x.total.tolist() == [size * (size + 1), 2 * size * (size + 1)]


def test_workers_are_started_once_and_have_one_thread_each(pool: GetPool):
    first, second = pool(2).run(process_id), pool(2).run(process_id)
    assert first == second
    assert len({os.getpid(), *(number for number, _ in first)}) == 3
    assert all(threads == 1 for _, threads in first)


def test_what_all_ranks_raise_is_raised_with_its_traceback_and_the_workers_go_on(pool: GetPool):
    before = pool(2).run(process_id)
    with pytest.raises(WorkerError, match=r"(?s)raises_on on 2 ranks.*rank 1: Traceback.*a message of rank 1"):
        pool(2).run(raises_on, 1, False)
    assert pool(2).run(process_id) == before


def test_a_rank_that_others_wait_for_ends_the_run_and_the_next_has_new_workers(own_pool: Pool):
    before = own_pool.run(process_id)
    with pytest.raises(WorkerError, match=r"(?s)rank 0: Traceback.*a message of rank 0.*rank 1: .*another rank"):
        own_pool.run(raises_on, 0, True)
    assert not {x for x, _ in before} & {x for x, _ in own_pool.run(process_id)}


def test_a_hang_is_an_error_that_says_where(own_pool: Pool):
    with pytest.raises(WorkerError, match=r"(?s)no answer in 1 s.*in waits_for_rank"):
        own_pool.run(waits_for_rank, 1, timeout=1.0)


def test_a_rank_that_dies_is_an_error(own_pool: Pool):
    with pytest.raises(WorkerError, match="died, exit code 3"):
        own_pool.run(dies)
    assert len(own_pool.run(process_id)) == 2
