from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.evaluation.sequences import BettingSequence

RUNS = 2000
values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), max_size=60)


def capitals(xs: list[float], mean: float, alpha: float) -> tuple[float, float]:
    """The product of the paper, one observation at a time."""
    up = down = 1.0
    seen: list[float] = []
    squares = 0.0
    for t, x in enumerate(xs, start=1):
        variance = (0.25 + squares) / t
        bet = math.sqrt(2 * math.log(1 / alpha) / (variance * t * math.log(1 + t)))
        up *= 1 + min(bet, 0.75 / mean) * (x - mean)
        down *= 1 - min(bet, 0.75 / (1 - mean)) * (x - mean)
        seen.append(x)
        squares += (x - (0.5 + sum(seen)) / (t + 1)) ** 2
    return up, down


def test_capital_of_two_observations_in_closed_form() -> None:
    found = BettingSequence(0.05, [0.4])
    found.update([1.0, 0.5])
    first = math.sqrt(2 * math.log(20) / (0.25 * math.log(2)))
    second = math.sqrt(2 * math.log(20) / ((0.25 + 0.25**2) / 2 * 2 * math.log(3)))
    # Both bets are above the caps, 0.75 / 0.4 and 0.75 / 0.6.
    assert min(first, second) > 0.75 / 0.4
    assert np.exp(found.log_capital[:, 0]) == pytest.approx(
        [(1 + 1.875 * 0.6) * (1 + 1.875 * 0.1), (1 - 1.25 * 0.6) * (1 - 1.25 * 0.1)], rel=1e-14
    )


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_capital_equals_the_product(mean: float, alpha: float) -> None:
    xs = np.random.default_rng(0).beta(2, 3, size=200).tolist()
    found = BettingSequence(alpha, [mean])
    found.update(xs)
    assert np.exp(found.log_capital[:, 0]) == pytest.approx(capitals(xs, mean, alpha), rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(values, st.integers(0, 60))
def test_batches_are_one_stream(xs: list[float], cut: int) -> None:
    whole, parts = BettingSequence(0.1), BettingSequence(0.1)
    whole.update(xs)
    for part in (xs[:cut], [], xs[cut:]):
        parts.update(part)
    assert parts.log_capital == pytest.approx(whole.log_capital)
    assert parts.n == whole.n == len(xs)
    for found, expected in zip(parts.rejections, whole.rejections, strict=True):
        assert (found == expected).all()


@settings(max_examples=50, deadline=None)
@given(values)
def test_bounds_only_tighten_and_mirror(xs: list[float]) -> None:
    found, mirrored = BettingSequence(0.1), BettingSequence(0.1)
    low, high = 0.0, 1.0
    for x in xs:
        found.update([x])
        mirrored.update([1 - x])
        assert low <= found.lower
        assert found.upper <= high
        low, high = found.lower, found.upper
    assert (1 - mirrored.upper, 1 - mirrored.lower) == pytest.approx((low, high), abs=1e-9)


def test_bounds_close_in_on_the_mean() -> None:
    found = BettingSequence(0.05)
    found.update((np.random.default_rng(0).random(3000) < 0.2).astype(float))
    assert 0.15 < found.lower < 0.2 < found.upper < 0.25
    narrow = BettingSequence(0.05)
    narrow.update(0.2 + 0.01 * np.random.default_rng(0).random(3000))
    assert narrow.upper - narrow.lower < 0.005


def test_a_rejection_keeps_its_time() -> None:
    found = BettingSequence(0.05, [0.5])
    found.update([1.0] * 4)
    assert found.rejections.too_low[0] == 0
    found.update([1.0] * 10)
    at = int(found.rejections.too_low[0])
    # The cap at 0.5 is a bet of 1.5, so that each win multiplies the capital by 1.75.
    assert at == math.ceil(math.log(20) / math.log(1.75))
    found.update([0.0] * 50)
    assert int(found.rejections.too_low[0]) == at
    assert found.lower == 0.5


@pytest.mark.parametrize("mean", [0.5, 0.02])
def test_bounds_hold_at_every_time(mean: float) -> None:
    """Of 2,000 runs watched after each of 1,000 draws, at most a share alpha ever rejects the true mean, per side."""
    alpha, random = 0.05, np.random.default_rng(0)
    wrong = np.zeros(2)
    for _ in range(RUNS):
        found = BettingSequence(alpha, [mean])
        found.update((random.random(1000) < mean).astype(float))
        wrong += [side[0] > 0 for side in found.rejections]
    # Three standard errors of the simulation.
    assert (wrong / RUNS <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / RUNS)).all()


@pytest.mark.parametrize("bad", [[1.1], [-0.1], [float("nan")], [[0.5]]])
def test_observations_outside_are_refused_whole(bad: list[float]) -> None:
    found = BettingSequence(0.05, [0.5])
    with pytest.raises(ValueError):
        found.update([0.2, *bad])
    assert found.n == 0


@pytest.mark.parametrize(("alpha", "grid"), [(0.0, None), (1.0, None), (0.1, [0.5, 0.4]), (0.1, [1.5]), (0.1, [])])
def test_arguments_are_checked(alpha: float, grid: list[float] | None) -> None:
    with pytest.raises(ValueError):
        BettingSequence(alpha, grid)
