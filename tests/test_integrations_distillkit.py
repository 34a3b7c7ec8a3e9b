"""DistillKit's divergences: its formulas, written out here in float64, and where ours differ from them."""

import math
from types import SimpleNamespace

import pytest
import torch
from foreign_support import assert_same, numbers, pretend, stored

from pyalign.integrations import distillkit
from pyalign.integrations.distillkit import (
    JSDLoss,
    KLDLoss,
    MissingProbabilityHandling,
    TVDLoss,
    sparse_js_div,
    sparse_kl_div,
    sparse_tvd,
)

V, K = 13, 4
ZERO, UNIFORM = MissingProbabilityHandling
STUDENT = numbers(2, 5, V, seed=1, scale=1.5)
VALUES, IDS = stored(2, 5, vocab=V, k=K)
MASK = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], dtype=torch.bool)
FUNCTIONS = {"kl": sparse_kl_div, "jsd": sparse_js_div, "tvd": sparse_tvd}
CLASSES = {"kl": KLDLoss, "jsd": JSDLoss, "tvd": TVDLoss}


def their_sparse(
    kind, logits, ids, values, mask, missing, log_target=True, temperature=1.0, of_target=1.0, of_student=1.0, eps=1e-8
):
    """Their get_logprobs and the three inner functions, the sum over tokens."""
    student = torch.log_softmax(logits * (of_student / temperature), -1).gather(-1, ids)
    alpha = of_target / temperature
    tempered = alpha * values
    normaliser = tempered.logsumexp(-1, keepdim=True)
    if missing is UNIFORM:
        assert log_target
        leftover = (1 - values.exp().sum(-1, keepdim=True)).clamp(0, 1)
        normaliser = (tempered.exp().sum(-1, keepdim=True) + leftover**alpha).log()
        if alpha == 1.0:
            normaliser = torch.zeros_like(normaliser)
    teacher = tempered - normaliser
    p, q = teacher.exp(), student.exp()
    p_rest, q_rest = 1 - p.sum(-1), 1 - q.sum(-1)
    if kind == "kl":
        cost = (p * (teacher - student)).sum(-1)
        if missing is UNIFORM:
            log_p_rest, log_q_rest = (torch.log1p(-x.sum(-1).clamp(eps, 1 - eps)) for x in (p, q))
            cost = cost + log_p_rest.exp() * (log_p_rest - log_q_rest)
    elif kind == "jsd":
        middle = (0.5 * (p + q)).log()
        first, second = (p * (teacher - middle)).sum(-1), (q * (student - middle)).sum(-1)
        if missing is UNIFORM:
            log_rest = (0.5 * (p_rest + q_rest)).log()
            first, second = first + p_rest * (p_rest.log() - log_rest), second + q_rest * (q_rest.log() - log_rest)
        else:
            second = second + q_rest * math.log(2.0)
        cost = 0.5 * (first + second)
    else:
        outside = (p_rest - q_rest).abs() if missing is UNIFORM else q_rest
        cost = 0.5 * ((p - q).abs().sum(-1) + outside)
    return (cost if mask is None else cost * mask).sum()


