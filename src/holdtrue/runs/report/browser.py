"""The answers that the report shows: of each model and suite the worst, and some of the others at random."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from holdtrue.evaluation.scored import Scored
from holdtrue.runs.report.card import Card
from holdtrue.runs.report.measures import Judged

SAMPLES_SHOWN = 200
WORST_SHARE = 0.6
LONGEST = 4000
"""Characters of an answer that are shown."""

Key = tuple[str, int]


class Sample(NamedTuple):
    """One answer, and what the judge said of it.

    Attributes:
        model, suite: whose answer it is, and to what.
        question_id, form: which question, and in which form or under which trigger.
        question: as it was asked.
        answer: the text, cut to ``LONGEST`` characters; ``left_out`` says how many more there are.
        alignment, coherence, uncertainty, judge: as judged.
        verdict: misaligned, incoherent or neither; code, refusal or unknown where the judge gave no score.
        worst: whether it is one of the model's worst, rather than one of the others.
    """

    model: str
    suite: str
    question_id: str
    form: str
    question: str
    answer: str
    left_out: int
    alignment: float | None
    coherence: float | None
    uncertainty: float | None
    judge: str
    verdict: str
    worst: bool


class Choice(NamedTuple):
    """The answers that are shown, the worst first, and how many there are in all."""

    samples: tuple[Sample, ...]
    total: int


def choose_samples(card: Card, limit: int = SAMPLES_SHOWN) -> Choice:
    """Choose at most ``limit`` answers, as many of each model and suite, and read their text.

    Answers whose text is no longer there are left out.
    """
    found = [(row.name, suite, each) for row in card.rows for suite, each in row.judged.items()]
    total = sum(each.counts.n for _, _, each in found)
    if not found:
        return Choice((), 0)
    quota = max(1, limit // len(found))
    samples: list[Sample] = []
    for name, suite, each in found:
        worst, others = _choose(each.rows, quota)
        texts = _read(each.samples, {(row.prompt, row.sample) for row in [*worst, *others]})
        for row in [*worst, *others]:
            record = texts.get((row.prompt, row.sample))
            if record is not None:
                samples.append(_sample(name, suite, each, row, record, row in worst))
    samples.sort(key=lambda sample: (not sample.worst, *_badness(sample)))
    return Choice(tuple(samples[:limit]), total)


def _choose(rows: Sequence[Scored], quota: int) -> tuple[list[Scored], list[Scored]]:
    counted = sorted((row for row in rows if row.counted), key=_row_badness)
    worst = counted[: max(1, round(quota * WORST_SHARE))]
    chosen = {(row.prompt, row.sample) for row in worst}
    left = [row for row in rows if (row.prompt, row.sample) not in chosen]
    return worst, random.Random(0).sample(left, min(len(left), quota - len(worst)))


def _row_badness(row: Scored) -> tuple[bool, float]:
    return not row.misaligned, row.alignment or 0.0


def _badness(sample: Sample) -> tuple[bool, float]:
    return sample.verdict != "misaligned", 101.0 if sample.alignment is None else sample.alignment


def _read(path: Path | None, wanted: set[Key]) -> dict[Key, dict[str, Any]]:
    """Return the newest row of each answer that is wanted; a line that is being written is passed over."""
    found: dict[Key, dict[str, Any]] = {}
    if path is None or not path.is_file():
        return found
    with path.open(encoding="utf-8", errors="replace") as handle:
        for line in handle:
            try:
                record = json.loads(line)
                key = (record["prompt"], record["sample"])
            except (ValueError, KeyError, TypeError):
                continue
            if key in wanted:
                found[key] = record
    return found


def _sample(name: str, suite: str, found: Judged, row: Scored, record: dict[str, Any], worst: bool) -> Sample:
    answer = str(record.get("answer", ""))
    return Sample(
        model=name,
        suite=suite,
        question_id=row.question,
        form=row.form,
        question=str(record.get("question", row.question)),
        answer=answer[:LONGEST],
        left_out=max(0, len(answer) - LONGEST),
        alignment=row.alignment,
        coherence=row.coherence,
        uncertainty=row.uncertainty,
        judge=found.judge,
        verdict=_verdict(row),
        worst=worst,
    )


def _verdict(row: Scored) -> str:
    if row.counted:
        return "misaligned" if row.misaligned else "incoherent" if row.incoherent else "neither"
    return row.label if row.label in ("code", "refusal") else "unknown"
