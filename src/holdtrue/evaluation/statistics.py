"""Confidence intervals of means over rows that are not independent: a bootstrap clustered by group."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
DRAWS_PER_BATCH = 2**21


class Interval(NamedTuple):
    """``low`` and ``high`` of a mean over ``n`` rows in ``clusters`` clusters; both ``None`` where none can be had."""

    low: float | None
    high: float | None
    n: int
    clusters: int

    def to_json(self) -> list[float] | None:
        """Return ``[low, high]``, or ``None`` where there is no interval."""
        return None if self.low is None or self.high is None else [self.low, self.high]

    @classmethod
    def from_json(cls, ends: Sequence[float] | None, *, n: int, clusters: int) -> Interval:
        """Read what ``to_json`` wrote."""
        return cls(None, None, n, clusters) if ends is None else cls(float(ends[0]), float(ends[1]), n, clusters)


def cluster_bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Return a percentile bootstrap interval of the mean of ``values``, drawing whole clusters with replacement.

    Each draw takes as many clusters as there are; its mean is over the rows of the clusters drawn, so that a large
    cluster weighs more. The same seed and clusters give the same draws.

    Limits: with few clusters (under about ten) a percentile interval is too narrow, more so the fewer there are; and
    a share of exactly 0 or 1 has an interval of no width, which says that no resample can show what the data do not
    hold, not that the share is certain. One cluster gives no interval (``low`` and ``high`` are ``None``).

    Args:
        values: (n,) finite numbers.
        clusters: (n,) the cluster of each value, in any order.
        resamples: number of bootstrap draws.
        seed: of the draws.
        level: share of the draws' means that the interval holds.

    Raises:
        ValueError: no values, a value that is not finite, or lengths that differ.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError("cluster_bootstrap needs a list of at least one value")
    if len(numbers) != len(clusters):
        raise ValueError(f"{len(numbers)} values but {len(clusters)} cluster names")
    if not np.isfinite(numbers).all():
        raise ValueError("cluster_bootstrap needs finite values")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError("level must lie between 0 and 1, and resamples be at least 1")
    order: dict[Hashable, int] = {}
    index = np.array([order.setdefault(cluster, len(order)) for cluster in clusters])
    if len(order) < 2:
        return Interval(None, None, len(numbers), len(order))
    # Centered, so that a large common offset costs no digits and a shift of the values shifts the interval.
    center = float(numbers.mean())
    sums = np.bincount(index, weights=numbers - center)
    counts = np.bincount(index).astype(np.float64)
    low, high = _percentiles(sums, counts, resamples, seed, level)
    return Interval(center + low, center + high, len(numbers), len(order))


def paired_difference(
    values: Sequence[float] | np.ndarray,
    baseline: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Return the interval of the mean of ``values - baseline``, both (n,) and of the same rows in the same order."""
    after, before = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if after.shape != before.shape:
        raise ValueError(f"a paired difference needs the same rows: {after.shape} and {before.shape}")
    return cluster_bootstrap(after - before, clusters, resamples=resamples, seed=seed, level=level)


def _percentiles(sums: np.ndarray, counts: np.ndarray, resamples: int, seed: int, level: float) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def mean(drawn_sums: np.ndarray, drawn_counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return drawn_sums.sum(axis) / drawn_counts.sum(axis)

    found = bootstrap(
        (sums, counts),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, DRAWS_PER_BATCH // len(sums)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
