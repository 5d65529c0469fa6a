from __future__ import annotations

import pytest

from holdtrue.errors import SpecError
from holdtrue.evaluation.judges import Budget, Prices
from holdtrue.evaluation.judges.budget import Meter, Use


def test_tokens_are_limited_by_what_is_reserved_and_used() -> None:
    meter = Meter(Budget(tokens=100))
    assert meter.fits(Use(90, 10))
    meter.reserve(Use(90, 10))
    assert not meter.fits(Use(1, 0))
    meter.settle(Use(90, 10), Use(40, 1))
    assert meter.used == (40, 1)
    assert meter.fits(Use(59, 0))
    assert not meter.fits(Use(60, 0))


def test_dollars_are_limited_by_prices() -> None:
    meter = Meter(Budget(dollars=0.01), Prices(input=2.0, output=10.0))
    assert meter.cost(Use(1000, 100)) == pytest.approx(0.003)
    assert meter.fits(Use(4000, 200))
    assert not meter.fits(Use(4000, 201))


def test_what_was_once_refused_stays_refused() -> None:
    meter = Meter(Budget(tokens=10))
    meter.exhausted = True
    assert not meter.fits(Use(1, 0))


@pytest.mark.parametrize("budget", [Budget(dollars=1), Budget(tokens=0), Budget(tokens=-5)])
def test_a_budget_that_makes_no_sense_is_refused(budget: Budget) -> None:
    with pytest.raises(SpecError):
        Meter(budget)


def test_without_a_budget_all_fits() -> None:
    assert Meter().fits(Use(10**12, 10**12))
    assert Meter().cost(Use(1, 1)) is None