def their_dense(kind, logits, teacher, mask, temperature):
    q_log, p_log = (torch.log_softmax(x / temperature, -1) for x in (logits, teacher))
    p, q = p_log.exp(), q_log.exp()
    if kind == "kl":
        cost = (p * (p_log - q_log)).sum(-1)
    elif kind == "jsd":
        middle = torch.logaddexp(p_log, q_log) - math.log(2.0)
        cost = 0.5 * ((p * (p_log - middle)).sum(-1) + (q * (q_log - middle)).sum(-1))
    else:
        cost = 0.5 * (p - q).abs().sum(-1)
    return (cost * mask).sum()


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("missing", [ZERO, UNIFORM])
@pytest.mark.parametrize(
    "temperatures", [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.0, 2.0, 1.0), (1.5, 1.0, 2.0)], ids=lambda x: str(x)
)
def test_sparse_functions_are_their_formulas(kind, missing, temperatures):
    temperature, of_target, of_student = temperatures
    options = {"temperature": temperature}

    def ours(x):
        return FUNCTIONS[kind](
            x, IDS, VALUES, MASK, missing=missing, target_generation_temperature=of_target,
            student_generation_temperature=of_student, **options,
        )  # fmt: skip

    def theirs(x):
        return their_sparse(kind, x, IDS, VALUES, MASK, missing, True, temperature, of_target, of_student)

    assert_same(ours, theirs, STUDENT)


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_teacher_logits_are_renormalised_over_their_entries(kind, temperature):
    logits = VALUES + 3.0

    def theirs(x):
        return their_sparse(kind, x, IDS, logits, None, ZERO, False, temperature)

    assert_same(lambda x: FUNCTIONS[kind](x, IDS, logits, log_target=False, temperature=temperature), theirs, STUDENT)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("missing", [ZERO, UNIFORM])
@pytest.mark.parametrize("num_items", [None, 11, torch.tensor(11)], ids=["counted", "int", "tensor"])
def test_classes_divide_by_the_items_and_multiply_by_the_temperature_squared(kind, missing, num_items):
    loss = CLASSES[kind](2.0, missing, sparse_chunk_length=2)
    signal = SimpleNamespace(sparse_ids=IDS, sparse_values=VALUES, log_values=True, generation_temperature=1.0)

    def ours(x):
        return loss(SimpleNamespace(logits=x), signal, MASK[..., None], None, num_items)

    def theirs(x):
        total = their_sparse(kind, x, IDS, VALUES, MASK, missing, True, 2.0)
        return total * 4.0 / (MASK.sum() if num_items is None else 11)

    assert_same(ours, theirs, STUDENT)


@pytest.mark.parametrize("kind", CLASSES)
def test_classes_over_a_dense_teacher(kind):
    teacher = numbers(2, 5, V, seed=2, scale=2.0)

    def theirs(x):
        return their_dense(kind, x, teacher, MASK, 2.0) * 4.0 / MASK.sum()

    def ours(x):
        return CLASSES[kind](2.0)(SimpleNamespace(logits=x), SimpleNamespace(logits=teacher), MASK[..., None])

    assert_same(ours, theirs, STUDENT)


def test_without_a_mask_every_token_counts():
    signal = SimpleNamespace(sparse_ids=IDS, sparse_values=VALUES, log_values=True, generation_temperature=1.0)
    loss = KLDLoss(1.0)(SimpleNamespace(logits=STUDENT), signal)
    torch.testing.assert_close(loss, their_sparse("kl", STUDENT, IDS, VALUES, None, ZERO) / 10)


def test_a_peaked_teacher_is_not_nan():
    """1 - 1e-8 is 1 in float32: their log of the mass outside is -inf, and 0 times it NaN."""
    student = STUDENT.float().requires_grad_()
    ids = torch.arange(K).expand(2, 5, K).contiguous()
    values = torch.tensor([0.0, -40.0, -41.0, -42.0]).expand(2, 5, K).contiguous()
    assert their_sparse("kl", student.detach(), ids, values, MASK, UNIFORM).isnan()
    loss = sparse_kl_div(student, ids, values, MASK, missing=UNIFORM)
    loss.backward()
    exact = -torch.log_softmax(STUDENT.float().double(), -1)[..., 0][MASK].sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("missing", [ZERO, UNIFORM])
def test_entries_without_probability_cost_nothing(missing):
    values, ids = VALUES.clone(), IDS.clone()
    values[..., -1] = -math.inf
    assert their_sparse("kl", STUDENT, ids, values, MASK, missing).isnan()
    expected = their_sparse("kl", STUDENT, ids[..., :-1], values[..., :-1], MASK, missing)
    if missing is UNIFORM:  # their mass outside holds the fourth entry as well, and so must the comparison
        q = torch.log_softmax(STUDENT, -1).gather(-1, ids).exp()
        p_rest = 1 - values.exp().sum(-1)
        expected = expected + (p_rest * ((1 - q[..., :-1].sum(-1)) / (1 - q.sum(-1))).log() * MASK).sum()
    torch.testing.assert_close(sparse_kl_div(STUDENT, ids, values, MASK, missing=missing), expected)
    ids[..., -1], values[..., -1] = -1, 5.0  # a missing entry's value is not read
    if missing is ZERO:
        torch.testing.assert_close(sparse_kl_div(STUDENT, ids, values, MASK, missing=missing), expected)


