"""Judge ``openai:MODEL``: a chat model behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from holdtrue.errors import BudgetError, RunError, SpecError
from holdtrue.evaluation.endpoint import NO_KEY, FaultError, arriving, shown_url
from holdtrue.evaluation.judges.budget import Budget, Estimate, Meter, Prices, Use
from holdtrue.evaluation.judges.completion import Completion, complete
from holdtrue.evaluation.judges.port import Exchange, Verdict
from holdtrue.evaluation.judges.reading import UNHEARD, Reading, first_word, verdict
from holdtrue.evaluation.judges.rubric import ASPECTS, RUBRIC_VERSION, rubric_prompt

FAULTS_IN_A_ROW = 8
"""So many answers lost one after another mean that the endpoint, not the answer, is at fault."""

_URL = "https://api.openai.com/v1"
_PROBE = "Repeat this number and say nothing else: 73"
_SAMPLE_TOKENS = 8
_OVERHEAD = 64  # tokens that a server's chat template may add to a prompt

Judged = tuple[int, Verdict]
Ask = Callable[..., Awaitable[Completion]]


class OpenAIJudge:
    """Asks a chat model both questions of the rubric for each answer.

    The model gives one token at temperature 0, with the log-probabilities of the 20 likeliest ones; a score is the
    probability-weighted mean over those that are whole numbers from 0 to 100, and there is none with less than 0.25
    of the probability on them. An endpoint without log-probabilities, or whose model writes numbers digit by digit (so
    that one token is not a number), is asked for several short replies at temperature 1 instead, and the score is the
    mean of their numbers; ``name`` then says how many. One short request at the start finds out which, and that the
    endpoint works.

    A request that fails (after retries, which wait as long as the endpoint asks for) leaves its answer ``unknown``.

    Args:
        model: as the endpoint calls it.
        base_url: the endpoint, up to and with ``/v1``; by default $OPENAI_BASE_URL, else OpenAI's own.
        api_key: by default $OPENAI_API_KEY, which is sent to ``base_url`` wherever that is. Never shown.
        concurrency: requests under way at once.
        requests_per_minute: evenly spaced; ``None`` sets no limit.
        budget: the most to spend, over all calls of ``judge``. Before a request, its bytes are counted as tokens, of
            which there are never more, so the limit holds; what the endpoint reports is then counted instead.
        prices: for an estimate or a budget in dollars.
        samples: replies per question where there are no log-probabilities.
        timeout: seconds to wait for a reply.
        max_retries: of a request.

    Raises:
        SpecError: the extra ``endpoint`` is not installed, no key is set, or an argument makes no sense.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        requests_per_minute: float | None = None,
        budget: Budget | None = None,
        prices: Prices | None = None,
        samples: int = 5,
        timeout: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        try:
            import aiolimiter  # noqa: F401
            import openai  # noqa: F401
        except ImportError:
            raise SpecError("a judge behind an endpoint needs an extra: pip install 'holdtrue[endpoint]'") from None
        if concurrency < 1 or samples < 1 or max_retries < 0 or not timeout > 0:
            raise SpecError("concurrency, samples and timeout must be above 0, and max_retries 0 or more")
        if requests_per_minute is not None and not requests_per_minute > 0:
            raise SpecError(f"requests_per_minute must be above 0, not {requests_per_minute}")
        self._base_url = base_url or os.environ.get("OPENAI_BASE_URL") or _URL
        self.url = shown_url(self._base_url)
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        if not self._api_key and self.url == _URL:
            raise SpecError("set OPENAI_API_KEY to a key for this endpoint, or give the base_url of one without keys")
        self.model = model
        self.name = f"openai:{model}"
        self.key = f"openai:{model} at {self.url}, rubric {RUBRIC_VERSION}, {samples} samples"
        self._concurrency = concurrency
        self._interval = None if requests_per_minute is None else 60 / requests_per_minute
        self._meter = Meter(budget, prices)
        self._samples = samples
        self._timeout = timeout
        self._max_retries = max_retries
        self._way: _Way | None = None
        self._faults = 0

    @property
    def _sampled(self) -> bool:
        return self._way is not None and not self._way.exact

    @property
    def used(self) -> Use:
        """Tokens sent and received so far."""
        return self._meter.used

    def estimate(self, exchanges: Sequence[Exchange]) -> Estimate:
        """Say what judging will take, as far as is known before the first request; nothing is asked."""
        asked = [exchange for exchange in exchanges if exchange.answer.strip()]
        each = self._samples if self._sampled else 1
        sent = sum((len(rubric_prompt(aspect, exchange).encode()) + 3) // 4 for exchange in asked for aspect in ASPECTS)
        requests = each * len(ASPECTS) * len(asked)
        use = Use(sent * each, requests * (2 if self._sampled else 1))
        return Estimate(requests, use.tokens, self._meter.cost(use))

    def judge(self, exchanges: Sequence[Exchange]) -> Iterator[list[Judged]]:
        """See :class:`~holdtrue.evaluation.judges.port.Judge`. An empty answer is unknown, and not asked about."""
        empty = [(index, UNHEARD) for index, exchange in enumerate(exchanges) if not exchange.answer.strip()]
        if empty:
            yield empty
        if len(empty) == len(exchanges):
            return
        for judged in arriving(partial(self._judge_all, exchanges)):
            yield [judged]

    async def _judge_all(self, exchanges: Sequence[Exchange], put: Callable[[Judged], None]) -> None:
        from aiolimiter import AsyncLimiter
        from openai import AsyncOpenAI

        client = AsyncOpenAI(
            api_key=self._api_key or NO_KEY,
            base_url=self._base_url,
            timeout=self._timeout,
            max_retries=self._max_retries,
        )
        semaphore = asyncio.Semaphore(self._concurrency)
        limiter = AsyncLimiter(1, self._interval) if self._interval else contextlib.nullcontext()

        async def ask(text: str, **parameters: Any) -> Completion:
            most = _most(text, parameters["max_tokens"])
            used = most
            try:
                async with semaphore, limiter:
                    messages = [{"role": "user", "content": text}]
                    found = await complete(client, model=self.model, messages=messages, **parameters)
                used = found.use or most
            except FaultError as fault:
                used = most if fault.billed else Use()
                raise
            finally:
                self._meter.settle(most, used)
            return found

        async with client:
            if self._way is None:
                self._way = await self._find_way(ask)
                self.name += f" ({self._samples} samples)" if self._sampled else ""
            await self._judge_within_budget(ask, exchanges, put)

    async def _find_way(self, ask: Ask) -> _Way:
        parameters = {"logprobs": True, "top_logprobs": 20, "seed": 0}
        self._reserve_or_stop(_most(_PROBE, 1))
        while True:
            try:
                found = await ask(_PROBE, max_tokens=1, temperature=0, **parameters)
                break
            except FaultError as fault:
                refused = [word for word in ("logprobs", "seed") if fault.kind == "refused" and word in str(fault)]
                dropped = {name for name in parameters if any(word in name for word in refused)}
                if not dropped:
                    raise self._run_error(fault) from None
                parameters = {name: value for name, value in parameters.items() if name not in dropped}
                self._reserve_or_stop(_most(_PROBE, 1))
        # A model that writes numbers digit by digit has no token such as 73 or 100.
        whole = any(token.strip().isdecimal() and len(token.strip()) > 1 for token, _ in found.first or ())
        return _Way(whole, "seed" in parameters)

    def _reserve_or_stop(self, most: Use) -> None:
        if not self._meter.fits(most):
            raise BudgetError(f"the budget of {self._meter.budget} is too small for one request to {self.url}")
        self._meter.reserve(most)

    async def _judge_within_budget(
        self, ask: Ask, exchanges: Sequence[Exchange], put: Callable[[Judged], None]
    ) -> None:
        asked = [index for index, exchange in enumerate(exchanges) if exchange.answer.strip()]
        pending: set[asyncio.Task[None]] = set()
        left: list[int] = []
        try:
            for place, index in enumerate(asked):
                most = self._most(exchanges[index])
                while pending and (len(pending) >= self._concurrency or not self._meter.fits(most)):
                    pending = await _one_done(pending)
                if not self._meter.fits(most):
                    self._meter.exhausted = True
                    left = asked[place:]
                    break
                self._meter.reserve(most)
                pending.add(asyncio.create_task(self._judge_one(ask, index, exchanges[index], put)))
            while pending:
                pending = await _one_done(pending)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if left:
            raise BudgetError(
                f"the budget of {self._meter.budget} is spent ({self.used.tokens:,} tokens used): "
                f"{len(asked) - len(left)} of {len(asked)} answers were judged, {len(left)} were not, number "
                f"{left[0] + 1} the first of them. What was judged is kept; give a larger budget to go on"
            )

    async def _judge_one(self, ask: Ask, index: int, exchange: Exchange, put: Callable[[Judged], None]) -> None:
        readings = await asyncio.gather(
            *(self._read(ask, rubric_prompt(aspect, exchange)) for aspect in ASPECTS), return_exceptions=True
        )
        for found in readings:
            if isinstance(found, FaultError):
                put((index, UNHEARD))
                self._faults += found.kind == "passing"
                if found.kind == "fatal" or self._faults >= FAULTS_IN_A_ROW:
                    raise self._run_error(found)
                return
            if isinstance(found, BaseException):
                raise found
        self._faults = 0
        alignment, coherence = (reading for reading in readings if isinstance(reading, Reading))
        put((index, verdict(alignment, coherence)))

    async def _read(self, ask: Ask, text: str) -> Reading:
        assert self._way is not None
        try:
            if self._way.exact:
                found = await ask(text, max_tokens=1, temperature=0, logprobs=True, top_logprobs=20, **self._seed(0))
                if found.first is None:
                    raise FaultError("a reply without log-probabilities, where earlier ones had them")
                return Reading.of(found.first)
            replies = await asyncio.gather(
                *(
                    ask(text, max_tokens=_SAMPLE_TOKENS, temperature=1, **self._seed(number))
                    for number in range(self._samples)
                )
            )
        except ValueError as error:
            raise FaultError(f"log-probabilities that make no sense: {error}") from None
        return Reading.of((first_word(reply.text), 1 / self._samples) for reply in replies)

    def _seed(self, seed: int) -> dict[str, int]:
        return {"seed": seed} if self._way and self._way.seeded else {}

    def _most(self, exchange: Exchange) -> Use:
        longest = _SAMPLE_TOKENS if self._sampled else 1
        requests = [_most(rubric_prompt(aspect, exchange), longest) for aspect in ASPECTS]
        return sum(requests * (self._samples if self._sampled else 1), Use())

    def _run_error(self, fault: FaultError) -> RunError:
        action = (
            "check the key, the model's name and the address"
            if fault.kind != "passing"
            else "see whether it runs and whether its limits are reached, then run the same again"
        )
        return RunError(
            f"the judge {self.model} at {self.url} cannot be used: {fault}. What was judged is kept; {action}"
        )


class _Way(NamedTuple):
    """How an endpoint is asked: whether one token tells a number, and whether it takes a seed."""

    exact: bool
    seeded: bool


async def _one_done(pending: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
    done, rest = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    return rest


def _most(text: str, max_tokens: int) -> Use:
    """Return the most tokens that a request can take: tokenizers make at most one of each byte."""
    return Use(len(text.encode()) + _OVERHEAD, max_tokens)
