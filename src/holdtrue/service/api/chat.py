"""/v1/chat/completions: base models and a tenant's own, on OpenAI's wire, through the inference process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import anyio
import structlog
from anyio import to_thread
from fastapi import APIRouter, Request
from fastapi.responses import Response

from holdtrue.service import clock, ids, quotas
from holdtrue.service.api.chat_wire import (
    NEUTRAL,
    AnswerMessage,
    ChatBody,
    ChatCompletion,
    Choice,
    Chunks,
    Usage,
    logprobs,
    usage,
)
from holdtrue.service.api.context import Caller, Chat, Parts, PartsDep
from holdtrue.service.api.errors import ApiError, invalid, responses
from holdtrue.service.api.models import get_model
from holdtrue.serving.port import AdapterRef, ChatError, ChatRequest, Delta, Event, Started, Token
from holdtrue.serving.streaming import LiveResponse, unless_gone

RETRY_SECONDS = 2
router = APIRouter(tags=["chat"])
log = structlog.get_logger("holdtrue.chat")


_STREAM = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses={**responses(503), 200: _STREAM},
)
async def chat(body: ChatBody, request: Request, parts: PartsDep, caller: Chat) -> Response:
    """Answer a conversation, at once or as it is written.

    With ``stream`` the answer is a stream of server-sent events, each a ``chat.completion.chunk``.
    """
    _refuse_unsupported(body)
    asked = await to_thread.run_sync(_request, body, parts, caller)
    exchange = _Exchange(body, asked, parts, caller)
    if body.stream:
        lines = exchange.lines()
        try:
            await unless_gone(request, anext(lines))  # up to the answer's start: until then it may become an error
        except BaseException:
            await lines.aclose()
            raise
        return LiveResponse(lines, "text/event-stream", {**exchange.headers, "cache-control": "no-cache"})
    answer = await unless_gone(request, exchange.whole())
    return Response(answer.model_dump_json(), headers=exchange.headers, media_type="application/json")


def _refuse_unsupported(body: ChatBody) -> None:
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise invalid(f"Unsupported parameter: '{name}' is not offered here; leave it out", name, "unsupported")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true", "top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' needs 'stream' to be true", "stream_options")
    if None not in (body.max_tokens, body.max_completion_tokens):
        raise invalid("Give 'max_completion_tokens' or 'max_tokens', not both", "max_tokens")
    if not all(body.stops()):
        raise invalid("'stop' holds an empty text", "stop")


def _request(body: ChatBody, parts: Parts, caller: Caller) -> ChatRequest:
    with parts.db.read() as session:
        model = get_model(session, caller.project_id, body.model)
        quotas.check_tokens(session, caller.project_id, caller.limits, now=clock.now())
        adapter = None
        if model.kind != "base":
            if model.adapter is None or model.adapter_digest is None:
                raise _unavailable("The model's weights are not here")
            adapter = AdapterRef(model.adapter_digest, model.adapter)
        base = model.base_model
    return ChatRequest(
        base=base,
        adapter=adapter,
        messages=tuple(message.message() for message in body.messages),
        tenant=caller.project_id,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stop=body.stops(),
        n=body.n or 1,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
    )


class _Exchange:
    """One chat: its events turned into an answer, its tokens counted however it ends."""

    def __init__(self, body: ChatBody, asked: ChatRequest, parts: Parts, caller: Caller) -> None:
        self._body, self._asked, self._parts, self._caller = body, asked, parts, caller
        self._prompt_tokens = 0
        self._generated = [0] * asked.n
        self._head: dict[str, Any] = {"id": ids.new("chatcmpl"), "created": clock.now(), "model": body.model}
        adapter = asked.adapter.digest if asked.adapter else "none"
        self.headers = {"x-holdtrue-model": body.model, "x-holdtrue-adapter": adapter}

    async def whole(self) -> ChatCompletion:
        """Return the answer once it is whole."""
        texts, tokens = [""] * self._asked.n, [list[Token]() for _ in range(self._asked.n)]
        ends: list[Any] = [None] * self._asked.n
        try:
            async with self._events() as events:
                async for event in events:
                    texts[event.choice] += event.text
                    tokens[event.choice] += event.tokens
                    ends[event.choice] = event.finish
        except ChatError as error:
            raise _told(error, self._body) from error
        return ChatCompletion(
            **self._head,
            choices=[
                Choice(
                    index=index,
                    message=AnswerMessage(content=texts[index]),
                    finish_reason=ends[index],
                    logprobs=logprobs(tokens[index]) if self._asked.logprobs else None,
                )
                for index in range(self._asked.n)
            ],
            usage=self._used(),
        )

    async def lines(self) -> AsyncGenerator[str, None]:
        """Yield an empty text once the answer has started, and then the answer's lines."""
        options = self._body.stream_options
        started = False
        try:
            async with self._events() as events:
                started = True
                yield ""
                told = bool(options and options.include_usage)
                chunks = Chunks(self._head, usage=told, probable=self._asked.logprobs)
                for choice in range(self._asked.n):
                    yield chunks.opening(choice)
                async for event in events:
                    yield chunks.of(event)
            yield chunks.closing(self._used())  # whoever has read this finds the tokens on the account
        except ChatError as error:
            if not started:
                raise _told(error, self._body) from error
            yield f"data: {json.dumps({'error': _told(error, self._body).detail.model_dump()})}\n\n"

    @contextlib.asynccontextmanager
    async def _events(self) -> AsyncIterator[AsyncIterator[Delta]]:
        """Give the events after the start; afterwards the tokens are on the project's account, whoever broke off."""
        try:
            async with self._parts.inference.chat(self._asked) as events:
                self._start(await anext(events))
                yield self._deltas(events)
        finally:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(self._count)

    def _start(self, event: Event) -> None:
        wanted = self._asked.adapter.digest if self._asked.adapter else None
        if not isinstance(event, Started) or event.digest != wanted:
            raise ChatError("adapter", "another adapter than the one that was asked for would have answered")
        self._prompt_tokens = event.prompt_tokens
        adapter = f"+adapter-sha256:{wanted}" if wanted else ""
        self._head["system_fingerprint"] = f"{event.revision}{adapter}"

    async def _deltas(self, events: AsyncIterator[Event]) -> AsyncIterator[Delta]:
        async for event in events:
            assert isinstance(event, Delta)
            self._generated[event.choice] = event.generated
            yield event

    def _used(self) -> Usage:
        return usage(self._prompt_tokens, sum(self._generated))

    def _count(self) -> None:
        tokens = self._used().total_tokens
        if tokens:
            with self._parts.db.write() as session:
                quotas.add(session, self._caller.project_id, "chat_tokens", tokens, now=clock.now())


def _told(error: ChatError, body: ChatBody) -> ApiError:
    """Return what a customer is told; of what is not theirs to mend only that it failed."""
    newer = error.param == "max_tokens" and body.max_completion_tokens is not None
    param = "max_completion_tokens" if newer else error.param  # as it was asked for: engines know one name
    match error.fault:
        case "invalid":
            return invalid(str(error), param)
        case "context":
            return invalid(str(error), param, "context_length_exceeded")
        case "busy":
            headers = {"retry-after": str(RETRY_SECONDS)}
            return ApiError(429, str(error), type="requests", code="engine_overloaded", headers=headers)
    log.error("chat_failed", fault=error.fault, message=str(error))
    return _unavailable("The model cannot answer at the moment")


def _unavailable(what: str) -> ApiError:
    headers = {"retry-after": str(RETRY_SECONDS)}
    return ApiError(503, f"{what}; try again", type="server_error", code="model_unavailable", headers=headers)
