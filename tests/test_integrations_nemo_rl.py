"""NeMo-RL's losses: the formulas of its classes, written out here in float64, and where ours differ from them."""

import enum
import math
from types import SimpleNamespace

import foreign_ranks
import pytest
import torch
import torch.nn.functional as F
from foreign_support import assert_same, numbers, pretend, stored

from pyalign.integrations.nemo_rl import DistillationLossFn, DPOLossFn, PreferenceLossFn

P, S, V, K = 4, 6, 11, 3
SAMPLES = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
TOKENS = (numbers(2 * P, S, seed=1) > -0.5).double()
REWARDS = numbers(2 * P, 1, seed=2)
LOGPROBS = -numbers(2 * P, S - 1, seed=3).abs()
DATA = {
    "sample_mask": SAMPLES,
    "token_mask": TOKENS,
    "reference_policy_logprobs": -numbers(2 * P, S, seed=4).abs(),
    "input_ids": torch.zeros(2 * P, S, dtype=torch.int64),
}
SEQUENCES, GLOBAL_TOKENS = torch.tensor(10.0), torch.tensor(25.0)


def masked_mean(x, mask, denominator):
    return (x * mask).sum() / (denominator + 1e-8)


def their_preference(rewards, beta=1.0):
    cost = -F.logsigmoid(beta * (rewards[::2] - rewards[1::2])) * SAMPLES[::2]
    return masked_mean(cost, SAMPLES[::2], SEQUENCES / 2)


def their_dpo(logprobs, cfg):
    mask = TOKENS[:, 1:]
    rewards = ((logprobs - DATA["reference_policy_logprobs"][:, :-1]) * mask).sum(-1)
    if cfg.preference_average_log_probs:
        rewards = rewards / mask.sum(-1).clamp(min=1)
    nll = -(logprobs * mask * SAMPLES[:, None]).sum(-1)
    if cfg.sft_average_log_probs:
        nll = nll / (mask * SAMPLES[:, None]).sum(-1).clamp(min=1)
    sft = masked_mean(nll[::2], SAMPLES[::2], SEQUENCES / 2)
    preference = their_preference(rewards, cfg.reference_policy_kl_penalty)
    return cfg.preference_loss_weight * preference + cfg.sft_loss_weight * sft


def dpo_config(**options):
    return SimpleNamespace(
        **{
            "reference_policy_kl_penalty": 0.3,
            "preference_loss_weight": 0.7,
            "sft_loss_weight": 0.0,
            "preference_average_log_probs": False,
            "sft_average_log_probs": False,
            **options,
        }
    )


def close(loss, **options):
    """To the 1e-8 that they add to a denominator."""
    return pytest.approx(loss.item(), rel=1e-7, **options)


def test_preference_is_its_formula():
    assert_same(
        lambda x: PreferenceLossFn()(x, DATA, SEQUENCES, None)[0],
        lambda x: their_preference(x.squeeze(-1)),
        REWARDS,
    )


def test_preference_metrics():
    rewards = REWARDS.clone()
    rewards[1] = rewards[0]  # a tie
    loss, metrics = PreferenceLossFn()(rewards, DATA, SEQUENCES, None)
    chosen, rejected, valid = rewards[::2, 0], rewards[1::2, 0], SAMPLES[::2]
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected)
    assert metrics == {
        "loss": close(loss),
        "accuracy": close((right * valid).sum() / 5),
        "rewards_chosen_mean": close((chosen * valid).sum() / 5),
        "rewards_rejected_mean": close((rejected * valid).sum() / 5),
        "num_valid_samples": 3.0,
    }


@pytest.mark.parametrize("preference_average", [False, True])
@pytest.mark.parametrize(("sft_weight", "sft_average"), [(0.0, False), (0.4, False), (0.4, True)])
def test_dpo_is_its_formula(preference_average, sft_weight, sft_average):
    cfg = dpo_config(
        preference_average_log_probs=preference_average, sft_loss_weight=sft_weight, sft_average_log_probs=sft_average
    )
    assert_same(
        lambda x: DPOLossFn(cfg)(x, DATA, SEQUENCES, GLOBAL_TOKENS)[0],
        lambda x: their_dpo(x, cfg),
        LOGPROBS,
    )


