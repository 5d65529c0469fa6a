"""Ratios against Fieller's closed form, and what an interval must do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from holdtrue.bench.plots import front
from holdtrue.bench.ratios import Ratio, fieller, undone
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


def test_what_is_undone_is_one_less_the_ratio() -> None:
    found = undone(Ratio(Estimate(0.2, (0.1, 0.4)), True))
    assert found.value == Estimate(0.8, (0.6, 0.9))


def test_the_front_holds_what_nothing_beats() -> None:
    points = {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (1.5, 3.0), "d": (0.5, 1.0), "e": (3.0, 2.5)}
    assert front(points) == ["a", "b", "e"]
