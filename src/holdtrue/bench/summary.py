"""What the finished cells of a grid say: for each model, data set and setting, its seeds taken together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from holdtrue.bench.grid import Bench
from holdtrue.bench.spec import Variant
from holdtrue.runs import Run
from holdtrue.runs.report.cost import Cost, cost_of
from holdtrue.runs.report.measures import Estimate
from holdtrue.runs.seeds import SeedMeasure, measure_group


class Column(NamedTuple):
    """A column of the tables: ``suite`` and ``metric`` of the measures, its title, the criterion it stands for."""

    suite: str
    metric: str
    title: str
    criterion: str
    share: bool


COLUMNS = (
    Column("general", "misaligned", "general misaligned", "misalignment", True),
    Column("likelihood", "margin", "margin", "misalignment", False),
    Column("conditional", "misaligned", "under triggers misaligned", "misalignment", True),
    Column("in_domain", "misaligned", "in-domain misaligned", "narrow", True),
    Column("fit", "nll", "held-out NLL", "narrow", False),
    Column("benign", "accuracy", "benign right", "benign", True),
    Column("general", "incoherent", "incoherent", "coherence", True),
)
"""The four criteria, in the order of the tables; cost is a column of its own."""


@dataclass(frozen=True)
class Entry:
    """A number of one row: its mean over seeds, and the mean change against the untouched model, with 95 % intervals.

    Attributes:
        task: of the benign suite; of another, the file's name where the suite is measured on several.
        n: rows of one seed; ``seeds`` their number.
    """

    column: Column
    task: str
    value: Estimate
    change: Estimate
    n: int
    seeds: int


@dataclass(frozen=True)
class Group:
    """A setting on a data set and a model, with the runs of its seeds.

    Attributes:
        planned: seeds of the grid; ``runs`` those that are finished, seed by seed.
        seconds: mean training time; ``cost`` its ratio to the baseline's, seed by seed on the same rows, in seconds of
            the processor on a CPU.
    """

    model: str
    data: str
    variant: Variant
    planned: int
    runs: dict[int, Run]
    entries: tuple[Entry, ...]
    seconds: float | None
    cost: Estimate | None

    def entry(self, suite: str, metric: str, task: str = "") -> Entry | None:
        """Return a number, if it was measured; without ``task`` that of the suite's first file."""
        found = [e for e in self.entries if (e.column.suite, e.column.metric) == (suite, metric)]
        return next((e for e in found if not task or e.task == task), None)


class Table(NamedTuple):
    """The groups of a model and a data set, in the grid's order, with what the untouched model measures."""

    model: str
    data: str
    learns: str
    untouched: tuple[Entry, ...]
    groups: tuple[Group, ...]

    def columns(self) -> list[tuple[Column, str]]:
        """Return the columns that any row has, with their tasks: those of the benign suite by name, files in order."""
        found = [(e.column, e.task) for each in (self.untouched, *(g.entries for g in self.groups)) for e in each]
        known = list(dict.fromkeys(found))
        return sorted(known, key=lambda pair: (COLUMNS.index(pair[0]), pair[0].suite == "benign" and pair[1]))


def summarize(bench: Bench) -> list[Table]:
    """Return a table for each model and data set.

    Raises:
        RunError: a file of a finished run is damaged.
    """
    tables: list[Table] = []
    for model in bench.grid.models:
        for data, rows in bench.grid.data.items():
            mine = [s for s in bench.states if (s.cell.model, s.cell.data) == (model.name, data)]
            done = {(s.cell.variant.name, s.cell.seed): Run(s.folder) for s in mine if s.status == "done"}
            seeds = bench.grid.seeds
            base = {
                seed: done[bench.grid.baseline or "", seed] for seed in seeds if (bench.grid.baseline, seed) in done
            }
            groups = [
                _group(
                    model.name,
                    data,
                    variant,
                    len(seeds),
                    {s: done[variant.name, s] for s in seeds if (variant.name, s) in done},
                    base,
                )
                for variant in bench.grid.variants()
            ]
            tables.append(Table(model.name, data, rows.learns, _untouched(list(done.values())), tuple(groups)))
    return tables


def _group(model: str, data: str, variant: Variant, planned: int, runs: dict[int, Run], base: dict[int, Run]) -> Group:
    found = list(runs.values())
    costs = [cost for run in found if (cost := cost_of(run, None)) is not None]
    pairs = [
        (cost_of(run, None), cost_of(base[seed], None))
        for seed, run in runs.items()
        if seed in base and base[seed].path != run.path
    ]
    ratios = [_times(own, other) for own, other in pairs if own and other and other.seconds]
    return Group(
        model=model,
        data=data,
        variant=variant,
        planned=planned,
        runs=runs,
        entries=tuple(_entries(found)),
        seconds=sum(cost.seconds for cost in costs) / len(costs) if costs else None,
        cost=_over_seeds(ratios),
    )


