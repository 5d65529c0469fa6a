"""Text as it comes: the same as the whole's decoding, cut at the first stop string, however tokens cut it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from holdtrue.serving.port import Token
from holdtrue.serving.text import AnswerText, TokenBytes
from support import small_tokenizer

SMALL = settings(max_examples=150, deadline=None, derandomize=True, database=None)
LETTERS = st.text(alphabet="abc é🙂\n日", max_size=30)
STOPS = st.lists(st.text(alphabet="abc é🙂", min_size=1, max_size=4), max_size=3)


def cut(content: bytes, places: Sequence[int]) -> list[bytes]:
    """Cut bytes at some places, in the middle of characters too."""
    edges = [0, *sorted(place % (len(content) + 1) for place in places), len(content)]
    return [content[a:b] for a, b in pairwise(edges)]


def write(parts: Sequence[bytes], stops: Sequence[str]) -> tuple[list[str], list[Token], bool]:
    text = AnswerText(stops)
    shown: list[str] = []
    tokens: list[Token] = []
    for number, part in enumerate(parts):
        taken = text.add(part, Token(number, part, 0.0))
        shown.append(taken.text)
        tokens += taken.tokens
        if taken.stopped:
            return shown, tokens, True
    taken = text.end()
    return [*shown, taken.text], [*tokens, *taken.tokens], taken.stopped


def until_stop(whole: str, stops: Sequence[str]) -> str | None:
    """The oracle: letter by letter, the first place at which some stop string is whole; the longest of those there."""
    for end in range(len(whole) + 1):
        ending = [stop for stop in stops if whole[:end].endswith(stop)]
        if ending:
            return whole[: end - max(map(len, ending))]
    return None


@SMALL
@given(LETTERS, STOPS, st.lists(st.integers(0, 200), max_size=20))
def test_the_text_does_not_depend_on_the_tokens(text: str, stops: list[str], places: list[int]):
    parts = cut(text.encode(), places)
    shown, _, stopped = write(parts, stops)
    expected = until_stop(text, stops)
    assert "".join(shown) == (text if expected is None else expected)
    assert stopped == (expected is not None)


@SMALL
@given(st.binary(max_size=30), st.lists(st.integers(0, 40), max_size=10))
def test_bytes_that_are_no_text_are_replaced_as_in_the_whole(content: bytes, places: list[int]):
    shown, tokens, _ = write(cut(content, places), ())
    assert "".join(shown) == content.decode("utf-8", "replace")
    assert b"".join(token.bytes for token in tokens) == content


@SMALL
@given(LETTERS, STOPS, st.lists(st.integers(0, 200), max_size=20))
def test_tokens_come_with_their_text(text: str, stops: list[str], places: list[int]):
    """Each token once, in order; those that lie wholly in a stop string never."""
    parts = cut(text.encode(), places)
    shown, tokens, _ = write(parts, stops)
    assert [token.token_id for token in tokens] == list(range(len(tokens)))
    said = "".join(shown).encode()
    assert b"".join(token.bytes for token in tokens).startswith(said)
    if tokens and not stops:
        assert len(tokens) == len(parts)


def test_nothing_that_may_be_a_stop_is_shown_early():
    text = AnswerText(["END"])
    assert [text.add(part).text for part in (b"a", b"E", b"N", b"x", b"EN")] == ["a", "", "", "ENx", ""]
    assert text.add(b"D").stopped


@SMALL
@given(LETTERS)
def test_a_byte_level_tokenizers_bytes(text: str):
    check_bytes(small_tokenizer(), text)


@SMALL
@given(st.text(max_size=20))
def test_the_shipped_tokenizers_bytes(tokenizer: PreTrainedTokenizerBase, text: str):
    check_bytes(tokenizer, text)


def check_bytes(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    table = TokenBytes(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = b"".join(table(id) for id in ids)
    assert found.decode("utf-8", "replace") == tokenizer.decode(ids, skip_special_tokens=True)


def test_control_tokens_are_silent_and_ids_beyond_the_vocabulary_too(tokenizer: PreTrainedTokenizerBase):
    table = TokenBytes(tokenizer)
    assert all(table(id) == b"" for id in tokenizer.all_special_ids)
    assert table(10**6) == b""


@pytest.fixture(scope="module")
def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of sentencepiece's kind: word pieces with a mark for spaces, and bytes for all else."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hi", "▁you", "ab", "é"]
    inner = Tokenizer(models.BPE({word: id for id, word in enumerate(words)}, [], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner)


PARTS = st.sampled_from([[257], [258], [259], [260], [261], *([1 + byte for byte in c.encode()] for c in "aé日🙂 \n")])


@SMALL
@given(st.lists(PARTS, min_size=1, max_size=8))
def test_word_pieces_with_bytes(pieces: PreTrainedTokenizerFast, parts: list[list[int]]):
    ids = [id for part in parts for id in part]
    table = TokenBytes(pieces)
    text = AnswerText(strips_first=table.strips_first)
    said = "".join(text.add(table(id)).text for id in ids) + text.end().text
    assert said == pieces.decode(ids, skip_special_tokens=True)
