from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from holdtrue.evaluation.sampling.text import answer_text

ANY = st.text(st.characters(categories=["L", "N", "Z", "Cs", "So", "Cc"]))


@given(ANY)
def test_any_text_can_be_written_as_utf8_afterwards(text: str) -> None:
    found = answer_text(text)
    assert found.encode("utf-8").decode("utf-8") == found
    assert answer_text(found) == found == found.strip()


@given(st.text())
def test_valid_text_only_loses_its_margins(text: str) -> None:
    assert answer_text(text) == text.strip()


def test_halves_of_a_pair() -> None:
    assert answer_text(" \ud83d\ude00 ") == "😀"
    assert answer_text("a\ud800b") == "a�b"
