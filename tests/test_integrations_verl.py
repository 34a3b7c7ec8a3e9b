"""verl's top-k forward KL: its formula, written out here in float64, and where ours differs from it."""

from types import SimpleNamespace

import pytest
import torch
from foreign_support import assert_same, numbers, pretend, stored

from pyalign.integrations import verl
from pyalign.integrations.verl import compute_forward_kl_topk

LENGTHS, V, K = (4, 7, 2), 19, 5
N = sum(LENGTHS)
STUDENT = numbers(1, N, V, seed=1, scale=1.5)
LOGPROBS, IDS = stored(N, vocab=V, k=K)
LAST = torch.tensor(LENGTHS).cumsum(0) - 1
CONFIG = SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=None, use_chunked_topk=False))


def nested(x, lengths=LENGTHS):
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(x, offsets=offsets)


def ours(student, logprobs=LOGPROBS, ids=IDS, config=CONFIG, **options):
    return compute_forward_kl_topk(student, nested(logprobs), nested(ids), config, "thd", **options)


def theirs(student, logprobs=LOGPROBS, ids=IDS):
    log_q_all = torch.log_softmax(student, -1)
    own = log_q_all.topk(ids.shape[-1], -1).indices
    log_q, log_p = log_q_all.gather(-1, ids[None]), logprobs[None]
    token_kl = log_p.exp() * (log_p - log_q)
    overlap = (ids[None].unsqueeze(-1) == own.unsqueeze(-2)).any(-1)
    return {
        "distillation_losses": token_kl.sum(-1),
        "student_mass": log_q.exp().sum(-1),
        "teacher_mass": log_p.exp().sum(-1),
        "overlap_count": overlap.sum(-1),
        "overlap_token_advantage": (-token_kl * overlap).sum(-1) / overlap.sum(-1).clamp(min=1),
    }


def bucket(student, logprobs=LOGPROBS, ids=IDS):
    """verl's sum and the term of everything outside."""
    q_rest = 1 - torch.log_softmax(student, -1).gather(-1, ids[None]).exp().sum(-1)
    p_rest = 1 - logprobs[None].exp().sum(-1)
    return theirs(student, logprobs, ids)["distillation_losses"] + p_rest * (p_rest / q_rest).log()


@pytest.mark.parametrize(
    ("tail", "formula"), [("drop", lambda x: theirs(x)["distillation_losses"]), ("bucket", bucket)]
)
def test_losses_are_their_formula_and_that_with_the_rest(tail, formula):
    assert_same(lambda x: ours(x, tail=tail)["distillation_losses"], formula, STUDENT)


