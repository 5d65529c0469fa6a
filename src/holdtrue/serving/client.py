"""Asks the inference process. No torch here: this is what the API process imports."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx

from holdtrue.serving.port import BusyError, ChatRequest, Piece, RequestError

SECRET = "x-holdtrue-secret"


class InferenceClient:
    """A client of one inference process.

    Args:
        url: its address.
        secret: that it wants.
    """

    def __init__(self, url: str, secret: str) -> None:
        timeout = httpx.Timeout(600.0, connect=5.0)
        self._client = httpx.AsyncClient(base_url=url, headers={SECRET: secret}, timeout=timeout, trust_env=False)

    async def chat(self, request: ChatRequest) -> AsyncIterator[Piece]:
        """Yield the pieces of a request's answers; a reader that stops ends the work.

        Raises:
            RequestError: the request cannot be answered as it is.
            BusyError: the process is full, away or failing.
        """
        try:
            async with self._client.stream("POST", "/chat", content=request.model_dump_json()) as response:
                if response.status_code != 200:
                    _raise(json.loads(await response.aread()))
                async for line in response.aiter_lines():
                    found = json.loads(line)
                    if "error" in found:
                        _raise(found)
                    yield Piece.model_validate(found)
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise BusyError(f"the inference process does not answer ({type(error).__name__}); try again soon") from None

    async def alive(self) -> bool:
        """Say whether the process answers."""
        try:
            return (await self._client.get("/healthz", timeout=2.0)).status_code == 200
        except httpx.HTTPError:
            return False


def _raise(found: dict[str, str | None]) -> None:
    message = found.get("error") or "the inference process failed"
    if found.get("kind") == "request":
        raise RequestError(message, found.get("param"), found.get("code"))
    raise BusyError(message)
