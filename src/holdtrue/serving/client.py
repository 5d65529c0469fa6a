"""The inference process from elsewhere: the port over HTTP. It needs no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator

import httpx

from holdtrue.serving.port import ChatError, ChatRequest, Event
from holdtrue.serving.wire import event_from_json, request_to_json

SILENCE = 60.0
"""Seconds after which an inference process that says nothing, not even that it lives, is given up."""
CONNECT = 5.0


class InferenceClient:
    """Answers chats by asking the inference process; see the port.

    Args:
        url: where it listens.
        secret: what both know; without one nothing is asked.
    """

    def __init__(self, url: str, secret: str) -> None:
        self._url = url.rstrip("/")
        self._secret = secret

    @contextlib.asynccontextmanager
    async def chat(self, request: ChatRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """Answer a request; leaving the context closes the connection, which ends the work on it."""
        if not self._secret:
            raise ChatError("unavailable", "no inference process belongs to this one: there is no shared secret")
        async with contextlib.AsyncExitStack() as stack:
            try:
                http = await stack.enter_async_context(self._http())
                call = http.stream("POST", f"{self._url}/chat", json=request_to_json(request))
                response = await stack.enter_async_context(call)
            except httpx.HTTPError as error:
                raise _away(error) from error
            if response.status_code != 200:
                raise ChatError("unavailable", f"the inference process answered with {response.status_code}")
            yield _events(response)

    async def alive(self) -> bool:
        """Say whether the inference process answers."""
        try:
            async with self._http() as http:
                return (await http.get(f"{self._url}/healthz")).status_code == 200
        except httpx.HTTPError:
            return False

    def _http(self) -> httpx.AsyncClient:
        # One for each call: a kept connection that the other side has closed would fail a request for nothing.
        return httpx.AsyncClient(
            headers={"authorization": f"Bearer {self._secret}"} if self._secret else {},
            timeout=httpx.Timeout(SILENCE, connect=CONNECT),
            trust_env=False,  # no proxy stands between two processes of one service
        )


async def _events(response: httpx.Response) -> AsyncIterator[Event]:
    try:
        async for line in response.aiter_lines():
            if line == '"end"':
                return
            if line:  # an empty one says only that the other side lives
                yield event_from_json(json.loads(line))
    except httpx.HTTPError as error:
        raise _away(error) from error
    except ValueError as error:
        raise ChatError("unavailable", "the inference process sent what cannot be read") from error
    raise ChatError("unavailable", "the inference process broke off")


def _away(error: httpx.HTTPError) -> ChatError:
    return ChatError("unavailable", f"the inference process cannot be reached ({type(error).__name__})")
