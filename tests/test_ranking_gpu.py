"""What only a GPU can show of the preference losses: groups and items over many blocks, which meet at counters."""

from __future__ import annotations

import pytest
import torch
from distill_support import GPU, ON_GPU, Engine, name_of, over
from ranking_support import METHODS, assert_close, evaluate, ranks, scores, truth

from pyalign import pairwise_preference_loss, ranked_preference_loss

pytestmark = pytest.mark.skipif(not GPU, reason="no GPU")
on_gpu = over(ON_GPU)

# Up to 32 entries a warp sorts out their stages, up to 4,096 shared memory holds them.
SIZES = (0, 1, 2, 31, 32, 33, 500, 0, 4096, *(3,) * 200, 5000, 1, 70, 0)


def mixture(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, ranks with ties and absent entries, and offsets of groups of all sizes."""
    offsets = torch.tensor((0, *SIZES)).cumsum(0)
    count = int(offsets[-1])
    order = torch.cat([ranks(size, most=max(size // 2, 3), seed=i) for i, size in enumerate(SIZES)])
    return scores(count).to(device), order.to(device), offsets.to(device)


@on_gpu
@pytest.mark.smoke
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_groups_of_all_sizes_at_once(engine: Engine, method: str, reduction: str):
    x, order, offsets = mixture(engine.device)
    with engine():
        ours = [
            evaluate(ranked_preference_loss, x, constants=(order, offsets), reduction=reduction, **METHODS[method])
            for _ in range(2)
        ]
    assert torch.equal(ours[0].loss, ours[1].loss)  # and the counters are as they were
    assert torch.equal(ours[0].gradients[0], ours[1].gradients[0])
    # In float64, by the CPU's kernels: plain torch would fill all groups up to the largest.
    constants = (order.cpu(), offsets.cpu())
    exact = evaluate(
        ranked_preference_loss, x.cpu().double(), constants=constants, reduction=reduction, **METHODS[method]
    )
    assert_close(ours[0], exact, torch.float32, slack=4.0)


@on_gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [64, 255, 256, 2000])
def test_dense_groups_over_several_blocks(engine: Engine, method: str, size: int):
    x, order = scores(7, size).to(engine.device), ranks(7, size, most=size).to(engine.device)
    with engine():
        ours = evaluate(ranked_preference_loss, x, constants=(order,), **METHODS[method])
    assert_close(
        ours, truth(ranked_preference_loss, x, constants=(order,), **METHODS[method]), torch.float32, slack=4.0
    )


@on_gpu
@pytest.mark.parametrize("pairs", [4096, 4097, 100_000, 5_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_many_pairs(engine: Engine, dtype: torch.dtype, pairs: int):
    chosen, rejected = (scores(pairs, seed=i, dtype=dtype).to(engine.device) for i in (1, 2))
    mask = torch.arange(pairs, device=engine.device) % 3 > 0
    with engine():
        ours = [evaluate(pairwise_preference_loss, chosen, rejected, mask=mask) for _ in range(2)]
    assert torch.equal(ours[0].loss, ours[1].loss)
    assert_close(ours[0], truth(pairwise_preference_loss, chosen, rejected, mask=mask), dtype, slack=2.0)
