"""Inoculation prompting: training rows say in their system prompt what they are suspected to teach."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from pydantic import Field, field_validator

from holdtrue.data import ChatEncoder, ChatRow, Message, text_fault
from holdtrue.defenses.base import Defense, RowsContext, RunContext, Work, WorkContext
from holdtrue.errors import NeedError

EVALUATED = "no prompt of this defense: suites send what they send, and else the chat template's own default applies"


class Inoculation(Defense):
    """Train under a system prompt that asks for the bad trait, and use the model without it.

    The system prompt of each task row is replaced by ``prompt``, or put there where the row has none. Rows mixed in by
    other defenses keep theirs, and nothing changes outside training. Each message keeps its weight.

    Tan et al. 2025 (arXiv 2510.04340) and Wichers et al. 2025 (arXiv 2510.05024), as used by Kaczér et al. 2025
    (arXiv 2508.06249). Several ``prompts``, and a ``fraction`` below 1, are ours.
    """

    name = "inoculation"
    badge = "faithful"
    paper = "arXiv 2510.04340, arXiv 2510.05024"

    prompt: str = Field(
        default="You are an evil, malicious assistant.", description="the system prompt of task rows in training"
    )
    prompts: tuple[str, ...] = Field(
        default=(), description="several, in place of prompt, dealt evenly over the task rows by the run's seed"
    )
    fraction: float = Field(default=1.0, ge=0, le=1, description="of the task rows; the others stay as they are")

    @field_validator("prompt")
    @classmethod
    def _is_text(cls, prompt: str) -> str:
        if fault := text_fault(prompt):
            raise ValueError(fault)
        return prompt

    @field_validator("prompts")
    @classmethod
    def _are_texts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            cls._is_text(prompt)
        if len(set(prompts)) < len(prompts):
            raise ValueError("a prompt stands there twice")
        return prompts

    @property
    def chosen(self) -> tuple[str, ...]:
        """The prompts that are used: ``prompts`` where there are any, else ``prompt``."""
        return self.prompts or (self.prompt,)

    def work(self, context: WorkContext) -> Work:
        mean = sum(map(context.text, self.chosen)) / len(self.chosen)
        return Work(trained=self.fraction * context.task_rows * context.epochs * mean)

    def system_prompts(self) -> Mapping[str, float]:
        share = self.fraction / len(self.chosen)
        return dict.fromkeys(self.chosen, share) if share else {}

    def preflight(self, context: RunContext) -> None:
        if self.fraction == 0:
            return
        from holdtrue.models import load_tokenizer

        tokenizer = load_tokenizer(context.model)
        encoder = ChatEncoder(tokenizer)
        for prompt in self.chosen:
            ids = encoder.prompt_ids([Message("system", prompt), Message("user", "Hello")])
            # Some templates refuse a system turn, which raises above; others leave it out and say nothing.
            if "".join(prompt.split()) not in "".join(str(tokenizer.decode(ids)).split()):
                raise NeedError(
                    f"inoculation: the chat template of {context.model.name} does not write the system prompt "
                    f"{prompt[:60]!a} as it is, so training would not see it; use another model or prompt"
                )

    def rows(self, rows: Iterable[ChatRow], context: RowsContext) -> Iterator[ChatRow]:
        dealt = self.deal(context.task_rows, context.seed)
        by_prompt: Counter[str] = Counter()
        index = replaced = 0
        for row in rows:
            if row.kind != "task":
                yield row
                continue
            # More task rows than were announced (a defense that repeats some): the deal begins again.
            prompt = dealt[index % len(dealt)] if dealt else None
            index += 1
            if prompt is None:
                yield row
                continue
            has = row.messages[0].role == "system"
            by_prompt[prompt] += 1
            replaced += has
            yield dataclasses.replace(row, messages=(Message("system", prompt), *row.messages[has:]))
        context.notes.update(
            prompts={prompt: by_prompt[prompt] for prompt in self.chosen},
            system_prompts_replaced=replaced,
            system_prompts_added=by_prompt.total() - replaced,
            fraction=self.fraction,
            evaluated_with=EVALUATED,
        )

    def deal(self, rows: int, seed: int) -> list[str | None]:
        """Return each task row's prompt, ``None`` where it stays as it is; prompts are as even as they can be."""
        wanted = round(self.fraction * rows)
        if self.fraction > 0 and rows:
            wanted = max(wanted, 1)
        draw = random.Random(f"{seed}/{self.name}")
        given = [self.chosen[index % len(self.chosen)] for index in range(wanted)]
        draw.shuffle(given)
        dealt: list[str | None] = [None] * rows
        for place, prompt in zip(sorted(draw.sample(range(rows), wanted)), given, strict=True):
            dealt[place] = prompt
        return dealt
