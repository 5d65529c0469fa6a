"""/v1/chat/completions: base models and a tenant's own, on OpenAI's wire, through the inference process."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, Self

from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import Field, StrictBool, StrictInt, StrictStr, model_validator

from holdtrue.service import clock, ids, quotas
from holdtrue.service.api import schemas
from holdtrue.service.api.context import Caller, Chat, Parts, PartsDep
from holdtrue.service.api.errors import ApiError, invalid, responses
from holdtrue.service.api.models import get_model
from holdtrue.serving.port import (
    MOST_CHOICES,
    MOST_STOPS,
    MOST_TOP,
    AdapterRef,
    BusyError,
    ChatRequest,
    Piece,
    RequestError,
    Turn,
)

router = APIRouter(tags=["chat"])
_ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that nothing here acts on, and the values with which that is no matter."""


class TextPart(schemas.Request):
    """A part of a message's content."""

    type: Literal["text"]
    text: StrictStr


class ChatMessage(schemas.Request):
    """A message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: StrictStr | list[TextPart]
    name: StrictStr | None = None

    def turn(self) -> Turn:
        """Return it as an engine takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Turn(role=_ROLES[self.role], content=text)


class StreamOptions(schemas.Request):
    """What a stream carries besides the answer."""

    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class ChatBody(schemas.Request):
    """A request for answers. Fields that nothing here acts on are refused unless their value changes nothing."""

    model: schemas.Plain = Field(min_length=1, max_length=300)
    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=MOST_STOPS)] | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MOST_CHOICES)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MOST_TOP)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: StrictStr | None = None
    safety_identifier: StrictStr | None = None
    metadata: schemas.Metadata | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    function_call: Any = None
    parallel_tool_calls: StrictBool | None = None
    response_format: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    modalities: list[str] | None = None
    store: StrictBool | None = None
    service_tier: str | None = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed with stream: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_completion_tokens or max_tokens, not both")
        return self

    def stops(self) -> tuple[str, ...]:
        """Return the stop texts."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if any(not text or len(text) > 200 for text in given):
            raise invalid("a stop text has 1 to 200 characters", "stop")
        return tuple(given)


@router.post(
    "/v1/chat/completions",
    responses={**responses(503), 200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
)
async def chat(body: ChatBody, request: Request, parts: PartsDep, caller: Chat) -> Response:
    """Answer a conversation, at once or as it is written."""
    asked = await to_thread.run_sync(_ask, body, parts, caller)
    head = {
        "id": ids.new("chatcmpl"),
        "created": clock.now(),
        "model": body.model,
        "system_fingerprint": f"fp_{asked.adapter.digest[:16]}" if asked.adapter else "fp_base",
    }
    headers = {"x-holdtrue-model": body.model, "x-holdtrue-adapter": asked.adapter.digest if asked.adapter else "none"}
    pieces = parts.inference.chat(asked)
    # The first piece decides whether this is an answer or an error: no status can be taken back.
    try:
        first = await anext(pieces)
    except RequestError as error:
        raise invalid(str(error), error.param, error.code) from None
    except BusyError as error:
        raise ApiError(
            503, str(error), type="server_error", code="engine_overloaded", headers={"retry-after": "2"}
        ) from None
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        lines = _events(head, asked, first, pieces, usage, bool(body.logprobs), parts, caller)
        return StreamingResponse(
            lines, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"}
        )
    try:
        answer = await _whole(head, asked, first, pieces, bool(body.logprobs))
    except BusyError as error:
        raise ApiError(
            503, str(error), type="server_error", code="engine_overloaded", headers={"retry-after": "2"}
        ) from None
    await to_thread.run_sync(_count, parts, caller, answer["usage"]["total_tokens"])
    return JSONResponse(answer, headers=headers)


def _ask(body: ChatBody, parts: Parts, caller: Caller) -> ChatRequest:
    for name, harmless in _NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and value not in harmless:
            raise invalid(f"{name} is not supported here; leave it out", name, "unsupported_parameter")
    if any("\0" in turn.turn().content for turn in body.messages):
        raise invalid("a message holds a NUL character", "messages")
    with parts.db.read() as session:
        model = get_model(session, caller.project_id, body.model)
        quotas.check_tokens(session, caller.project_id, caller.limits, now=clock.now())
        adapter = None
        if model.adapter is not None and model.adapter_digest is not None:
            adapter = AdapterRef(digest=model.adapter_digest, location=model.adapter)
        elif model.kind != "base":
            raise ApiError(404, f"The weights of {body.model!r} are gone", param="model", code="model_not_found")
        base = model.base_model
    return ChatRequest(
        tenant=caller.project_id,
        base=base,
        adapter=adapter,
        messages=tuple(message.turn() for message in body.messages),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=secrets.randbits(62) if body.seed is None else body.seed,
        stop=body.stops(),
        n=body.n or 1,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _count(parts: Parts, caller: Caller, tokens: int) -> None:
    with parts.db.write() as session:
        quotas.add(session, caller.project_id, "chat_tokens", tokens, now=clock.now())


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _likely(piece: Piece) -> list[dict[str, Any]]:
    return [
        {
            "token": each.token,
            "logprob": each.logprob,
            "bytes": each.bytes,
            "top_logprobs": [other.model_dump() for other in each.top],
        }
        for each in piece.logprobs
    ]


async def _whole(
    head: dict[str, Any], asked: ChatRequest, first: Piece, pieces: AsyncIterator[Piece], logprobs: bool
) -> dict[str, Any]:
    texts, likely, ends = [""] * asked.n, [list[Any]() for _ in range(asked.n)], ["stop"] * asked.n
    prompt = completion = 0
    piece: Piece | None = first
    while piece is not None:
        texts[piece.choice] += piece.text
        likely[piece.choice] += _likely(piece)
        if piece.finish is not None:
            ends[piece.choice] = piece.finish
            prompt, completion = piece.prompt_tokens, completion + piece.completion_tokens
        piece = await anext(pieces, None)
    return {
        **head,
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": texts[index], "refusal": None},
                "logprobs": {"content": likely[index], "refusal": None} if logprobs else None,
                "finish_reason": ends[index],
            }
            for index in range(asked.n)
        ],
        "usage": _usage(prompt, completion),
    }


async def _events(
    head: dict[str, Any],
    asked: ChatRequest,
    first: Piece,
    pieces: AsyncIterator[Piece],
    usage: bool,
    logprobs: bool,
    parts: Parts,
    caller: Caller,
) -> AsyncIterator[bytes]:
    def event(**fields: Any) -> bytes:
        more = {"usage": None} if usage and "usage" not in fields else {}
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', **fields, **more})}\n\n".encode()

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, likely: list[Any] | None = None) -> bytes:
        told = {"content": likely, "refusal": None} if likely else None
        return event(choices=[{"index": index, "delta": delta, "logprobs": told, "finish_reason": finish}])

    prompt = completion = 0
    try:
        for index in range(asked.n):
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
        piece: Piece | None = first
        while piece is not None:
            likely = _likely(piece) if logprobs else None
            if piece.text or likely:
                yield chunk(piece.choice, {"content": piece.text}, likely=likely)
            if piece.finish is not None:
                prompt, completion = piece.prompt_tokens, completion + piece.completion_tokens
                yield chunk(piece.choice, {}, piece.finish)
            piece = await anext(pieces, None)
        if usage:
            yield event(choices=[], usage=_usage(prompt, completion))
        yield b"data: [DONE]\n\n"
    except BusyError as error:
        body = {"message": str(error), "type": "server_error", "param": None, "code": "engine_overloaded"}
        yield f"data: {json.dumps({'error': body})}\n\n".encode()
    finally:
        await to_thread.run_sync(_count, parts, caller, prompt + completion)
