"""Confidence bounds of a mean that hold at every moment while observations arrive, so that one may stop any time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TRUNCATION = 0.75
"""Share of the capital that a bet may lose on one observation; the paper suggests 1/2 or 3/4."""
GRID = 1001
BLOCK = 256
"""Observations taken in at once, to bound the memory."""


class Rejections(NamedTuple):
    """Per mean of the grid, the observations seen when it was first found too low or too high; 0 where never."""

    too_low: np.ndarray
    too_high: np.ndarray


class BettingSequence:
    """A lower and an upper bound of the mean of observations in [0, 1], each wrong at any time with chance ``alpha``.

    For every mean m of a grid it bets against the claim that the mean is at most m, and against the claim that it is
    at least m. While the claim is true the capital is a nonnegative supermartingale that starts at 1, so that it ever
    reaches 1/``alpha`` with a chance of at most ``alpha`` (Ville); then m is rejected for good. The bets are the
    predictable plug-in empirical-Bernstein bets of Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting" (JRSS-B 2023, arXiv 2010.09686, section 4.3), one-sided: each side with its own ``alpha``.

    The observations need not be independent, but each must have the same mean given those before it, as draws with
    replacement have. The time of an update is its observations times the grid.

    Args:
        alpha: chance of error of each bound.
        grid: means to bet against, rising, in [0, 1]; 1,001 evenly spaced if not given. The bounds are conservative:
            the nearest rejected mean of the grid.
    """

    def __init__(self, alpha: float, grid: Sequence[float] | np.ndarray | None = None) -> None:
        means = np.linspace(0.0, 1.0, GRID) if grid is None else np.asarray(grid, dtype=np.float64)
        if not 0 < alpha < 1:
            raise ValueError("alpha must lie between 0 and 1")
        if means.ndim != 1 or not len(means) or not ((means >= 0) & (means <= 1)).all() or (np.diff(means) <= 0).any():
            raise ValueError("the grid must rise within [0, 1]")
        self.alpha = alpha
        self.grid = means
        self.n = 0
        self._sum = 0.0
        self._squares = 0.0
        self._capital = np.zeros((2, len(means)))
        with np.errstate(divide="ignore"):
            self._caps = TRUNCATION / np.stack([means, 1 - means])
        zeros = np.zeros(len(means), dtype=np.int64)
        self.rejections = Rejections(zeros, zeros.copy())

    @property
    def log_capital(self) -> np.ndarray:
        """(2, grid): natural logarithm of the capital now, won against "at most m" and against "at least m"."""
        return self._capital.copy()

    @property
    def lower(self) -> float:
        """The lower bound: the highest mean found too low so far, else 0."""
        rejected = self.grid[self.rejections.too_low > 0]
        return float(rejected[-1]) if len(rejected) else 0.0

    @property
    def upper(self) -> float:
        """The upper bound: the lowest mean found too high so far, else 1."""
        rejected = self.grid[self.rejections.too_high > 0]
        return float(rejected[0]) if len(rejected) else 1.0

    def update(self, values: Sequence[float] | np.ndarray) -> None:
        """Take in (n,) observations in the order in which they were drawn.

        Raises:
            ValueError: one is not a number in [0, 1]; none was taken in.
        """
        x = np.asarray(values, dtype=np.float64)
        if x.ndim != 1 or not ((x >= 0) & (x <= 1)).all():
            raise ValueError("observations must be numbers in [0, 1]")
        for start in range(0, len(x), BLOCK):
            self._take(x[start : start + BLOCK])

    def _take(self, x: np.ndarray) -> None:
        bets = np.minimum(self._bets(x)[:, None], self._caps[:, None, :])
        side = np.array([1.0, -1.0])[:, None, None]
        gains = np.log1p(side * bets * (x[:, None] - self.grid))
        capital = self._capital[:, None, :] + gains.cumsum(axis=1)
        self._capital = capital[:, -1]
        for reached, first in zip(capital >= math.log(1 / self.alpha), self.rejections, strict=True):
            new = reached.any(axis=0) & (first == 0)
            first[new] = self.n + 1 + reached.argmax(axis=0)[new]
        self.n += len(x)

    def _bets(self, x: np.ndarray) -> np.ndarray:
        """(n,) the bet on each observation, before it is capped: from the variance of those before it."""
        t = self.n + np.arange(1, len(x) + 1)
        sums = self._sum + x.cumsum()
        deviations = (x - (0.5 + sums) / (t + 1)) ** 2
        squares = self._squares + deviations.cumsum()
        variance = (0.25 + np.concatenate([[self._squares], squares[:-1]])) / t
        self._sum, self._squares = float(sums[-1]), float(squares[-1])
        return np.sqrt(2 * math.log(1 / self.alpha) / (variance * t * np.log1p(t)))
