"""OpenRLHF's losses: the formulas of its classes, written out here, and where ours differ from them."""

import math

import foreign_ranks
import pytest
import torch
import torch.nn.functional as F
from foreign_support import assert_same, numbers

from pyalign.integrations.openrlhf import DPOLoss, KDLoss, KTOLoss, LogExpLoss, PairWiseLoss

CHOSEN, REJECTED, MARGIN = numbers(7, seed=1), numbers(7, seed=2), numbers(7, seed=3).abs()
KL, REFERENCE = numbers(7, seed=4), [numbers(7, seed=i) for i in (5, 6, 7)]


@pytest.mark.parametrize("margin", [None, MARGIN, 0.5, torch.arange(7)], ids=["none", "tensor", "number", "integers"])
def test_pairwise_is_logsigmoid_of_the_difference_less_the_margin(margin):
    def theirs(chosen, rejected):
        return -F.logsigmoid(chosen - rejected - (0.0 if margin is None else margin)).mean()

    assert_same(lambda c, r: PairWiseLoss()(c, r, margin), theirs, CHOSEN, REJECTED)


def test_pairwise_takes_rewards_of_a_head_as_columns():
    column = PairWiseLoss()(CHOSEN[:, None], REJECTED[:, None], MARGIN[:, None])
    torch.testing.assert_close(column, PairWiseLoss()(CHOSEN, REJECTED, MARGIN))


def test_a_margin_of_another_shape_is_refused_and_not_broadcast():
    with pytest.raises(ValueError, match=r"margin: got shape \(7, 1\); wanted \(7,\)"):
        PairWiseLoss()(CHOSEN, REJECTED, MARGIN[:, None])
    with pytest.raises(ValueError, match=r"reject_reward: got shape"):
        PairWiseLoss()(CHOSEN, REJECTED[:, None])


def test_log_exp_is_its_formula_where_that_is_finite():
    assert_same(LogExpLoss(), lambda c, r: torch.log(1 + torch.exp(r - c)).mean(), CHOSEN, REJECTED)


def test_log_exp_does_not_overflow():
    chosen = torch.tensor([0.0, 0.0], requires_grad=True)
    rejected = torch.tensor([100.0, 1000.0])
    assert torch.log(1 + torch.exp(rejected - chosen)).mean().isinf()  # theirs
    loss = LogExpLoss()(chosen, rejected)
    loss.backward()
    assert loss.item() == pytest.approx(550.0)
    torch.testing.assert_close(chosen.grad, torch.tensor([-0.5, -0.5]))


def test_log_exp_refuses_the_margin_that_openrlhf_ignores():
    with pytest.raises(ValueError, match=r"margin: got Tensor; wanted None"):
        LogExpLoss()(CHOSEN, REJECTED, MARGIN)


@pytest.mark.parametrize(("smoothing", "ipo"), [(0.0, False), (0.2, False), (0.0, True)])
def test_dpo_is_its_formula(smoothing, ipo):
    def theirs(chosen, rejected):
        logits = (chosen - rejected) - (REFERENCE[0] - REFERENCE[1])
        if ipo:
            return ((logits - 1 / (2 * 0.3)) ** 2).mean()
        kept, flipped = F.logsigmoid(0.3 * logits), F.logsigmoid(-0.3 * logits)
        return (-kept * (1 - smoothing) - flipped * smoothing).mean()

    module = DPOLoss(0.3, smoothing, ipo)
    assert_same(lambda c, r: module(c, r, *REFERENCE[:2])[0], theirs, CHOSEN, REJECTED)


def test_dpo_unpacks_as_a_trainer_unpacks_it():
    chosen = CHOSEN.clone().requires_grad_()
    _, chosen_rewards, rejected_rewards = DPOLoss(0.3)(chosen, REJECTED, *REFERENCE[:2])
    torch.testing.assert_close(chosen_rewards, 0.3 * (CHOSEN - REFERENCE[0]))
    torch.testing.assert_close(rejected_rewards, 0.3 * (REJECTED - REFERENCE[1]))
    assert not chosen_rewards.requires_grad


def test_dpo_refuses_the_smoothing_that_ipo_has_no_use_for():
    with pytest.raises(ValueError, match=r"label_smoothing: got 0.1; wanted 0 with ipo=True"):
        DPOLoss(0.1, 0.1, True)


