"""What a setting keeps and undoes of what the undefended one does: ratios of changes, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np

from holdtrue.bench.summary import Group, task_of
from holdtrue.runs.report.measures import Estimate
from holdtrue.runs.seeds import SeedRow, is_share, seed_rows

Rows = Sequence[Sequence[float]]
Clusters = Sequence[Sequence[Hashable]]

TOWARDS = {"margin": -1, "misaligned": 1, "incoherent": 1, "nll": -1, "accuracy": 1}
"""The sign of a number's change that is a shift to misalignment, or something learned."""

WHICH = ("tuned", "untouched")


class Ratio(NamedTuple):
    """A ratio of two means; ``why`` says what it lacks.

    Attributes:
        value: ``None`` where it was not measured, or the denominator is zero.
        usable: whether the denominator is clear of zero, so that the ratio says something.
    """

    value: Estimate | None
    usable: bool
    why: str = ""


def fieller(over: Rows, under: Rows, clusters: Clusters) -> Ratio:
    """Return the ratio of two means over the same rows, each a mean over seeds of each seed's mean.

    Fieller's interval (Journal of the Royal Statistical Society B 1954): all r for which the mean of ``over - r ·
    under`` may be zero, with the clustered interval over seeds (``statistics.combine_seeds``) of that difference.
    Where the mean of ``under`` itself may be zero, the interval has no ends.

    Args:
        over, under: for each seed (n,) values of the same rows.
        clusters: for each seed the (n,) cluster of each row.
    """
    from holdtrue.evaluation.statistics import combine_seeds

    top, bottom = ([np.asarray(seed, dtype=np.float64) for seed in each] for each in (over, under))
    base = combine_seeds(bottom, clusters)

    def ends(r: float) -> tuple[float, float]:
        found = combine_seeds([a - r * b for a, b in zip(top, bottom, strict=True)], clusters)
        assert found.low is not None
        assert found.high is not None
        return found.low, found.high

    return _ratio(_mean(top), _mean(bottom), base.to_json(), ends)


def rate_ratio(tuned: tuple[Rows, Rows], untouched: tuple[Rows, Rows], clusters: Clusters) -> Ratio:
    """Return the ratio of two changes of a share; it always has a width, also where no row changed.

    The intervals of the two changes (``statistics.combine_rate_differences``) are combined by the method of variance
    estimates recovery (Donner and Zou, Statistical Methods in Medical Research 2012), as if the two were independent.

    Args:
        tuned, untouched: of the setting, and of the undefended one: for each seed the (n,) flags of the same rows.
        clusters: for each seed the (n,) cluster of each row.
    """
    from holdtrue.evaluation.statistics import combine_rate_differences

    own, base = (
        combine_rate_differences(after, before, clusters).to_json()
        for after, before in zip(tuned, untouched, strict=True)
    )
    top, bottom = (
        _mean([np.asarray(a, dtype=np.float64) - np.asarray(b) for a, b in zip(after, before, strict=True)])
        for after, before in zip(tuned, untouched, strict=True)
    )

    def ends(r: float) -> tuple[float, float]:
        """Return the limits of ``top - r · bottom``."""
        assert own is not None
        assert base is not None
        below, above = sorted((r * base[0], r * base[1]))
        middle = r * bottom
        low = top - middle - math.hypot(top - own[0], above - middle)
        return low, top - middle + math.hypot(own[1] - top, middle - below)

    return _ratio(top, bottom, base, ends)


def _mean(by_seed: Sequence[np.ndarray]) -> float:
    return float(np.mean([seed.mean() for seed in by_seed]))


def _ratio(
    top: float, bottom: float, base: Sequence[float] | None, ends: Callable[[float], tuple[float, float]]
) -> Ratio:
    """Return top / bottom with all r for which the interval ``ends(r)`` of ``top - r · bottom`` holds zero.

    ``base`` is the interval of ``bottom``, ``None`` where there is none.
    """
    from scipy.optimize import brentq

    if bottom == 0:
        return Ratio(None, False, "the undefended model did not change at all")
    value = top / bottom
    if base is None:
        return Ratio(Estimate(value), True, "no interval: the rows have one theme only")
    if base[0] <= 0 <= base[1]:
        return Ratio(Estimate(value), False, "the undefended model's own change is not clear of zero")

    def inside(r: float) -> float:
        low, high = ends(r)
        return min(high, -low)

    if inside(value) <= 0:  # rows that are exactly proportional: no width
        return Ratio(Estimate(value, (value, value)), True)
    found: list[float] = []
    for direction in (-1.0, 1.0):
        step = max(abs(value), 1.0) * 1e-3
        while step < 1e9 and inside(value + direction * step) > 0:
            step *= 2
        if step >= 1e9:
            return Ratio(Estimate(value), True, "the interval has no end")
        found.append(float(brentq(inside, value, value + direction * step, xtol=1e-9)))  # pyright: ignore
    return Ratio(Estimate(value, (min(found), max(found))), True)


def change_ratio(group: Group, base: Group, suite: str, metric: str, task: str = "") -> Ratio:
    """Return a setting's change of a number over the undefended one's, on rows and seeds that both have."""
    seeds = [seed for seed in group.runs if seed in base.runs]
    if not seeds:
        return Ratio(None, False, "no seed of both is finished")
    sha256 = _rows_of(group, seeds[0], suite, metric, task)
    if sha256 is None:
        return Ratio(None, False, "not measured")
    runs = [[each.runs[seed] for seed in seeds] for each in (group, base)]
    own, other = (seed_rows(each, suite, metric, sha256) for each in runs)
    if own is None or other is None:
        return Ratio(None, False, "not measured on the same rows")
    kept = [
        [(x, y) for x, y in zip(mine, theirs, strict=True) if None not in (x.tuned, x.untouched, y.tuned, y.untouched)]
        for mine, theirs in zip(own, other, strict=True)
    ]
    if not all(kept):
        return Ratio(None, False, "no answer counts on both sides")
    clusters = [[x.cluster for x, _ in each] for each in kept]
    sides = [[[pair[side] for pair in each] for each in kept] for side in (0, 1)]
    moved = [[list(map(_change, rows)) for rows in side] for side in sides]
    if is_share(suite, metric):
        after, before = ([[[getattr(row, name) for row in rows] for rows in side] for side in sides] for name in WHICH)
        ratio = rate_ratio((after[0], after[1]), (before[0], before[1]), clusters)
    else:
        ratio = fieller(moved[0], moved[1], clusters)
    if ratio.usable and TOWARDS[metric] * _mean([np.asarray(seed) for seed in moved[1]]) < 0:
        why = "the undefended model moved the other way, so that there is nothing to undo or to keep"
        return ratio._replace(usable=False, why=why)
    return ratio


def undone(ratio: Ratio) -> Ratio:
    """Return one less a ratio: the share of the undefended shift that is gone."""
    if ratio.value is None:
        return ratio
    ends = ratio.value.interval
    return ratio._replace(value=Estimate(1 - ratio.value.value, None if ends is None else (1 - ends[1], 1 - ends[0])))


def _change(row: SeedRow) -> float:
    assert row.tuned is not None
    assert row.untouched is not None
    return row.tuned - row.untouched


def _rows_of(group: Group, seed: int, suite: str, metric: str, task: str) -> str | None:
    first = group.entry(suite, metric, task)
    run = group.runs[seed]
    if first is None:
        return None
    for record in run.evaluations():
        named = (record["suite"], record["which"], task_of(run, record)) == (suite, "tuned", first.task)
        if named and record["data"].get("of_spec", False) and record["rows"]:
            return record["data"]["sha256"]
    return None
