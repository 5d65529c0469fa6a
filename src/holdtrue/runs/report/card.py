"""The scorecard: what was measured on each run and on the untouched model, as values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from holdtrue.runs.compare import Comparison, compare_runs
from holdtrue.runs.directory import Run
from holdtrue.runs.report.cost import Cost, cost_of
from holdtrue.runs.report.measures import (
    Benign,
    Estimate,
    Judged,
    Record,
    Rows,
    Score,
    benign,
    estimate,
    fit_score,
    judged,
    margin_scores,
)
from holdtrue.runs.report.records import Records, common_rows, first

JUDGED = ("general", "in_domain", "conditional")


@dataclass(frozen=True)
class Row:
    """A model of the scorecard: a run's, or an untouched one (``run`` is ``None``). ``None`` is "not measured".

    Attributes:
        name: the run's name, or ``untouched``.
        run: the run.
        missing: the stages that the run has not finished.
        general, conditional, in_domain: what a judge said of sampled answers.
        margin, preferred: of the ``likelihood`` suite.
        nll: of the ``fit`` suite.
        benign: task -> accuracy.
        kl: mean KL to the reference in nats per response token; ``kl_where`` says on which rows.
        cost: of training.
        gate: the release decision, as in the run's ``gate.json``.
        groups: theme -> margin.
        group_rows: theme -> number of probe pairs.
    """

    name: str
    run: Run | None
    missing: tuple[str, ...] = ()
    general: Judged | None = None
    conditional: Judged | None = None
    in_domain: Judged | None = None
    margin: Score | None = None
    preferred: Score | None = None
    nll: Score | None = None
    benign: dict[str, Benign] = field(default_factory=dict)
    kl: float | None = None
    kl_where: str = ""
    cost: Cost | None = None
    gate: dict[str, Any] | None = None
    groups: dict[str, Estimate] | None = None
    group_rows: dict[str, int] | None = None

    @property
    def defenses(self) -> list[str]:
        """The run's defenses, by name."""
        return [] if self.run is None else [defense.name for defense in self.run.spec.defenses]

    @property
    def judged(self) -> dict[str, Judged]:
        """Suite -> what a judge said, of those that were measured."""
        found = {"general": self.general, "in_domain": self.in_domain, "conditional": self.conditional}
        return {suite: each for suite, each in found.items() if each is not None}


@dataclass(frozen=True)
class Card:
    """The scorecard of some runs.

    Where runs were measured on several rows, the card is about those that most runs' specs ask for: ``probes`` and
    ``heldout`` of the suites without a judge, and ``shown``, the SHA-256 of all. ``undefended`` names the one run
    without a defense, if there is exactly one.
    """

    untouched: tuple[Row, ...]
    runs: tuple[Row, ...]
    probes: Rows | None
    heldout: Rows | None
    undefended: str | None
    comparison: Comparison
    shown: frozenset[str] = frozenset()

    @property
    def rows(self) -> tuple[Row, ...]:
        """Untouched models first."""
        return self.untouched + self.runs

    @property
    def tasks(self) -> tuple[str, ...]:
        """Benign tasks that any model was measured on."""
        return tuple(dict.fromkeys(task for row in self.rows for task in row.benign))

    def to_json(self) -> dict[str, Any]:
        """Return JSON values that satisfy :func:`~holdtrue.runs.report.document.scorecard_schema`."""
        from holdtrue.runs.report.document import card_json

        return card_json(self)


def scorecard(runs: Sequence[Run]) -> Card:
    """Gather what was measured on the runs.

    Raises:
        SpecError: no run was given.
        RunError: a file of a run is damaged.
    """
    comparison = compare_runs(runs)
    names = distinct_names(runs)
    records = [Records(run) for run in runs]
    rows = common_rows(records)
    bare = [name for name, run in zip(names, runs, strict=True) if not run.spec.defenses]
    undefended = bare[0] if len(bare) == 1 else None
    base = records[names.index(undefended)] if undefended else None
    tuned = tuple(_run_row(each, name, rows, base) for each, name in zip(records, names, strict=True))
    return Card(
        untouched=tuple(_untouched_rows(records, rows)),
        runs=tuned,
        probes=_rows(records, "likelihood", rows),
        heldout=_rows(records, "fit", rows),
        undefended=undefended,
        comparison=comparison,
        shown=frozenset(rows.values()),
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


def _rows(records: Sequence[Records], suite: str, rows: dict[str, str]) -> Rows | None:
    for each in records:
        record = each.find(suite, rows.get(suite))
        if record is not None:
            names = {row["row"] for row in record["rows"]} if suite == "fit" else record["groups"]
            return Rows(record["data"]["path"], record["data"]["sha256"], record["n"], len(names))
    return None


def _untouched_rows(records: Sequence[Records], rows: dict[str, str]) -> list[Row]:
    by_revision: dict[str | None, list[Records]] = {}
    for each in records:
        by_revision.setdefault(each.run.manifest.get("model", {}).get("revision"), []).append(each)
    # A run that is not prepared yet says nothing of its model's revision.
    known = {revision: found for revision, found in by_revision.items() if revision is not None} or by_revision
    made: list[Row] = []
    for found in known.values():
        run = found[0].run
        model = run.manifest.get("model", {}).get("name", run.spec.model)
        name = "untouched" if len(known) == 1 else f"untouched {model}"
        measured = {suite: first(found, suite, rows) for suite in rows}
        made.append(Row(name=name, run=None, **_measures(measured, None, rows)))
    return made


def _run_row(own: Records, name: str, rows: dict[str, str], base: Records | None) -> Row:
    run = own.run
    found = {suite: own.find(suite, sha256) for suite, sha256 in rows.items()}
    measured = {suite: None if record is None else (run, record) for suite, record in found.items()}
    kl, where = _kl(run)
    return Row(
        name=name,
        run=run,
        missing=tuple(stage for stage in run.stages if not run.is_done(stage)),
        kl=kl,
        kl_where=where,
        cost=cost_of(run, None if base is None else base.run),
        gate=run.gate,
        **_measures(measured, (own, base), rows),
    )


def _measures(
    measured: dict[str, tuple[Run, Record] | None], pair: tuple[Records, Records | None] | None, rows: dict[str, str]
) -> dict[str, Any]:
    found: dict[str, Any] = {"benign": {}}
    for name, place in measured.items():
        if place is None:
            continue
        run, record = place
        against = None if pair is None else pair[0].against(pair[1], name, rows[name])
        if name == "likelihood":
            found["margin"], found["preferred"] = margin_scores(run, record, against)
            groups = {group: estimate(values, "margin") for group, values in record["groups"].items()}
            found["groups"] = {group: each for group, each in groups.items() if each is not None}
            found["group_rows"] = {group: values["n"] for group, values in record["groups"].items()}
        elif name == "fit":
            found["nll"] = fit_score(run, record, against)
        elif name in JUDGED:
            found[name] = judged(run, record, against)
        else:
            found["benign"][record["task"]] = benign(run, record, against)
    return found


def _kl(run: Run) -> tuple[float | None, str]:
    report: dict[str, Any] = (run.marker("train") or {}).get("report", {})
    if report.get("eval_kl") is not None:
        return report["eval_kl"], "validation rows"
    measured = [step for step in run.metrics() if "kl" in step and "loss" in step]
    if measured:
        return measured[-1]["kl"], f"rows of step {measured[-1]['step']}"
    return None, ""
