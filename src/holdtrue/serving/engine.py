"""The default engine: one base model in this process, adapters over it, requests joining and leaving between tokens."""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from holdtrue.errors import DataError, HoldtrueError
from holdtrue.serving.batch import Batch, Row
from holdtrue.serving.port import AdapterRef, BusyError, ChatRequest, Piece, RequestError
from holdtrue.serving.text import TextStream

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = structlog.get_logger()
QUANTUM = 16
"""Tokens that one adapter's batch writes before the next one's turn."""
MOST_ROWS = 16
MOST_WAITING = 256
MOST_ADAPTERS = 8
DEFAULT_TOKENS = 1024

Fetch = Callable[[AdapterRef], Path]
Key = tuple[str, str | None]


class _Stream:
    """One request on its way."""

    def __init__(self, request: ChatRequest, prompt: list[int]) -> None:
        self.request, self.prompt = request, prompt
        self.cancelled = False
        self._pieces: queue.SimpleQueue[Piece | HoldtrueError] = queue.SimpleQueue()
        self._open = request.n

    def __iter__(self) -> Iterator[Piece]:
        left = self.request.n
        while left:
            piece = self._pieces.get()
            if isinstance(piece, HoldtrueError):
                raise piece
            left -= piece.finish is not None
            yield piece

    def cancel(self) -> None:
        self.cancelled = True
        self._pieces.put(BusyError("cancelled"))  # wakes a reader that waits

    def put(self, piece: Piece | HoldtrueError) -> None:
        self._pieces.put(piece)


