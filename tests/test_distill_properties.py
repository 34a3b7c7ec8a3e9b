"""What holds for every input: invariances, bounds and identities of the losses, over random ragged shapes.

Logits are multiples of 1/256, so that shifting them by a whole number rounds nothing, and so that there are ties. The
student's first logit is halfway between two of them: then no q_i is p_i (V > 1), where total variation has a kink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from distill_support import DIVERGENCES, TAILS, Engine, Outcome, evaluate, every_engine, generator
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pyalign import TopKLogprobs, distillation_loss, topk_distillation_loss, topk_logprobs

INF = math.inf


class Case(NamedTuple):
    """Random logits of both sides, as numbers that hypothesis can print and shrink."""

    tokens: tuple[int, ...]
    vocab: int
    seed: int
    scale: float
    dtype: torch.dtype
    engine: Engine

    def logits(self, *shape: int, seed: int = 0) -> Tensor:
        x = torch.randn(shape, generator=generator(4 * self.seed + seed), dtype=torch.float64) * self.scale
        return (x * 256).round().div(256).to(self.dtype).to(self.engine.device)

    @property
    def student(self) -> Tensor:
        x = self.logits(*self.tokens, self.vocab, seed=1)
        x[..., 0] += 1 / 512
        return x

    @property
    def teacher(self) -> Tensor:
        return self.logits(*self.tokens, self.vocab, seed=2)

    def per_token(self, seed: int = 3) -> Tensor:
        """(...) multiples of 1/4 in [0, 4)."""
        x = torch.randint(0, 16, self.tokens, generator=generator(4 * self.seed + seed))
        return (x.to(self.dtype) / 4).to(self.engine.device)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=generator(self.seed)).to(self.engine.device)

    @property
    def unit(self) -> float:
        """What rounding may do to a number of size 1: float64 is measured by float64."""
        return 2.0**-24 if self.dtype == torch.float32 else 2.0**-50


def cases(engine: Engine, tokens: Any = None, vocab: Any = None) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        tokens=st.lists(st.integers(0, 2 if engine.slow else 3), max_size=2).map(tuple) if tokens is None else tokens,
        vocab=st.integers(1, 40) | st.sampled_from([63, 64, 65, 257]) if vocab is None else vocab,
        seed=st.integers(0, 10**6),
        scale=st.sampled_from([0.1, 1.0, 4.0]),
        dtype=st.sampled_from([x for x in (torch.float32, torch.float64) if engine.serves(x)]),
        engine=st.just(engine),
    )


few = settings(max_examples=3, phases=[Phase.generate])  # shrinking is thousands of calls


def for_all(**strategies: Any) -> Callable[[Callable[..., None]], Callable[[Engine], None]]:
    """``check(engine, case, ...)`` of many cases on every engine, and of a few in Triton's interpreter."""
    shape = {name: strategies.pop(name, None) for name in ("tokens", "vocab")}

    def decorate(check: Callable[..., None]) -> Callable[[Engine], None]:
        @every_engine
        def test(engine: Engine) -> None:
            @settings(few if engine.slow else settings())
            @given(case=cases(engine, **shape), **strategies)
            def run(**values: Any) -> None:
                check(**values)

            with engine():
                run()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


divergences = st.sampled_from(DIVERGENCES)
tails = st.sampled_from(TAILS)
shares = st.floats(0, 1)
temperatures = st.sampled_from([0.5, 1.0, 1.7, 4.0])


def part(share: float, vocab: int) -> int:
    """A k with 1 <= k <= V."""
    return 1 + round(share * (vocab - 1))


def near(ours: Tensor, theirs: Tensor, bound: float) -> None:
    """Within ``bound``, absolutely and relatively."""
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound, equal_nan=False)


def same(ours: Outcome, theirs: Outcome, case: Case, slack: float = 1.0) -> None:
    slack *= 1 + case.scale  # log-ratios are that large, and round
    near(ours.loss, theirs.loss, 32 * slack * case.unit)
    near(ours.gradient, theirs.gradient, 32 * slack * case.unit)


# Invariances


