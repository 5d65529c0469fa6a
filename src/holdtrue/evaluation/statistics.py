"""Confidence intervals over rows that are not independent, for the few clusters (questions, themes) that there are.

Means get a cluster-robust t interval, shares a Korn-Graubard interval; both take several training seeds. All are
computed in closed form, without random draws.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

LEVEL = 0.95
ICC_FLOOR = 0.1
"""Correlation within a cluster that an interval of a share assumes at least, since few clusters cannot show it."""


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


class Bounds(NamedTuple):
    """The ends of an interval."""

    low: float
    high: float


Numbers: TypeAlias = Sequence[float] | Sequence[bool] | np.ndarray


def cluster_interval(values: Numbers, clusters: Sequence[Hashable], *, level: float = LEVEL) -> Interval:
    """Return the interval of the mean of ``values``, any numbers, whose rows are correlated within clusters.

    Mean ± t · s, with the bias-reduced cluster-robust standard error (CR2) and the degrees of freedom of Bell and
    McCaffrey (Survey Methodology 2002), which are the clusters less one where all are of one size, and fewer where
    few of them hold most rows. One cluster gives no interval; equal values give one of no width.

    Limits: it is symmetric, so that it covers somewhat too little where the clusters' means are very skewed. For
    shares, above all of rare events, use :func:`rate_interval`.

    Args:
        values: (n,) finite numbers.
        clusters: (n,) the cluster of each value, in any order.
        level: coverage aimed at.

    Raises:
        ValueError: no values, a value that is not finite, or lengths that differ.
    """
    return combine_seeds([values], [clusters], level=level)


def rate_interval(flags: Numbers, clusters: Sequence[Hashable], *, level: float = LEVEL) -> Interval:
    """Return the interval of the share of rows that are true, correlated within clusters; it always has a width.

    Korn and Graubard (Survey Methodology 1998): the exact binomial interval (Clopper-Pearson) of a sample as large as
    the rows are worth. That size is n over the design effect (how many times the clusters make the variance of the
    share as large as that of independent rows), and is cut further by the degrees of freedom. Few clusters or few
    events show a design effect badly, none at all where nothing or everything is true; hence the one assumed is never
    below that of a correlation of 0.1 within clusters (``ICC_FLOOR``). So the interval is conservative for rare
    events, and wider than need be where questions hardly differ. Clusters of one row each give Clopper-Pearson's.

    Args:
        flags: (n,) booleans, or zeros and ones.
        clusters: (n,) the cluster of each.
        level: coverage aimed at.

    Raises:
        ValueError: no flags, one that is neither 0 nor 1, or lengths that differ.
    """
    return combine_rates([flags], [clusters], level=level)


def paired_difference(
    values: Numbers, baseline: Numbers, clusters: Sequence[Hashable], *, level: float = LEVEL
) -> Interval:
    """Return the interval of the mean of ``values - baseline``, both (n,) and of the same rows in the same order.

    For flags, use :func:`rate_difference`.
    """
    after, before = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if after.shape != before.shape:
        raise ValueError(f"a paired difference needs the same rows: {after.shape} and {before.shape}")
    return cluster_interval(after - before, clusters, level=level)


def rate_difference(
    flags: Numbers, baseline: Numbers, clusters: Sequence[Hashable], *, level: float = LEVEL
) -> Interval:
    """Return the interval of the share true in ``flags`` less that in ``baseline``, the same rows in the same order.

    The difference is the share of rows that rose less the share that fell; the intervals of the two
    (:func:`rate_interval`) are combined by the square-and-add method of Zou and Donner (Statistics in Medicine 2008).
    It always has a width, also where no row changed.
    """
    return combine_rate_differences([flags], [baseline], [clusters], level=level)


def wilson(successes: int, n: int, *, level: float = LEVEL) -> Bounds:
    """Return Wilson's interval (JASA 1927) of a share of ``n`` independent rows, too narrow where they are not.

    Raises:
        ValueError: ``n`` below 1, or ``successes`` not between 0 and ``n``.
    """
    from scipy.special import ndtri

    if n < 1:
        raise ValueError("a share needs at least one row")
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} rows is no share")
    z = float(ndtri((1 + level) / 2))
    share, spread = successes / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return Bounds(0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


def combine_seeds(
    values_by_seed: Sequence[Numbers], clusters_by_seed: Sequence[Sequence[Hashable]], *, level: float = LEVEL
) -> Interval:
    """Return the interval of the mean over training seeds of each seed's mean, on the same clusters.

    It holds for other seeds and other clusters alike: its variance is that between the seeds' means over their
    number, plus that between clusters of what the seeds have in common (the same questions are hard for each), with
    the degrees of freedom of Welch and Satterthwaite: two or three seeds that disagree much give a wide interval.
    One seed is :func:`cluster_interval`, and says nothing of other seeds.

    Args:
        values_by_seed: for each seed its (n,) values; the lengths may differ.
        clusters_by_seed: for each seed the cluster of each value; the same names mean the same clusters.
    """
    spread = _spread([_finite(values) for values in values_by_seed], clusters_by_seed, level)
    if spread.clusters < 2:
        return spread.interval(None, None)
    half = _student(level, spread.df) * math.sqrt(spread.variance)
    return spread.interval(spread.mean - half, spread.mean + half)


def combine_rates(
    flags_by_seed: Sequence[Numbers], clusters_by_seed: Sequence[Sequence[Hashable]], *, level: float = LEVEL
) -> Interval:
    """Return the interval of the mean over training seeds of each seed's share: :func:`rate_interval` for seeds.

    The design effect takes in the variance between seeds; see :func:`combine_seeds` for that and for the arguments.
    """
    spread = _spread([_flags(flags) for flags in flags_by_seed], clusters_by_seed, level)
    if spread.clusters < 2:
        return spread.interval(None, None)
    share, n = min(max(spread.mean, 0.0), 1.0), spread.n
    alone = share * (1 - share) / n
    effect = max(spread.variance / alone if alone > 0 else 1.0, 1 + (spread.cluster_size - 1) * ICC_FLOOR)
    few = (_student(level, max(n - 1, 1)) / _student(level, spread.df)) ** 2
    low, high = _clopper_pearson(share, min(n / effect * few, n), level)
    return spread.interval(low, high)


def combine_rate_differences(
    flags_by_seed: Sequence[Numbers],
    baseline_by_seed: Sequence[Numbers],
    clusters_by_seed: Sequence[Sequence[Hashable]],
    *,
    level: float = LEVEL,
) -> Interval:
    """Return the interval of the mean over training seeds of each seed's :func:`rate_difference`."""
    rose: list[np.ndarray] = []
    fell: list[np.ndarray] = []
    for flags, baseline in zip(flags_by_seed, baseline_by_seed, strict=True):
        after, before = _flags(flags), _flags(baseline)
        if after.shape != before.shape:
            raise ValueError(f"a paired difference needs the same rows: {after.shape} and {before.shape}")
        rose.append((after > before).astype(np.float64))
        fell.append((after < before).astype(np.float64))
    up, down = (combine_rates(each, clusters_by_seed, level=level) for each in (rose, fell))
    if up.low is None or up.high is None or down.low is None or down.high is None:
        return up
    rise, fall = (float(np.mean([each.mean() for each in seeds])) for seeds in (rose, fell))
    low = rise - fall - math.hypot(rise - up.low, down.high - fall)
    high = rise - fall + math.hypot(up.high - rise, fall - down.low)
    return up._replace(low=max(low, -1.0), high=min(high, 1.0))