@pytest.mark.parametrize(("chosen", "rejected"), [(7, 7), (7, 3), (0, 7), (7, 0)])
@pytest.mark.parametrize("shift", [2.0, -2.0], ids=["kl above 0", "kl below 0"])
def test_kto_is_its_formula(chosen, rejected, shift):
    def theirs(policy_chosen, policy_rejected):
        kl = (KL + shift - REFERENCE[2]).mean().clamp(min=0)
        good = 1 - torch.sigmoid(0.3 * (policy_chosen - REFERENCE[0][:chosen] - kl))
        bad = 1 - torch.sigmoid(0.3 * (kl - (policy_rejected - REFERENCE[1][:rejected])))
        return torch.cat([1.5 * good, 0.5 * bad]).mean()

    module = KTOLoss(0.3, 1.5, 0.5, 1, torch.device("cpu"))

    def ours(policy_chosen, policy_rejected):
        references = REFERENCE[0][:chosen], REFERENCE[1][:rejected], REFERENCE[2]
        return module(policy_chosen, policy_rejected, KL + shift, *references)[0]

    sides = CHOSEN[:chosen], REJECTED[:rejected]
    if chosen and rejected:
        assert_same(ours, theirs, *sides)
    else:
        torch.testing.assert_close(ours(*sides), theirs(*sides))


def test_kto_returns_rewards_and_the_kl():
    module = KTOLoss(0.3, 1.0, 1.0, 1, torch.device("cpu"))
    _, chosen, rejected, kl = module(CHOSEN, REJECTED[:3], KL, REFERENCE[0], REFERENCE[1][:3], REFERENCE[2])
    torch.testing.assert_close(chosen, 0.3 * (CHOSEN - REFERENCE[0]))
    torch.testing.assert_close(rejected, 0.3 * (REJECTED - REFERENCE[1])[:3])
    torch.testing.assert_close(kl, (KL - REFERENCE[2]).mean().clamp(min=0))


@pytest.mark.slow
def test_kto_averages_its_kl_over_processes(pool):
    sides = [numbers(8, seed=i) for i in range(11, 17)]
    sides[2] = sides[2] + 2.0  # or the estimate is clamped
    pool(foreign_ranks.RANKS).run(foreign_ranks.kto, sides, (sides[2] - sides[5]).mean())


def test_kto_refuses_processes_that_are_not_there():
    with pytest.raises(ValueError, match=r"world_size: got 8; wanted 1, or torch.distributed's processes"):
        KTOLoss(0.1, 1.0, 1.0, 8, torch.device("cpu"))


STUDENT, TEACHER = numbers(2, 5, 11, seed=8), numbers(2, 5, 11, seed=9, scale=2.0)
LABELS = torch.tensor([[-100, 3, 4, 0, -100], [1, 2, -100, 10, 5]])


def their_kd(student, teacher, labels):
    product = torch.softmax(teacher, -1) * torch.log_softmax(student, -1)
    rows = product.masked_fill(student.isinf(), 0).sum(-1).view(-1)
    mask = (labels != -100).view(-1)
    return -(rows * mask).sum() / mask.sum()


def test_kd_is_the_cross_entropy_of_the_teacher():
    assert_same(lambda x: KDLoss()(x, TEACHER, LABELS), lambda x: their_kd(x, TEACHER, LABELS), STUDENT)


def test_kd_without_the_teachers_entropy_is_the_kl_with_the_same_gradient():
    entropy = torch.distributions.Categorical(logits=TEACHER).entropy()[LABELS != -100].mean()

    def theirs(student):
        return their_kd(student, TEACHER, LABELS) - entropy

    assert_same(lambda x: KDLoss(teacher_entropy=False)(x, TEACHER, LABELS), theirs, STUDENT)


def test_kd_where_both_sides_have_no_probability():
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[..., 4] = teacher[..., 4] = -math.inf
    expected = their_kd(student, teacher, LABELS)
    torch.testing.assert_close(KDLoss()(student, teacher, LABELS), expected)


def test_kd_of_nothing_is_a_differentiable_zero():
    nothing = torch.full_like(LABELS, -100)
    assert their_kd(STUDENT, TEACHER, nothing).isnan()
    student = STUDENT.clone().requires_grad_()
    loss = KDLoss()(student, TEACHER, nothing)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() == 0.0


def test_kd_is_exact_for_16_bit_logits():
    student, teacher = STUDENT.bfloat16(), TEACHER.bfloat16()
    expected = their_kd(student.double(), teacher.double(), LABELS)
    assert KDLoss()(student, teacher, LABELS).item() == pytest.approx(expected.item(), rel=1e-6)
