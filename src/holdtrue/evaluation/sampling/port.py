"""The port of samplers: whatever can answer a list of chat prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from holdtrue.data import Message


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time; 1 samples from the model's own distribution.
        max_new_tokens: an answer that is longer is cut there.
    """

    temperature: float = 1.0
    max_new_tokens: int = 600

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2 or self.max_new_tokens < 1:
            raise ValueError("temperature must lie between 0 and 2, and max_new_tokens be at least 1")


class Request(NamedTuple):
    """A conversation that ends with a user turn, and the seed of its answer."""

    messages: tuple[Message, ...]
    seed: int


@dataclass(frozen=True, slots=True, order=True)
class Answer:
    """The answer to request number ``index``: its text, tokens (``None`` if unknown), and why it ended."""

    index: int
    text: str
    tokens: int | None
    finish: Literal["stop", "length"]


class Sampler(Protocol):
    """Answers requests.

    Attributes:
        name: what it is, for people and records, such as ``transformers`` or ``endpoint http://…``.
    """

    name: str

    def sample(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Answer]]:
        """Yield answers, some at a time as they are done, in any order, each request's once.

        A sampler that is stopped between two lists has lost nothing of those it yielded.

        Raises:
            RunError: it cannot go on (an endpoint that is down, a model that fails); what was yielded stays good.
        """
        ...
