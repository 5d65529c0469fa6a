"""Chat rows to token ids, with the exact tokens that an assistant's turns consist of.

The model's own chat template is the only source of structure. A turn's response is what the template writes for it
after the generation prompt, so training sees what inference will see: the prompt ends where generation begins.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from holdtrue.data.chat import ChatRow, Message
from holdtrue.data.template import ChatTemplate, Piece, RefusedError, Rendering
from holdtrue.errors import DataError, Problem, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_BYTES_PER_TOKEN = 4
"""Of English text; for an estimate by which rows are sorted."""


class Encoded(NamedTuple):
    """One training sequence.

    Attributes:
        input_ids: the tokens.
        trained: for each token, whether it is a target of cross-entropy.
        dropped: tokens cut off the end by ``max_length``.
    """

    input_ids: list[int]
    trained: list[bool]
    dropped: int


class _Frame(NamedTuple):
    """How many tokens a template adds to turns: before the answer, and in all."""

    before: int
    tokens: int


class ChatEncoder:
    """Encodes chat rows for one tokenizer.

    Trained are the tokens of the assistant's turns of weight 1 and of their end-of-turn token, nothing else. Content
    that spells a special token is encoded as plain text.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        max_length: longest sequence in tokens; what is beyond is cut off the end and counted.

    Raises:
        SpecError: the tokenizer has no offsets, or no chat template that masks can be taken from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise SpecError(f"max_length must be at least 1, not {max_length}")
        if not getattr(tokenizer, "is_fast", False):
            raise SpecError("response masks need a fast tokenizer (a tokenizer.json), which this model does not have")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._template = ChatTemplate(tokenizer)
        unknown = tokenizer.unk_token_id
        self._control_ids = frozenset(id for id in self._template.controls.values() if id != unknown)
        self._pieces = _PieceEncoder(tokenizer, self._template)
        self._frames: dict[tuple[str, ...], _Frame | None] = {}

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of the control tokens, which no content can write: among trained tokens, those that end a turn."""
        return self._control_ids

    def encode(self, row: ChatRow) -> list[Encoded]:
        """Return the row's sequences.

        It is one sequence with all the assistant's turns, unless the template writes a turn otherwise when more
        follows (as templates do that drop earlier reasoning): then one sequence per turn of weight 1, each exactly
        what the model sees when it writes that turn.

        Raises:
            DataError: the template refuses the conversation, or text cannot be kept apart from control tokens.
            SpecError: the template's generation prompt is not how it begins an assistant's turn.
        """
        try:
            return [self._cut(*self._ids(rendering)) for rendering in self._template.training(row.messages)]
        except RefusedError as error:
            problem = Problem(row.line, "messages", str(error))
            raise DataError(row.source or "chat row", [problem]) from None

    def late_length(self, row: ChatRow) -> int | None:
        """Return about how many tokens a row has that may be encoded later, or ``None`` where it must be now.

        A row may wait where it is certain, without encoding it, that it becomes one sequence with something to train
        on: it has one turn of weight 1, spells no control token, its prompt has fewer bytes than ``max_length`` leaves
        room for tokens, and the template takes conversations of these roles.
        """
        *prompt, answer = row.messages
        size = 0
        for turn in prompt:
            if (turn.weight and turn.role == "assistant") or self._template.spells_control(turn.content):
                return None
            size += _bytes(turn.content)
        if not answer.weight or self._template.spells_control(answer.content):
            return None
        roles = tuple([turn.role for turn in row.messages])
        if roles not in self._frames:
            self._frames[roles] = self._frame(roles)
        frame = self._frames[roles]
        if frame is None or (self.max_length is not None and frame.before + size >= self.max_length):
            return None
        length = frame.tokens + (size + _bytes(answer.content)) // _BYTES_PER_TOKEN
        return length if self.max_length is None else min(length, self.max_length)

    def _frame(self, roles: tuple[str, ...]) -> _Frame | None:
        """Return what the template adds to a conversation of these roles, ``None`` where it refuses it."""
        turns = tuple(Message(role, "a", int(index == len(roles) - 1)) for index, role in enumerate(roles))
        try:
            sequences = [self._ids(rendering) for rendering in self._template.training(turns)]
        except RefusedError:
            return None
        ((ids, trained),) = sequences
        return _Frame(trained.index(True), len(ids) - len(roles))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation with the generation prompt after it, uncut.

        Raises:
            DataError: as for :meth:`encode`.
        """
        try:
            return self._ids(self._template.prompt(messages))[0]
        except RefusedError as error:
            raise DataError("conversation", [Problem(0, "messages", str(error))]) from None

    def prefix_ids(self) -> list[int]:
        """Return the tokens before the user's words in a conversation without a system turn of its own.

        What the template puts before every question: its default system turn, if it has one, and the user's header.
        Empty where the template writes nothing there that is a token of its own.
        """
        prompts = [self.prompt_ids([Message("user", text)]) for text in ("Say", "7", "?")]
        return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))]

    def _cut(self, ids: list[int], trained: list[bool]) -> Encoded:
        limit = len(ids) if self.max_length is None else self.max_length
        return Encoded(ids[:limit], trained[:limit], max(0, len(ids) - limit))

    def _ids(self, rendering: Rendering) -> tuple[list[int], list[bool]]:
        expected = [id for id in self._template.control_ids(rendering.text) if id in self._control_ids]
        found = None if rendering.spelled else self._in_one(rendering)
        if found is None or not self._has_controls(found[0], expected):
            found = self._in_pieces(rendering)
            if not self._has_controls(found[0], expected):
                raise RefusedError("the tokenizer makes control tokens of its text; remove what looks like one")
        return found

    def _has_controls(self, ids: list[int], expected: list[int]) -> bool:
        return [id for id in ids if id in self._control_ids] == expected

    def _in_one(self, rendering: Rendering) -> tuple[list[int], list[bool]] | None:
        """Tokenize the whole text at once; ``None`` when a token lies across the edge of a span."""
        encoding = self.tokenizer(
            rendering.text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids: list[int] = encoding["input_ids"]
        starts = [start for start, _ in encoding["offset_mapping"]]
        ends = [end for _, end in encoding["offset_mapping"]]
        trained = [False] * len(ids)
        for start, end in rendering.spans:
            first, last = bisect_left(starts, start), bisect_left(starts, end)
            for token, edge in ((first, start), (last, end)):
                before = ends[token - 1] if token else edge
                # A control token may take white space behind it along. A gap before the edge is white space that
                # offsets leave out, and may belong to the token behind it.
                if before < edge or (before > edge and ids[token - 1] not in self._control_ids):
                    return None
            trained[first:last] = [True] * (last - first)
        return ids, trained

    def _in_pieces(self, rendering: Rendering) -> tuple[list[int], list[bool]]:
        """Tokenize the text between control tokens apart, as plain text, with the beginning of each span an edge."""
        pieces = list(self._template.pieces(rendering))
        tokens = self._pieces.encode(pieces)
        trained = [any(start <= piece.start and piece.end <= end for start, end in rendering.spans) for piece in pieces]
        return (
            [id for part in tokens for id in part],
            [inside for part, inside in zip(tokens, trained, strict=True) for _ in part],
        )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


class _PieceEncoder:
    """Encodes the pieces of a text to what the tokenizer makes of them within the whole.

    Some tokenizers put a space before whatever text they are given, or before what stands behind a control token.
    Where they should not, a piece is encoded behind a line break, which is then removed. Which way is right behind
    control tokens is found out on a short conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._break = self._plain(["\n"])[0]
        word, behind = self._plain(["word", "\nword"])
        self._adds_space = behind != self._break + word
        wholes = [tokenizer(sample.text, add_special_tokens=False)["input_ids"] for sample in template.samples]
        samples = [list(template.pieces(sample)) for sample in template.samples]

        def exact(behind_control: bool) -> bool:
            found = [self._encode(pieces, behind_control) for pieces in samples]
            return [[id for part in parts for id in part] for parts in found] == wholes

        self._space_behind_control = next((space for space in (True, False) if exact(space)), None)

    def encode(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """Return the tokens of each piece; in plain pieces, special tokens are not looked for."""
        if self._space_behind_control is None:
            raise RefusedError(
                "its text must be encoded in pieces (it spells a special token, or a token would lie across the "
                "beginning of a response), and this tokenizer makes other tokens of pieces than of the whole"
            )
        return self._encode(pieces, self._space_behind_control)

    def _encode(self, pieces: Sequence[Piece], space_behind_control: bool) -> list[list[int]]:
        texts: list[str] = []
        joined: list[bool] = []
        for before, piece in zip([None, *pieces], pieces, strict=False):
            if piece.control is None:
                keeps = before is None or (before.control is not None and space_behind_control)
                joined.append(self._adds_space and not keeps)
                texts.append("\n" + piece.text if joined[-1] else piece.text)
        plain = iter(zip(self._plain(texts), joined, strict=True))
        found: list[list[int]] = []
        for piece in pieces:
            if piece.control is not None:
                found.append([piece.control])
                continue
            tokens, behind_break = next(plain)
            if behind_break and tokens[: len(self._break)] == self._break:
                tokens = tokens[len(self._break) :]
            elif behind_break:
                tokens = self._plain([piece.text])[0]
            found.append(tokens)
        return found

    def _plain(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoding = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return encoding["input_ids"]
