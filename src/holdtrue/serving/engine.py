"""The engine on transformers and PEFT: one thread that gives every lane its turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import secrets
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdtrue.errors import HoldtrueError
from holdtrue.serving.adapters import Adapters, Fetch, copy_folder
from holdtrue.serving.lane import Lane, Ticket
from holdtrue.serving.port import ChatError, ChatRequest, Event, Started, check_room
from holdtrue.serving.prompts import Prompts
from holdtrue.serving.rows import bytes_per_token, check_architecture

if TYPE_CHECKING:
    from torch import nn


CACHE_BYTES = 2 * 2**30
"""Memory for keys and values where the device does not say how much it has free."""
_CACHE_SHARE = 0.6
_LOADERS = 4

BaseKey = tuple[str, str | None]
Key = tuple[BaseKey, str | None, str]
Emit = Callable[[Event | ChatError | None], None]
logger = logging.getLogger("holdtrue.serving")


@dataclass(frozen=True)
class _Base:
    """A base model with what turns texts into its tokens and back."""

    adapters: Adapters
    prompts: Prompts
    token_bytes: int
    budget: int


class TransformersEngine:
    """Answers chats in this process, with any number of adapters over a base model; see the port.

    A *lane* is one model (base or adapter) for one tenant. Within a lane answers are written together, a token of each
    at a time, and requests join and leave between two tokens. Lanes take turns. A batch, and the memory of what was
    read, is never shared by two lanes.

    The same model, messages, seed and settings give the same answer whoever else is there, up to the rounding of
    batched products (see :mod:`holdtrue.evaluation.sampling.gumbel`).

    Args:
        fetch: gets an adapter's folder from its location.
        threads: of torch; 0 leaves its default.
        place: where an adapter's files lie while it is loaded; by default where the system has temporary ones.
    """

    def __init__(self, fetch: Fetch = copy_folder, *, threads: int = 0, place: Path | None = None) -> None:
        self._fetch, self._place = fetch, place
        self._threads = threads
        self._bases: dict[BaseKey, Future[_Base]] = {}
        self._lanes: dict[Key, Lane] = {}
        self._turn: list[Key] = []
        self._blocked: Key | None = None
        self._tickets: set[Ticket] = set()
        self._guard = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loaders = ThreadPoolExecutor(_LOADERS, "holdtrue-load")
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="holdtrue-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; whoever still waits gets an error."""
        with self._guard:
            self._closed = True
        self._inbox.put(lambda: None)
        self._thread.join()
        stopped = ChatError("unavailable", "the engine has stopped")
        for base in self._bases.values():
            if not base.done():
                base.set_exception(stopped)
        self._loaders.shutdown(cancel_futures=True)
        for ticket in list(self._tickets):
            ticket.emit(stopped)

    def submit(self, request: ChatRequest, emit: Emit) -> Callable[[], None]:
        """Take a request; return what ends it early.

        ``emit`` is called from a thread of the engine's with each event, and at last with ``None`` or an error.

        Raises:
            ChatError: too many requests are under way, or a value is out of its range.
        """
        request.check()
        ticket = Ticket(request, secrets.randbits(63) if request.seed is None else request.seed)
        ticket.emit = partial(self._tell, ticket, emit)
        with self._guard:
            if self._closed:
                raise ChatError("unavailable", "the engine has stopped")
            tenants = Counter(each.request.tenant for each in self._tickets)
            check_room(tenants, request.tenant)
            self._tickets.add(ticket)
            self._loaders.submit(self._prepare, ticket)
        return partial(self._cancel, ticket)

    @contextlib.asynccontextmanager
    async def chat(self, request: ChatRequest) -> AsyncIterator[AsyncIterator[Event]]:
        """Answer a request; see the port."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | ChatError | None] = asyncio.Queue()

        def emit(event: Event | ChatError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        async def read() -> AsyncIterator[Event]:
            while (event := await events.get()) is not None:
                if isinstance(event, ChatError):
                    raise event
                yield event

        cancel = self.submit(request, emit)
        try:
            yield read()
        finally:
            cancel()

    @contextlib.contextmanager
    def answer(self, request: ChatRequest) -> Iterator[Iterator[Event]]:
        """Answer a request for somebody who has no event loop."""
        events: queue.SimpleQueue[Event | ChatError | None] = queue.SimpleQueue()

        def read() -> Iterator[Event]:
            while (event := events.get()) is not None:
                if isinstance(event, ChatError):
                    raise event
                yield event

        cancel = self.submit(request, events.put)
        try:
            yield read()
        finally:
            cancel()

    def _tell(self, ticket: Ticket, emit: Emit, event: Event | ChatError | None) -> None:
        if not isinstance(event, Event):
            with self._guard:
                if ticket not in self._tickets:
                    return  # it has had its end
                self._tickets.remove(ticket)
        emit(event)

    def _cancel(self, ticket: Ticket) -> None:
        ticket.gone.set()
        with self._guard:
            self._tickets.discard(ticket)
        self._inbox.put(lambda: None)

    # What follows up to the next line runs in the loaders' threads.

    def _prepare(self, ticket: Ticket) -> None:
        try:
            base = self._base((ticket.request.base, ticket.request.revision))
            ticket.prompt, ticket.most = base.prompts.encode(ticket.request)
            if ticket.request.n > 1 and ticket.request.n * ticket.length * base.token_bytes > base.budget:
                raise ChatError("invalid", "so many answers of this length need too much memory at once", "n")
            model = base.adapters.get(ticket.request.adapter)
            self._inbox.put(partial(self._enqueue, ticket, base, model))
        except ChatError as error:
            ticket.emit(error)
        except HoldtrueError as error:
            logger.error("a base model cannot be served: %s", type(error).__name__)
            ticket.emit(ChatError("failed", str(error)))
        except Exception as error:
            logger.exception("a chat could not be prepared")
            ticket.emit(ChatError("failed", f"the chat could not be prepared ({type(error).__name__})"))

    def _base(self, key: BaseKey) -> _Base:
        with self._guard:
            if self._closed:
                raise ChatError("unavailable", "the engine has stopped")
            found = self._bases.get(key)
            if found is None:
                found = self._bases[key] = Future()
                # In the engine's thread: libraries change what holds for all threads while they load weights.
                self._inbox.put(partial(_resolve, found, partial(self._load, *key)))
        try:
            return found.result()
        except HoldtrueError:
            with self._guard:
                if self._bases.get(key) is found:
                    del self._bases[key]  # the next request tries again
            raise

    def _load(self, name: str, revision: str | None) -> _Base:
        from holdtrue.models import causal_lm, load_tokenizer, resolve
        from holdtrue.scoring import position_limit

        source = resolve(name, revision)
        tokenizer = load_tokenizer(source)
        adapters = Adapters(source, self._fetch, self._place)
        model = adapters.load_base()
        lm: Any = causal_lm(model)
        check_architecture(lm)
        prompts = Prompts(tokenizer, lm.generation_config, position_limit(model))
        return _Base(adapters, prompts, bytes_per_token(lm), _budget(lm))

    # ---- What follows runs in the engine's thread, which alone touches lanes. ----

    def _run(self) -> None:
        import torch

        if self._threads:
            torch.set_num_threads(self._threads)
        while not self._closed:
            self._read_inbox()  # outside: weights that are loaded in inference mode could not be used elsewhere
            with torch.inference_mode():
                self._admit()
                self._give_turn()

    def _read_inbox(self) -> None:
        """Do what others ask of this thread; wait for it where there is nothing else to do."""
        while True:
            try:
                job = self._inbox.get(block=not self._lanes)
            except queue.Empty:
                return
            job()
            if self._closed:
                return

    def _enqueue(self, ticket: Ticket, base: _Base, model: nn.Module) -> None:
        from holdtrue.models import causal_lm

        if ticket.gone.is_set():
            return
        request = ticket.request
        key = ((request.base, request.revision), request.adapter.digest if request.adapter else None, request.tenant)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(model, causal_lm(model), base.prompts.table, base.prompts.ends)
            self._turn.append(key)
        lane.waiting.append(ticket)

    def _admit(self) -> None:
        """Let requests in, each lane's in order and the lanes in turn, as far as memory goes."""
        # One that did not fit comes first, or those that need less would overtake it for ever.
        for key in sorted(self._turn, key=lambda key: key != self._blocked):
            lane = self._lanes[key]
            while lane.waiting and lane.waiting[0].gone.is_set():
                lane.waiting.popleft()
            if not lane.waiting or not lane.takes(lane.waiting[0]):
                continue
            if not self._fits(key, lane.waiting[0]):
                self._blocked = key
                return
            self._blocked = None
            lane.start(ticket := lane.waiting.popleft())
            base, ref = self._bases[key[0]].result(), ticket.request.adapter
            ticket.emit(Started(len(ticket.prompt), base.adapters.source.revision, ref.digest if ref else None))

    def _fits(self, key: Key, ticket: Ticket) -> bool:
        base = self._bases[key[0]].result()
        others = sum(
            lane.size() * self._bases[other[0]].result().token_bytes
            for other, lane in self._lanes.items()
            if other != key
        )
        own = self._lanes[key].size(ticket) * base.token_bytes
        alone = others == 0 and not self._lanes[key].busy
        return alone or others + own <= base.budget

    def _give_turn(self) -> None:
        for _ in range(len(self._turn)):
            key = self._turn.pop(0)
            lane = self._lanes[key]
            if not lane.busy and not lane.waiting:
                del self._lanes[key]
                continue
            self._turn.append(key)
            if not lane.busy:
                continue
            try:
                lane.turn()
            except Exception as error:
                logger.error("a lane failed: %s", type(error).__name__, exc_info=True)
                lane.fail(ChatError("failed", f"the model failed while it answered ({type(error).__name__})"))
            return


def _resolve(future: Future[_Base], load: Callable[[], _Base]) -> None:
    try:
        future.set_result(load())
    except BaseException as error:
        future.set_exception(error)


def _budget(lm: Any) -> int:
    import torch

    device = lm.get_input_embeddings().weight.device
    if device.type != "cuda":
        return CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _CACHE_SHARE)
