"""The examples with accelerate and Lightning: gradient accumulation is one large batch, cut into pieces."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from distributed_support import torchrun

EXAMPLES = Path(__file__).resolve().parents[1] / "bench" / "examples"
pytestmark = pytest.mark.usefixtures("unpoisoned", "single_thread")


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def accelerate_example(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield example("accelerate_distillation")
    AcceleratorState._reset_state(reset_partial_state=True)


def one_large_batch(module, texts_per_step, epochs):
    """Plain torch: the mean KL over the tokens of a whole step."""
    student, teacher = module.make_model(0), module.make_model(1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(epochs):
        for start in range(0, len(module.TEXTS), texts_per_step):
            batch = module.collate(module.TEXTS[start : start + texts_per_step])
            counted = batch.pop("labels")[:, 1:] != -100
            with torch.no_grad():
                p_log = torch.log_softmax(teacher(**batch).logits[:, :-1], -1)
            q_log = torch.log_softmax(student(**batch).logits[:, :-1], -1)
            loss = (p_log.exp() * (p_log - q_log)).sum(-1)[counted].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_accelerate_accumulates_the_gradient_of_one_large_batch(accelerate_example):
    accumulation = 8
    losses = accelerate_example.train(accumulation, epochs=2)
    expected = one_large_batch(accelerate_example, accumulation * accelerate_example.BATCH, epochs=2)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert len(losses) == 6  # the last step of each epoch has fewer micro-batches
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.slow
def test_accelerate_over_two_processes_takes_the_same_steps(accelerate_example):
    script = EXAMPLES / "accelerate_distillation.py"
    output = torchrun(script, "--accumulation", 4, size=2, ACCELERATE_USE_CPU="1")
    losses = [float(x) for x in re.findall(r"^step \d+: (\S+) over", output, re.MULTILINE)]
    expected = one_large_batch(accelerate_example, 2 * 4 * accelerate_example.BATCH, epochs=4)
    assert losses == pytest.approx(expected, rel=1e-3, abs=2e-6)


@pytest.mark.filterwarnings("ignore::Warning:lightning")  # they warn of CPUs, workers and torch's own deprecations
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_lightning_accumulates_the_gradient_of_one_large_batch():
    module = example("lightning_reward")
    whole, cut = module.train(micro_batch=32, epochs=2), module.train(micro_batch=8, epochs=2)
    assert cut.losses == pytest.approx(whole.losses, rel=1e-3)
    assert sum(cut.losses[-3:]) < 0.9 * sum(cut.losses[:3])