class TransformersEngine:
    """Answers with transformers and PEFT, in a thread of its own.

    A batch holds requests of one tenant on one adapter: no other's tokens, keys or values are ever in the same tensor.
    Batches take turns. An answer depends on its own request alone, up to the rounding of batched products; sampling
    uses noise that is a function of seed, step and token, so that its mates do not shift it.

    Args:
        model: the base model, which is frozen here.
        tokenizer: its own, with a chat template.
        fetch: returns a local folder of an adapter, checked against its digest.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, fetch: Fetch) -> None:
        from holdtrue.data import ChatEncoder
        from holdtrue.scoring import position_limit

        self._base = model.eval().requires_grad_(False)
        self._peft: PeftModel | None = None
        self._tokenizer, self._fetch = tokenizer, fetch
        self._encoder = ChatEncoder(tokenizer)
        self._limit = position_limit(model) or 2**31
        self._ends = _end_tokens(model, tokenizer)
        self._adapters: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._arrivals: queue.SimpleQueue[_Stream | None] = queue.SimpleQueue()
        self._waiting: dict[Key, collections.deque[_Stream]] = {}
        self._batches: dict[Key, Batch] = {}
        self._turns: collections.deque[Key] = collections.deque()
        self._count = 0
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def submit(self, request: ChatRequest) -> _Stream:
        """Take a request; see the port."""
        from holdtrue.data import Message

        try:
            prompt = self._encoder.prompt_ids([Message(turn.role, turn.content) for turn in request.messages])
        except DataError as error:
            raise RequestError("; ".join(problem.message for problem in error.problems), "messages") from None
        wanted = request.max_tokens
        if len(prompt) + (wanted or 1) > self._limit:
            raise RequestError(
                f"This model's maximum context length is {self._limit} tokens. However, you requested "
                f"{len(prompt) + (wanted or 1)} tokens ({len(prompt)} in the messages, {wanted or 1} in the answer)",
                "messages" if len(prompt) >= self._limit else "max_tokens",
                "context_length_exceeded",
            )
        stream = _Stream(request, prompt)
        with self._lock:
            if self._closed or self._count >= MOST_WAITING:
                raise BusyError("the inference process has as many requests as it can hold; try again soon")
            self._count += 1
        self._arrivals.put(stream)
        return stream

    def close(self) -> None:
        """Stop; requests under way end with an error."""
        with self._lock:
            self._closed = True
        self._arrivals.put(None)
        self._thread.join()

    # The thread

    def _run(self) -> None:
        while self._receive(block=not self._turns):
            key = self._turns.popleft()
            try:
                self._turn(key)
            except Exception as error:
                log.exception("inference failed")
                self._fail(key, error)
            batch = self._batches.get(key)
            if self._waiting.get(key) or (batch is not None and batch.rows):
                if key not in self._turns:
                    self._turns.append(key)
            else:
                self._waiting.pop(key, None)
                self._batches.pop(key, None)
        for key in list(self._turns):
            self._fail(key, BusyError("the inference process is stopping"))

    def _receive(self, *, block: bool) -> bool:
        while True:
            try:
                stream = self._arrivals.get(block=block)
            except queue.Empty:
                return True
            if stream is None:
                return False
            adapter = stream.request.adapter
            key = (stream.request.tenant, None if adapter is None else adapter.digest)
            self._waiting.setdefault(key, collections.deque()).append(stream)
            if key not in self._turns:
                self._turns.append(key)
            block = False

    def _turn(self, key: Key) -> None:
        import torch

        waiting = self._waiting.setdefault(key, collections.deque())
        batch = self._batches.get(key)
        if batch is not None and batch.rows:
            first = batch.rows[0].owner.request
        elif waiting:
            first = waiting[0].request
        else:
            return
        with torch.inference_mode(), self._adapted(first.adapter) as lm:
            batch = self._batches.setdefault(key, Batch(lm, self._ends))
            for _ in range(QUANTUM):
                while waiting and len(batch.rows) + waiting[0].request.n <= max(MOST_ROWS, waiting[0].request.n):
                    self._join(batch, waiting[0])
                    waiting.popleft()  # not before: what fails in between is told to all who are under way or wait
                if not batch.rows:
                    return
                batch.step()
                self._leave(batch)
                self._receive_quietly()

    def _receive_quietly(self) -> None:
        """Let what has just arrived for the batch under way join it at the next token."""
        if not self._arrivals.empty() and not self._receive(block=False):
            self._arrivals.put(None)

    def _join(self, batch: Batch, stream: _Stream) -> None:
        if stream.cancelled:
            with self._lock:
                self._count -= 1
            return
        request = stream.request
        room = self._limit - len(stream.prompt)
        most = min(room, request.max_tokens or min(DEFAULT_TOKENS, room))
        rows = [
            Row(stream, choice, request, TextStream(self._tokenizer, request.stop), most, self._tokenizer)
            for choice in range(request.n)
        ]
        batch.join(stream.prompt, rows)
        self._leave(batch)

    def _leave(self, batch: Batch) -> None:
        for row in batch.rows:
            piece = row.take(len(row.owner.prompt))
            if piece is not None:
                row.owner.put(piece)
        gone = [row for row in batch.rows if row.finish is not None or row.owner.cancelled]
        if gone:
            for owner in {id(row.owner): row.owner for row in gone}.values():
                if not any(row.owner is owner and row not in gone for row in batch.rows):
                    with self._lock:
                        self._count -= 1
            batch.keep([i for i, row in enumerate(batch.rows) if row not in gone])

    def _fail(self, key: Key, error: Exception) -> None:
        told = error if isinstance(error, HoldtrueError) else BusyError("the inference process failed; try again")
        batch = self._batches.pop(key, None)
        owners = [row.owner for row in (batch.rows if batch else [])]
        for stream in {id(each): each for each in (*owners, *self._waiting.pop(key, ()))}.values():
            stream.put(told)
            with self._lock:
                self._count -= 1

    # Adapters

    def _adapted(self, adapter: AdapterRef | None) -> Any:
        from contextlib import nullcontext

        from holdtrue.models import causal_lm, without_adapter

        if adapter is None:
            return (
                _giving(without_adapter(self._peft), self._base) if self._peft is not None else nullcontext(self._base)
            )
        self._load(adapter)
        assert self._peft is not None
        self._peft.set_adapter(adapter.digest)
        self._peft.requires_grad_(False)
        return nullcontext(causal_lm(self._peft))

    def _load(self, adapter: AdapterRef) -> None:
        from holdtrue.models import load_adapter
        from holdtrue.models.adapter_files import check_adapter_folder

        if adapter.digest in self._adapters:
            self._adapters.move_to_end(adapter.digest)
            return
        folder = self._fetch(adapter)
        check_adapter_folder(folder)
        if self._peft is None:
            self._peft = load_adapter(self._base, folder, name=adapter.digest)
        else:
            self._peft.load_adapter(str(folder), adapter.digest, torch_device=str(self._base.device))
        self._peft.eval()
        self._adapters[adapter.digest] = None
        in_use = {digest for _, digest in self._batches}
        for digest in list(self._adapters):
            if len(self._adapters) > MOST_ADAPTERS and digest not in in_use and digest != adapter.digest:
                self._peft.delete_adapter(digest)
                del self._adapters[digest]


class _giving:  # noqa: N801 (a context manager that is used like a function)
    """Enter a context and give a value of one's own."""

    def __init__(self, inner: Any, value: Any) -> None:
        self._inner, self._value = inner, value

    def __enter__(self) -> Any:
        self._inner.__enter__()
        return self._value

    def __exit__(self, *found: Any) -> None:
        self._inner.__exit__(*found)


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    found = getattr(model.generation_config, "eos_token_id", None)
    ends = {found} if isinstance(found, int) else set(found or ())
    return frozenset(ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))
