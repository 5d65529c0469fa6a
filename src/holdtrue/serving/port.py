"""The port of inference: whatever can answer a chat with a base model and an adapter, token by token.

Three implement it: the transformers engine and vLLM in the process that holds the model, and the client in every other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from holdtrue.errors import HoldtrueError

if TYPE_CHECKING:
    from holdtrue.data import Message

TOP = 20
"""Most candidates that can be asked for beside each token."""
CHOICES = 16
"""Most answers to one request."""
STOPS = 4
"""Most stop strings."""
WAITING = 256
"""Requests under way and waiting, of all tenants; more are refused as ``busy``."""
WAITING_OF_TENANT = 64

Finish = Literal["stop", "length"]
Fault = Literal["invalid", "context", "adapter", "busy", "failed", "unavailable"]


class ChatError(HoldtrueError):
    """A chat that cannot be answered.

    Attributes:
        fault: ``invalid``: the request; ``context``: it is too long for the model; ``adapter``: the adapter is not
            there, or is not what its digest says; ``busy``: too much is asked at once; ``failed``: the model broke off;
            ``unavailable``: the inference process cannot be reached.
        param: the field of the request that it is about.
    """

    def __init__(self, fault: Fault, message: str, param: str | None = None) -> None:
        self.fault: Fault = fault
        self.param = param
        super().__init__(message)


def check_room(under_way: Counter[str], tenant: str) -> None:
    """Raise ``ChatError``, ``busy``, where a tenant may have no request more; ``under_way`` counts them by tenant."""
    if under_way[tenant] >= WAITING_OF_TENANT or under_way.total() >= WAITING:
        raise ChatError("busy", "too many chats are being answered or waiting; try again in some seconds")


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """An adapter: its content by ``digest`` (:func:`holdtrue.models.digest.tree_digest`), and where it lies.

    ``location`` is a key of the object store in a service, a folder elsewhere. The digest is what counts: whatever lies
    at the location is loaded only if it has that digest.
    """

    digest: str
    location: str


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat to be answered.

    Attributes:
        base: the base model, by the name that :func:`holdtrue.models.resolve` takes.
        adapter: what is put on it; ``None`` asks the base model itself.
        messages: the conversation.
        tenant: whoever asks; no two of them ever share a batch.
        revision: what the base model must be (``ModelSource.revision``); ``None`` takes the one that is there.
        max_tokens: longest answer in tokens, its end included; ``None`` leaves it to the engine.
        temperature: 0 takes the likeliest token each time; up to 2.
        top_p: only the likeliest tokens that together have this probability are drawn from; 0 to 1.
        seed: the same one gives the same answer; ``None`` draws one.
        stop: texts at which an answer ends; they are not part of it.
        n: answers to give.
        logprobs: whether each token comes with its log-probability under the model, before temperature and top_p.
        top_logprobs: how many of the likeliest tokens come with it.
    """

    base: str
    adapter: AdapterRef | None
    messages: tuple[Message, ...]
    tenant: str = ""
    revision: str | None = None
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0

    def check(self) -> None:
        """Raise ``ChatError`` for a value out of its range."""
        wrong = next((name for name, fine in self._rules() if not fine), None)
        if wrong is not None:
            raise ChatError("invalid", f"{wrong} is out of its range", wrong)

    def _rules(self) -> list[tuple[str, bool]]:
        return [
            ("messages", bool(self.messages)),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1),
            ("temperature", 0 <= self.temperature <= 2),
            ("top_p", 0 <= self.top_p <= 1),
            ("stop", len(self.stop) <= STOPS and all(self.stop)),
            ("n", 1 <= self.n <= CHOICES),
            ("top_logprobs", 0 <= self.top_logprobs <= TOP),
        ]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could come: the bytes that it stands for, and its log-probability in nats."""

    token_id: int
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A token that came, and the likeliest ones in its place."""

    token_id: int
    bytes: bytes
    logprob: float
    top: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The first event of a chat: what answers it, and the tokens of its prompt.

    ``revision`` pins the base model's weights; ``digest`` is that of the adapter that was loaded, ``None`` without one.
    """

    prompt_tokens: int
    revision: str
    digest: str | None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in one of the answers.

    Attributes:
        choice: which answer, from 0.
        text: what it goes on with; whole characters, without any part of a stop string.
        tokens: those that the text consists of, where log-probabilities were asked for.
        generated: tokens so far, its end and those of a stop string included.
        finish: why it ended; ``None`` while it goes on.
    """

    choice: int
    text: str
    generated: int
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None


Event = Started | Delta


class Inference(Protocol):
    """Answers chats."""

    def chat(self, request: ChatRequest) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Return the events of an answer: ``Started``, then ``Delta`` until each choice has finished.

        Leaving the context ends the work on it, whether it is done or not.

        Raises:
            ChatError: before ``Started`` or between two events.
        """
        ...
