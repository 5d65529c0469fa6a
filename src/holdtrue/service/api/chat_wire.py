"""Chat completions as OpenAI's API writes them: what is asked, what is answered, and an engine's events in its form."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from holdtrue.data import Message
from holdtrue.service.api import schemas
from holdtrue.serving.port import CHOICES, STOPS, TOP, Candidate, Delta, Token

LOWEST = -9999.0
"""What OpenAI writes for a token that is next to impossible; JSON has no infinity."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "audio": (),
    "moderation": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that nothing here acts on, each with the values by which nothing is asked for."""

Content = Annotated[StrictStr, Field(max_length=2**22)]


class CacheBreakpoint(schemas.Request):
    """A hint for a cache, as OpenAI has it."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class CacheOptions(schemas.Request):
    """Hints for a cache, as OpenAI has them."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class TextPart(schemas.Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: Content
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class ChatMessage(schemas.Request):
    """A message. An earlier answer may be sent back as it came, with its empty fields."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Annotated[StrictStr, Field(max_length=64)] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def message(self) -> Message:
        """Return it as an engine takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(schemas.Request):
    """What a stream carries besides the answer. Nothing is obfuscated here."""

    include_usage: StrictBool | None = None
    include_obfuscation: StrictBool | None = None


class ChatBody(schemas.Request):
    """A chat that is to be answered."""

    model: schemas.Plain = Field(min_length=1, max_length=300)
    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_tokens: Annotated[StrictInt, Field(ge=1, le=10**9)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, le=10**9)] | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2)] | None = None
    top_p: Annotated[StrictFloat, Field(ge=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Content | Annotated[list[Content], Field(max_length=STOPS)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=CHOICES)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=TOP)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    # Who of the customer's users asks, and hints for a cache: of no use here, and nobody is harmed by them.
    user: Content | None = None
    safety_identifier: Content | None = None
    prompt_cache_key: Content | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    prompt_cache_options: CacheOptions | None = None
    metadata: schemas.Metadata | None = None
    parallel_tool_calls: StrictBool | None = None
    # Refused unless NEUTRAL has their value.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    response_format: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    modalities: Any = None
    store: Any = None
    service_tier: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    audio: Any = None
    moderation: Any = None
    prediction: Any = None
    web_search_options: Any = None

    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TopLogprob(schemas.Answer):
    """A token that could have come."""

    token: str
    bytes: list[int] | None
    logprob: float


class TokenLogprob(TopLogprob):
    """A token that came. ``bytes`` are exact where ``token`` is only a part of a character."""

    top_logprobs: list[TopLogprob]


class Logprobs(schemas.Answer):
    """The log-probabilities of an answer's tokens under the model, before temperature and ``top_p``."""

    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None = None


class AnswerMessage(schemas.Answer):
    """An answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = None


class Choice(schemas.Answer):
    """One of the answers."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None


class Usage(schemas.Answer):
    """The tokens of a chat."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(schemas.Answer):
    """A chat's answers. ``system_fingerprint`` names the base model's weights and the adapter, each by its digest."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str


def usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    """Return what a chat used."""
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, total_tokens=total)


def logprobs(tokens: list[Token]) -> Logprobs:
    """Return tokens with their log-probabilities as they are answered."""
    return Logprobs(
        content=[
            TokenLogprob(**_one(token), top_logprobs=[TopLogprob(**_one(other)) for other in token.top])
            for token in tokens
        ]
    )


def _one(token: Token | Candidate) -> dict[str, Any]:
    text = token.bytes.decode("utf-8", "replace")
    return {"token": text, "bytes": list(token.bytes), "logprob": max(token.logprob, LOWEST)}


class Chunks:
    """The chunks of a stream, each a line of server-sent events.

    Args:
        head: what every chunk carries.
        usage: whether the tokens are told at the end, and ``null`` before it.
        probable: whether log-probabilities were asked for.
    """

    DONE = "data: [DONE]\n\n"

    def __init__(self, head: dict[str, Any], *, usage: bool, probable: bool) -> None:
        self._head = {**head, "object": "chat.completion.chunk"}
        self._usage = usage
        self._probable = probable

    def opening(self, choice: int) -> str:
        """Return the first chunk of an answer."""
        return self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})

    def of(self, delta: Delta) -> str:
        """Return the chunks of an event: what is new, and why the answer ended if it did."""
        lines = ""
        if delta.text or delta.tokens:
            found = logprobs(list(delta.tokens)).model_dump() if self._probable else None
            lines += self._chunk(delta.choice, {"content": delta.text}, logprobs=found)
        if delta.finish is not None:
            lines += self._chunk(delta.choice, {}, finish=delta.finish)
        return lines

    def closing(self, used: Usage) -> str:
        """Return what comes after all answers."""
        last = self._line({"choices": [], "usage": used.model_dump()}) if self._usage else ""
        return last + self.DONE

    def _chunk(
        self, choice: int, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> str:
        one = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return self._line({"choices": [one], **({"usage": None} if self._usage else {})})

    def _line(self, values: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self._head, **values})}\n\n"
