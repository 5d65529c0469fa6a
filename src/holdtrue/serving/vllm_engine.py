"""The port on vLLM's asynchronous engine, for large models on GPUs.

Untried on a GPU: the project's tests run this code against a stand-in for the library.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import tempfile
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

from holdtrue.errors import HoldtrueError, SpecError
from holdtrue.models.digest import tree_digest
from holdtrue.serving.adapters import KEPT, Fetch, copy_folder
from holdtrue.serving.port import (
    AdapterRef,
    Candidate,
    ChatError,
    ChatRequest,
    Delta,
    Event,
    Started,
    Token,
    check_room,
)
from holdtrue.serving.prompts import Prompt, Prompts
from holdtrue.serving.sampling import seed_of
from holdtrue.serving.text import AnswerText

MOST_RANK = 64
"""Largest rank of an adapter: vLLM reserves room for it when it starts."""
logger = logging.getLogger("holdtrue.serving")


class Turnstile:
    """Lets requests of one lane in together, and those of another only when these have left; in order of arrival."""

    def __init__(self) -> None:
        self._lane: object = None
        self._inside = 0
        self._queue: deque[tuple[object, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def of(self, lane: object) -> AsyncIterator[None]:
        """Wait for the lane's turn, and be inside."""
        if self._inside and (self._lane != lane or self._queue):
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append((lane, waiting))
            try:
                await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled():
                    self._leave()  # let in at the same moment
                else:
                    with contextlib.suppress(ValueError):
                        self._queue.remove((lane, waiting))
                raise
        else:
            self._lane, self._inside = lane, self._inside + 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        self._inside -= 1
        while self._queue and not self._inside:  # those who wait may all have gone
            self._lane = self._queue[0][0]
            mine = [each for each in self._queue if each[0] == self._lane]
            self._queue = deque(each for each in self._queue if each[0] != self._lane)
            for _, waiting in mine:
                if not waiting.done():
                    self._inside += 1
                    waiting.set_result(None)


class _Loaded(NamedTuple):
    key: tuple[str, str | None]
    engine: Any
    prompts: Prompts
    revision: str


