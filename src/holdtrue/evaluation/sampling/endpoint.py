"""A sampler for models behind any OpenAI-compatible chat endpoint, whose replies are bytes from a stranger."""

from __future__ import annotations

import asyncio
import json
import os
import queue
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ValidationError

from holdtrue.errors import RunError, SpecError
from holdtrue.evaluation.judges.completion import shown_url
from holdtrue.evaluation.sampling.port import Answer, Decoding, Request
from holdtrue.evaluation.sampling.text import answer_text

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RETRIES = 5
"""Times that a request is sent again when it failed in a way that may pass: later each time, or as the server says."""

_SHOWN = 200


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
        from anyio.from_thread import start_blocking_portal

        if not requests:
            return
        done: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        # Its own thread and event loop, so that it works where a loop is running already, as in a notebook.
        with start_blocking_portal() as portal:
            future = portal.start_task_soon(self._sample_all, requests, decoding, done.put)
            future.add_done_callback(lambda _: done.put(None))
            try:
                while (answer := done.get()) is not None:
                    yield [answer]
                future.result()
            finally:
                future.cancel()

    async def _sample_all(self, requests: Sequence[Request], decoding: Decoding, put: Callable[[Answer], None]) -> None:
        from openai import AsyncOpenAI

        left = iter(enumerate(requests))
        faults: list[tuple[int, _FaultError]] = []

        async def work() -> None:
            for index, request in left:
                if faults:
                    return
                try:
                    put(await self._answer(client, index, request, decoding))
                except _FaultError as fault:
                    faults.append((index, fault))

        client = AsyncOpenAI(
            # Endpoints without keys ignore it, but the library wants one.
            api_key=self._api_key or "none",
            base_url=self._base_url,
            timeout=self._timeout,
            max_retries=RETRIES,
        )
        async with client:
            await asyncio.gather(*(work() for _ in range(min(self._concurrency, len(requests)))))
        if faults:
            index, fault = faults[0]
            what = fault.what.replace(self._api_key, "[key]") if self._api_key else fault.what
            raise RunError(
                f"{self.name}, model {self._model!a}, request {index + 1} of {len(requests)}: {what}. "
                f"Answers so far are kept; {fault.action}, then run the same again"
            )

    async def _answer(self, client: AsyncOpenAI, index: int, request: Request, decoding: Decoding) -> Answer:
        import openai

        messages: Any = [{"role": message.role, "content": message.content} for message in request.messages]
        try:
            response = await client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=messages,
                temperature=decoding.temperature,
                max_tokens=decoding.max_new_tokens,
                seed=request.seed % 2**63,
            )
            body = response.text
        except openai.APITimeoutError:
            raise _FaultError(
                f"no reply in {self._timeout:g} s", "see whether it is overloaded, or lower the concurrency"
            ) from None
        except openai.APIConnectionError as error:
            cause = _line(error.__cause__ or error)
            raise _FaultError(f"cannot connect: {cause}", "see whether it runs, and at this address") from None
        except openai.APIStatusError as error:
            action = _ACTIONS.get(error.status_code, "see the server's log")
            raise _FaultError(f"HTTP {error.status_code}: {_line(error.message)}", action) from None
        except (openai.OpenAIError, ValueError) as error:
            raise _FaultError(_line(error), "check the address") from None
        choice, tokens = _read(body)
        text = choice.message.content or ""
        return Answer(index, answer_text(text), tokens, "length" if choice.finish_reason == "length" else "stop")


_ACTIONS = {
    400: "see whether the prompt fits the model, and whether the server takes these settings",
    401: "check the key",
    403: "check the key",
    404: "check the model's name, and that the address ends where the server's API begins, often in /v1",
    429: "wait until its limits allow more, or lower the concurrency",
}


class _FaultError(Exception):
    def __init__(self, what: str, action: str) -> None:
        super().__init__(what)
        self.what, self.action = what, action


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


class _Read(NamedTuple):
    choice: _Choice
    tokens: int | None


def _read(body: str) -> _Read:
    action = "check that the address is that of an OpenAI-compatible endpoint"
    try:
        reply = _Reply.model_validate(json.loads(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        what = f"the reply is no chat completion ({where}: {first['msg']}): {_line(body)}"
        raise _FaultError(what, action) from None
    except (ValueError, RecursionError):
        raise _FaultError(f"the reply is not JSON: {_line(body) or 'it is empty'}", action) from None
    choice = reply.choices[0] if reply.choices else _Choice(message=_Message())
    return _Read(choice, reply.usage.completion_tokens if reply.usage else None)


def _line(text: object) -> str:
    line = "".join(char if char.isprintable() else " " for char in str(text)[: 10 * _SHOWN])
    return " ".join(line.split())[:_SHOWN]