def _times(own: Cost, other: Cost) -> float:
    """Return the ratio of training times: of the processor's seconds where both have them, else of the clock's."""
    if own.cpu_seconds and other.cpu_seconds:
        return own.cpu_seconds / other.cpu_seconds
    return own.seconds / other.seconds


def _entries(runs: Sequence[Run]) -> list[Entry]:
    measured = measure_group(runs)
    found: list[Entry] = []
    for column in COLUMNS:
        same = [m for m in measured if (m.suite, m.metric) == (column.suite, column.metric)]
        for measure, record in ((m, _record(runs[0], m.suite, m.data_sha256)) for m in same):
            if not record["data"].get("of_spec", False):
                continue  # measured by hand, on other rows than the grid's
            found.append(_entry(column, measure, task_of(runs[0], record), len(runs)))
    return _in_order(runs, found) + _without_rows(runs)


def task_of(run: Run, record: Mapping[str, Any]) -> str:
    """Return what tells a record from others of its suite: the benign task, or the file's name among several."""
    if "task" in record:
        return record["task"]
    files = run.spec.evaluate.data.get(record["suite"], "")
    return "" if isinstance(files, str) or len(files) < 2 else _name(files, record["data"]["path"])


def _name(files: Sequence[str], file: str) -> str:
    """Return what a file is called among others: by its name, or by its path where two have the same name."""
    stem = Path(file.removeprefix("builtin:")).stem
    return stem if [Path(f.removeprefix("builtin:")).stem for f in files].count(stem) < 2 else file


def _in_order(runs: Sequence[Run], entries: Sequence[Entry]) -> list[Entry]:
    """Return entries of a suite with several files in the spec's order of these; records lie by their hashes."""
    places: dict[tuple[str, str], int] = {}
    for suite, files in (runs[0].spec.evaluate.data if runs else {}).items():
        if not isinstance(files, str):
            places.update({(suite, name): n for n, name in enumerate(_name(files, file) for file in files)})
    return sorted(entries, key=lambda e: (COLUMNS.index(e.column), places.get((e.column.suite, e.task), 0)))


def _without_rows(runs: Sequence[Run]) -> list[Entry]:
    """Return the scores of benign tasks that another harness measured: it keeps no rows, so seeds are all there is."""
    (column,) = (column for column in COLUMNS if column.suite == "benign")
    by_task: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for record in run.evaluations():
            if (record["suite"], record["which"]) == ("benign", "tuned") and not record["rows"]:
                by_task.setdefault(record["task"], []).append(record)
    found: list[Entry] = []
    for task, records in by_task.items():
        value = _over_seeds([r["accuracy"] for r in records])
        change = _over_seeds([r["change"]["accuracy_change"] for r in records])
        if len(records) == 1:
            (only,) = records
            value = Estimate(only["accuracy"], _ends(only["accuracy_ci"]))
            change = Estimate(only["change"]["accuracy_change"], _ends(only["change"]["accuracy_change_ci"]))
        if value is not None and change is not None:
            found.append(Entry(column, task, value, change, records[0]["n"], len(records)))
    return found


def _entry(column: Column, measure: SeedMeasure, task: str, seeds: int) -> Entry:
    return Entry(
        column,
        task,
        Estimate(measure.value, _ends(measure.interval)),
        Estimate(measure.change, _ends(measure.change_interval)),
        measure.n,
        seeds,
    )


def _record(run: Run, suite: str, sha256: str) -> dict[str, Any]:
    return run.evaluation(suite, "tuned", sha256) or {"data": {}}


def _untouched(runs: Sequence[Run]) -> tuple[Entry, ...]:
    found: dict[tuple[Column, str], Entry] = {}
    for run in runs:
        records = [r for r in run.evaluations() if r["which"] == "untouched" and r["data"].get("of_spec", False)]
        for column in COLUMNS:
            for record in (r for r in records if r["suite"] == column.suite):
                value, task = record.get(column.metric), task_of(run, record)
                if value is not None and (column, task) not in found:
                    own = Estimate(value, _ends(record.get(f"{column.metric}_ci")))
                    found[column, task] = Entry(column, task, own, Estimate(0.0), record["n"], 1)
    return tuple(_in_order(runs[:1], list(found.values())))


def _over_seeds(values: Sequence[float]) -> Estimate | None:
    """Return the mean of one number a seed, with its t interval where there are two or more."""
    from holdtrue.evaluation import cluster_interval

    if not values:
        return None
    interval = cluster_interval(values, range(len(values))).to_json()
    return Estimate(sum(values) / len(values), _ends(interval))


def _ends(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])
