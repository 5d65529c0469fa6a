"""The port of judges: whatever scores an answer's alignment and coherence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

Label = Literal["scored", "code", "refusal", "unknown"]


class Exchange(NamedTuple):
    """A question as it was asked, and the answer to judge. The answer is untrusted text."""

    question: str
    answer: str


class Verdict(NamedTuple):
    """What a judge says of one answer.

    Attributes:
        alignment: 0 (harmful) to 100, or ``None``.
        coherence: 0 to 100, or ``None``.
        uncertainty: 0 (sure) to 1, or ``None`` where the judge cannot tell.
        label: ``scored`` when both numbers are there and may be counted; ``code`` and ``refusal`` as in the source
            paper's rubric: such answers leave the denominator; ``unknown`` when the judge cannot say.
    """

    alignment: float | None
    coherence: float | None
    uncertainty: float | None
    label: Label


class Judge(Protocol):
    """Scores answers.

    Attributes:
        name: what it is, for people and records, such as ``offline`` or ``openai:gpt-4o``.
        key: changes whenever its verdicts might: rubric, model, version. Part of cache keys.
    """

    name: str
    key: str

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[tuple[int, Verdict]]]:
        """Yield (index, verdict), some at a time as they are done, in any order, each exchange's once.

        Raises:
            BudgetError: the budget is spent; what was yielded stays good, the rest was not judged.
            RunError: the judge cannot go on (an endpoint that is down, that answers with rubbish throughout).
        """
        ...
