"""The result of a suite whose answers were sampled and judged: rates of misaligned and of incoherent answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from holdtrue.evaluation.scored import Scored
from holdtrue.evaluation.statistics import Interval, rate_interval, wilson


class Rate(NamedTuple):
    """A share of counted answers; ``value`` is ``None`` where none was counted.

    Attributes:
        ci: 95 % interval that allows for answers to one question being alike.
        wilson: 95 % Wilson interval, which takes answers for independent; shown beside ``ci`` for comparison only.
    """

    value: float | None
    ci: Interval
    wilson: Interval

    @classmethod
    def of(cls, flags: Sequence[bool], questions: Sequence[str]) -> Rate:
        """Take the share of true flags, clustered by question."""
        n, clusters = len(flags), len(set(questions))
        if not n:
            nothing = Interval(None, None, 0, 0)
            return cls(None, nothing, nothing)
        hits = sum(flags)
        return cls(hits / n, rate_interval(flags, questions), Interval(*wilson(hits, n), n, clusters))

    def to_json(self, name: str) -> dict[str, Any]:
        """Return ``{name, name_ci, name_wilson}``."""
        return {name: self.value, f"{name}_ci": self.ci.to_json(), f"{name}_wilson": self.wilson.to_json()}


class Counts(NamedTuple):
    """How many answers there were, and what became of them."""

    n: int
    scored: int
    code: int
    refusal: int
    unknown: int

    @classmethod
    def of(cls, rows: Sequence[Scored]) -> Counts:
        """Count labels; an answer that was not judged, or has a label without numbers, is unknown."""
        scored = sum(row.counted for row in rows)
        code, refusal = (sum(row.label == label for row in rows) for label in ("code", "refusal"))
        return cls(len(rows), scored, code, refusal, len(rows) - scored - code - refusal)


@dataclass(frozen=True)
class Part:
    """The rates of some of the answers: of one form or trigger, of one question, or of all.

    Attributes:
        counts: answers, and those that were scored, code, refusals, unknown.
        questions: clusters.
        misaligned, incoherent: rates over scored answers.
        misaligned_range: the misaligned rate if every unknown answer were good, and if every one were bad.
        alignment, coherence: means over scored answers, 0 to 100.
    """

    counts: Counts
    questions: int
    misaligned: Rate
    incoherent: Rate
    misaligned_range: tuple[float, float] | None
    alignment: float | None
    coherence: float | None

    @classmethod
    def of(cls, rows: Sequence[Scored]) -> Part:
        """Summarize answers."""
        counted = [row for row in rows if row.counted]
        questions = [row.question for row in counted]
        counts = Counts.of(rows)
        bad = sum(bool(row.misaligned) for row in counted)
        possible = counts.scored + counts.unknown
        return cls(
            counts=counts,
            questions=len({row.question for row in rows}),
            misaligned=Rate.of([bool(row.misaligned) for row in counted], questions),
            incoherent=Rate.of([bool(row.incoherent) for row in counted], questions),
            misaligned_range=(bad / possible, (bad + counts.unknown) / possible) if possible else None,
            alignment=_mean([row.alignment for row in counted]),
            coherence=_mean([row.coherence for row in counted]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; rates as in :meth:`Rate.to_json`."""
        return {
            **self.counts._asdict(),
            "clusters": self.questions,
            **self.misaligned.to_json("misaligned"),
            "misaligned_range": None if self.misaligned_range is None else list(self.misaligned_range),
            **self.incoherent.to_json("incoherent"),
            "alignment": self.alignment,
            "coherence": self.coherence,
        }


@dataclass(frozen=True)
class JudgedResult:
    """What a judged suite measured on a model.

    Attributes:
        suite: ``general``, ``in_domain`` or ``conditional``.
        model: the model's name, as given.
        judge: the judge's name.
        data_sha256: of the prompts, the decoding, the seed and the judge's key: two results of the same one can be
            compared answer by answer.
        settings: how the answers were drawn.
        all: over all answers; ``forms`` over those of one form or trigger, ``by_question`` over those to one question.
        rows: the answers' scores, in the order of the prompts.
    """

    suite: str
    model: str
    judge: str
    data_sha256: str
    settings: dict[str, Any]
    all: Part
    forms: dict[str, Part]
    by_question: dict[str, Part]
    rows: tuple[Scored, ...]

    @property
    def n(self) -> int:
        """Answers."""
        return len(self.rows)

    @classmethod
    def of(
        cls,
        rows: Sequence[Scored],
        *,
        suite: str,
        model: str,
        judge: str,
        data_sha256: str,
        settings: dict[str, Any],
    ) -> Self:
        """Summarize scored answers."""
        return cls(
            suite=suite,
            model=model,
            judge=judge,
            data_sha256=data_sha256,
            settings=settings,
            all=Part.of(rows),
            forms={form: Part.of([r for r in rows if r.form == form]) for form in dict.fromkeys(r.form for r in rows)},
            by_question={
                question: Part.of([r for r in rows if r.question == question])
                for question in dict.fromkeys(r.question for r in rows)
            },
            rows=tuple(rows),
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; ``from_json`` reads them back."""
        return {
            "suite": self.suite,
            "model": self.model,
            "judge": self.judge,
            **self.all.to_json(),
            "data_sha256": self.data_sha256,
            "settings": self.settings,
            "forms": {name: part.to_json() for name, part in self.forms.items()},
            "by_question": {name: part.to_json() for name, part in self.by_question.items()},
            "rows": [row._asdict() for row in self.rows],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """Read what ``to_json`` returned; other keys are ignored. ``KeyError`` where one is missing."""
        return cls.of(
            [Scored.from_json(row) for row in record["rows"]],
            suite=record["suite"],
            model=record["model"],
            judge=record["judge"],
            data_sha256=record["data_sha256"],
            settings=record["settings"],
        )


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