def test_the_bucket_is_what_it_does_unless_told():
    assert torch.equal(ours(STUDENT)["distillation_losses"], ours(STUDENT, tail="bucket")["distillation_losses"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_figures_beside_the_loss_are_theirs(dtype):
    student = STUDENT.to(dtype)
    results, expected = ours(student), theirs(student.double())
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert value.shape == (1, N), name
        if name != "distillation_losses":
            assert not value.requires_grad
            torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)
    assert 0 < expected["overlap_count"].float().mean() < K, "some overlap, and not all"


def test_their_sum_is_negative_where_ours_is_not():
    """verl#7856: the clamp at 0 was active in 415 of 467 steps."""
    sharper = torch.full_like(STUDENT, -6.0).scatter(-1, IDS[None], LOGPROBS[None] + 4.0)
    clamped = theirs(sharper)["distillation_losses"] < 0
    assert clamped.float().mean() > 0.5
    losses = ours(sharper)["distillation_losses"]
    assert (losses[clamped] > 1e-3).all()


def test_rows_filled_with_one_id_have_no_teacher():
    """The last position of a sequence: ids [0] * K, log-probs [0.0] * K."""
    logprobs, ids = LOGPROBS.clone(), IDS.clone()
    logprobs[LAST], ids[LAST] = 0.0, 0
    student = STUDENT.clone().requires_grad_()
    results = ours(student, logprobs, ids)
    results["distillation_losses"].sum().backward()
    others = torch.ones(N, dtype=torch.bool).index_fill(0, LAST, False)
    for name, value in results.items():
        assert (value[0, LAST] == 0).all(), name
        torch.testing.assert_close(value[0, others], ours(STUDENT)[name][0, others], msg=name)
    assert student.grad[0, LAST].abs().max() == 0.0
    assert (student.grad[0, others].abs().amax(-1) > 0).all()


def test_one_entry_per_token():
    logprobs, ids = LOGPROBS[:, :1].contiguous(), IDS[:, :1].contiguous()
    assert_same(lambda x: ours(x, logprobs, ids)["distillation_losses"], lambda x: bucket(x, logprobs, ids), STUDENT)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_sequence_parallel_ranks_take_their_share(monkeypatch, size):
    """13 positions over 2, 3 and 5 ranks: the last rank's share is padded at the end."""
    rank = 0
    pretend(
        monkeypatch, "verl.utils.ulysses",
        get_ulysses_sequence_parallel_world_size=lambda: size,
        get_ulysses_sequence_parallel_rank=lambda: rank,
    )  # fmt: skip
    share = -(-N // size)
    padded = torch.cat([STUDENT, torch.ones(1, share * size - N, V, dtype=STUDENT.dtype)], 1)
    parts = []
    for rank in range(size):  # the lambda above reads it
        student = padded[:, rank * share : (rank + 1) * share].clone().requires_grad_()
        parts.append(ours(student)["distillation_losses"])
        parts[-1].sum().backward()
        assert student.grad.isfinite().all()
    whole = torch.cat(parts, 1)
    torch.testing.assert_close(whole[:, :N], bucket(STUDENT))
    assert (whole[:, N:] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tail": "clamp"}, "tail: got 'clamp'; wanted one of 'bucket', 'renormalize', 'drop'"),
        (
            {"config": SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=-10.0))},
            r"log_prob_min_clamp: got -10.0; wanted None",
        ),
        (
            {"logprobs": LOGPROBS[:, :3].contiguous()},
            r"teacher_topk_ids: got logits \(1, 13, 19\), log-probs \(13, 3\)",
        ),
        ({"student": STUDENT[:, 1:]}, r"teacher_topk_ids: got logits \(1, 12, 19\)"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ours(**{"student": STUDENT, **options})


def test_refused_layouts():
    with pytest.raises(ValueError, match=r"teacher_topk_log_probs: got a dense tensor; wanted a nested one"):
        compute_forward_kl_topk(STUDENT, LOGPROBS, nested(IDS), CONFIG, "thd")
    with pytest.raises(ValueError, match=r"data_format: got 'sbhd'"):
        compute_forward_kl_topk(STUDENT, nested(LOGPROBS), nested(IDS), CONFIG, "sbhd")
    twice = IDS.clone()
    twice[3, 1] = twice[3, 0]
    with pytest.raises(ValueError, match=r"row 3 holds an index twice"):
        ours(STUDENT, LOGPROBS, twice)


def test_install_puts_it_where_verl_looks(monkeypatch):
    module = pretend(monkeypatch, "verl.trainer.distillation.fsdp.losses", compute_forward_kl_topk=theirs)
    verl.install(tail="drop")
    arguments = {
        "student_logits": STUDENT, "teacher_topk_log_probs": nested(LOGPROBS), "teacher_topk_ids": nested(IDS),
        "config": CONFIG, "data_format": "thd",
    }  # fmt: skip
    results = module.compute_forward_kl_topk(**arguments)  # as verl calls it
    torch.testing.assert_close(results["distillation_losses"], theirs(STUDENT)["distillation_losses"])
    with pytest.raises(ValueError, match=r"tail: got 'clamp'"):
        verl.install(tail="clamp")
    monkeypatch.delattr(module, "compute_forward_kl_topk")
    with pytest.raises(AttributeError, match=r"has no compute_forward_kl_topk to replace"):
        verl.install()


def test_install_names_what_is_missing():
    with pytest.raises(ModuleNotFoundError, match=r"this needs verl"):
        verl.install()
