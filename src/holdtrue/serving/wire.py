"""The port's values as JSON, between the inference process and its client."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from holdtrue.data import Message
from holdtrue.serving.port import AdapterRef, Candidate, ChatError, ChatRequest, Delta, Event, Started, Token


def request_to_json(request: ChatRequest) -> dict[str, Any]:
    """Return a request as JSON values."""
    return asdict(request)


def request_from_json(values: dict[str, Any]) -> ChatRequest:
    """Return a request; ``ChatError`` for what is none."""
    try:
        adapter = values.pop("adapter")
        messages = tuple(Message(**message) for message in values.pop("messages"))
        stop = tuple(values.pop("stop"))
        return ChatRequest(adapter=AdapterRef(**adapter) if adapter else None, messages=messages, stop=stop, **values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ChatError("invalid", f"this is no chat request: {type(error).__name__}") from None


def event_to_json(event: Event | ChatError) -> dict[str, Any]:
    """Return an event, or an error in its place, as JSON values."""
    match event:
        case ChatError():
            return {"error": {"fault": event.fault, "message": str(event), "param": event.param}}
        case Started():
            return {"started": asdict(event)}
        case Delta():
            tokens = [[*_candidate(token), [_candidate(each) for each in token.top]] for token in event.tokens]
            return {"delta": [event.choice, event.text, event.generated, tokens, event.finish]}


def event_from_json(values: dict[str, Any]) -> Event:
    """Return an event; raises the ``ChatError`` that stands in its place."""
    match values:
        case {"error": {"fault": fault, "message": message, "param": param}}:
            raise ChatError(fault, message, param)
        case {"started": dict(started)}:
            return Started(**started)
        case {"delta": [choice, text, generated, tokens, finish]}:
            found = tuple(_token(*token) for token in tokens)
            return Delta(choice, text, generated, found, finish)
        case _:
            raise ChatError("unavailable", "the inference process sent what is no event")


def _candidate(token: Token | Candidate) -> list[Any]:
    return [token.token_id, token.bytes.hex(), token.logprob]


def _token(token_id: int, content: str, logprob: float, top: list[Any]) -> Token:
    found = tuple(Candidate(id, bytes.fromhex(text), value) for id, text, value in top)
    return Token(token_id, bytes.fromhex(content), logprob, found)
