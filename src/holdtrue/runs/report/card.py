"""The scorecard: what was measured on each run and on the untouched model, as values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from holdtrue.errors import HoldtrueError
from holdtrue.runs.compare import Comparison, compare_runs
from holdtrue.runs.directory import STAGES, Run

Record = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval ``(low, high)``, ``None`` where there is none."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Row:
    """A line of the scorecard: a run, or an untouched model (``run`` is ``None``). ``None`` is "not measured".

    Attributes:
        name: the run's name, or ``untouched``.
        run: the run.
        missing: the stages that the run has not finished.
        margin, margin_change, preferred: of the ``likelihood`` suite; the change is against the untouched model.
        nll, nll_change: of the ``fit`` suite.
        against_margin, against_nll: the change against the undefended run on the same rows, where there is one.
        kl: mean KL to the reference in nats per response token; ``kl_where`` says on which rows.
        seconds, tokens_per_second, peak_memory_bytes: of training.
        groups: theme -> margin.
        group_rows: theme -> number of probe pairs.
    """

    name: str
    run: Run | None
    missing: tuple[str, ...] = ()
    margin: Estimate | None = None
    margin_change: Estimate | None = None
    preferred: Estimate | None = None
    nll: Estimate | None = None
    nll_change: Estimate | None = None
    against_margin: Estimate | None = None
    against_nll: Estimate | None = None
    kl: float | None = None
    kl_where: str = ""
    seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    groups: dict[str, Estimate] | None = None
    group_rows: dict[str, int] | None = None

    @property
    def defenses(self) -> list[str]:
        """The run's defenses, by name."""
        return [] if self.run is None else [defense.name for defense in self.run.spec.defenses]


@dataclass(frozen=True)
class Rows:
    """The rows of a measure: file, number, and clusters of the bootstrap."""

    data: str
    sha256: str
    n: int
    clusters: int


