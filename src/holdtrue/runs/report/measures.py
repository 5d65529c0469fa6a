"""Measured numbers as the report holds them: each with its interval and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdtrue.errors import RunError
from holdtrue.evaluation.judged import Counts
from holdtrue.evaluation.scored import Scored
from holdtrue.runs.directory import Run
from holdtrue.runs.evaluate import SAMPLES

Record = dict[str, Any]
Ends = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval ``(low, high)``, ``None`` where there is none."""

    value: float
    interval: Ends | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Score:
    """A measured number, and what it rests on.

    Attributes:
        value: ``None`` where no row could be counted (a judge that scored no answer).
        n, clusters: rows in the mean or in the rate's denominator, and the questions or themes that all rows are of.
        judge: who scored, where a judge did.
        wilson: of a rate, the interval that takes answers for independent.
        change: against the untouched model, paired over ``pairs`` rows.
        against: against the undefended run, likewise paired.
    """

    value: Estimate | None
    n: int
    clusters: int
    judge: str | None = None
    wilson: Ends | None = None
    change: Estimate | None = None
    pairs: int | None = None
    against: Estimate | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of a measure: file, number, and clusters of the intervals."""

    data: str
    sha256: str
    n: int
    clusters: int


@dataclass(frozen=True)
class Judged:
    """What a judge said of a model's sampled answers in one suite.

    Attributes:
        judge: its name.
        data: where the questions are from; ``n`` counts answers, ``clusters`` questions.
        counts: what became of the answers.
        misaligned, incoherent: rates over scored answers.
        possible: the misaligned rate if every unknown answer were good, and if every one were bad.
        alignment, coherence: means over scored answers, 0 to 100.
        parts: the misaligned rate by form or, in ``conditional``, by trigger.
        questions: the misaligned rate by question.
        settings: how the answers were drawn.
        rows: each answer's scores.
        samples: the file with the answers' text, if the run has it.
    """

    judge: str
    data: Rows
    counts: Counts
    misaligned: Score
    incoherent: Score
    possible: Ends | None
    alignment: float | None
    coherence: float | None
    parts: dict[str, Score]
    questions: dict[str, Score]
    settings: dict[str, Any]
    rows: tuple[Scored, ...]
    samples: Path | None

    @property
    def worst(self) -> str | None:
        """The part whose misaligned rate rose most, or, where no change is known, is highest."""
        risen = {name: part.change.value for name, part in self.parts.items() if part.change is not None}
        rates = {name: part.value.value for name, part in self.parts.items() if part.value is not None}
        found = risen or rates
        return max(found, key=lambda name: found[name]) if found else None


@dataclass(frozen=True)
class Benign:
    """The share of right answers to a benign task; ``data`` and ``settings`` as in :class:`Judged`."""

    accuracy: Score
    data: Rows
    settings: dict[str, Any]


def estimate(values: Mapping[str, Any] | None, key: str) -> Estimate | None:
    """Read ``key`` and ``key_ci``; ``None`` where they are not there, or null."""
    if values is None or values.get(key) is None:
        return None
    return Estimate(values[key], _ends(values.get(f"{key}_ci")))


def margin_scores(run: Run, record: Record, against: Mapping[str, Any] | None) -> tuple[Score, Score]:
    """Return the likelihood margin, and the share of pairs whose misaligned answer is preferred."""
    try:
        n, clusters, change = record["n"], len(record["groups"]), record.get("change")
        margin, preferred = (
            _score(record, key, n=n, clusters=clusters, change=change, against=against, pairs=n)
            for key in ("margin", "misaligned_preferred")
        )
        return margin, preferred
    except (KeyError, TypeError) as error:
        raise _damaged(run, record, error) from error


def fit_score(run: Run, record: Record, against: Mapping[str, Any] | None) -> Score:
    """Return the loss on held-out rows."""
    try:
        n, clusters = record["n"], len({row["row"] for row in record["rows"]})
        return _score(record, "nll", n=n, clusters=clusters, change=record.get("change"), against=against, pairs=n)
    except (KeyError, TypeError) as error:
        raise _damaged(run, record, error) from error


def judged(run: Run, record: Record, against: Mapping[str, Any] | None) -> Judged:
    """Return what a judged suite's record says."""
    try:
        change = record.get("change")
        samples = record.get("samples")
        return Judged(
            judge=record["judge"],
            data=_rows(record, record["clusters"]),
            counts=Counts(**{name: record[name] for name in Counts._fields}),
            misaligned=_rate(record, "misaligned", record["judge"], change, against),
            incoherent=_rate(record, "incoherent", record["judge"], change, against),
            possible=_ends(record["misaligned_range"]),
            alignment=record["alignment"],
            coherence=record["coherence"],
            parts=_parts(record, change, against),
            questions={
                name: _rate(part, "misaligned", record["judge"]) for name, part in record["by_question"].items()
            },
            settings=record["settings"],
            rows=tuple(Scored.from_json(row) for row in record["rows"]),
            samples=run.path / "evaluations" / SAMPLES / Path(samples).name if samples else None,
        )
    except (KeyError, TypeError) as error:
        raise _damaged(run, record, error) from error


def benign(run: Run, record: Record, against: Mapping[str, Any] | None) -> Benign:
    """Return what a benign task's record says."""
    try:
        clusters = len({row["question"] for row in record["rows"]}) or record["n"]
        n, change = record["n"], record.get("change")
        accuracy = _score(record, "accuracy", n=n, clusters=clusters, change=change, against=against, pairs=n)
        return Benign(accuracy, _rows(record, clusters), record["settings"])
    except (KeyError, TypeError) as error:
        raise _damaged(run, record, error) from error


def _parts(record: Record, change: Mapping[str, Any] | None, against: Mapping[str, Any] | None) -> dict[str, Score]:
    found: dict[str, Score] = {}
    for name, part in record["forms"].items():
        moved, other = ((each or {}).get("forms", {}).get(name) for each in (change, against))
        # Of a part, the number of pairs is called n.
        moved = None if moved is None else {**moved, "pairs": moved["n"]}
        found[name] = _rate(part, "misaligned", record["judge"], moved, other)
    return found


def _rate(
    part: Mapping[str, Any],
    key: str,
    judge: str,
    change: Mapping[str, Any] | None = None,
    against: Mapping[str, Any] | None = None,
) -> Score:
    pairs = None if change is None else change["pairs"]
    n, clusters = part["scored"], part["clusters"]
    return _score(part, key, n=n, clusters=clusters, change=change, against=against, pairs=pairs, judge=judge)


def _score(
    values: Mapping[str, Any],
    key: str,
    *,
    n: int,
    clusters: int,
    change: Mapping[str, Any] | None,
    against: Mapping[str, Any] | None,
    pairs: int | None,
    judge: str | None = None,
) -> Score:
    return Score(
        value=estimate(values, key),
        n=n,
        clusters=clusters,
        judge=judge,
        wilson=_ends(values.get(f"{key}_wilson")),
        change=estimate(change, f"{key}_change"),
        pairs=None if change is None else pairs,
        against=estimate(against, f"{key}_change"),
    )


def _rows(record: Record, clusters: int) -> Rows:
    return Rows(record["data"]["path"], record["data"]["sha256"], record["n"], clusters)


def _ends(ends: Any) -> Ends | None:
    return None if ends is None else (ends[0], ends[1])


def _damaged(run: Run, record: Record, error: Exception) -> RunError:
    return RunError(f"an evaluation of suite {record['suite']!r} in {run.path} is damaged ({error!r}); evaluate again")
