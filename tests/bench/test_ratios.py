"""Ratios against Fieller's closed form, and what an interval must do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from holdtrue.bench.plots import front
from holdtrue.bench.ratios import Ratio, fieller, rate_ratio, undone
from holdtrue.evaluation.statistics import combine_rate_differences
from holdtrue.runs.report.measures import Estimate


def closed_form(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Fieller 1954 for n independent pairs: the roots of (mx - r my)^2 = t^2 (sxx - 2 r sxy + r^2 syy) / n."""
    n, t2 = len(x), stats.t.ppf(0.975, len(x) - 1) ** 2
    (sxx, sxy), (_, syy) = np.cov(x, y) * t2 / n
    mx, my = x.mean(), y.mean()
    low, high = sorted(np.roots([my**2 - syy, -2 * (mx * my - sxy), mx**2 - sxx]).real)
    return float(low), float(high)


@pytest.mark.parametrize("seed", range(5))
def test_independent_rows_of_one_seed_give_the_closed_form(seed: int) -> None:
    random = np.random.default_rng(seed)
    y = random.normal(1.0, 0.3, 20)
    x = 0.8 * y + random.normal(0, 0.1, 20)
    found = fieller([x.tolist()], [y.tolist()], [list(range(20))])
    assert found.value is not None
    assert found.value.value == pytest.approx(x.mean() / y.mean())
    assert found.value.interval == pytest.approx(closed_form(x, y), abs=1e-6)
    assert found.usable


def test_a_denominator_that_may_be_zero_gives_no_interval() -> None:
    found = fieller([[1.0, 2.0, 3.0]], [[-1.0, 0.5, 1.0]], [[0, 1, 2]])
    assert not found.usable
    assert found.value is not None
    assert found.value.interval is None
    assert "not clear of zero" in found.why
    assert fieller([[1.0, 2.0]], [[0.0, 0.0]], [[0, 1]]).value is None


def test_rows_that_are_proportional_give_no_width() -> None:
    y = [1.0, 1.2, 0.9, 1.1]
    found = fieller([[2 * v for v in y]], [y], [list(range(4))])
    assert found.value is not None
    assert found.value.interval == pytest.approx((2.0, 2.0), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10), seeds=st.integers(1, 3))
def test_an_interval_holds_its_estimate_and_scales(seed: int, scale: float, seeds: int) -> None:
    random = np.random.default_rng(seed)
    y = [random.normal(1.0, 0.4, 18).tolist() for _ in range(seeds)]
    x = [random.normal(0.5, 0.4, 18).tolist() for _ in range(seeds)]
    clusters = [[i % 6 for i in range(18)]] * seeds
    one = fieller(x, y, clusters)
    assume(one.usable and one.value is not None and one.value.interval is not None)
    assert one.value is not None
    assert one.value.interval is not None
    low, high = one.value.interval
    assert low <= one.value.value <= high
    other = fieller([[scale * v for v in row] for row in x], y, clusters)
    assert other.value is not None
    assert other.value.interval == pytest.approx((low * scale, high * scale), rel=1e-4, abs=1e-6)


def flags(hits: int, n: int) -> list[float]:
    return [1.0] * hits + [0.0] * (n - hits)


def test_a_share_that_did_not_change_at_all_has_a_width() -> None:
    """All of 6 of 8 undone: the change is 0 in every row, and 8 rows do not show that it is 0 in all others."""
    clusters = [list(range(8))]
    none = [flags(0, 8)]
    found = rate_ratio((none, [flags(6, 8)]), (none, none), clusters)
    assert found.usable
    assert found.value is not None
    assert found.value.value == 0.0
    assert found.value.interval is not None
    low, high = found.value.interval
    assert low < -0.3
    assert high > 0.3


def test_ratios_of_shares_agree_with_the_closed_form() -> None:
    """Donner and Zou 2012, equation for a ratio: of the two changes' own intervals."""
    n = 200
    clusters = [list(range(n))]
    none = [flags(0, n)]
    found = rate_ratio((none, none), (none, none), clusters)
    assert found.value is None
    found = rate_ratio(([flags(30, n)], [flags(120, n)]), (none, none), clusters)
    ends = [combine_rate_differences([flags(hits, n)], none, clusters) for hits in (30, 120)]
    (l1, u1), (l2, u2) = [(e.low or 0.0, e.high or 0.0) for e in ends]
    t1, t2 = 0.15, 0.6
    low = (t1 * t2 - math.sqrt((t1 * t2) ** 2 - l1 * u2 * (2 * t1 - l1) * (2 * t2 - u2))) / (u2 * (2 * t2 - u2))
    high = (t1 * t2 + math.sqrt((t1 * t2) ** 2 - u1 * l2 * (2 * t1 - u1) * (2 * t2 - l2))) / (l2 * (2 * t2 - l2))
    assert found.value is not None
    assert found.value.interval == pytest.approx((low, high), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(hits=st.integers(0, 60), base=st.integers(20, 60), before=st.integers(0, 10))
def test_an_interval_of_a_share_holds_its_estimate(hits: int, base: int, before: int) -> None:
    clusters = [[i // 2 for i in range(60)]]
    untouched = [flags(before, 60)]
    found = rate_ratio(([flags(hits, 60)], [flags(base, 60)]), (untouched, untouched), clusters)
    assume(found.usable and found.value is not None and found.value.interval is not None)
    assert found.value is not None
    assert found.value.interval is not None
    low, high = found.value.interval
    assert low < found.value.value < high


def test_what_is_undone_is_one_less_the_ratio() -> None:
    found = undone(Ratio(Estimate(0.2, (0.1, 0.4)), True))
    assert found.value == Estimate(0.8, (0.6, 0.9))


def test_the_front_holds_what_nothing_beats() -> None:
    points = {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (1.5, 3.0), "d": (0.5, 1.0), "e": (3.0, 2.5)}
    assert front(points) == ["a", "b", "e"]
