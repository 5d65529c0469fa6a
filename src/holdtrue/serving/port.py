"""What an inference engine is asked and what it answers, whatever runs it. Plain values: no torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from holdtrue.errors import HoldtrueError

MOST_CHOICES = 8
MOST_STOPS = 4
MOST_TOP = 20


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AdapterRef(_Value):
    """An adapter by its immutable name.

    Attributes:
        digest: ``holdtrue.models.digest.tree_digest`` of its folder; checked before it is loaded.
        location: its key in the object store.
    """

    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    location: str


class Turn(_Value):
    """A message of a conversation."""

    role: str
    content: str


class ChatRequest(_Value):
    """A conversation to be gone on with.

    Attributes:
        tenant: whose it is; answers of two tenants are never computed in one batch.
        base: alias of the base model.
        adapter: on that base, or ``None`` for the base itself.
        messages: the conversation.
        max_tokens: of each answer; ``None`` leaves it to the engine.
        temperature: 0 takes the likeliest token.
        top_p: the share of probability that is sampled from, above 0 and up to 1.
        seed: of the first choice; each later one has a seed of its own, made of it.
        stop: texts at which an answer ends; they are not part of it.
        n: answers.
        top_logprobs: how many likeliest tokens to tell for each token; ``None``: no log-probabilities at all.
    """

    tenant: str
    base: str
    adapter: AdapterRef | None = None
    messages: tuple[Turn, ...]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=MOST_STOPS)
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None


class Likely(_Value):
    """A token and its log-probability in nats, before temperature."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Likely):
    """A token that was written, and the likeliest in its place."""

    top: list[Likely] = Field(default_factory=list)


class Piece(_Value):
    """A part of an answer.

    Attributes:
        choice: which answer.
        text: what comes next; may be empty.
        logprobs: of the tokens since the last piece.
        finish: ``stop`` or ``length`` with the last piece of a choice.
        prompt_tokens, completion_tokens: with the last piece of a choice.
    """

    choice: int
    text: str = ""
    logprobs: list[TokenLogprob] = Field(default_factory=list)
    finish: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class RequestError(HoldtrueError):
    """A request that cannot be answered as it is; ``param`` names what is wrong with it."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        self.param, self.code = param, code
        super().__init__(message)


class BusyError(HoldtrueError):
    """There is no room for another request now."""


class Engine(Protocol):
    """Answers requests."""

    def submit(self, request: ChatRequest) -> Stream:
        """Take a request.

        Raises:
            RequestError: the conversation does not fit the model.
            BusyError: too many wait already.
        """
        ...

    def close(self) -> None:
        """Stop."""


class Stream(Protocol):
    """The pieces of one request, as they come."""

    def __iter__(self) -> Iterator[Piece]:
        """Yield pieces; ends after the last choice's end."""
        ...

    def cancel(self) -> None:
        """Say that nobody reads any more."""


def error_body(error: HoldtrueError) -> dict[str, Any]:
    """Return an error as the inference process sends it."""
    return {
        "error": str(error),
        "param": getattr(error, "param", None),
        "code": getattr(error, "code", None),
        "kind": "request" if isinstance(error, RequestError) else "busy" if isinstance(error, BusyError) else "other",
    }
