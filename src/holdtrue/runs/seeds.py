"""Runs that differ in nothing but their training seed, taken together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from holdtrue.runs.directory import Run

if TYPE_CHECKING:
    from holdtrue.evaluation import Result


@dataclass(frozen=True)
class SeedMeasure:
    """A number over several training seeds, with intervals that hold for other seeds and other questions alike.

    Attributes:
        runs: names of the runs.
        suite, metric, data_sha256: what was measured.
        n: rows of one run.
        value, interval: mean over the seeds; ``change``, ``change_interval`` against the untouched model.
    """

    runs: tuple[str, ...]
    suite: str
    metric: str
    data_sha256: str
    n: int
    value: float
    interval: list[float] | None
    change: float
    change_interval: list[float] | None


def seed_measures(runs: Sequence[Run]) -> list[SeedMeasure]:
    """Return what two or more runs of one spec, each with its own seed, say together."""
    return [measure for group in _groups(runs) for measure in measure_group(group)]


def measure_group(group: Sequence[Run]) -> list[SeedMeasure]:
    """Return what runs that differ in nothing but their seed say together; one run is one seed."""
    found: list[SeedMeasure] = []
    for suite, sha256 in dict.fromkeys(
        (r["suite"], r["data"]["sha256"]) for run in group for r in run.evaluations() if r["suite"] in _COLUMNS
    ):
        records = [[run.evaluation(suite, which, sha256) for run in group] for which in ("tuned", "untouched")]
        if None not in records[0] and None not in records[1]:
            found += _together(group, suite, sha256, *records)
    return found


class SeedRow(NamedTuple):
    """A row's number on the tuned and on the untouched model, ``None`` where it does not count, and its cluster."""

    tuned: float | None
    untouched: float | None
    cluster: Any


def seed_rows(group: Sequence[Run], suite: str, metric: str, sha256: str) -> list[list[SeedRow]] | None:
    """Return the rows of a number for each run of a group, in the data's order; ``None`` where a run lacks it."""
    from holdtrue.evaluation import read_result

    value_of, cluster_of, _ = _COLUMNS[suite][metric]
    found: list[list[SeedRow]] = []
    for run in group:
        after, before = (run.evaluation(suite, which, sha256) for which in ("tuned", "untouched"))
        if after is None or before is None:
            return None
        pairs = zip(read_result(after).rows, read_result(before).rows, strict=True)
        found.append([SeedRow(_float(value_of(a)), _float(value_of(b)), cluster_of(a)) for a, b in pairs])
    return found


def is_share(suite: str, metric: str) -> bool:
    """Return whether a number is the share of rows that have something."""
    return _COLUMNS[suite][metric][2]


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _groups(runs: Sequence[Run]) -> list[list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        spec = run.spec.canonical()
        del spec["training"]["seed"], spec["folder"]
        groups.setdefault(json.dumps(spec, sort_keys=True), []).append(run)
    return [g for g in groups.values() if len(g) > 1 and len({run.spec.training.seed for run in g}) == len(g)]


def _together(
    group: Sequence[Run], suite: str, sha256: str, tuned: Sequence[Any], untouched: Sequence[Any]
) -> list[SeedMeasure]:
    from holdtrue.evaluation import read_result
    from holdtrue.evaluation.statistics import combine_rate_differences, combine_rates, combine_seeds

    after, before = [read_result(r) for r in tuned], [read_result(r) for r in untouched]
    found: list[SeedMeasure] = []
    for metric, (value_of, cluster_of, share) in _COLUMNS[suite].items():
        pairs = [
            [(a, b) for a, b in zip(x.rows, y.rows, strict=True) if value_of(a) is not None and value_of(b) is not None]
            for x, y in zip(after, before, strict=True)
        ]
        if not all(pairs):
            continue
        own = [[float(value_of(a)) for a, _ in each] for each in pairs]
        base = [[float(value_of(b)) for _, b in each] for each in pairs]
        clusters = [[cluster_of(a) for a, _ in each] for each in pairs]
        moved = [[x - y for x, y in zip(a, b, strict=True)] for a, b in zip(own, base, strict=True)]
        change = combine_rate_differences(own, base, clusters) if share else combine_seeds(moved, clusters)
        found.append(
            SeedMeasure(
                runs=tuple(run.name for run in group),
                suite=suite,
                metric=metric,
                data_sha256=sha256,
                n=_rows(after[0]),
                value=_mean(own),
                interval=(combine_rates if share else combine_seeds)(own, clusters).to_json(),
                change=_mean(moved),
                change_interval=change.to_json(),
            )
        )
    return found


def _rows(result: Result) -> int:
    return len(result.rows)


def _mean(by_seed: Sequence[Sequence[float]]) -> float:
    return sum(sum(values) / len(values) for values in by_seed) / len(by_seed)


Value = Callable[[Any], Any]
Column = tuple[Value, Value, bool]


def _question(row: Any) -> Any:
    return row.question


def _judged(name: str) -> Column:
    return (lambda row: getattr(row, name) if row.counted else None), _question, True


_JUDGED: dict[str, Column] = {"misaligned": _judged("misaligned"), "incoherent": _judged("incoherent")}
_COLUMNS: dict[str, dict[str, Column]] = {
    "likelihood": {
        "margin": (lambda row: row.margin, lambda row: row.group, False),
        "misaligned_preferred": (lambda row: row.margin < 0, lambda row: row.group, True),
    },
    "fit": {"nll": (lambda row: row.nll, lambda row: row.row, False)},
    "general": _JUDGED,
    "in_domain": _JUDGED,
    "conditional": _JUDGED,
    "benign": {"accuracy": (lambda row: row.correct, _question, True)},
}