class VllmEngine:
    """Answers chats with vLLM, which takes the GPU; one base model, the first that is asked for. See the port.

    vLLM would batch different adapters together and keep what it read for later prompts: here it is given requests of
    one model and tenant at a time, and its prefix cache is off. Each request has its seed, but not the noise of the
    transformers engine: the two write different answers.

    Args:
        fetch: gets an adapter's folder from its location.
        place: where the files of loaded adapters lie; by default where the system has temporary ones.

    Raises:
        SpecError: the extra is not installed.
    """

    def __init__(self, fetch: Fetch = copy_folder, place: Path | None = None) -> None:
        try:
            import vllm  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SpecError("vLLM needs an extra, and a GPU: pip install 'holdtrue[vllm]'") from None
        self._fetch, self._place = fetch, place
        self._loaded: _Loaded | None = None
        self._loading, self._fetching = asyncio.Lock(), asyncio.Lock()
        self._turnstile = Turnstile()
        self._open: Counter[str] = Counter()
        self._loras: OrderedDict[str, tuple[Any, tempfile.TemporaryDirectory[str]]] = OrderedDict()
        self._numbers = 0

    def close(self) -> None:
        """Stop the engine's process."""
        if self._loaded is not None:
            self._loaded.engine.shutdown()
        for _, folder in self._loras.values():
            folder.cleanup()

    @contextlib.asynccontextmanager
    async def chat(self, request: ChatRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """Answer a request; see the port."""
        request.check()
        tenant = request.tenant
        check_room(self._open, tenant)
        self._open[tenant] += 1
        try:
            async with contextlib.aclosing(self._events(request)) as events:
                yield events
        finally:
            self._open[tenant] -= 1

    async def _events(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        try:
            loaded = await self._base(request)
            prompt = await asyncio.to_thread(loaded.prompts.encode, request)
            digest = request.adapter.digest if request.adapter else None
            async with self._turnstile.of((digest, request.tenant)):
                lora = await self._lora(loaded, request.adapter)
                yield Started(len(prompt.ids), loaded.revision, digest)
                async with contextlib.aclosing(_Answers(loaded, request, prompt, lora).deltas()) as deltas:
                    async for delta in deltas:
                        yield delta
        except ChatError:
            raise
        except HoldtrueError as error:
            raise ChatError("failed", str(error)) from error
        except Exception as error:
            logger.error("vLLM failed: %s", type(error).__name__)
            raise ChatError("failed", f"vLLM failed ({type(error).__name__})") from error

    async def _base(self, request: ChatRequest) -> _Loaded:
        key = (request.base, request.revision)
        async with self._loading:
            if self._loaded is None:
                self._loaded = await asyncio.to_thread(_load, *key)
        if self._loaded.key != key:
            raise ChatError("unavailable", f"this process serves {self._loaded.key[0]}, and vLLM one model only")
        return self._loaded

    async def _lora(self, loaded: _Loaded, ref: AdapterRef | None) -> Any:
        """Return vLLM's handle of an adapter; called by the lane inside, so that no other is in use."""
        if ref is None:
            return None
        async with self._fetching:
            if ref.digest not in self._loras:
                self._numbers += 1
                self._loras[ref.digest] = await asyncio.to_thread(self._fetched, ref, self._numbers)
            self._loras.move_to_end(ref.digest)
            while len(self._loras) > KEPT:
                _, (oldest, folder) = self._loras.popitem(last=False)
                await loaded.engine.remove_lora(oldest.lora_int_id)
                folder.cleanup()
            return self._loras[ref.digest][0]

    def _fetched(self, ref: AdapterRef, number: int) -> tuple[Any, tempfile.TemporaryDirectory[str]]:
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        from holdtrue.models.adapter_files import check_adapter_folder

        temporary = tempfile.TemporaryDirectory(prefix="holdtrue-adapter-", dir=self._place)
        folder = Path(temporary.name) / "adapter"
        try:
            self._fetch(ref.location, folder)
            if (found := tree_digest(folder)) != ref.digest:
                raise ChatError("adapter", f"the adapter {ref.digest} is not what was stored: its digest is {found}")
            config, _ = check_adapter_folder(folder)
            if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("r", 8) > MOST_RANK:
                raise ChatError("adapter", f"vLLM takes adapters of one rank up to {MOST_RANK}; {ref.digest} is none")
        except (HoldtrueError, OSError) as error:
            temporary.cleanup()
            if isinstance(error, ChatError):
                raise
            raise ChatError("adapter", f"the adapter {ref.digest} cannot be fetched: {error}") from error
        return LoRARequest(ref.digest, number, str(folder)), temporary


class _Answers:
    """The answers to one request, each a request of its own to vLLM, with its own seed."""

    def __init__(self, loaded: _Loaded, request: ChatRequest, prompt: Prompt, lora: Any) -> None:
        self._loaded, self._request, self._prompt, self._lora = loaded, request, prompt, lora
        self._seed = secrets.randbits(63) if request.seed is None else request.seed

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yield what is new in any of the answers until all have ended; closing this gives up what is left."""
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()

        async def write(choice: int) -> None:
            try:
                async with contextlib.aclosing(self._choice(choice)) as found:
                    async for delta in found:
                        queue.put_nowait(delta)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.create_task(write(choice)) for choice in range(self._request.n)]
        left = len(tasks)
        try:
            while left:
                found = await queue.get()
                if isinstance(found, Exception):
                    raise found
                left -= found.finish is not None
                yield found
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _choice(self, choice: int) -> AsyncGenerator[Delta, None]:
        table, ends = self._loaded.prompts.table, self._loaded.prompts.ends
        text, generated = AnswerText(self._request.stop, strips_first=table.strips_first), 0
        name = f"chat-{secrets.token_hex(12)}"
        outputs = self._loaded.engine.generate(
            {"prompt_token_ids": self._prompt.ids}, self._settings(choice), name, lora_request=self._lora
        )
        try:
            async for output in outputs:
                part = output.outputs[0]
                for place, token_id in enumerate(part.token_ids):
                    generated += 1
                    if token_id in ends:
                        break
                    token = self._token(token_id, part.logprobs[place]) if self._request.logprobs else None
                    taken = text.add(table(token_id), token)
                    if taken.stopped:
                        yield Delta(choice, taken.text, generated, taken.tokens, "stop")
                        return
                    if taken.text or taken.tokens:
                        yield Delta(choice, taken.text, generated, taken.tokens)
                if part.finish_reason is not None:
                    rest = text.end()
                    finish = "length" if part.finish_reason == "length" and not rest.stopped else "stop"
                    yield Delta(choice, rest.text, generated, rest.tokens, finish)
                    return
            raise ChatError("failed", "vLLM ended an answer without saying why")
        finally:
            await self._loaded.engine.abort(name)  # nothing happens to one that has ended

    def _settings(self, choice: int) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        request = self._request
        greedy = request.temperature == 0 or request.top_p == 0
        return SamplingParams(
            temperature=0.0 if greedy else request.temperature,
            top_p=1.0 if greedy else request.top_p,
            seed=seed_of(self._seed, choice) % 2**63,
            max_tokens=self._prompt.most,
            stop_token_ids=sorted(self._loaded.prompts.ends),
            logprobs=request.top_logprobs if request.logprobs else None,
            detokenize=False,  # stop strings and half characters are dealt with here
            output_kind=RequestOutputKind.DELTA,
        )

    def _token(self, token_id: int, found: Any) -> Token:
        table = self._loaded.prompts.table
        likeliest = sorted(found.items(), key=lambda pair: -pair[1].logprob)[: self._request.top_logprobs]
        top = tuple(Candidate(id, table(id), each.logprob) for id, each in likeliest)
        return Token(token_id, table(token_id), found[token_id].logprob, top)


def _load(name: str, revision: str | None) -> _Loaded:
    from vllm import AsyncEngineArgs, AsyncLLMEngine  # pyright: ignore[reportMissingImports]

    from holdtrue.models import generation_config, load_tokenizer, resolve

    source = resolve(name, revision)
    tokenizer = load_tokenizer(source)
    engine = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(
            model=str(source.path),
            trust_remote_code=False,
            seed=0,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=MOST_RANK,
            enable_prefix_caching=False,
            enable_log_requests=False,  # prompts are nobody's business
        )
    )
    prompts = Prompts(tokenizer, generation_config(source.path), engine.model_config.max_model_len)
    return _Loaded((name, revision), engine, prompts, source.revision)
