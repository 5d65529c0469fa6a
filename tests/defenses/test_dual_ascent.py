"""The controller alone: projection, units, and a problem whose optimum is known in closed form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.defenses.dual_ascent import Dual, DualAscent

BOUNDS = st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)).map(sorted)
GAINS = {"gain": st.floats(0.01, 10), "lead": st.floats(0, 10)}


@given(
    bounds=BOUNDS,
    values=st.lists(st.floats(-1e300, 1e300) | st.sampled_from([math.inf, -math.inf]), max_size=20),
    **GAINS,
)
def test_the_multiplier_stays_within_its_bounds(bounds, values, gain, lead):
    rule = DualAscent(gain, lead, *bounds)
    state = rule.start()
    for value in values:
        before = state
        state = rule.step(state, value)
        assert bounds[0] <= state.multiplier <= bounds[1]
        assert -1 <= state.error <= 1
        ratio = state.multiplier / before.multiplier
        assert 1 / DualAscent.LARGEST_FACTOR * (1 - 1e-12) <= ratio <= DualAscent.LARGEST_FACTOR * (1 + 1e-12)


@given(
    error=st.floats(-1, 1),
    before=st.floats(-1, 1),
    start=st.floats(0.1, 10),
    gain=st.floats(0, 0.5),
    lead=st.floats(0, 1),
)
def test_a_step_is_the_formula(error, before, start, gain, lead):
    stepped = DualAscent(gain, lead, 1e-3, 1e3).step(Dual(start, before), 1 + error)
    change = gain * (error + lead * max(0, error - before))
    expected = math.log(start) + min(max(change, -math.log(4)), math.log(4))
    assert math.log(stepped.multiplier) == pytest.approx(expected, abs=1e-9)


def test_it_does_not_wind_up_at_a_bound():
    rule = DualAscent(lowest=0.5, highest=2.0)
    state = rule.start()
    for _ in range(50):
        state = rule.step(state, 5.0)
    assert state.multiplier == 2.0
    assert rule.step(state, 0.5).multiplier < 2.0


def test_a_multiplier_held_at_zero_stays_there():
    rule = DualAscent(lowest=0.0, highest=0.0)
    assert rule.start().multiplier == 0.0
    assert rule.step(rule.start(), 9.0).multiplier == 0.0


def test_a_multiplier_at_one_value_stays_there():
    rule = DualAscent(lowest=3.0, highest=3.0)
    assert rule.step(rule.step(rule.start(), 2.0), 0.1).multiplier == 3.0


def relaxed(rule: DualAscent, *, price: float, allowed: float, delay: float, probes: int) -> tuple[list[float], float]:
    """Drifts and the last multiplier of: minimize (x − 1)²/2 subject to x <= allowed, with the term price * m * x²/2.

    Between two probes x relaxes towards the term's own optimum 1 / (1 + price * m), by a share 1 − exp(−1/delay).
    """
    x, state, drifts = 0.0, rule.start(), []
    for _ in range(probes):
        optimum = 1 / (1 + price * state.multiplier)
        x = optimum + (x - optimum) * math.exp(-1 / delay)
        drifts.append(x)
        state = rule.step(state, x / allowed)
    return drifts, state.multiplier


@pytest.mark.parametrize("delay", [0.1, 1.0, 4.0, 10.0])
@pytest.mark.parametrize("allowed", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("price", [0.05, 1.0, 20.0])
def test_it_finds_the_constrained_optimum(price, allowed, delay):
    # At the optimum x = allowed, so m = (1/allowed − 1) / price. Wide bounds: these optima lie far apart.
    rule = DualAscent(lowest=1e-4, highest=1e4)
    drifts, multiplier = relaxed(rule, price=price, allowed=allowed, delay=delay, probes=400)
    assert drifts[-1] == pytest.approx(allowed, rel=1e-3)
    assert multiplier == pytest.approx((1 / allowed - 1) / price, rel=1e-2)


def test_the_unit_of_the_value_does_not_matter():
    rule = DualAscent()
    # Powers of two, so that not even rounding differs.
    a, b = ([rule.step(Dual(1.0, -1.0), unit * 0.375 / (unit * 0.5))] for unit in (1.0, 1024.0))
    assert a == b


def test_a_constraint_that_never_binds_lets_the_multiplier_fall_to_its_least():
    drifts, multiplier = relaxed(DualAscent(), price=1.0, allowed=2.0, delay=4.0, probes=40)
    assert multiplier == 0.01
    assert drifts[-1] == pytest.approx(1 / 1.01, rel=1e-3)


def test_looking_ahead_overshoots_less_on_a_short_run():
    peaks = {
        lead: max(relaxed(DualAscent(lead=lead), price=0.3, allowed=0.3, delay=4.0, probes=10)[0])
        for lead in (0.0, 1.0)
    }
    assert peaks[1.0] < peaks[0.0]


@pytest.mark.parametrize("price", [0.3, 1.0, 3.0, 10.0])
def test_ten_probes_come_near_from_a_weight_that_is_off(price):
    drifts, _ = relaxed(DualAscent(), price=price, allowed=0.4, delay=2.0, probes=10)
    assert drifts[-1] == pytest.approx(0.4, rel=0.25)
