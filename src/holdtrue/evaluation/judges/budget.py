"""What judging by an endpoint costs: an estimate before, and a limit that is not passed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from holdtrue.errors import SpecError


@dataclass(frozen=True)
class Prices:
    """What an endpoint takes, in dollars per million tokens sent and received."""

    input: float
    output: float


@dataclass(frozen=True)
class Budget:
    """The most that may be spent, in tokens (sent and received), in dollars, or both."""

    tokens: int | None = None
    dollars: float | None = None

    def __str__(self) -> str:
        tokens = [] if self.tokens is None else [f"{self.tokens:,} tokens"]
        return " and ".join(tokens + ([] if self.dollars is None else [f"${self.dollars:g}"]))


class Estimate(NamedTuple):
    """What judging will take, roughly: four bytes of text are counted as a token. ``cost`` in dollars."""

    requests: int
    tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", about ${self.cost:.2f}"
        return f"the judge will be asked {self.requests:,} times: about {self.tokens:,} tokens{cost}"


class Use(NamedTuple):
    """Tokens sent to an endpoint and received from it."""

    input: int = 0
    output: int = 0

    def __add__(self, other: object) -> Use:
        assert isinstance(other, Use)
        return Use(self.input + other.input, self.output + other.output)

    def __sub__(self, other: Use) -> Use:
        return Use(self.input - other.input, self.output - other.output)

    @property
    def tokens(self) -> int:
        """Tokens both ways."""
        return self.input + self.output


class Meter:
    """Counts use against a budget. What could be used is reserved before it is asked for, so the limit holds.

    Attributes:
        used: what was reserved and not given back, and what is known to have been used.
        exhausted: a request was refused; all later ones are refused as well.

    Raises:
        SpecError: a budget in dollars without prices, or one that is not above 0.
    """

    def __init__(self, budget: Budget | None = None, prices: Prices | None = None) -> None:
        self.budget = budget or Budget()
        self.used = Use()
        self.exhausted = False
        self._prices = prices
        if self.budget.dollars is not None and prices is None:
            raise SpecError("a budget in dollars needs the endpoint's prices; give them, or a budget in tokens")
        if any(limit is not None and not limit > 0 for limit in (self.budget.tokens, self.budget.dollars)):
            raise SpecError(f"a budget must be above 0, not {self.budget}")

    def cost(self, use: Use) -> float | None:
        """Return what a use costs in dollars; ``None`` without prices."""
        if self._prices is None:
            return None
        return (use.input * self._prices.input + use.output * self._prices.output) / 1e6

    def fits(self, use: Use) -> bool:
        """Say whether so much more can be used."""
        after = self.used + use
        cost = self.cost(after)
        return not self.exhausted and not (
            (self.budget.tokens is not None and after.tokens > self.budget.tokens)
            or (self.budget.dollars is not None and cost is not None and cost > self.budget.dollars)
        )

    def reserve(self, use: Use) -> None:
        """Count a use that may come."""
        self.used += use

    def settle(self, reserved: Use, used: Use) -> None:
        """Replace what was reserved by what was used."""
        self.used = self.used - reserved + used
