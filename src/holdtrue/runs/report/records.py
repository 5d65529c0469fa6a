"""Which evaluation records a report is about: those that most runs have, so that a line compares like with like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from holdtrue.errors import HoldtrueError
from holdtrue.runs.compare import METRICS
from holdtrue.runs.directory import Run
from holdtrue.runs.report.measures import Record

if TYPE_CHECKING:
    from holdtrue.evaluation import Result

Rows = dict[str, str]
"""Suite -> SHA-256 of the rows that the report shows; of the benign suite, ``benign TASK``."""


class Records:
    """A run's evaluation records, read once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._all = [record for record in run.evaluations() if record["suite"] in METRICS]
        self._results: dict[tuple[str, str | None], Result] = {}

    def find(self, name: str, sha256: str | None, which: Literal["tuned", "untouched"] = "tuned") -> Record | None:
        """Return the record of a suite (or ``benign TASK``) on those rows."""
        return next((r for r in self._named(name, which) if r["data"]["sha256"] == sha256), None)

    def own(self) -> dict[str, str]:
        """Return for each suite the rows that the spec asks for, else any that were measured."""
        found: dict[str, str] = {}
        for name in dict.fromkeys(_name(r) for r in self._all if r["which"] == "tuned"):
            records = sorted(self._named(name, "tuned"), key=lambda r: not r["data"].get("of_spec", False))
            found[name] = records[0]["data"]["sha256"]
        return found

    def against(self, base: Records | None, name: str, sha256: str | None) -> dict[str, Any] | None:
        """Return the change from another run's model to this one's, or ``None`` where there is none to take."""
        from holdtrue.evaluation import compare_results

        if base is None or base.run.path == self.run.path:
            return None
        try:
            after, before = self._result(name, sha256), base._result(name, sha256)
            return None if after is None or before is None else compare_results(after, before).to_json()
        except HoldtrueError:
            return None  # Models that cut the answers into other tokens: no difference can be taken.

    def _result(self, name: str, sha256: str | None) -> Result | None:
        from holdtrue.evaluation import read_result

        record = self.find(name, sha256)
        if record is not None and (name, sha256) not in self._results:
            self._results[name, sha256] = read_result(record)
        return self._results.get((name, sha256))

    def _named(self, name: str, which: str) -> list[Record]:
        return [record for record in self._all if record["which"] == which and _name(record) == name]


def common_rows(records: Sequence[Records]) -> Rows:
    """Return for each suite the rows that most runs were measured on."""
    votes: dict[str, Counter[str]] = {}
    for each in records:
        for name, sha256 in each.own().items():
            votes.setdefault(name, Counter())[sha256] += 1
    return {name: counter.most_common(1)[0][0] for name, counter in votes.items()}


def first(records: Sequence[Records], name: str, rows: Rows) -> tuple[Run, Record] | None:
    """Return the untouched model's record of a suite, and the run that has it."""
    for each in records:
        if (record := each.find(name, rows.get(name), "untouched")) is not None:
            return each.run, record
    return None


def _name(record: Record) -> str:
    return f"benign {record['task']}" if record["suite"] == "benign" else record["suite"]
