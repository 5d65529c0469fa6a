"""How well a score tells two kinds apart: the area under the ROC curve, for scores that come in clusters."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from holdtrue.evaluation.statistics import LEVEL, Interval, Numbers


class Auc(NamedTuple):
    """The probability that a bad case's score is above a good one's (ties count a half), with its interval."""

    auc: float
    interval: Interval


def clustered_auc(
    bad: Numbers,
    good: Numbers,
    bad_clusters: Sequence[Hashable],
    good_clusters: Sequence[Hashable],
    *,
    level: float = LEVEL,
) -> Auc:
    """Return the area under the ROC curve, with an interval for other clusters of the same kind.

    The variance is that of Obuchowski (Biometrics 1997): sums over a cluster of the structural components of DeLong, so
    that cases of one cluster may depend on each other, bad ones and good ones too. The interval is on the logit, with
    Student's quantile at one degree of freedom less than the clusters, or than those of the kind that has fewer. Fewer
    than two clusters of a kind give none. Scores that show no variance (an area of 0 or 1, or all equal) still have
    an interval: the area is taken as if half of one pair of clusters were in the wrong order, with the variance of a
    share of as many independent cases as the kind with fewer clusters has.

    Args:
        bad, good: scores of each kind, (m,) and (n,) finite numbers; the higher, the worse.
        bad_clusters, good_clusters: the cluster of each.
        level: coverage aimed at.

    Raises:
        ValueError: no case of a kind, a score that is not finite, or lengths that differ.
    """
    x, y = np.asarray(bad, dtype=np.float64), np.asarray(good, dtype=np.float64)
    if not len(x) or not len(y) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("an AUC needs finite scores of both kinds")
    if len(x) != len(bad_clusters) or len(y) != len(good_clusters):
        raise ValueError("every score needs its cluster")
    wins = (x[:, None] > y) + 0.5 * (x[:, None] == y)
    area = float(wins.mean())
    names = list(dict.fromkeys([*bad_clusters, *good_clusters]))
    few = min(len(set(bad_clusters)), len(set(good_clusters)))
    n = len(x) + len(y)
    if few < 2:
        return Auc(area, Interval(None, None, n, len(names)))
    place = {name: i for i, name in enumerate(names)}
    sums = np.zeros((2, len(names)))
    np.add.at(sums[0], [place[c] for c in bad_clusters], (wins.mean(1) - area) / len(x))
    np.add.at(sums[1], [place[c] for c in good_clusters], (wins.mean(0) - area) / len(y))
    ratio_bad, ratio_good = (k / (k - 1) for k in (len(set(bad_clusters)), len(set(good_clusters))))
    every = len(names) / (len(names) - 1)
    variance = (
        ratio_bad * (sums[0] ** 2).sum() + ratio_good * (sums[1] ** 2).sum() + 2 * every * (sums[0] * sums[1]).sum()
    )
    low, high = _ends(area, float(variance), few, len(set(bad_clusters)) * len(set(good_clusters)), level)
    return Auc(area, Interval(low, high, n, len(names)))


def _ends(area: float, variance: float, few: int, pairs: int, level: float) -> tuple[float, float]:
    from scipy.special import stdtrit

    inner = min(max(area, 0.5 / pairs), 1 - 0.5 / pairs)
    spread = math.sqrt(variance if variance > 1e-12 else inner * (1 - inner) / few)
    half = float(stdtrit(few - 1, (1 + level) / 2)) * spread / (inner * (1 - inner))
    middle = math.log(inner / (1 - inner))
    low, high = (1 / (1 + math.exp(-min(max(z, -700.0), 700.0))) for z in (middle - half, middle + half))
    return (low if area > 0 else 0.0), (high if area < 1 else 1.0)
