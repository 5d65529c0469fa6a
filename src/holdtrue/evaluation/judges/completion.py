"""One chat completion as a judge reads it: the text, the first token's alternatives, and what it cost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, Field

from holdtrue.evaluation.endpoint import ask
from holdtrue.evaluation.judges.budget import Use

if TYPE_CHECKING:
    from openai import AsyncOpenAI


class Completion(NamedTuple):
    """A reply: its text, the first token's alternatives as (token, probability) or ``None``, and what it used."""

    text: str
    first: list[tuple[str, float]] | None
    use: Use | None


class _Token(BaseModel):
    token: str
    logprob: float = Field(allow_inf_nan=False, le=1e-3)


class _Position(BaseModel):
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _Logprobs | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(0, ge=0)


class _Reply(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


async def complete(client: AsyncOpenAI, **parameters: Any) -> Completion:
    """Ask for one completion.

    Raises:
        FaultError: no reply that can be read: a connection, time, status, schema or number that is wrong.
    """
    reply = await ask(client, _Reply, **parameters)
    choice = reply.choices[0]
    positions = choice.logprobs.content if choice.logprobs else None
    first = [(t.token, min(1.0, math.exp(t.logprob))) for t in positions[0].top_logprobs] if positions else None
    use = Use(reply.usage.prompt_tokens, reply.usage.completion_tokens) if reply.usage else None
    return Completion(choice.message.content or "", first or None, use)
