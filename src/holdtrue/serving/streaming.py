"""Answers that are written while somebody reads them, and end when nobody does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

import anyio
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Value = TypeVar("Value")


class LiveResponse(Response):
    """Sends what a generator yields as it comes; when the reader goes, the generator is closed there and then.

    Starlette's own notices a reader who has gone only with the next thing that it sends, on some servers, and leaves
    the generator to the garbage collector.
    """

    def __init__(
        self, lines: AsyncGenerator[str, None], media_type: str, headers: Mapping[str, str] | None = None
    ) -> None:
        self.status_code, self.media_type, self.background = 200, media_type, None
        self._lines = lines
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            with anyio.CancelScope(shield=True):
                await _end(sending, gone)
                await self._lines.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for line in self._lines:
            if line:
                await send({"type": "http.response.body", "body": line.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """Do a piece of work for a request whose body was read; give it up when nobody waits for the answer any more.

    Raises:
        ClientDisconnect: nobody does.
    """
    doing = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    finally:
        with anyio.CancelScope(shield=True):
            await _end(doing, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        if not task.done():
            task.cancel()
            # What it raises now is of no use to anybody: its answer is not wanted.
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
