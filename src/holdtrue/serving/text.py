"""From tokens to text, as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from holdtrue.serving.port import Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


class TokenBytes:
    """The bytes that each token of a tokenizer stands for; control tokens stand for none.

    Byte-level vocabularies and those of sentencepiece with bytes are read exactly; of any other a token's bytes are
    those of its own decoding.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        added = tokenizer.added_tokens_decoder
        self._silent = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
        # The decoder's parts can be read from its representation alone.
        decoder = str(getattr(tokenizer, "backend_tokenizer", tokenizer).decoder)
        self._letters = {char: byte for byte, char in bytes_to_unicode().items()} if "ByteLevel" in decoder else None
        self._pieces = self._letters is None and "ByteFallback" in decoder
        self.strips_first = self._pieces and "Strip(" in decoder
        """Whether an answer's first space is the vocabulary's own and not the answer's."""

    def __call__(self, token_id: int) -> bytes:
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = b"" if token_id in self._silent else self._read(token_id)
        return found

    def _read(self, token_id: int) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(name, str):  # an id beyond the vocabulary: some models have more rows than tokens
            return b""
        if self._letters is not None:
            values = [self._letters.get(char) for char in name]
            return name.encode() if None in values else bytes(value for value in values if value is not None)
        if self._pieces:
            byte = _BYTE.fullmatch(name)
            return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()
        return str(self._tokenizer.decode([token_id])).encode("utf-8", "replace")


class Taken(NamedTuple):
    """What may be shown now: text, the tokens that began in it, and whether a stop string ended the answer."""

    text: str
    tokens: tuple[Token, ...]
    stopped: bool


class AnswerText:
    """The text of one answer while it is written.

    A character of several tokens is held back until it is whole, and text that may be the beginning of a stop string
    until that is decided. Bytes that are no character become U+FFFD, as in the decoding of the whole. Where two stop
    strings are there, the one that is whole first counts, however the text was cut into tokens.
    """

    def __init__(self, stops: Sequence[str] = (), *, strips_first: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        self._strip = strips_first
        self._held = ""
        self._shown = 0
        self._tokens: deque[tuple[int, int, Token]] = deque()

    def add(self, content: bytes, token: Token | None = None) -> Taken:
        """Take the next token: its bytes, and itself where it is to be given back with its text."""
        start = self._shown + len(self._held)
        text = self._decoder.decode(content)
        if self._strip and text:
            text, self._strip = text.removeprefix(" "), False
        self._held += text
        if token is not None:
            self._tokens.append((start, start + len(text), token))
        return self._take(final=False)

    def end(self) -> Taken:
        """Return what was held back; nothing more comes."""
        self._held += self._decoder.decode(b"", final=True)
        return self._take(final=True)

    def _take(self, *, final: bool) -> Taken:
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._show(min(found)[1], stopped=True)
        return self._show(len(self._held) - (0 if final else self._kept()), stopped=False, final=final)

    def _kept(self) -> int:
        longest = min(len(self._held), max(map(len, self._stops), default=1) - 1)
        endings = (size for size in range(longest, 0, -1) if any(s.startswith(self._held[-size:]) for s in self._stops))
        return next(endings, 0)

    def _show(self, count: int, *, stopped: bool, final: bool = False) -> Taken:
        text, self._held = self._held[:count], self._held[count:]
        self._shown += count
        tokens: list[Token] = []
        while self._tokens and (final or self._tokens[0][0] < self._shown or self._tokens[0][1] <= self._shown):
            tokens.append(self._tokens.popleft()[2])
        return Taken(text, tuple(tokens), stopped)