@for_all(divergence=divergences, temperature=temperatures)
def test_the_loss_is_invariant_to_shifting_a_rows_logits_on_either_side(
    case: Case, divergence: str, temperature: float
):
    options = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    shift = 16 * (case.per_token() - 2)[..., None]  # multiples of 4, to 32
    plain = evaluate(case.student, case.teacher, **options)
    same(evaluate(case.student + shift, case.teacher, **options), plain, case)
    same(evaluate(case.student, case.teacher + shift, **options), plain, case)


@for_all(divergence=divergences, tail=tails, share=shares, temperature=temperatures)
def test_topk_losses_are_invariant_to_shifting_a_rows_logits_on_either_side(
    case: Case, divergence: str, tail: str, share: float, temperature: float
):
    options = {"divergence": divergence, "tail": tail, "reduction": "none"}
    shift = 16 * (case.per_token() - 2)[..., None]
    k = part(share, case.vocab)
    stored = topk_logprobs(case.teacher, k, temperature=temperature)
    shifted = topk_logprobs(case.teacher + shift, k, temperature=temperature)
    assert torch.equal(stored.indices, shifted.indices)
    plain = evaluate(case.student, stored, **options)
    same(evaluate(case.student + shift, stored, **options), plain, case)
    same(evaluate(case.student, shifted, **options), plain, case)


@for_all(divergence=divergences, share=shares, tail=tails)
def test_permuting_the_vocabulary_permutes_the_gradient(case: Case, divergence: str, share: float, tail: str):
    order = case.order(case.vocab)
    options = {"divergence": divergence, "reduction": "none"}
    plain = evaluate(case.student, case.teacher, **options)
    permuted = evaluate(case.student[..., order], case.teacher[..., order], **options)
    same(permuted, Outcome(plain.loss, plain.gradient[..., order]), case)

    stored = topk_logprobs(case.teacher, part(share, case.vocab))
    moved = stored._replace(indices=order.argsort()[stored.indices])
    plain = evaluate(case.student, stored, tail=tail, **options)
    permuted = evaluate(case.student[..., order], moved, tail=tail, **options)
    same(permuted, Outcome(plain.loss, plain.gradient[..., order]), case)


@for_all(share=shares, divergence=divergences, tail=tails)
def test_the_order_of_the_stored_entries_does_not_matter(case: Case, share: float, divergence: str, tail: str):
    stored = topk_logprobs(case.teacher, part(share, case.vocab))
    order = case.order(stored.indices.shape[-1])
    shuffled = stored._replace(logprobs=stored.logprobs[..., order], indices=stored.indices[..., order])
    options = {"divergence": divergence, "tail": tail, "reduction": "none"}
    same(evaluate(case.student, shuffled, **options), evaluate(case.student, stored, **options), case)


@for_all(divergence=divergences, tokens=st.integers(1, 5).map(lambda n: (n,)))
def test_permuting_the_tokens_permutes_the_losses_to_the_bit(case: Case, divergence: str):
    """A row's loss doesn't depend on the batch it is computed in."""
    order = case.order(case.tokens[0])
    stored = topk_logprobs(case.teacher, part(0.3, case.vocab))
    moved = TopKLogprobs(*(x[order] for x in stored[:3] if isinstance(x, Tensor)))
    for teacher, permuted in ((case.teacher, case.teacher[order]), (stored, moved)):
        one = evaluate(case.student, teacher, divergence=divergence, reduction="none")
        other = evaluate(case.student[order], permuted, divergence=divergence, reduction="none")
        if case.engine.name == "reference":  # torch's own sums depend on the batch
            same(other, Outcome(one.loss[order], one.gradient[order]), case)
            continue
        assert torch.equal(other.loss, one.loss[order])
        assert torch.equal(other.gradient, one.gradient[order])


# Gradients over the vocabulary


def of_order_of(case: Case, temperature: float) -> float:
    """A bound of the log-ratios' size over T, which rounds in gradients: log q - log p spans twice the logits."""
    return 1 + 20 * case.scale / temperature**2


