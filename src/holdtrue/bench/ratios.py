"""What a setting keeps and undoes of what the undefended one does: ratios of changes, with Fieller's intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from holdtrue.bench.summary import Group, task_of
from holdtrue.runs.report.measures import Estimate
from holdtrue.runs.seeds import SeedRow, seed_rows

Rows = Sequence[Sequence[float]]


class Ratio(NamedTuple):
    """A ratio of two means; ``why`` says what it lacks.

    Attributes:
        value: ``None`` where it was not measured, or the denominator is zero.
        usable: whether the denominator is clear of zero, so that the ratio says something.
    """

    value: Estimate | None
    usable: bool
    why: str = ""


def fieller(over: Rows, under: Rows, clusters: Sequence[Sequence[Hashable]]) -> Ratio:
    """Return the ratio of two means over the same rows, each a mean over seeds of each seed's mean.

    Fieller's interval (Journal of the Royal Statistical Society B 1954): all r for which the mean of ``over - r ·
    under`` may be zero, with the clustered interval over seeds (``statistics.combine_seeds``) of that difference.
    Where the mean of ``under`` itself may be zero, the interval has no ends.

    Args:
        over, under: for each seed (n,) values of the same rows.
        clusters: for each seed the (n,) cluster of each row.
    """
    from scipy.optimize import brentq

    from holdtrue.evaluation.statistics import combine_seeds

    top, bottom = ([np.asarray(seed, dtype=np.float64) for seed in each] for each in (over, under))
    means = [float(np.mean([seed.mean() for seed in each])) for each in (top, bottom)]
    if means[1] == 0:
        return Ratio(None, False, "the undefended model did not change at all")
    value = means[0] / means[1]
    base = combine_seeds(bottom, clusters)
    if base.low is None or base.high is None:
        return Ratio(Estimate(value), True, "no interval: the rows have one theme only")
    if base.low <= 0 <= base.high:
        return Ratio(Estimate(value), False, "the undefended model's own change is not clear of zero")

    def inside(r: float) -> float:
        ends = combine_seeds([a - r * b for a, b in zip(top, bottom, strict=True)], clusters)
        assert ends.low is not None
        assert ends.high is not None
        return min(ends.high, -ends.low)

    ends: list[float] = []
    for direction in (-1.0, 1.0):
        step = max(abs(value), 1.0) * 1e-3
        while step < 1e9 and inside(value + direction * step) > 0:
            step *= 2
        if step >= 1e9:
            return Ratio(Estimate(value), True, "the interval has no end")
        if inside(value) <= 0:  # rows that are exactly proportional: no width
            ends.append(value)
            continue
        ends.append(float(brentq(inside, value, value + direction * step, xtol=1e-9)))  # pyright: ignore
    return Ratio(Estimate(value, (min(ends), max(ends))), True)


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
    over: list[list[float]] = []
    under: list[list[float]] = []
    clusters: list[list[Hashable]] = []
    for mine, theirs in zip(own, other, strict=True):
        pairs = [
            (a, b, x.cluster)
            for x, y in zip(mine, theirs, strict=True)
            if (a := _change(x)) is not None and (b := _change(y)) is not None
        ]
        if not pairs:
            return Ratio(None, False, "no answer counts on both sides")
        over.append([a for a, _, _ in pairs])
        under.append([b for _, b, _ in pairs])
        clusters.append([c for _, _, c in pairs])
    return fieller(over, under, clusters)


def undone(ratio: Ratio) -> Ratio:
    """Return one less a ratio: the share of the undefended shift that is gone."""
    if ratio.value is None:
        return ratio
    ends = ratio.value.interval
    return ratio._replace(value=Estimate(1 - ratio.value.value, None if ends is None else (1 - ends[1], 1 - ends[0])))


def _change(row: SeedRow) -> float | None:
    return None if row.tuned is None or row.untouched is None else row.tuned - row.untouched


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
