"""Asking an OpenAI-compatible endpoint, whose replies are bytes from a stranger: what samplers and judges share."""

from __future__ import annotations

import json
import queue
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import BaseModel, ValidationError

from holdtrue.errors import SpecError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

T = TypeVar("T")
Reply = TypeVar("Reply", bound=BaseModel)

NO_KEY = "none"
"""Sent to endpoints without keys: they ignore it, but the library wants one."""
_READ, _SHOWN = 10_000, 300
_FATAL = (401, 402, 403, 404, 405)
_REFUSED = (400, 413, 422)


class FaultError(Exception):
    """A request failed, after the library's retries; its text never holds the key.

    Attributes:
        reason: no connection (``down``), no reply in time (``slow``), an HTTP ``status`` that is an error, a reply that
            cannot be read (``rubbish``), or something the library would not send (``client``).
        status: the HTTP status, where that is the reason.
    """

    def __init__(
        self,
        text: str,
        reason: Literal["down", "slow", "status", "rubbish", "client"] = "rubbish",
        status: int | None = None,
    ) -> None:
        super().__init__(text)
        self.reason, self.status = reason, status

    @property
    def kind(self) -> Literal["passing", "refused", "fatal"]:
        """Whether another request may succeed: perhaps, all but this one, or none."""
        return "fatal" if self.status in _FATAL else "refused" if self.status in _REFUSED else "passing"

    @property
    def billed(self) -> bool:
        """Whether its tokens may have been used."""
        return self.reason in ("slow", "rubbish")


async def ask(client: AsyncOpenAI, schema: type[Reply], **parameters: Any) -> Reply:
    """Ask for one chat completion; the library retries what may pass, and waits as long as the endpoint says.

    Raises:
        FaultError: no reply that fits the schema.
    """
    import openai

    key = client.api_key
    try:
        response = await client.chat.completions.with_raw_response.create(**parameters)
        body = response.text
    except openai.APITimeoutError:
        waited = client.timeout
        shown = f"{waited:g}" if isinstance(waited, float | int) else str(waited)
        raise FaultError(f"no reply in {shown} s", "slow") from None
    except openai.APIConnectionError as error:
        raise FaultError(f"cannot connect: {_line(error.__cause__ or error, key)}", "down") from None
    except openai.APIStatusError as error:
        text = f"HTTP {error.status_code}: {_line(error.response.text, key)}"
        raise FaultError(text, "status", error.status_code) from None
    except (openai.OpenAIError, ValueError) as error:
        raise FaultError(_line(error, key), "client") from None
    try:
        return schema.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise FaultError(
            f"the reply is no chat completion ({where}: {first['msg']}): {_line(body, key)}", "rubbish"
        ) from None
    except (ValueError, RecursionError):
        raise FaultError(f"the reply is not JSON: {_line(body, key) or 'it is empty'}", "rubbish") from None


def arriving(work: Callable[[Callable[[T], None]], Awaitable[None]]) -> Iterator[T]:
    """Yield what ``work`` hands to the function that it is given, as it comes; then raise what it raised.

    ``work`` runs in a thread and an event loop of its own, so that this works where a loop is running already, as in a
    notebook. It is canceled when the reader stops.
    """
    from anyio.from_thread import start_blocking_portal

    results: queue.SimpleQueue[T | None] = queue.SimpleQueue()
    with start_blocking_portal() as portal:
        future = portal.start_task_soon(work, results.put)
        future.add_done_callback(lambda _: results.put(None))
        try:
            while (result := results.get()) is not None:
                yield result
            future.result()
        finally:
            future.cancel()


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


def _line(text: object, key: str) -> str:
    """Return the beginning of a text on one line, without the key, which endpoints have been seen to repeat."""
    whole = str(text) if key == NO_KEY else str(text).replace(key, "[key]")
    return " ".join("".join(char if char.isprintable() else " " for char in whole[:_READ]).split())[:_SHOWN]