@for_all(divergence=divergences, temperature=temperatures)
def test_the_gradient_sums_to_zero_over_the_vocabulary(case: Case, divergence: str, temperature: float):
    ours = evaluate(case.student, case.teacher, divergence=divergence, temperature=temperature, reduction="none")
    total = ours.gradient.double().sum(-1)
    near(total, torch.zeros_like(total), 8 * case.unit * of_order_of(case, temperature))


@for_all(divergence=divergences, tail=tails, share=shares, temperature=temperatures)
def test_the_gradient_of_a_topk_loss_sums_to_zero_over_the_vocabulary(
    case: Case, divergence: str, tail: str, share: float, temperature: float
):
    """ "drop" too, though it is no divergence: it knows the student by its log-probabilities."""
    stored = topk_logprobs(case.teacher, part(share, case.vocab), temperature=temperature)
    total = evaluate(case.student, stored, divergence=divergence, tail=tail, reduction="none").gradient.double().sum(-1)
    near(total, torch.zeros_like(total), 8 * case.unit * of_order_of(case, temperature))


@for_all(temperature=temperatures)
def test_the_gradient_of_the_forward_kl_is_q_minus_p_over_t(case: Case, temperature: float):
    ours = evaluate(case.student, case.teacher, temperature=temperature, reduction="none")
    q, p = ((x.double() / temperature).softmax(-1) for x in (case.student, case.teacher))
    near(ours.gradient.double(), (q - p) / temperature, 32 * case.unit)


@for_all(share=shares, vocab=st.integers(2, 40))
def test_the_gradient_of_the_bucket_is_q_minus_p_on_s_and_q_times_1_minus_the_ratio_of_the_rests_outside(
    case: Case, share: float
):
    """With P_R and Q_R the mass outside S, the gradient there is q_i (1 - P_R / Q_R)."""
    stored = topk_logprobs(case.teacher, part(share, case.vocab - 1))
    ours = evaluate(case.student, stored, reduction="none")
    q, p = (x.double().softmax(-1) for x in (case.student, case.teacher))
    inside = torch.zeros_like(q, dtype=torch.bool).scatter(-1, stored.indices, True)
    rest_p, rest_q = (x.masked_fill(inside, 0.0).sum(-1, keepdim=True) for x in (p, q))
    expected = torch.where(inside, q - p, q * (1 - rest_p / rest_q))
    near(ours.gradient.double(), expected, 32 * case.unit)


# Zero, and bounds


@for_all(
    divergence=divergences, temperature=temperatures, tail=st.sampled_from(["bucket", "renormalize"]), share=shares
)
def test_identical_student_and_teacher_give_zero_loss_and_zero_gradient(
    case: Case, divergence: str, temperature: float, tail: str, share: float
):
    stored = topk_logprobs(case.teacher, part(share, case.vocab), temperature=temperature)
    for teacher, options in ((case.teacher, {"temperature": temperature}), (stored, {"tail": tail})):
        ours = evaluate(case.teacher, teacher, divergence=divergence, reduction="none", **options)
        near(ours.loss, torch.zeros_like(ours.loss), 8 * case.unit)
        if divergence != "tvd" or teacher is not stored:  # its kink is here: stored p and q differ by a rounding
            near(ours.gradient, torch.zeros_like(ours.gradient), 8 * case.unit / temperature)


@for_all(divergence=divergences, temperature=temperatures, noise=st.sampled_from([0.0, 2.0**-10, 0.25]))
def test_losses_are_never_negative(case: Case, divergence: str, temperature: float, noise: float):
    """Not by a rounding either, however close the two sides are, where a kernel computes them."""
    allowed = 8 * case.unit if case.engine.name == "reference" else 0.0
    close = case.teacher + noise * case.logits(*case.tokens, case.vocab, seed=3)
    for student in (case.student, close):
        loss = distillation_loss(
            student, case.teacher, divergence=divergence, temperature=temperature, reduction="none"
        )
        assert (loss >= -allowed).all(), loss


