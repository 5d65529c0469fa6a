"""One chat completion from an OpenAI-compatible endpoint, taken as what it is: bytes from a stranger."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, Field, ValidationError

from holdtrue.errors import SpecError
from holdtrue.evaluation.judges.budget import Use

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_READ, _SHOWN = 10_000, 300
_FATAL = (401, 402, 403, 404, 405)
_REFUSED = (400, 413, 422)


class FaultError(Exception):
    """A request failed, after the library's retries.

    Attributes:
        kind: ``passing``: the endpoint is down, slow, limits the rate, or replied with rubbish; ``refused``: it is
            well, and refused this one request; ``fatal``: no request can succeed.
        billed: whether its tokens may have been used.
    """

    def __init__(
        self, text: str, kind: Literal["passing", "refused", "fatal"] = "passing", billed: bool = False
    ) -> None:
        super().__init__(text)
        self.kind = kind
        self.billed = billed


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
    """Ask for one completion; the library retries what may pass, and waits as long as the endpoint says.

    Raises:
        FaultError: no reply that can be read: a connection, time, status, schema or number that is wrong.
    """
    import openai

    key = client.api_key
    try:
        response = await client.chat.completions.with_raw_response.create(**parameters)
        body = response.text
    except openai.APITimeoutError:
        raise FaultError(f"no reply in {client.timeout} s", billed=True) from None
    except openai.APIConnectionError as error:
        raise FaultError(f"cannot connect: {_line(error.__cause__ or error, key)}") from None
    except openai.APIStatusError as error:
        kind = "fatal" if error.status_code in _FATAL else "refused" if error.status_code in _REFUSED else "passing"
        raise FaultError(f"HTTP {error.status_code}: {_line(error.response.text, key)}", kind) from None
    except (openai.OpenAIError, ValueError) as error:
        raise FaultError(_line(error, key)) from None
    return _read(body, key)


def shown_url(url: str) -> str:
    """Return an address without the user, the password and the query that may be in it.

    Raises:
        SpecError: it is no http or https address.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise SpecError(f"the endpoint's address cannot be read: {error}") from None
    if parts.scheme not in ("http", "https") or not host:
        raise SpecError("the endpoint's address must be like http://localhost:8000/v1")
    host = f"[{host}]" if ":" in host else host
    return urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", parts.path.rstrip("/"), "", ""))


def _read(body: str, key: str) -> Completion:
    try:
        reply = _Reply.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the reply"
        raise FaultError(f"the reply is no chat completion: {where}: {first['msg']}", billed=True) from None
    except (ValueError, RecursionError):
        raise FaultError(f"the reply is not JSON: {_line(body, key) or 'it is empty'}", billed=True) from None
    choice = reply.choices[0]
    positions = choice.logprobs.content if choice.logprobs else None
    first = [(t.token, min(1.0, math.exp(t.logprob))) for t in positions[0].top_logprobs] if positions else None
    use = Use(reply.usage.prompt_tokens, reply.usage.completion_tokens) if reply.usage else None
    return Completion(choice.message.content or "", first or None, use)


def _line(text: object, key: str) -> str:
    """Return the beginning of a text on one line, without the key, which endpoints have been seen to repeat."""
    whole = str(text).replace(key, "[key]")[:_READ]
    return " ".join("".join(char if char.isprintable() else " " for char in whole).split())[:_SHOWN]
