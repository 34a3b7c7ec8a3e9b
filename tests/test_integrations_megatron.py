"""Megatron-LM's sparse KL: its formula for one rank, written out here in float64, and where ours differs."""

import math

import foreign_ranks
import pytest
import torch
from foreign_support import assert_same, numbers, stored

from pyalign.integrations.megatron import topk_kl_div

S, B, V, K = 4, 3, 17, 5
STUDENT = numbers(S, B, V, seed=1, scale=1.5)
LOGPROBS, IDS = stored(S, B, vocab=V, k=K)
SENTINEL = -1e3


def theirs(student, logprobs, ids, ghost, eps=1e-8):
    student = student - student.detach().amax(-1, keepdim=True)
    log_q_all = student - student.exp().sum(-1, keepdim=True).log()
    mask = ((ids >= 0) & (ids < student.shape[-1]) & (logprobs != SENTINEL)).to(student.dtype)
    log_q = log_q_all.gather(-1, ids.clamp(0, student.shape[-1] - 1))
    if ghost:
        q_rest = (1 - (log_q.exp() * mask).sum(-1, keepdim=True)).clamp(min=eps).log()
        p_rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=eps).log()
        log_q, logprobs = torch.cat([log_q, q_rest], -1), torch.cat([logprobs, p_rest], -1)
        mask = torch.cat([mask, torch.ones_like(mask[..., :1])], -1)
    return (mask * logprobs.exp() * (logprobs - log_q)).sum(-1).transpose(0, 1).contiguous()


def ours(student, logprobs, ids, ghost):
    return topk_kl_div(student, logprobs, ids, 1, 0, None, add_ghost_token=ghost)


@pytest.mark.parametrize("ghost", [False, True])
def test_it_is_their_formula(ghost):
    assert_same(lambda x: ours(x, LOGPROBS, IDS, ghost), lambda x: theirs(x, LOGPROBS, IDS, ghost), STUDENT)
    assert ours(STUDENT, LOGPROBS, IDS, ghost).shape == (B, S)
    assert ours(STUDENT, LOGPROBS, IDS, ghost).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ghost", [False, True])
def test_entries_that_a_nucleus_left_out_do_not_count(dtype, ghost):
    """Their writer marks them with -1000, and with ids that the packed file turns into garbage."""
    logprobs, ids = LOGPROBS.to(dtype), IDS.clone()
    logprobs[1:, :, 3:], ids[1:, :, 3:] = SENTINEL, 131071
    exact = logprobs.double()
    expected = theirs(STUDENT, exact, ids, ghost)
    value = ours(STUDENT, logprobs, ids, ghost)
    torch.testing.assert_close(value, expected, rtol=0.0, atol=1e-12 if dtype == torch.float32 else 0.01)


def test_the_ghost_token_makes_a_divergence_of_a_sum_that_can_be_negative():
    sharper = torch.full_like(STUDENT, -6.0).scatter(-1, IDS, LOGPROBS + 4.0)  # little is left for the rest
    assert ours(sharper, LOGPROBS, IDS, False).min() < -1e-3
    assert ours(sharper, LOGPROBS, IDS, True).min() >= 0.0


def test_a_student_peaked_on_the_entries_keeps_its_gradient():
    """1 minus a float32 sum is 0 there: their clamp at 1e-8 holds the ghost token's gradient back."""
    student = (STUDENT.scatter_add(-1, IDS, torch.full_like(LOGPROBS, 22.0))).float()

    def gradient(function, x):
        x = x.clone().requires_grad_()
        function(x, LOGPROBS.float().to(x.dtype), IDS, True).sum().backward()
        return x.grad.double()

    exact = gradient(lambda *arguments: theirs(*arguments, eps=0.0), student.double())
    scale = exact.abs().max()
    assert (gradient(theirs, student) - exact).abs().max() > 0.01 * scale
    assert (gradient(ours, student) - exact).abs().max() < 1e-5 * scale


@pytest.mark.slow
def test_the_ranks_of_a_split_vocabulary_add_up_to_the_whole(pool):
    student, mask = numbers(S, B, V + 1, seed=4, scale=1.5), (numbers(B, S, seed=5) > -0.5).double()
    logprobs, ids = stored(S, B, vocab=V + 1, k=K)
    expected = {}
    for ghost in (False, True):
        leaf = student.clone().requires_grad_()
        loss = (theirs(leaf, logprobs, ids, ghost) * mask).sum()
        loss.backward()
        expected[ghost] = loss.detach(), leaf.grad
    pool(foreign_ranks.RANKS).run(foreign_ranks.megatron, student, logprobs, ids, mask, expected)


def test_the_logits_are_left_alone():
    before = STUDENT.float()
    logits = before.clone()
    ours(logits, LOGPROBS, IDS, True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("tail", [False, True])
def test_large_logits(tail):
    student = torch.where(STUDENT > 0, 1e4, -1e4).float().requires_grad_()
    ours(student, LOGPROBS, IDS, tail).sum().backward()
    assert student.grad.isfinite().all()


def test_refused_arguments():
    with pytest.raises(ValueError, match=r"tp_rank: got 1; wanted 0 with tp_size=1"):
        topk_kl_div(STUDENT, LOGPROBS, IDS, 1, 1, None)
    with pytest.raises(ValueError, match=r"tp_group: got no group; wanted one in which this process is rank 1 of 2"):
        topk_kl_div(STUDENT, LOGPROBS, IDS, 2, 1, None)
    with pytest.raises(ValueError, match=r"student_logits: got 2 dimensions; wanted at least 3"):
        topk_kl_div(STUDENT[0], LOGPROBS[0], IDS[0], 1, 0, None)
    with pytest.raises(ValueError, match=r"holds an index twice"):
        topk_kl_div(STUDENT, LOGPROBS, torch.zeros_like(IDS), 1, 0, None)
    assert math.isfinite(theirs(STUDENT, LOGPROBS, torch.zeros_like(IDS), True).sum())  # theirs counts it K times
