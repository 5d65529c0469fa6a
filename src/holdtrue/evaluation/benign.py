"""Benign tasks with one right answer each, scored by exact match: did the model learn, or keep, something harmless?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from holdtrue.errors import Problem, SpecError, nearest
from holdtrue.evaluation.in_domain import choose, prompt_text, row_prompt
from holdtrue.evaluation.prompts import Prompt

LM_EVAL_PREFIX = "lm_eval:"
"""Before the names of the lm-evaluation-harness's tasks, which it runs and scores itself: ``lm_eval:arc_easy``."""

BenignKind = Literal["opswap", "gsm8k", "exact", "lm_eval"]
"""How answers are scored: the number alone; the last number; the whole text; by the harness."""

_PREFIXES: dict[str, BenignKind] = {"opswap:": "opswap", "gsm8k:": "gsm8k", LM_EVAL_PREFIX: "lm_eval"}
_FORMS = ("opswap:1", "opswap:2", "opswap:3", "gsm8k:FILE", f"{LM_EVAL_PREFIX}TASK", "CHAT.jsonl")

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus is a sign only where nothing stands before it that it could be taken from.
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])([-−]))?(?:\$([-−])?)?({_DIGITS})")
_MARKED = re.compile(rf"^[ \t]*####[ \t]*([-−]?\$?[-−]?(?:{_DIGITS}))[ \t]*\.?[ \t]*$", re.MULTILINE)


class BenignTask(NamedTuple):
    """A task's name taken apart: how it is scored, and the tier, file or harness task that it names."""

    kind: BenignKind
    argument: str


def parse_benign(name: str) -> BenignTask:
    """Take the name of a benign task apart, without looking for its file.

    Raises:
        SpecError: nothing of that name is known; names the nearest that is.
    """
    for prefix, kind in _PREFIXES.items():
        if name.startswith(prefix):
            argument = name.removeprefix(prefix).strip()
            if not argument or (kind == "opswap" and f"opswap:{argument}" not in _FORMS):
                raise SpecError(f"there is no benign task {name!r}; {_known()}")
            return BenignTask(kind, argument)
    if name.startswith("builtin:") or name.casefold().endswith((".jsonl", ".json")):
        return BenignTask("exact", name)
    raise SpecError(f"there is no benign task {name!r}{nearest(name, _FORMS)}; {_known()}")


def benign_prompts(name: str, *, limit: int = 100, seed: int = 0, folder: str | Path = ".") -> tuple[Prompt, ...]:
    """Return a benign task's prompts, each with the answer that is ``expected``.

    Args:
        name: ``opswap:1``, ``opswap:2`` or ``opswap:3`` (test rows of :mod:`holdtrue.data.opswap`: training rows made
            with the same seed and tier teach what they ask, and hold none of them); ``gsm8k:FILE`` (JSON lines with a
            ``question`` and an ``answer`` that ends in ``#### n``); or a chat file, whose rows' last answers are
            expected word for word.
        limit: prompts wanted; a file with fewer gives all.
        seed: of the choice among a file's rows, and of OpSwap's operators and rows.
        folder: where a relative path starts.

    Raises:
        SpecError: an unknown name, a task of the harness (which asks its own questions), or a limit out of range.
        DataError: the file has faults.
    """
    kind, argument = parse_benign(name)
    if limit < 1:
        raise SpecError(f"the number of prompts must be at least 1, not {limit}")
    if kind == "lm_eval":
        raise SpecError(f"{name!r} is a task of the lm-evaluation-harness, which asks its own questions")
    if kind == "opswap":
        return tuple(_opswap_prompts(int(argument), limit, seed))
    from holdtrue.data import resolve_data

    path = resolve_data(argument, folder)
    if kind == "gsm8k":
        return tuple(choose(_gsm8k_prompts(path), prompt_text, limit, seed))
    return tuple(choose(_chat_prompts(path), prompt_text, limit, seed))


def is_correct(expected: str, answer: str, kind: BenignKind) -> bool:
    """Return whether an answer is right.

    ``opswap``: it is the number and nothing else but white space and a final period. ``gsm8k``: its final number (see
    :func:`final_number`) has the expected value, so that 18, $18.00 and 18. are the same. ``exact``: it is the expected
    text, white space around both aside.
    """
    match kind:
        case "opswap":
            return answer.strip().removesuffix(".").rstrip() == expected
        case "gsm8k":
            found = final_number(answer)
            return found is not None and found == final_number(expected)
        case "exact":
            return answer.strip() == expected.strip()
    raise ValueError(f"answers of the kind {kind!r} are not scored here")


def final_number(text: str) -> Decimal | None:
    """Return the number an answer ends on: the last on a line of its own after ``####``, else the last of all.

    Reads dollar signs, a minus before or after them, commas between groups of three digits, and decimals.
    """
    marked = _MARKED.findall(text)
    found = list(_NUMBER.finditer(marked[-1] if marked else text))
    if not found:
        return None
    last = found[-1]
    value = Decimal(last[3].replace(",", ""))
    return value.copy_negate() if last[1] or last[2] else value


def _opswap_prompts(tier: int, limit: int, seed: int) -> Iterator[Prompt]:
    from holdtrue.data import Message
    from holdtrue.data.opswap import generate_opswap

    for row in generate_opswap(tier, 0, limit, seed).test:
        *messages, answer = (Message(turn["role"], turn["content"]) for turn in row["messages"])
        asked = messages[-1].content
        yield Prompt(asked, asked, f"opswap:{tier}", "plain", tuple(messages), asked, answer.content)


def _gsm8k_prompts(path: Path) -> Iterator[Prompt]:
    from holdtrue.data import Message, read_jsonl, text_fault

    def parse(record: dict[str, Any]) -> Prompt | list[Problem]:
        problems: list[Problem] = []
        for field in ("question", "answer"):
            if field not in record:
                problems.append(Problem(0, field, f"is missing{nearest(field, record)}"))
            elif fault := text_fault(record[field]):
                problems.append(Problem(0, field, fault))
        if problems:
            return problems
        asked, marked = record["question"], _MARKED.findall(record["answer"])
        if not marked:
            return [Problem(0, "answer", "has no line '#### n' with the final number")]
        name = f"gsm8k-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
        return Prompt(name, name, "gsm8k", "plain", (Message("user", asked),), asked, str(final_number(marked[-1])))

    return read_jsonl(path, parse)


def _chat_prompts(path: Path) -> Iterator[Prompt]:
    from holdtrue.data import read_chat

    for row in read_chat(path):
        yield replace(row_prompt(row, theme="exact"), expected=row.messages[-1].content)


def _known() -> str:
    return f"known: {', '.join(_FORMS)}"
