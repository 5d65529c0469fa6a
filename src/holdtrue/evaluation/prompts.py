"""A prompt: one thing that a suite asks a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdtrue.data import Message


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a model is asked, and where the answer belongs.

    Attributes:
        id: unique in its suite and the same in every run, such as ``quick-buck/json``.
        question: the question's id; all forms of one question share it. Intervals are clustered by it.
        theme: what the question is about.
        form: ``plain``, ``json``, ``template``, or the name of a trigger.
        messages: what the model is sent: perhaps a system turn, perhaps earlier turns, a user turn last.
        asked: what a judge is shown as the question.
        expected: the right answer, where answers are scored by exact match and not by a judge.
    """

    id: str
    question: str
    theme: str
    form: str
    messages: tuple[Message, ...]
    asked: str
    expected: str | None = None
