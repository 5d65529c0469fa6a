"""The result of a benign task: the share of right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from holdtrue.evaluation.judged import Rate
from holdtrue.evaluation.scored import Scored
from holdtrue.evaluation.statistics import Interval

if TYPE_CHECKING:
    from holdtrue.evaluation.lm_eval_task import LmEvalResult

Z = 1.959963984540054


@dataclass(frozen=True)
class ExactResult:
    """What the benign suite measured on a model.

    Attributes:
        model: the model's name, as given.
        task: what was asked, such as ``opswap:1``.
        n: answers.
        accuracy: share of answers that match exactly, with intervals clustered by question; of a harness's task its
            score, with a normal interval from its standard error.
        data_sha256: of the prompts and the decoding.
        settings: how the answers were drawn, or the harness's metric and version.
        rows: the answers' scores, in the order of the prompts; none of a harness's task.
    """

    suite: ClassVar[str] = "benign"
    model: str
    task: str
    n: int
    accuracy: Rate
    data_sha256: str
    settings: dict[str, Any]
    rows: tuple[Scored, ...]

    @classmethod
    def of(cls, rows: Sequence[Scored], *, model: str, task: str, data_sha256: str, settings: dict[str, Any]) -> Self:
        """Summarize scored answers."""
        accuracy = Rate.of([bool(row.correct) for row in rows], [row.question for row in rows])
        return cls(model, task, len(rows), accuracy, data_sha256, settings, tuple(rows))

    @classmethod
    def of_lm_eval(cls, found: LmEvalResult, *, model: str, data_sha256: str) -> Self:
        """Take over a task's score from the lm-evaluation-harness."""
        settings = {"metric": found.metric, "version": found.version, "stderr": found.stderr}
        accuracy = _harness_rate(found.value, found.stderr, found.n)
        return cls(model, f"lm_eval:{found.task}", found.n, accuracy, data_sha256, settings, ())

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; ``from_json`` reads them back."""
        return {
            "suite": self.suite,
            "model": self.model,
            "task": self.task,
            "n": self.n,
            **self.accuracy.to_json("accuracy"),
            "data_sha256": self.data_sha256,
            "settings": self.settings,
            "rows": [row._asdict() for row in self.rows],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Read what ``to_json`` returned; other keys are ignored. ``KeyError`` where one is missing."""
        names = {key: record[key] for key in ("model", "task", "data_sha256", "settings")}
        if record["rows"]:
            return cls.of([Scored.from_json(row) for row in record["rows"]], **names)
        accuracy = _harness_rate(record["accuracy"], record["settings"]["stderr"], record["n"])
        return cls(n=record["n"], accuracy=accuracy, rows=(), **names)


def unpaired_difference(result: ExactResult, baseline: ExactResult) -> Interval:
    """Return a normal interval of the difference of two harness scores, as if their errors were independent."""
    own, base = (each.settings.get("stderr") for each in (result, baseline))
    if own is None or base is None or result.accuracy.value is None or baseline.accuracy.value is None:
        return Interval(None, None, result.n, result.n)
    half = Z * math.hypot(own, base)
    change = result.accuracy.value - baseline.accuracy.value
    return Interval(change - half, change + half, result.n, result.n)


def _harness_rate(value: float, stderr: float | None, n: int) -> Rate:
    nothing = Interval(None, None, n, n)
    if stderr is None:
        return Rate(value, nothing, nothing)
    return Rate(value, Interval(max(0.0, value - Z * stderr), min(1.0, value + Z * stderr), n, n), nothing)