class _Spread(NamedTuple):
    """A mean, its variance and degrees of freedom; ``cluster_size`` is the rows' mean size of their own cluster."""

    mean: float
    variance: float
    df: float
    cluster_size: float
    n: int
    clusters: int

    def interval(self, low: float | None, high: float | None) -> Interval:
        return Interval(low, high, self.n, self.clusters)


def _spread(
    values_by_seed: Sequence[np.ndarray], clusters_by_seed: Sequence[Sequence[Hashable]], level: float
) -> _Spread:
    if not 0 < level < 1:
        raise ValueError("level must lie between 0 and 1")
    seeds = len(values_by_seed)
    if seeds == 0 or seeds != len(clusters_by_seed):
        raise ValueError(f"{seeds} seeds' values but {len(clusters_by_seed)} seeds' clusters")
    order: dict[Hashable, int] = {}
    indices = [_index(values, names, order) for values, names in zip(values_by_seed, clusters_by_seed, strict=True)]
    groups = len(order)
    means = np.array([values.mean() for values in values_by_seed])
    # Per cluster, averaged over seeds: its share of the rows, and its rows' part in the mean's deviation.
    share, residual, sizes = np.zeros(groups), np.zeros(groups), np.zeros(groups)
    for values, index, mean in zip(values_by_seed, indices, means, strict=True):
        counts = np.bincount(index, minlength=groups).astype(np.float64)
        sizes += counts
        share += counts / (len(values) * seeds)
        residual += np.bincount(index, weights=values - mean, minlength=groups) / (len(values) * seeds)
    n = int(sizes.sum())
    mean, size = float(means.mean()), float((sizes**2).sum() / n)
    if groups < 2:
        return _Spread(mean, math.nan, math.nan, size, n, groups)
    by_cluster = float((residual**2 / (1 - share)).sum())
    leverage = share**2 / (1 - share)
    df = 1 / float((share**2).sum() + leverage.sum() ** 2 - (leverage**2).sum())
    if seeds == 1:
        return _Spread(mean, by_cluster, df, size, n, groups)
    by_seed = float(means.var(ddof=1)) / seeds
    variance = by_cluster + by_seed
    if by_seed > 0:
        df = variance**2 / (by_cluster**2 / df + by_seed**2 / (seeds - 1))
    return _Spread(mean, variance, df, size, n, groups)


def _index(values: np.ndarray, names: Sequence[Hashable], order: dict[Hashable, int]) -> np.ndarray:
    if len(values) != len(names):
        raise ValueError(f"{len(values)} values but {len(names)} cluster names")
    return np.array([order.setdefault(name, len(order)) for name in names])


def _finite(values: Numbers) -> np.ndarray:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError("an interval needs a list of at least one value")
    if not np.isfinite(numbers).all():
        raise ValueError("an interval needs finite values")
    return numbers


def _flags(flags: Numbers) -> np.ndarray:
    numbers = _finite(flags)
    if not ((numbers == 0) | (numbers == 1)).all():
        raise ValueError("a share needs booleans, or zeros and ones")
    return numbers


def _student(level: float, df: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, (1 + level) / 2))


def _clopper_pearson(share: float, n: float, level: float) -> Bounds:
    from scipy.special import betaincinv

    hits, misses, tail = share * n, (1 - share) * n, (1 - level) / 2
    low = float(betaincinv(hits, misses + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, misses, 1 - tail)) if misses > 0 else 1.0
    return Bounds(low, high)
