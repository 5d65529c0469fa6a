"""A multiplier on a constraint that is measured now and then: projected dual ascent on its logarithm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Dual(NamedTuple):
    """``multiplier``: in force until the next measurement. ``error``: the one last measured, within -1 to 1."""

    multiplier: float
    error: float


@dataclass(frozen=True)
class DualAscent:
    """The rule for a constraint ``value <= target``, with the relative error e_k = value_k / target − 1:

    log m_{k+1} = clip(log m_k + gain * (e_k + lead * max(0, e_k − e_{k−1})), log lowest, log highest)

    With ``lead`` 0 this is dual ascent by multiplicative steps (mirror ascent with the entropy, projected). ``lead``
    looks ahead by so many measurements along a straight line, against the delay between a multiplier and what comes of
    it; only while the value rises, which is how PID-Lagrangian methods (Stooke et al. 2020, arXiv 2007.03964) use their
    derivative: at a run's end a value above its target costs more than one below. The projection is on m itself, so
    that no integral winds up at a bound.

    Errors are cut to −1 to 1, and one step changes m by a factor of ``LARGEST_FACTOR`` at most.

    Args:
        gain: step size. The rule knows no unit, so it does not depend on the scales of value and multiplier.
        lead: measurements to look ahead while the value rises, at least 0.
        lowest, highest: bounds on m, 0 < lowest <= highest; or both 0, which holds m at 0.
    """

    gain: float = 1.0
    lead: float = 1.0
    lowest: float = 0.01
    highest: float = 100.0

    LARGEST_FACTOR = 4.0

    def start(self) -> Dual:
        """Return the first state: m as near 1 as its bounds allow, and a value of 0, which is nothing of the target."""
        return Dual(min(max(1.0, self.lowest), self.highest), -1.0)

    def step(self, state: Dual, relative: float) -> Dual:
        """Return the state after a measurement of ``relative`` = value / target."""
        error = min(max(relative - 1.0, -1.0), 1.0)
        if self.highest == 0.0:
            return Dual(0.0, error)
        cap = math.log(self.LARGEST_FACTOR)
        change = self.gain * (error + self.lead * max(0.0, error - state.error))
        moved = state.multiplier * math.exp(min(max(change, -cap), cap))
        return Dual(min(max(moved, self.lowest), self.highest), error)