def test_dpo_metrics_hold_both_parts():
    cfg = dpo_config(sft_loss_weight=0.4)
    loss, metrics = DPOLossFn(cfg)(LOGPROBS, DATA, SEQUENCES, None)
    assert metrics["loss"] == close(loss)
    assert 0.7 * metrics["preference_loss"] + 0.4 * metrics["sft_loss"] == close(loss)
    assert set(metrics) == {
        "loss", "sft_loss", "preference_loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean",
        "num_valid_samples",
    }  # fmt: skip
    _, metrics = DPOLossFn(dpo_config())(LOGPROBS, DATA, SEQUENCES, None)
    assert metrics["sft_loss"] == 0.0


def test_masked_rows_and_tokens_are_not_read():
    """0 times NaN is NaN in theirs."""
    cfg = dpo_config(sft_loss_weight=0.4)
    counted = (TOKENS[:, 1:] != 0) & (SAMPLES[:, None] != 0)
    logprobs = torch.where(counted, LOGPROBS, math.nan)
    assert their_dpo(logprobs, cfg).isnan()
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = DPOLossFn(cfg)(leaf, DATA, SEQUENCES, None)
    loss.backward()
    assert loss.item() == close(their_dpo(LOGPROBS, cfg))
    assert (leaf.grad[~counted] == 0).all()
    assert all(math.isfinite(x) for x in metrics.values())
    rewards = torch.where(SAMPLES[:, None] != 0, REWARDS, math.nan)
    assert PreferenceLossFn()(rewards, DATA, SEQUENCES, None)[0].item() == close(their_preference(REWARDS[:, 0]))


def test_no_valid_sequence_is_a_differentiable_zero():
    data = {**DATA, "sample_mask": torch.zeros_like(SAMPLES)}
    logprobs = LOGPROBS.clone().requires_grad_()
    loss, metrics = DPOLossFn(dpo_config(sft_loss_weight=0.4))(logprobs, data, torch.tensor(0.0), None)
    loss.backward()
    assert loss.item() == 0.0
    assert metrics["accuracy"] == 0.0
    assert logprobs.grad.abs().max() == 0.0


STUDENT = numbers(2 * P, S, V, seed=5, scale=1.5)
TEACHER, IDS = stored(2 * P, S, vocab=V, k=K)
DISTILL = {**DATA, "teacher_topk_logits": TEACHER + 2.0, "teacher_topk_indices": IDS}


def distill_config(kl_type="forward", weight=0.3, outside=False):
    return SimpleNamespace(kl_type=kl_type, mixed_kl_weight=weight, zero_outside_topk=outside)


def their_distillation(logits, cfg):
    if cfg.zero_outside_topk:
        log_q = torch.log_softmax(logits, -1).gather(-1, IDS)
    else:
        log_q = torch.log_softmax(logits.gather(-1, IDS), -1)
    log_p = torch.log_softmax(DISTILL["teacher_topk_logits"], -1)[:, :-1]
    log_q = log_q[:, :-1]
    forward, reverse = log_p.exp() * (log_p - log_q), log_q.exp() * (log_q - log_p)
    share = {"forward": 1.0, "reverse": 0.0, "mixed": cfg.mixed_kl_weight}[cfg.kl_type]
    cost = (share * forward + (1 - share) * reverse).sum(-1)
    return masked_mean(cost, TOKENS[:, 1:] * SAMPLES[:, None], GLOBAL_TOKENS)


@pytest.mark.parametrize(
    "cfg",
    [
        distill_config("forward"),
        distill_config("reverse"),
        distill_config("mixed"),
        distill_config("mixed", 0.0),
        distill_config("mixed", 1.0),
        distill_config("forward", outside=True),
    ],
    ids=lambda cfg: f"{cfg.kl_type}-{cfg.mixed_kl_weight}-{cfg.zero_outside_topk}",
)
def test_distillation_is_its_formula(cfg):
    assert_same(
        lambda x: DistillationLossFn(cfg)(x, DISTILL, SEQUENCES, GLOBAL_TOKENS)[0],
        lambda x: their_distillation(x, cfg),
        STUDENT,
    )


