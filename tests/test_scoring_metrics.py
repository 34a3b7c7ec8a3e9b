"""Metrics of pairs: golden values, every backend against a loop over pairs, identities, slices, extremes, the plot."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from distill_support import DTYPES, Engine, every_engine, every_kernel, name_of, quick_engine
from ranking_support import scores
from scoring_support import on
from torch import Tensor

import pyalign
from pyalign import preference_metrics
from pyalign.evaluation import plot_calibration
from pyalign.scoring import PreferenceEvaluation

FIGURES = ("pairs", "accuracy", "standard_error", "ties", "log_loss", "brier", "ece")


def figures(evaluation: PreferenceEvaluation) -> dict[str, float]:
    return {name: float(getattr(evaluation, name)) for name in FIGURES}


def pair_by_pair(
    z: list[float], bins: int, weight: list[float] | None = None
) -> tuple[dict[str, float], list[tuple[float, float, float]]]:
    """The figures, and (weight, confidence, accuracy) of each bin, as their definitions say."""
    weights = [1.0] * len(z) if weight is None else weight
    total = sum(weights)
    right = [1.0 if x > 0 else 0.5 if x == 0 else 0.0 for x in z]
    p = [1 / (1 + math.exp(-x)) if x > -700 else 0.0 for x in z]
    confidence = [max(x, 1 - x) for x in p]

    def mean(values: list[float], within: list[float] = weights) -> float:
        return sum(w * x for w, x in zip(within, values, strict=True)) / sum(within) if sum(within) else math.nan

    accuracy = mean(right)
    points: list[tuple[float, float, float]] = []
    for b in range(bins):
        own = [w * (min(int((c - 0.5) * 2 * bins), bins - 1) == b) for w, c in zip(weights, confidence, strict=True)]
        points.append((sum(own), mean(confidence, own), mean(right, own)))
    expected = {
        "pairs": len(z),
        "accuracy": accuracy,
        "standard_error": math.sqrt(mean([(x - accuracy) ** 2 for x in right]) * sum(w * w for w in weights)) / total,
        "ties": mean([float(x == 0) for x in z]),
        "log_loss": mean([math.log1p(math.exp(-abs(x))) + max(-x, 0.0) for x in z]),
        "brier": mean([(1 - x) ** 2 for x in p]),
        "ece": sum(w * abs(c - a) for w, c, a in points if w) / total,
    }
    return expected, points


def check(
    evaluation: PreferenceEvaluation, z: list[float], bins: int, weight: list[float] | None = None, **tolerance: Any
):
    expected, points = pair_by_pair(z, bins, weight)
    tolerance = {"rel": 1e-6, "abs": 1e-7, **tolerance}
    assert figures(evaluation) == pytest.approx(expected, **tolerance)
    bins_of = evaluation.calibration
    for ours, wanted in zip(
        (bins_of.weight, bins_of.confidence, bins_of.accuracy), zip(*points, strict=True), strict=True
    ):
        assert ours.tolist() == pytest.approx(list(wanted), nan_ok=True, **tolerance)
    assert bins_of.edges.tolist() == pytest.approx([0.5 + 0.5 * b / bins for b in range(bins + 1)])


# ---- Golden values ----


@every_engine
@pytest.mark.smoke
def test_golden_values(engine: Engine):
    """A pair won by 1, one lost by 1, one tied; sigmoid(1) = .7310585786300049."""
    p = 0.7310585786300049
    with engine():
        ours = preference_metrics(
            on(engine, torch.tensor([1.0, 0.0, 5.0])), on(engine, torch.tensor([0.0, 1.0, 5.0])), bins=2
        )  # fmt: skip
    expected = {
        "pairs": 3,
        "accuracy": 0.5,
        "standard_error": math.sqrt((0.25 + 0.25 + 0) / 3 / 3),
        "ties": 1 / 3,
        "log_loss": (0.31326168751822286 + 1.3132616875182228 + 0.6931471805599453) / 3,
        "brier": ((1 - p) ** 2 + p**2 + 0.25) / 3,
        "ece": (2 * p + 0.5) / 3 - 0.5,
    }
    assert figures(ours) == pytest.approx(expected, rel=1e-6)
    assert ours.calibration.weight.tolist() == [3.0, 0.0]
    assert ours.calibration.accuracy.tolist() == pytest.approx([0.5, math.nan], nan_ok=True)


# ---- Every backend against a loop ----


@every_engine
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.smoke
def test_every_option(engine: Engine, dtype: torch.dtype):
    if not engine.serves(dtype):
        return
    count, bins = 700, 7
    chosen, rejected = (scores(count, seed=i, dtype=dtype) for i in (1, 2))
    rejected[:30] = chosen[:30]
    margin, weight = scores(count, seed=3).abs() / 4, scores(count, seed=4).abs()
    margin[:30] = 0
    mask = torch.arange(count) % 7 != 0
    gap = chosen.double() - rejected.double()
    for options, z in (
        ({}, gap),
        ({"scale": 0.5, "margin": 0.25}, 0.5 * gap - 0.25),
        ({"margin": margin, "weight": weight, "mask": mask}, gap - margin.double()),
        ({"weight": weight.bfloat16(), "mask": mask.int()}, gap),
    ):
        keep = mask if "mask" in options else torch.ones_like(mask)
        weights = options["weight"][keep].double().tolist() if "weight" in options else None
        with engine():
            ours = preference_metrics(on(engine, chosen), on(engine, rejected), bins=bins, **on(engine, options))
        # A confidence within a rounding of an edge may fall on either side: few pairs, so the bins may differ by one.
        check(ours, z[keep].tolist(), bins, weights)


@every_engine
def test_several_pieces_and_a_ragged_end(engine: Engine):
    count = 2**17 + 5 if engine.slow else 2**18 + 3333
    chosen, rejected = (scores(count, seed=i) for i in (1, 2))
    z = (chosen - rejected).double()
    with engine():
        ours = preference_metrics(on(engine, chosen), on(engine, rejected), bins=2 if engine.slow else 10)
    assert int(ours.pairs) == int(ours.calibration.weight.sum()) == count
    assert float(ours.accuracy) == pytest.approx(
        float((z > 0).double().mean() + (z == 0).double().mean() / 2), abs=1e-12
    )
    assert float(ours.log_loss) == pytest.approx(float(torch.nn.functional.softplus(-z).mean()), rel=1e-7)
    assert float(ours.brier) == pytest.approx(float(torch.sigmoid(-z).square().mean()), rel=1e-7)


@every_engine
@pytest.mark.smoke
def test_slices_are_the_metrics_of_their_pairs(engine: Engine):
    """By integers, ascending, and by names, in order of appearance; the whole is unchanged but for its last bits."""
    chosen, rejected = (on(engine, scores(200, seed=i)) for i in (1, 2))
    numbers = torch.tensor([7, -2, 7, 100])[torch.arange(200) % 4]
    names = [{7: "helpful", -2: "honest", 100: "harmless"}[x] for x in numbers.tolist()]
    weight = on(engine, scores(200, seed=3).abs())
    with engine():
        whole = preference_metrics(chosen, rejected, weight=weight)
        for category, keys in (
            (on(engine, numbers), [-2, 7, 100]),
            (on(engine, numbers.to(torch.int16)), [-2, 7, 100]),
            (on(engine, numbers * 2**40), [-2 * 2**40, 7 * 2**40, 100 * 2**40]),
            (names, ["helpful", "honest", "harmless"]),
            (numbers.numpy(), [7, -2, 100]),
        ):
            ours = preference_metrics(chosen, rejected, weight=weight, category=category)
            assert list(ours.slices) == keys
            assert figures(ours) == pytest.approx(figures(whole), rel=1e-12)
            by_number = isinstance(category, Tensor)
            for place, value in enumerate((-2, 7, 100) if by_number else (7, -2, 100)):
                mask = on(engine, numbers == value)
                alone = preference_metrics(chosen, rejected, weight=weight, mask=mask)
                part = ours.slices[keys[place]]
                assert figures(part) == pytest.approx(figures(alone), rel=1e-12)
                assert part.slices == {}
                torch.testing.assert_close(part.calibration.accuracy, alone.calibration.accuracy, equal_nan=True)
        bools = preference_metrics(chosen, rejected, category=chosen > 0).slices
        assert set(bools) == {False, True}


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_many_categories(name: str):
    """More cells than fit a table for every piece of the pairs."""
    count, categories = 200_000, 20_000
    chosen, rejected, category = scores(count, seed=1), scores(count, seed=2), torch.arange(count) % categories
    with pyalign.backend(name):
        ours = preference_metrics(chosen, rejected, category=category)
    assert len(ours.slices) == categories
    assert {int(part.pairs) for part in list(ours.slices.values())[::997]} == {10}
    right = (chosen > rejected).view(10, categories).double().mean(0)
    assert [float(ours.slices[i].accuracy) for i in (0, 77, 19_999)] == pytest.approx(right[[0, 77, 19_999]].tolist())


# ---- Identities ----


@pytest.mark.parametrize("name", ["cpu", "reference"])
@hypothesis.given(
    z=st.lists(st.floats(-60, 60), min_size=1, max_size=40), bins=st.integers(1, 12), seed=st.integers(0, 99)
)
def test_identities(name: str, z: list[float], bins: int, seed: int):
    """Swapping the sides, repeating pairs, and zero weights."""
    chosen = torch.tensor(z, dtype=torch.float64)
    rejected = torch.zeros_like(chosen)
    repeats = torch.randint(0, 4, chosen.shape, generator=torch.Generator().manual_seed(seed))
    with pyalign.backend(name):
        ours, swapped = preference_metrics(chosen, rejected, bins=bins), preference_metrics(rejected, chosen, bins=bins)
        check(ours, z, bins, rel=1e-9, abs=1e-9)
        assert float(swapped.accuracy) == pytest.approx(1 - float(ours.accuracy))
        assert float(swapped.ties) == float(ours.ties)
        torch.testing.assert_close(swapped.calibration.confidence, ours.calibration.confidence, equal_nan=True)
        torch.testing.assert_close(swapped.calibration.accuracy, 1 - ours.calibration.accuracy, equal_nan=True)
        assert 0 <= float(ours.ece) <= 1
        weighted = preference_metrics(chosen, rejected, bins=bins, weight=repeats.double())
        repeated = preference_metrics(
            chosen.repeat_interleave(repeats), rejected.repeat_interleave(repeats), bins=bins
        )  # fmt: skip
        for figure in ("accuracy", "ties", "log_loss", "brier", "ece"):
            one, two = (float(getattr(x, figure)) for x in (weighted, repeated))
            assert one == pytest.approx(two, rel=1e-9, abs=1e-12, nan_ok=True)


def test_a_calibrated_model_has_no_calibration_error():
    """Pairs drawn with the probabilities that the scores say."""
    generator = torch.Generator().manual_seed(0)
    gap = 2 * torch.randn(400_000, generator=generator)
    wins = torch.rand(400_000, generator=generator) < torch.sigmoid(gap)
    z = torch.where(wins, gap, -gap)
    calibrated, overconfident = (preference_metrics(z * k, torch.zeros_like(z)) for k in (1.0, 2.0))
    assert float(calibrated.ece) < 0.003
    assert float(overconfident.ece) > 0.05
    assert float(calibrated.log_loss) < float(overconfident.log_loss)
    assert float(preference_metrics(z * 2, torch.zeros_like(z), scale=0.5).ece) == float(calibrated.ece)


# ---- Extremes and edges ----


@every_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_extremes(engine: Engine, dtype: torch.dtype):
    """Margins of +-1e4 and 1e-30, log-losses of 1e-13, scores of which a difference is all there is."""
    if not engine.serves(dtype):
        return
    for z in (1e4, -1e4, 30.0, -30.0, 1e-30, -1e-30, 0.0):
        with engine():
            ours = preference_metrics(
                on(engine, torch.tensor([z], dtype=dtype)), on(engine, torch.zeros(1, dtype=dtype)), bins=4
            )  # fmt: skip
        expected, _ = pair_by_pair([z], 4)
        expected["brier"] = (math.exp(-z) / (1 + math.exp(-z))) ** 2 if z > -100 else 1.0
        assert float(ours.ece) == pytest.approx(expected.pop("ece"), rel=1e-5, abs=1e-7)
        assert {name: figures(ours)[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=0)
    with engine():
        close = preference_metrics(
            on(engine, torch.tensor([1000.0001, 1000], dtype=dtype)), on(engine, torch.full((2,), 1000, dtype=dtype))
        )  # fmt: skip
    assert float(close.accuracy) == 0.75


@every_engine
@pytest.mark.smoke
def test_no_pairs(engine: Engine):
    chosen = on(engine, torch.tensor([1.0, 2.0]))
    with engine():
        for ours in (
            preference_metrics(chosen[:0], chosen[:0]),
            preference_metrics(chosen, chosen, mask=chosen < 0),
            preference_metrics(chosen[:0], chosen[:0], category=[]),
            preference_metrics(chosen[:0], chosen[:0], category=on(engine, torch.zeros(0, dtype=torch.int64))),
        ):
            assert int(ours.pairs) == 0
            assert all(math.isnan(value) for name, value in figures(ours).items() if name != "pairs")
            assert ours.slices == {}
            assert ours.to_dict()["accuracy"] is None
        assert math.isnan(float(preference_metrics(chosen, chosen, weight=0 * chosen).accuracy))


@every_engine
def test_pairs_that_are_not_numbers(engine: Engine):
    """A NaN makes every mean NaN, and stays out of the bins; infinite scores decide; a mask keeps NaN out."""
    inf, nan = math.inf, math.nan
    chosen, rejected = torch.tensor([1.0, nan, inf, 3.0, inf]), torch.tensor([0.0, 0.0, 0.0, inf, inf])
    category = [0, 1, 0, 2, 1]
    with engine():
        ours = preference_metrics(on(engine, chosen), on(engine, rejected), category=category, bins=5)
    assert int(ours.pairs) == 5
    assert all(math.isnan(value) for name, value in figures(ours).items() if name != "pairs")
    assert ours.calibration.weight.tolist() == [0.0, 0.0, 1.0, 0.0, 2.0]
    assert figures(ours.slices[0]) == pytest.approx(
        {"pairs": 2, "accuracy": 1, "standard_error": 0, "ties": 0, "log_loss": 0.3132617 / 2, "brier": 0.0723295 / 2,
         "ece": 0.2689414 / 2}, abs=1e-6,
    )  # fmt: skip
    lost = figures(ours.slices[2])
    assert lost["log_loss"] == inf
    assert (lost["accuracy"], lost["brier"], lost["ece"]) == (0, 1, 1)
    assert math.isnan(figures(ours.slices[1])["accuracy"])
    with engine():
        mask = on(engine, torch.tensor([1, 0, 1, 0, 0]))
        kept = preference_metrics(on(engine, chosen), on(engine, rejected), mask=mask, bins=5)
    assert figures(kept) == pytest.approx(figures(ours.slices[0]))


@every_kernel
def test_confidences_on_an_edge(engine: Engine):
    """1/2 lies in the first bin and 1 in the last, however many there are."""
    chosen = on(engine, torch.tensor([0.0, 200.0, -200.0]))
    with engine():
        for bins in (1, 2, 3, 10, 1000) if not engine.slow else (1, 3):
            weight = preference_metrics(chosen, torch.zeros_like(chosen), bins=bins).calibration.weight.tolist()
            assert weight[0] == (3 if bins == 1 else 1)
            assert weight[-1] == (3 if bins == 1 else 2)


@quick_engine
def test_strided_scores_of_two_dtypes(engine: Engine):
    both = on(engine, scores(40, 2))
    with engine():
        ours = preference_metrics(both[:, 0], both[:, 1].bfloat16())
        same = preference_metrics(both[:, 0].contiguous(), both[:, 1].bfloat16().float().contiguous())
    assert figures(ours) == figures(same)


def test_results_are_detached():
    leaf = scores(9).requires_grad_()
    assert not preference_metrics(leaf, scores(9, seed=1)).accuracy.requires_grad


# ---- Size, threads, memory ----


def test_ten_million_pairs_take_no_memory_of_their_own():
    """A float64 copy of the scores would be 160 MB."""
    chosen, rejected = torch.rand(10_000_000), torch.rand(10_000_000)
    preference_metrics(chosen[:1000], rejected[:1000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = preference_metrics(chosen, rejected)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes; bytes on macOS
    assert int(ours.pairs) == 10_000_000
    assert grown < 16 * 1024


def test_the_same_bits_whatever_the_number_of_threads(threads: Callable[[int], None]):
    chosen, rejected, weight = (scores(300_000, seed=i) for i in (1, 2, 3))
    results: list[dict[str, float]] = []
    for count in (1, 2, 3):
        threads(count)
        results.append(figures(preference_metrics(chosen, rejected, weight=weight.abs())))
    assert results[0] == results[1] == results[2]


# ---- What is made of them ----


def test_the_result_as_plain_values():
    chosen, rejected = torch.tensor([1.0, 0.0, 5.0]), torch.tensor([0.0, 1.0, 5.0])
    ours = preference_metrics(chosen, rejected, bins=2, category=["a", "b", "a"])
    plain = json.loads(json.dumps(ours.to_dict()))
    assert plain == ours.to_dict()
    assert list(plain) == [*FIGURES, "calibration", "slices"]
    assert plain["pairs"] == 3
    assert plain["accuracy"] == 0.5
    assert plain["calibration"]["edges"] == [0.5, 0.75, 1.0]
    assert plain["calibration"]["accuracy"] == [0.5, None]
    assert list(plain["slices"]) == ["a", "b"]
    assert "slices" not in plain["slices"]["a"]
    assert plain["slices"]["a"]["accuracy"] == 0.75


def points_of(figure: Any) -> list[Tensor]:
    """The drawn curves, without the diagonal."""
    return [torch.tensor(line.get_xydata()) for line in figure.axes[0].lines if line.get_label() != "calibrated"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # matplotlib's own imports
def test_the_calibration_plot(tmp_path: Path):
    pytest.importorskip("matplotlib")
    chosen, rejected = scores(500, seed=1), scores(500, seed=2)
    ours = preference_metrics(chosen, rejected, category=torch.arange(500) % 2)
    figure = plot_calibration(ours, tmp_path / "calibration.png", title="a model")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[0].get_title() == "a model"
    curve = torch.stack([ours.calibration.confidence, ours.calibration.accuracy], 1)
    torch.testing.assert_close(points_of(figure)[0], curve)
    both = plot_calibration(ours.slices)
    assert [text.get_text()[:3] for text in both.axes[0].get_legend().get_texts()] == ["cal", "0: ", "1: "]
    empty = plot_calibration(preference_metrics(chosen[:0], rejected[:0]), str(tmp_path / "empty.png"))
    assert (tmp_path / "empty.png").exists()
    assert len(empty.axes) == 2


# ---- Arguments ----

A, B = scores(4), scores(4, seed=1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: preference_metrics([1.0], B), TypeError, "chosen: got list; wanted a tensor"),
        (lambda: preference_metrics(A[:, None], B), ValueError, r"chosen: got shape \(4, 1\); wanted one score per it"),
        (lambda: preference_metrics(A, B[:3]), ValueError, r"rejected: got shape \(3,\); wanted \(4,\), one per item"),
        (lambda: preference_metrics(A.long(), B), TypeError, "chosen: got torch.int64; wanted float32"),
        (lambda: preference_metrics(A, B.to("meta")), ValueError, "rejected: got a tensor on meta; wanted one on cpu"),
        (lambda: preference_metrics(A, B, bins=0), ValueError, "bins: got 0; wanted an int >= 1"),
        (lambda: preference_metrics(A, B, bins=2.5), ValueError, "bins: got 2.5; wanted an int >= 1"),
        (lambda: preference_metrics(A, B, bins=True), ValueError, "bins: got True; wanted an int >= 1"),
        (lambda: preference_metrics(A, B, scale=0.0), ValueError, "scale: got 0.0; wanted a finite number > 0"),
        (lambda: preference_metrics(A, B, margin=math.inf), ValueError, "margin: got inf; wanted a finite number"),
        (lambda: preference_metrics(A, B, margin=A[:2]), ValueError, r"margin: got shape \(2,\); wanted \(4,\)"),
        (lambda: preference_metrics(A, B, weight=A > 0), TypeError, "weight: got torch.bool; wanted a floating dtype"),
        (lambda: preference_metrics(A, B, weight=[1.0]), TypeError, "weight: got list; wanted a tensor"),
        (lambda: preference_metrics(A, B, mask=A), TypeError, "mask: got torch.float32; wanted bool or an integer dty"),
        (lambda: preference_metrics(A, B, category=A), TypeError, "category: got torch.float32; wanted bool"),
        (lambda: preference_metrics(A, B, category=torch.arange(3)), ValueError, r"category: got shape \(3,\)"),
        (lambda: preference_metrics(A, B, category=["a"]), ValueError, "category: got 1 entries; wanted 4, one per pa"),
        (lambda: preference_metrics(A, B, category="abcd"), TypeError, "category: got str; wanted an integer tensor o"),
        (lambda: preference_metrics(A, B, category=iter("abcd")), TypeError, "category: got str_.*; wanted an integer"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named(call: Callable[[], Any], error: type[Exception], message: str):
    with pytest.raises(error, match="^" + message):
        call()
