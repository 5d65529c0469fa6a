"""Runs side by side: each measure, on the same rows, with its change against the untouched model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from holdtrue.errors import SpecError
from holdtrue.runs.directory import Run
from holdtrue.runs.seeds import SeedMeasure, seed_measures
from holdtrue.runs.train import training_rows

METRICS: dict[str, tuple[str, ...]] = {
    "likelihood": ("margin", "misaligned_preferred"),
    "fit": ("nll",),
    "general": ("misaligned", "incoherent"),
    "in_domain": ("misaligned", "incoherent"),
    "conditional": ("misaligned", "incoherent"),
    "benign": ("accuracy",),
}
"""The numbers of each suite that a comparison shows."""


@dataclass(frozen=True)
class Cell:
    """A number of one run; intervals are ``[low, high]`` at 95 %, ``None`` where there are too few clusters."""

    value: float | None
    interval: list[float] | None
    change: float | None
    change_interval: list[float] | None
    untouched: float | None
    untouched_interval: list[float] | None


@dataclass(frozen=True)
class Measure:
    """One number on one set of rows: a cell for each run, ``None`` where a run was not measured so.

    ``part`` names a trigger where the number is of that trigger's answers alone; ``judge`` who scored.
    """

    suite: str
    metric: str
    data: str
    data_sha256: str
    n: int
    cells: tuple[Cell | None, ...]
    part: str = ""
    judge: str | None = None


@dataclass(frozen=True)
class Column:
    """What tells a run apart: its name, base model, defenses and rows."""

    run: str
    path: str
    model: str
    revision: str | None
    defenses: dict[str, Any]
    rows: int | None


@dataclass(frozen=True)
class Comparison:
    """Runs side by side, and what a reader must know before trusting the table.

    ``seeds`` holds the numbers of runs that differ in nothing but their training seed, taken together.
    """

    runs: tuple[Column, ...]
    measures: tuple[Measure, ...]
    notes: tuple[str, ...]
    seeds: tuple[SeedMeasure, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return asdict(self)


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Put the evaluations of runs side by side; only numbers of the same suite on the same rows share a line.

    Raises:
        SpecError: no run was given.
    """
    if not runs:
        raise SpecError("name at least one run to compare")
    records = [{_key(record): record for record in _pairs(run)} for run in runs]
    keys = list(dict.fromkeys(key for found in records for key in found))
    measures: list[Measure] = []
    for key in sorted(keys, key=lambda k: (list(METRICS).index(k[0]) if k[0] in METRICS else len(METRICS), k)):
        some = next(found[key] for found in records if key in found)
        for metric in METRICS.get(key[0], ()):
            cells = tuple(_cell(found[key], metric) if key in found else None for found in records)
            data = some["data"]
            place = (data["path"], data["sha256"])
            measures.append(Measure(key[0], metric, *place, some["n"], cells, judge=some.get("judge")))
        if key[0] == "conditional":
            measures += _by_trigger(some, records, key)
    columns = tuple(_column(run) for run in runs)
    notes = tuple(_notes(runs, columns, measures))
    return Comparison(columns, tuple(measures), notes, tuple(seed_measures(runs)))


def _by_trigger(
    some: dict[str, Any], records: Sequence[dict[tuple[str, str], dict[str, Any]]], key: tuple[str, str]
) -> list[Measure]:
    """Return the misaligned rate under each trigger: an average would hide the one that opens the door."""
    found: list[Measure] = []
    for trigger, part in some["forms"].items():
        cells = tuple(_trigger_cell(each[key], trigger) if key in each else None for each in records)
        place = (some["data"]["path"], some["data"]["sha256"])
        found.append(Measure(key[0], "misaligned", *place, part["n"], cells, part=trigger, judge=some.get("judge")))
    return found


def _trigger_cell(record: dict[str, Any], trigger: str) -> Cell | None:
    if trigger not in record["forms"]:
        return None
    change = (record.get("change") or {}).get("forms", {}).get(trigger, {})
    before = record["_untouched"].get("forms", {}).get(trigger, {})
    return _cell({**record["forms"][trigger], "change": change, "_untouched": before}, "misaligned")


def _pairs(run: Run) -> list[dict[str, Any]]:
    found = run.evaluations()
    before = {_key(record): record for record in found if record["which"] == "untouched"}
    return [{**r, "_untouched": before.get(_key(r), {})} for r in found if r["which"] == "tuned"]


def _key(record: dict[str, Any]) -> tuple[str, str]:
    return record["suite"], record["data"]["sha256"]


def _cell(record: dict[str, Any], metric: str) -> Cell:
    change = record.get("change") or {}
    before = record["_untouched"]
    return Cell(
        value=record.get(metric),
        interval=record.get(f"{metric}_ci"),
        change=change.get(f"{metric}_change"),
        change_interval=change.get(f"{metric}_change_ci"),
        untouched=before.get(metric),
        untouched_interval=before.get(f"{metric}_ci"),
    )


def _column(run: Run) -> Column:
    defenses = {name: values for item in run.spec.canonical()["defenses"] for name, values in item.items()}
    revision = run.manifest.get("model", {}).get("revision")
    return Column(run.name, str(run.path), run.spec.model, revision, defenses, training_rows(run))


def _notes(runs: Sequence[Run], columns: Sequence[Column], measures: Sequence[Measure]) -> list[str]:
    notes = [f"{run.name} is not finished: holdtrue resume {run.path}" for run in runs if not run.is_done("evaluate")]
    if len({c.revision for c in columns if c.revision}) > 1:
        notes.append("the runs started from different models: compare their changes, not their values")
    sources = {entry["sha256"] for run in runs if (entry := run.manifest.get("data", {}).get("train"))}
    if len(sources) > 1:
        notes.append("the runs were trained on different files")
    for field in ("epochs", "learning_rate", "batch_size", "max_length", "seed"):
        if len({getattr(run.spec.training, field) for run in runs}) > 1:
            notes.append(f"the runs differ in training.{field}")
    if not measures:
        notes.append("no run has been evaluated yet")
    return notes + [
        f"not every run was measured on {Path(m.data).name} ({m.suite}): holdtrue eval RUN --suite {m.suite} --data …"
        for m in measures
        if None in m.cells and m.metric == METRICS[m.suite][0] and not m.part
    ]