@for_all(divergence=divergences, share=shares, stored=st.sampled_from([torch.bfloat16, torch.float16]))
def test_topk_losses_are_never_negative_however_the_stored_entries_were_rounded(
    case: Case, divergence: str, share: float, stored: torch.dtype
):
    allowed = 8 * case.unit if case.engine.name == "reference" else 0.0
    logprobs, indices, rest, _ = topk_logprobs(case.teacher, part(share, case.vocab))
    assert rest is not None
    rounded = TopKLogprobs(logprobs.to(stored), indices, rest.to(stored))
    for teacher, tail in ((rounded, "bucket"), (rounded._replace(residual=None), "bucket"), (rounded, "renormalize")):
        for student in (case.student, case.teacher):
            loss = topk_distillation_loss(student, teacher, divergence=divergence, tail=tail, reduction="none")
            assert (loss >= -allowed).all(), (tail, teacher.residual is None, loss)


@for_all(beta=st.sampled_from([0.1, 0.5, 0.8]))
def test_the_bounded_divergences_keep_to_their_bounds(case: Case, beta: float):
    """Total variation at most 1, and by Pinsker at most sqrt(KL / 2); Jensen-Shannon at most the entropy of beta."""
    value = {
        name: distillation_loss(4 * case.student, case.teacher, divergence=name, beta=beta, reduction="none")
        for name in DIVERGENCES
    }
    slack = 8 * case.unit
    assert (value["tvd"] <= 1 + slack).all()
    for name in ("forward_kl", "reverse_kl"):
        assert (value["tvd"] <= (value[name] / 2).clamp(min=0).sqrt() + 4 * math.sqrt(slack) * 2.0**-8 + slack).all()
    entropy = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert (value["jsd"] <= entropy + slack).all()


