"""A sampler for models behind any OpenAI-compatible chat endpoint, whose replies are bytes from a stranger."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydantic import BaseModel

from holdtrue.errors import RunError, SpecError
from holdtrue.evaluation.endpoint import NO_KEY, FaultError, arriving, ask, shown_url
from holdtrue.evaluation.sampling.port import Answer, Decoding, Request
from holdtrue.evaluation.sampling.text import answer_text

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RETRIES = 5
"""Times that a request is sent again when it failed in a way that may pass: later each time, or as the server says."""


class EndpointSampler:
    """Answers with a model behind an endpoint, several requests at a time; each answer is yielded as it is done.

    Sent are the model's name, the messages, temperature, ``max_tokens`` and seed. What else shapes an answer (the
    server's own top-p or top-k, and whether it follows the seed) is the server's to say. A reply without a choice or
    without content is the answer "". ``tokens`` is what the server reports, if it does.

    A request that fails, after retries, ends the sampling: those under way are waited for and yielded, then the error
    is raised.

    Args:
        model: as the endpoint calls it.
        base_url: the endpoint, up to and with ``/v1``.
        api_key: by default $OPENAI_API_KEY, if set, which is sent to ``base_url`` wherever that is. Never shown.
        concurrency: requests under way at once.
        timeout: seconds to wait for a reply.

    Raises:
        SpecError: the extra ``endpoint`` is not installed, or an argument makes no sense.
    """

    def __init__(
        self, model: str, base_url: str, api_key: str | None = None, *, concurrency: int = 8, timeout: float = 300.0
    ) -> None:
        try:
            import openai  # noqa: F401
        except ImportError:
            raise SpecError("a model behind an endpoint needs an extra: pip install 'holdtrue[endpoint]'") from None
        if concurrency < 1 or not timeout > 0:
            raise SpecError("concurrency and timeout must be above 0")
        self.url = shown_url(base_url)
        self.name = f"endpoint {self.url}"
        self._base_url = base_url
        self._model = model
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        self._concurrency = concurrency
        self._timeout = timeout

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Answer]]:
        """See the port.

        Raises:
            RunError: the endpoint is down, slow, limits the rate, refuses a request or replies with rubbish.
        """
        if requests:
            for answer in arriving(partial(self._sample_all, requests, decoding)):
                yield [answer]

    async def _sample_all(self, requests: Sequence[Request], decoding: Decoding, put: Callable[[Answer], None]) -> None:
        from openai import AsyncOpenAI

        left = iter(enumerate(requests))
        faults: list[tuple[int, FaultError]] = []

        async def work() -> None:
            for index, request in left:
                if faults:
                    return
                try:
                    put(await self._answer(client, index, request, decoding))
                except FaultError as fault:
                    faults.append((index, fault))

        client = AsyncOpenAI(
            api_key=self._api_key or NO_KEY,
            base_url=self._base_url,
            timeout=self._timeout,
            max_retries=RETRIES,
        )
        async with client:
            await asyncio.gather(*(work() for _ in range(min(self._concurrency, len(requests)))))
        if faults:
            index, fault = faults[0]
            raise RunError(
                f"{self.name}, model {self._model!a}, request {index + 1} of {len(requests)}: {fault}. "
                f"Answers so far are kept; {_action(fault)}, then run the same again"
            )

    async def _answer(self, client: AsyncOpenAI, index: int, request: Request, decoding: Decoding) -> Answer:
        reply = await ask(
            client,
            _Reply,
            model=self._model,
            messages=[{"role": message.role, "content": message.content} for message in request.messages],
            temperature=decoding.temperature,
            max_tokens=decoding.max_new_tokens,
            seed=request.seed % 2**63,
        )
        choice = reply.choices[0] if reply.choices else _Choice(message=_Message())
        tokens = reply.usage.completion_tokens if reply.usage else None
        text = answer_text(choice.message.content or "")
        return Answer(index, text, tokens, "length" if choice.finish_reason == "length" else "stop")


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Reply(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


_BY_STATUS = {
    400: "see whether the prompt fits the model, and whether the server takes these settings",
    401: "check the key",
    403: "check the key",
    404: "check the model's name, and that the address ends where the server's API begins, often in /v1",
    429: "wait until its limits allow more, or lower the concurrency",
}
_BY_REASON = {
    "down": "see whether it runs, and at this address",
    "slow": "see whether it is overloaded, or lower the concurrency",
    "rubbish": "check that the address is that of an OpenAI-compatible endpoint",
    "client": "check the address",
}


def _action(fault: FaultError) -> str:
    if fault.status is not None:
        return _BY_STATUS.get(fault.status, "see the server's log")
    return _BY_REASON[fault.reason]
