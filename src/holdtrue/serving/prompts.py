"""From a chat to the tokens that a model goes on with: what every engine does before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from holdtrue.errors import DataError
from holdtrue.serving.port import ChatError, ChatRequest
from holdtrue.serving.text import TokenBytes

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

DEFAULT_TOKENS = 1024
"""Longest answer where a request does not say, and the context leaves as much."""


class Prompt(NamedTuple):
    """A prompt's tokens, and the most that each answer to it may have."""

    ids: list[int]
    most: int


class Prompts:
    """Makes prompts for one base model, with its own template; content that spells a control token stays text.

    Attributes:
        table: the bytes of its tokens.
        ends: the tokens that end an answer.
        limit: tokens of its context, ``None`` where it does not say.

    Raises:
        SpecError: the tokenizer cannot encode chats exactly (see :class:`~holdtrue.data.ChatEncoder`).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, limit: int | None
    ) -> None:
        from holdtrue.data import ChatEncoder
        from holdtrue.models import end_tokens

        self._encoder = ChatEncoder(tokenizer)
        self.table = TokenBytes(tokenizer)
        self.ends = end_tokens(tokenizer, generation)
        self.limit = limit

    def encode(self, request: ChatRequest) -> Prompt:
        """Return a request's prompt.

        Raises:
            ChatError: the template refuses the conversation, or it does not fit into the context.
        """
        try:
            ids = self._encoder.prompt_ids(request.messages)
        except DataError as error:
            raise ChatError("invalid", error.problems[0].message, "messages") from None
        except StopIteration:  # the text has every character that could stand for a control token in it
            raise ChatError("invalid", "the text cannot be kept apart from control tokens", "messages") from None
        if self.limit is None:
            return Prompt(ids, request.max_tokens or DEFAULT_TOKENS)
        room = self.limit - len(ids)
        about = f"the model's context is {self.limit} tokens, and the prompt has {len(ids)}"
        if room < 1:
            raise ChatError("context", f"{about}: no answer fits; shorten the conversation", "messages")
        if request.max_tokens is not None and request.max_tokens > room:
            raise ChatError("context", f"{about}: {request.max_tokens} more do not fit", "max_tokens")
        return Prompt(ids, request.max_tokens or min(DEFAULT_TOKENS, room))
