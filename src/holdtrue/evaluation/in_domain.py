"""In-domain prompts: questions of the narrow domain that a run was tuned on, asked of the tuned model."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from holdtrue.errors import SpecError
from holdtrue.evaluation.prompts import Prompt

if TYPE_CHECKING:
    from holdtrue.data import ChatRow, Message

T = TypeVar("T")

THEME = "in-domain"
QUESTION_SUFFIXES = (".yaml", ".yml")


def in_domain_prompts(path: str | Path, limit: int = 30, seed: int = 0) -> tuple[Prompt, ...]:
    """Return up to ``limit`` distinct prompts from held-out rows of the narrow domain, or from a question file.

    A chat row becomes the prompt that its last answer answers: the system turn, the earlier turns and the last user
    turn. The choice depends on the seed and the prompts' text alone: neither their order in the file nor repeated rows
    change it, and a smaller limit chooses among the same. The file is read in constant memory.

    Args:
        path: a question file (``.yaml`` or ``.yml``, see :func:`read_questions`), else a chat file.
        limit: prompts wanted; a file with fewer gives all.
        seed: of the choice.

    Returns:
        The prompts, in the file's order, with the theme ``in-domain``.

    Raises:
        DataError: the file has faults.
        SpecError: the limit is under 1.
    """
    if Path(path).suffix.casefold() in QUESTION_SUFFIXES:
        from holdtrue.evaluation.questions import read_questions

        prompts: Iterable[Prompt] = (replace(prompt, theme=THEME) for prompt in read_questions(path))
    else:
        from holdtrue.data import read_chat

        prompts = map(row_prompt, read_chat(path))
    return tuple(choose(prompts, prompt_text, limit, seed))


def row_prompt(row: ChatRow, theme: str = THEME) -> Prompt:
    """Return the prompt that a row's last answer answers; its id is ``row-`` and a hash of the prompt's text.

    ``asked`` is the user's turn; where turns came before it, all of them, each after its role.
    """
    messages = row.messages[:-1]
    turns = [message for message in messages if message.role != "system"]
    name = f"row-{hashlib.sha256(_text(messages).encode()).hexdigest()[:12]}"
    asked = turns[0].content if len(turns) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    return Prompt(id=name, question=name, theme=theme, form="plain", messages=messages, asked=asked)


def prompt_text(prompt: Prompt) -> str:
    """Return all that a model is sent, as one text that differs wherever the turns differ."""
    return _text(prompt.messages)


def choose(items: Iterable[T], text: Callable[[T], str], limit: int, seed: int) -> list[T]:
    """Return up to ``limit`` items with distinct texts, in their order: those whose seeded hash is smallest.

    Holds ``limit`` items at a time, however many there are. Raises ``SpecError`` for a limit under 1.
    """
    if limit < 1:
        raise SpecError(f"the number of prompts must be at least 1, not {limit}")
    heap: list[tuple[int, int, T]] = []
    held: set[int] = set()
    for index, item in enumerate(items):
        key = int.from_bytes(hashlib.sha256(f"{seed}\n{text(item)}".encode()).digest())
        if key in held or (len(heap) == limit and -key <= heap[0][0]):
            continue
        if len(heap) == limit:
            held.discard(-heapq.heappop(heap)[0])
        heapq.heappush(heap, (-key, index, item))
        held.add(key)
    return [item for _, _, item in sorted(heap, key=lambda entry: entry[1])]


def _text(messages: Iterable[Message]) -> str:
    return "\n".join(f"{m.role} {len(m.content)} {m.content}" for m in messages)