@for_all(beta=st.sampled_from([0.1, 0.5, 0.8]), temperature=temperatures)
def test_swapping_the_sides_swaps_the_divergences(case: Case, beta: float, temperature: float):
    """KL(t || s) is the reverse KL of the swapped pair; TVD is symmetric; JSD is once beta becomes 1 - beta."""

    def value(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> Tensor:
        return distillation_loss(
            student, teacher, divergence=divergence, beta=beta, temperature=temperature, reduction="none"
        )

    for name, twin in (("forward_kl", "reverse_kl"), ("tvd", "tvd"), ("jsd", "jsd")):
        one = value(case.student, case.teacher, name, beta)
        near(one, value(case.teacher, case.student, twin, 1 - beta), 32 * case.unit)


# Top-k


@for_all(vocab=st.integers(1, 12) | st.just(65), tokens=st.just((2,)))
def test_the_bucket_is_at_most_the_full_kl_grows_with_k_and_reaches_it_at_one_less_than_the_vocabulary(case: Case):
    """Splitting the rest into more categories can only tell the two sides better apart."""
    full = distillation_loss(case.student, case.teacher, reduction="none")
    steps = sorted({part(share, case.vocab) for share in (0, 0.1, 0.3, 0.6, 1)} | {max(case.vocab - 1, 1), case.vocab})
    ladder = [topk_distillation_loss(case.student, topk_logprobs(case.teacher, k), reduction="none") for k in steps]
    slack = 16 * case.unit * (1 + full)
    for lower, higher in zip(ladder, [*ladder[1:], full], strict=True):
        assert (lower <= higher + slack).all(), (steps, ladder, full)
    for k, loss in zip(steps, ladder, strict=True):
        if k >= case.vocab - 1:
            near(loss, full, 32 * case.unit)


@for_all(divergence=divergences, whole=st.booleans())
def test_nothing_is_lost_with_all_but_one_entry_stored(case: Case, divergence: str, whole: bool):
    """k = V - 1 and k = V: loss and gradient of the full divergence, whichever it is."""
    stored = topk_logprobs(case.teacher, case.vocab if whole else max(case.vocab - 1, 1))
    ours = evaluate(case.student, stored, divergence=divergence, reduction="none")
    same(ours, evaluate(case.student, case.teacher, divergence=divergence, reduction="none"), case)


def agreeing(case: Case, stored: TopKLogprobs) -> Tensor:
    """Student logits with q = p on S, and the teacher's mass outside spread at random, not as the teacher's is."""
    assert stored.residual is not None
    spread = case.logits(*case.tokens, case.vocab, seed=3).scatter(-1, stored.indices, -INF)
    return (spread.log_softmax(-1) + stored.residual[..., None]).scatter(-1, stored.indices, stored.logprobs)


@for_all(divergence=divergences, share=shares, vocab=st.integers(2, 40))
def test_the_bucket_loss_is_zero_where_q_is_p_on_s_whatever_the_rest_is(case: Case, divergence: str, share: float):
    stored = topk_logprobs(case.teacher, part(share, case.vocab - 1))
    ours = evaluate(agreeing(case, stored), stored, divergence=divergence, reduction="none")
    unit = 32 * case.unit  # the student's logits are log-probabilities, rounded
    near(ours.loss, torch.zeros_like(ours.loss), unit)
    if divergence != "tvd":  # whose kink is here
        near(ours.gradient, torch.zeros_like(ours.gradient), unit)


@for_all(divergence=divergences, share=shares, vocab=st.integers(2, 40), nudge=st.sampled_from([-1.0, 0.25, 2.0]))
def test_the_bucket_loss_is_positive_where_q_is_not_p_on_s(case: Case, divergence: str, share: float, nudge: float):
    """By Pinsker's inequality: at least as much as the total variation of the k + 1 categories asks for."""
    stored = topk_logprobs(case.teacher, part(share, case.vocab - 1))
    student = agreeing(case, stored)
    student = student.scatter_add(-1, stored.indices[..., :1], torch.full_like(student[..., :1], nudge))
    q, p = student.double().softmax(-1).gather(-1, stored.indices), stored.logprobs.double().exp()
    variation = 0.5 * ((q - p).abs().sum(-1) + (q.sum(-1) - p.sum(-1)).abs())
    least = {"forward_kl": 2 * variation**2, "reverse_kl": 2 * variation**2, "jsd": variation**2 / 2, "tvd": variation}
    loss = topk_distillation_loss(student, stored, divergence=divergence, reduction="none").double()
    assert (loss >= least[divergence] * (1 - 1e-4) - 32 * case.unit).all(), (loss, least[divergence])
    assert (loss[variation > 1e-3] > 0).all()


@for_all(share=shares, temperature=temperatures)
def test_renormalize_is_the_divergence_of_the_softmaxes_over_s(case: Case, share: float, temperature: float):
    """The full-vocabulary normalisers cancel, and entries outside S have no gradient."""
    stored = topk_logprobs(case.teacher, part(share, case.vocab), temperature=temperature)
    ours = evaluate(case.student, stored, tail="renormalize", reduction="none")
    on_s = evaluate(
        case.student.gather(-1, stored.indices), case.teacher.gather(-1, stored.indices), temperature=temperature,
        reduction="none",
    )  # fmt: skip
    same(ours, Outcome(on_s.loss, torch.zeros_like(ours.gradient).scatter(-1, stored.indices, on_s.gradient)), case)


@for_all(share=shares)
def test_drop_is_the_bare_sum_over_s_and_no_divergence(case: Case, share: float):
    """sum_S p (log p - log q), gradient q M - p on S and q M outside with M = sum_S p: not 0 where q = p."""
    stored = topk_logprobs(case.teacher, part(share, case.vocab))
    p = torch.zeros_like(case.student.double()).scatter(-1, stored.indices, stored.logprobs.double().exp())
    for student in (case.student, case.teacher):
        ours = evaluate(student, stored, tail="drop", reduction="none")
        log_q = student.double().log_softmax(-1)
        near(ours.loss.double(), (p.xlogy(p) - p * log_q).sum(-1), 32 * case.unit)
        near(ours.gradient.double(), log_q.exp() * p.sum(-1, keepdim=True) - p, 32 * case.unit)


@for_all(share=shares, temperature=temperatures)
def test_topk_logprobs_are_the_largest_and_with_the_residual_all_of_the_mass(
    case: Case, share: float, temperature: float
):
    """Sorted, equals by lowest index, values and entries those of torch.topk, exp(entries) + exp(residual) = 1."""
    k = part(share, case.vocab)
    logprobs, indices, residual, stored = topk_logprobs(case.teacher, k, temperature=temperature)
    assert residual is not None
    assert stored == temperature
    exact = (case.teacher.double() / temperature).log_softmax(-1)
    values = case.teacher.topk(k).values
    assert torch.equal(case.teacher.gather(-1, indices), values)
    near(logprobs.double(), exact.gather(-1, indices), 8 * case.unit)
    mass = logprobs.double().exp().sum(-1) + residual.double().exp()
    near(mass, torch.ones_like(mass), 8 * case.unit)
    assert (values[..., 1:] <= values[..., :-1]).all()
    assert (logprobs[..., 1:] <= logprobs[..., :-1]).all()
    tied = values[..., 1:] == values[..., :-1]
    assert (indices[..., 1:] > indices[..., :-1])[tied].all()
    outside = case.teacher.scatter(-1, indices, INF)  # an equal that was left out stands behind all that are in
    last_of_equals = torch.where(outside == values[..., -1:], 1, 0).argmax(-1)
    left_out = (outside == values[..., -1:]).any(-1)
    assert (last_of_equals > indices[..., -1])[left_out].all()


# What the options are


def masks(case: Case) -> Tensor:
    return case.per_token() >= 1


@for_all(divergence=divergences, share=shares, reduction=st.sampled_from(["mean", "sum"]))
def test_a_mask_is_leaving_the_rows_out(case: Case, divergence: str, share: float, reduction: str):
    keep = masks(case)
    stored = topk_logprobs(case.teacher, part(share, case.vocab))
    left = TopKLogprobs(*(x[keep] for x in stored[:3] if isinstance(x, Tensor)))
    for teacher, kept in ((case.teacher, case.teacher[keep]), (stored, left)):
        ours = evaluate(case.student, teacher, divergence=divergence, mask=keep, reduction=reduction)
        theirs = evaluate(case.student[keep], kept, divergence=divergence, reduction=reduction)
        near(ours.loss, theirs.loss, 32 * case.unit)
        near(ours.gradient[keep], theirs.gradient, 32 * case.unit)
        assert not ours.gradient[~keep].any()


@for_all(divergence=divergences)
def test_a_weight_scales_a_tokens_loss_and_gradient(case: Case, divergence: str):
    weight = case.per_token()
    plain = evaluate(case.student, case.teacher, divergence=divergence, reduction="none")
    ours = evaluate(case.student, case.teacher, divergence=divergence, reduction="none", weight=weight)
    same(ours, Outcome(weight * plain.loss, weight[..., None] * plain.gradient), case)
    total = evaluate(case.student, case.teacher, divergence=divergence, reduction="sum", weight=weight)
    same(total, Outcome(ours.loss.sum(), ours.gradient), case)


@for_all(divergence=divergences, reduction=st.sampled_from(["mean", "sum", "none"]))
def test_loss_and_gradient_are_linear_in_the_upstream_gradient_and_the_reductions_agree(
    case: Case, divergence: str, reduction: str
):
    """Mean is sum over the number of tokens that count, sum is that of "none"."""
    keep = masks(case)
    count = keep.sum().clamp(min=1)
    each = evaluate(case.student, case.teacher, divergence=divergence, mask=keep, reduction="none")
    upstream = case.per_token(seed=2) - 2 if reduction == "none" else case.student.new_tensor(-1.5)
    ours = evaluate(case.student, case.teacher, upstream, divergence=divergence, mask=keep, reduction=reduction)
    factor = upstream[..., None] if reduction == "none" else upstream / (count if reduction == "mean" else 1)
    loss = {"none": each.loss, "sum": each.loss.sum(), "mean": each.loss.sum() / count}[reduction]
    same(ours, Outcome(loss, each.gradient * factor), case, slack=2)


@for_all(divergence=divergences, temperature=temperatures, squared=st.booleans())
def test_a_temperature_is_dividing_the_logits(case: Case, divergence: str, temperature: float, squared: bool):
    """The chain rule adds 1 / T to the gradient; ``temperature_squared`` multiplies both by T^2."""
    ours = evaluate(
        case.student, case.teacher, divergence=divergence, temperature=temperature, temperature_squared=squared,
        reduction="none",
    )  # fmt: skip
    plain = evaluate(case.student / temperature, case.teacher / temperature, divergence=divergence, reduction="none")
    factor = temperature**2 if squared else 1.0
    theirs = Outcome(plain.loss * factor, plain.gradient * factor / temperature)
    same(ours, theirs, case, slack=max(1.0, factor) * max(1.0, case.scale / temperature))


@for_all(divergence=divergences, share=shares, extra=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_vocab_size_is_slicing_both_sides(case: Case, divergence: str, share: float, extra: tuple[int, int]):
    """Whatever stands beyond it, with a gradient of 0 there."""
    vocab = case.vocab
    student = F.pad(case.student, (0, extra[0]), value=math.nan)
    teacher = F.pad(case.teacher, (0, extra[1]), value=INF)
    stored = topk_logprobs(case.teacher, part(share, vocab))
    for wide, narrow in ((teacher, case.teacher), (stored, stored)):
        ours = evaluate(student, wide, divergence=divergence, vocab_size=vocab, reduction="none")
        assert not ours.gradient[..., vocab:].any()
        theirs = evaluate(case.student, narrow, divergence=divergence, reduction="none")
        same(ours._replace(gradient=ours.gradient[..., :vocab]), theirs, case)


@for_all(divergence=divergences, h=st.sampled_from([0.0, 0.25, 1.0]), temperature=temperatures, share=shares)
def test_a_hard_weight_mixes_with_cross_entropy(
    case: Case, divergence: str, h: float, temperature: float, share: float
):
    """(1 - h) divergence at T + h cross_entropy at 1, which targets of ignore_index don't have."""
    targets = (case.per_token() * 4).long() % case.vocab
    targets = targets.where(case.per_token(seed=2) >= 1, -100)
    options = {"divergence": divergence, "reduction": "none"}
    leaf = case.student.requires_grad_()
    hard = F.cross_entropy(leaf.view(-1, case.vocab), targets.view(-1), reduction="none").view(case.tokens)
    (hard_gradient,) = torch.autograd.grad(hard.sum(), leaf)
    stored = topk_logprobs(case.teacher, part(share, case.vocab), temperature=temperature)
    for teacher in (case.teacher, stored):
        soft = evaluate(case.student, teacher, temperature=temperature, **options)
        ours = evaluate(case.student, teacher, temperature=temperature, targets=targets, hard_weight=h, **options)
        mixed = Outcome((1 - h) * soft.loss + h * hard.detach(), (1 - h) * soft.gradient + h * hard_gradient)
        same(ours, mixed, case)


@for_all(divergence=divergences, share=shares, count=st.integers(1, 5))
def test_teacher_rows_is_gathering_the_teachers_rows(case: Case, divergence: str, share: float, count: int):
    """-1 matches nothing, and the token doesn't count."""
    teacher = case.logits(count, case.vocab, seed=2)
    matched = (case.per_token() * 4).long() % (count + 1) - 1
    keep, index = matched >= 0, matched.clamp(min=0)
    stored = topk_logprobs(teacher, part(share, case.vocab))
    gathered = TopKLogprobs(*(x[index] for x in stored[:3] if isinstance(x, Tensor)))
    for rows, expanded in ((teacher, teacher[index]), (stored, gathered)):
        ours = evaluate(case.student, rows, divergence=divergence, teacher_rows=matched)
        theirs = evaluate(case.student, expanded, divergence=divergence, mask=keep)
        assert torch.equal(ours.loss, theirs.loss)
        assert torch.equal(ours.gradient, theirs.gradient)


@for_all(temperature=temperatures)
def test_metrics_are_the_students_entropy_and_whether_the_most_likely_entries_agree(case: Case, temperature: float):
    _, metrics = distillation_loss(case.student, case.teacher, temperature=temperature, return_metrics=True)
    log_q = (case.student.double() / temperature).log_softmax(-1)
    near(metrics.entropy.double(), -(log_q.exp() * log_q).sum(-1), 16 * case.unit)
    top = [(x == x.amax(-1, keepdim=True)).int().argmax(-1) for x in (case.student, case.teacher)]
    assert torch.equal(metrics.agreement, top[0] == top[1])