def test_masked_tokens_are_not_read():
    student = torch.where(MASK[..., None], STUDENT, math.nan)
    assert their_sparse("kl", student, IDS, VALUES, MASK, ZERO).isnan()
    torch.testing.assert_close(
        sparse_kl_div(student, IDS, VALUES, MASK), their_sparse("kl", STUDENT, IDS, VALUES, MASK, ZERO)
    )


def test_nothing_counted_is_a_differentiable_zero():
    student = STUDENT.clone().requires_grad_()
    signal = SimpleNamespace(sparse_ids=IDS, sparse_values=VALUES, log_values=True, generation_temperature=1.0)
    loss = KLDLoss(1.0)(SimpleNamespace(logits=student), signal, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.abs().max() == 0.0


def test_the_chunk_length_changes_nothing():
    whole = sparse_kl_div(STUDENT, IDS, VALUES, MASK)
    assert torch.equal(sparse_kl_div(STUDENT, IDS, VALUES, MASK, chunk_length=2), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 1e-6}, r"eps: got 1e-06; wanted 1e-8"),
        ({"missing": "average"}, r"missing: got 'average'; wanted one of 'zero', 'symmetric_uniform'"),
        ({"missing": UNIFORM, "log_target": False}, r"missing: got symmetric_uniform; wanted zero for teacher logits"),
        ({"temperature": 0.0}, r"temperature: got 0.0; wanted a finite number > 0"),
        ({"chunk_length": 0}, r"chunk_length: got 0; wanted None or an int >= 1"),
        ({"mask": MASK[..., None].expand(2, 5, 3)}, r"mask: got shape \(2, 5, 3\); wanted \(B, T\) or \(B, T, 1\)"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_kl_div(STUDENT, IDS, VALUES, **options)


def test_refused_arguments():
    with pytest.raises(ValueError, match=r"target_ids: got shape"):
        sparse_kl_div(STUDENT, IDS[..., :2], VALUES)
    with pytest.raises(TypeError, match=r"mask: got torch.float64; wanted bool or an integer dtype"):
        sparse_kl_div(STUDENT, IDS, VALUES, MASK.double())
    with pytest.raises(ValueError, match=r"holds an index twice"):
        sparse_kl_div(STUDENT, torch.zeros_like(IDS), VALUES)
    with pytest.raises(TypeError, match=r"signal: got SimpleNamespace; wanted a DenseSignal or a SparseSignal"):
        KLDLoss(1.0)(SimpleNamespace(logits=STUDENT), SimpleNamespace())
    with pytest.raises(ValueError, match=r"missing_probability_handling: got 'half'"):
        KLDLoss(1.0, "half")


def test_install_replaces_the_classes_of_the_same_names(monkeypatch):
    names = ["cross_entropy", "tvd", "kl", "jsd"]
    theirs = [type("Theirs", (), {"name": classmethod(lambda cls, name=name: name)}) for name in names]
    classes = list(theirs)
    pretend(monkeypatch, "distillkit.lossfuncs", ALL_LOSS_CLASSES=classes)
    distillkit.install()
    assert classes == [theirs[0], TVDLoss, KLDLoss, JSDLoss]  # the very list that the trainer holds
    del classes[1]
    with pytest.raises(RuntimeError, match=r"has no tvd"):
        distillkit.install()


def test_install_names_what_is_missing():
    with pytest.raises(ModuleNotFoundError, match=r"this needs DistillKit"):
        distillkit.install()
