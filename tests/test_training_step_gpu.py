"""Whole training steps in CUDA graphs: model, loss, backward and optimizer, replayed over new batches."""

from __future__ import annotations

import copy

import pytest
import torch
from distill_support import GPU, ON_GPU, Engine, over
from training_support import LOSSES, Batch, Model, Step, batch

pytestmark = pytest.mark.skipif(not GPU, reason="no GPU")


def on(engine: Engine, seed: int) -> Batch:
    return Batch(*(x.to(engine.device) for x in batch(torch.float32, seed=seed)))


@pytest.mark.parametrize("name", LOSSES)
@over(ON_GPU)
def test_a_captured_step_trains_like_an_eager_one(engine: Engine, name: str):
    step = Step(Model(LOSSES[name].reads, torch.float32), name).to(engine.device)
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2, capturable=True)
    given, items = on(engine, 0), torch.ones((), device=engine.device)

    def train(x: Batch, module: Step, update: torch.optim.Optimizer) -> torch.Tensor:
        update.zero_grad()
        loss = module(x, items)
        loss.backward()
        update.step()
        return loss.detach()

    with engine():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train(given, step, optimizer)
        torch.cuda.current_stream().wait_stream(stream)
        twin = copy.deepcopy(step)
        other = torch.optim.AdamW(twin.parameters(), lr=1e-2, capturable=True)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which shares no tensor
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # to wait for the GPU would be an error
            loss = train(given, step, optimizer)
        for seed in (1, 2, 3):
            x = on(engine, seed)
            for y, z in zip(given, x, strict=True):
                y.copy_(z)
            items.fill_(int(LOSSES[name].count(x)))
            graph.replay()
            torch.testing.assert_close(loss, train(x, twin, other), rtol=1e-5, atol=1e-6)
        for y, z in zip(step.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