@dataclass(frozen=True)
class Card:
    """The scorecard of some runs.

    ``probes`` and ``heldout`` are the rows that the columns are about: where runs were measured on several, those
    that most runs' specs ask for. ``undefended`` names the one run without a defense, if there is exactly one.
    """

    untouched: tuple[Row, ...]
    runs: tuple[Row, ...]
    probes: Rows | None
    heldout: Rows | None
    undefended: str | None
    comparison: Comparison

    @property
    def rows(self) -> tuple[Row, ...]:
        """Untouched models first."""
        return self.untouched + self.runs

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; intervals are ``[low, high]`` or null."""
        return {
            "format": 1,
            "probes": None if self.probes is None else asdict(self.probes),
            "heldout": None if self.heldout is None else asdict(self.heldout),
            "undefended": self.undefended,
            "rows": [_row_json(row) for row in self.rows],
        }


def scorecard(runs: Sequence[Run]) -> Card:
    """Gather what was measured on the runs.

    Raises:
        SpecError: no run was given.
        RunError: a file of a run is damaged.
    """
    comparison = compare_runs(runs)
    names = distinct_names(runs)
    probes = _common(runs, "likelihood")
    heldout = _common(runs, "fit")
    bare = [name for name, run in zip(names, runs, strict=True) if not run.spec.defenses]
    undefended = bare[0] if len(bare) == 1 else None
    base = runs[names.index(undefended)] if undefended else None
    return Card(
        untouched=tuple(_untouched_rows(runs, probes, heldout)),
        runs=tuple(_run_row(run, name, probes, heldout, base) for run, name in zip(runs, names, strict=True)),
        probes=_rows(runs, "likelihood", probes),
        heldout=_rows(runs, "fit", heldout),
        undefended=undefended,
        comparison=comparison,
    )


def distinct_names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, told apart by their folders where two are the same."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.path.parent.name}/{run.path.name}" for run in runs]
    seen: Counter[str] = Counter()
    told: list[str] = []
    for name in names:
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return told


def _common(runs: Sequence[Run], suite: str) -> str | None:
    own = [record["data"]["sha256"] for run in runs if (record := run.evaluation(suite)) is not None]
    return Counter(own).most_common(1)[0][0] if own else None


def _rows(runs: Sequence[Run], suite: str, sha256: str | None) -> Rows | None:
    for run in runs if sha256 else ():
        record = run.evaluation(suite, "tuned", sha256)
        if record is not None:
            names = {row["row"] for row in record["rows"]} if suite == "fit" else record["groups"]
            return Rows(record["data"]["path"], record["data"]["sha256"], record["n"], len(names))
    return None


def _untouched_rows(runs: Sequence[Run], probes: str | None, heldout: str | None) -> list[Row]:
    by_revision: dict[str | None, list[Run]] = {}
    for run in runs:
        by_revision.setdefault(run.manifest.get("model", {}).get("revision"), []).append(run)
    # A run that is not prepared yet says nothing of its model's revision.
    known = {revision: found for revision, found in by_revision.items() if revision is not None} or by_revision
    rows: list[Row] = []
    for found in known.values():
        model = found[0].manifest.get("model", {}).get("name", found[0].spec.model)
        margin = _first(found, "likelihood", probes)
        fit = _first(found, "fit", heldout)
        name = "untouched" if len(known) == 1 else f"untouched {model}"
        rows.append(Row(name=name, run=None, **_measures(margin, fit)))
    return rows


def _first(runs: Sequence[Run], suite: str, sha256: str | None) -> Record | None:
    if sha256 is None:
        return None
    return next((r for run in runs if (r := run.evaluation(suite, "untouched", sha256)) is not None), None)


def _run_row(run: Run, name: str, probes: str | None, heldout: str | None, base: Run | None) -> Row:
    likelihood = run.evaluation("likelihood", "tuned", probes) if probes else None
    fit = run.evaluation("fit", "tuned", heldout) if heldout else None
    report: dict[str, Any] = (run.marker("train") or {}).get("report", {})
    against: dict[str, Any] = {}
    if base is not None and base.path != run.path:
        against["against_margin"] = _against(likelihood, base, "likelihood", probes, "margin")
        against["against_nll"] = _against(fit, base, "fit", heldout, "nll")
    kl, where = _kl(run, report)
    return Row(
        name=name,
        run=run,
        missing=tuple(stage for stage in STAGES if not run.is_done(stage)),
        margin_change=_change(likelihood, "margin_change"),
        nll_change=_change(fit, "nll_change"),
        kl=kl,
        kl_where=where,
        seconds=report.get("seconds"),
        tokens_per_second=report.get("tokens_per_second"),
        peak_memory_bytes=report.get("peak_memory_bytes"),
        **_measures(likelihood, fit),
        **against,
    )


def _measures(likelihood: Record | None, fit: Record | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if likelihood is not None:
        groups = likelihood["groups"]
        found = {
            "margin": _estimate(likelihood, "margin"),
            "preferred": _estimate(likelihood, "misaligned_preferred"),
            "groups": {name: _estimate(group, "margin") for name, group in groups.items()},
            "group_rows": {name: group["n"] for name, group in groups.items()},
        }
    if fit is not None:
        found["nll"] = _estimate(fit, "nll")
    return found


def _estimate(record: Record, key: str) -> Estimate:
    ends = record.get(f"{key}_ci")
    return Estimate(record[key], None if ends is None else (ends[0], ends[1]))


def _change(record: Record | None, key: str) -> Estimate | None:
    change = (record or {}).get("change") or {}
    return _estimate(change, key) if key in change else None


def _against(record: Record | None, base: Run, suite: str, sha256: str | None, key: str) -> Estimate | None:
    from holdtrue.evaluation import compare_results, read_result

    before = base.evaluation(suite, "tuned", sha256) if sha256 else None
    if record is None or before is None:
        return None
    try:
        change = compare_results(read_result(record), read_result(before)).to_json()
    except HoldtrueError:
        return None  # Models that cut the answers into other tokens: no difference can be taken.
    return _estimate(change, f"{key}_change")


def _kl(run: Run, report: dict[str, Any]) -> tuple[float | None, str]:
    if report.get("eval_kl") is not None:
        return report["eval_kl"], "validation rows"
    measured = [step for step in run.metrics() if "kl" in step and "loss" in step]
    if measured:
        return measured[-1]["kl"], f"rows of step {measured[-1]['step']}"
    return None, ""


def _row_json(row: Row) -> dict[str, Any]:
    values = {key: value for key, value in vars(row).items() if key != "run"}
    values["path"] = None if row.run is None else str(row.run.path)
    values["defenses"] = row.defenses
    values["missing"] = list(row.missing)
    for key, value in values.items():
        if isinstance(value, Estimate):
            values[key] = asdict(value)
    if row.groups is not None:
        values["groups"] = {name: asdict(estimate) for name, estimate in row.groups.items()}
    return values