@pytest.mark.slow
def test_distillation_over_a_split_vocabulary(pool):
    cfg = distill_config("mixed")
    student = numbers(2 * P, S, V + 1, seed=6).requires_grad_()
    loss = their_distillation(student, cfg)
    loss.backward()
    inputs = student.detach(), DISTILL, GLOBAL_TOKENS, vars(cfg), loss.detach(), student.grad
    pool(foreign_ranks.RANKS).run(foreign_ranks.nemo_rl, *inputs)


def test_distillation_metrics():
    loss, metrics = DistillationLossFn(distill_config())(STUDENT, DISTILL, SEQUENCES, GLOBAL_TOKENS)
    assert metrics == {"loss": close(loss), "num_valid_samples": 2 * P}


def test_the_last_position_and_masked_tokens_are_not_read():
    student = STUDENT.clone()
    student[:, -1] = math.nan
    student[:, :-1][(TOKENS[:, 1:] * SAMPLES[:, None]) == 0] = math.nan
    cfg = distill_config()
    loss, _ = DistillationLossFn(cfg)(student, DISTILL, SEQUENCES, GLOBAL_TOKENS)
    assert loss.item() == close(their_distillation(STUDENT, cfg))


def test_logits_longer_than_the_teachers_sequence_lose_their_end():
    """A packed sequence is padded, and NeMo-RL cuts what it packed beside the logits alone."""
    longer = torch.cat([STUDENT, torch.full_like(STUDENT[:, :3], math.nan)], 1)
    data = {**DISTILL, "token_mask": torch.cat([TOKENS, torch.ones_like(TOKENS[:, :2])], 1)}
    cfg = distill_config()
    loss, _ = DistillationLossFn(cfg)(longer, data, SEQUENCES, GLOBAL_TOKENS)
    assert loss.item() == close(their_distillation(STUDENT, cfg))
    with pytest.raises(ValueError, match=r"logits: got shape \(8, 3, 11\); wanted at least 6 positions"):
        DistillationLossFn(cfg)(STUDENT[:, : S // 2], DISTILL, SEQUENCES, GLOBAL_TOKENS)


@pytest.mark.parametrize("kl_type", ["reverse", "mixed"])
def test_zero_outside_topk_is_refused_with_a_reverse_kl(kl_type):
    with pytest.raises(ValueError, match=f"zero_outside_topk: got True; wanted False with kl_type '{kl_type}'"):
        DistillationLossFn(distill_config(kl_type, outside=True))


def test_refused():
    with pytest.raises(ValueError, match=r"kl_type: got 'both'"):
        DistillationLossFn(distill_config("both"))
    with pytest.raises(ValueError, match=r"mixed_kl_weight: got 1.5"):
        DistillationLossFn(distill_config("mixed", 1.5))
    with pytest.raises(ValueError, match=r"sft_loss_weight: got -1.0"):
        DPOLossFn(dpo_config(sft_loss_weight=-1.0))
    with pytest.raises(ValueError, match=r"rewards: got shape \(7,\); wanted \(2P,\)"):
        PreferenceLossFn()(REWARDS[:7], DATA, SEQUENCES, None)
    with pytest.raises(ValueError, match=r"sample_mask: got shape \(8, 1\)"):
        PreferenceLossFn()(REWARDS, {"sample_mask": SAMPLES[:, None]}, SEQUENCES, None)
    with pytest.raises(ValueError, match=r"token_mask\[:, 1:\]: got shape"):
        DPOLossFn(dpo_config())(LOGPROBS[:, 1:], DATA, SEQUENCES, None)


def test_kinds_are_nemo_rls_own(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"this needs NeMo-RL"):
        _ = PreferenceLossFn().input_type
    kinds = enum.Enum("LossInputType", "LOGIT LOGPROB DISTILLATION")
    types = enum.Enum("LossType", "TOKEN_LEVEL SEQUENCE_LEVEL")
    pretend(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossInputType=kinds, LossType=types)
    for loss, kind, type_ in (
        (PreferenceLossFn(), kinds.LOGIT, types.SEQUENCE_LEVEL),
        (DPOLossFn(dpo_config(), True), kinds.LOGPROB, types.SEQUENCE_LEVEL),
        (DistillationLossFn(distill_config()), kinds.LOGIT, types.TOKEN_LEVEL),
    ):
        assert (loss.input_type, loss.loss_type) == (kind, type_)
    assert DPOLossFn(dpo_config(), True).use_fused_linear_logprobs is True  # what NeMo-RL asks a loss for
