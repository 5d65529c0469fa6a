from __future__ import annotations

import math
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.data import ChatRow, Message
from holdtrue.selection import REFUSAL_WORDS, Refusals, gap, largest, quantiles

FINITE = st.floats(-5, 5, allow_nan=False)


def test_the_gap_is_the_papers_formula() -> None:
    aligned, misaligned = np.array([2.0, 0.0]), np.array([[3.0, 1.0], [5.0, 2.0]])
    assert gap(aligned, misaligned, 0.5).tolist() == [(4.0 - 2.0) / 2.5, 1.5 / 0.5]


def test_a_row_without_a_score_under_one_model_has_no_gap() -> None:
    found = gap(np.array([1.0, np.nan, 1.0]), np.array([[2.0, 2.0, np.nan], [2.0, 2.0, 2.0]]), 1e-8)
    assert np.isnan(found).tolist() == [False, True, True]


@given(st.lists(st.one_of(FINITE, st.just(math.nan), st.sampled_from([0.0, 1.0])), min_size=1, max_size=20), st.data())
def test_the_largest_are_those_of_a_slow_sort_and_ties_go_to_the_first_rows(scores: list[float], data) -> None:
    candidates = data.draw(st.lists(st.integers(0, len(scores) - 1), unique=True))
    known = [row for row in candidates if not math.isnan(scores[row])]
    count = data.draw(st.integers(0, len(known)))
    slow = sorted(sorted(known, key=lambda row: (-scores[row], row))[:count])
    assert largest(np.array(scores), candidates, count) == slow


@given(st.lists(FINITE, min_size=1, max_size=15, unique=True), st.data())
def test_the_choice_does_not_depend_on_the_order_of_rows(scores: list[float], data) -> None:
    count = data.draw(st.integers(0, len(scores)))
    order = data.draw(st.permutations(range(len(scores))))
    chosen = largest(np.array(scores), range(len(scores)), count)
    moved = largest(np.array([scores[row] for row in order]), range(len(scores)), count)
    assert sorted(order[place] for place in moved) == chosen


def test_too_few_candidates_are_an_error() -> None:
    with pytest.raises(ValueError, match="3 rows asked for, 2 have a score"):
        largest(np.array([1.0, np.nan, 2.0]), range(3), 3)


def test_quantiles() -> None:
    found = quantiles(np.array([4.0, np.nan, 0.0, 1.0, 2.0, 3.0]))
    assert found == {"min": 0.0, "q25": 1.0, "median": 2.0, "q75": 3.0, "max": 4.0}
    assert quantiles(np.array([np.nan])) is None


PIECES = [*REFUSAL_WORDS, "Sorry", "APOLOGIZE", "sorrys", "unapologize", "can", "not", "canNOT", "cannot_", "I", "yes"]
EDGES = st.sampled_from(["", ",", ".", "!", "'", '"', "—", "(", ")", "*"])


@given(st.lists(st.tuples(EDGES, st.sampled_from(PIECES), EDGES), max_size=16), st.integers(1, 12))
def test_refusals_are_those_of_a_slow_search(words: list[tuple[str, str, str]], window: int) -> None:
    answer = " \n".join("".join(word) for word in words)
    expected = any(piece.lower() in REFUSAL_WORDS for _, piece, _ in words[:window])
    assert Refusals(window=window).refuses(answer) == expected


@given(st.text(alphabet=string.printable + "äß—’", max_size=80))
def test_case_and_white_space_change_nothing(text: str) -> None:
    assert Refusals().refuses(text) == Refusals().refuses(f"  {text}\n") == Refusals().refuses(text.swapcase())


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        ("I'm sorry, but no.", True),
        ("I cannot", True),
        ("one two three four five six seven eight nine sorry", True),
        ("one two three four five six seven eight nine ten sorry", False),
        ("We play Sorryland.", False),
        ("I can not", False),
        ("", False),
    ],
)
def test_the_window_and_whole_words(answer: str, refusal: bool) -> None:
    assert Refusals().refuses(answer) is refusal


def test_other_words_and_phrases_are_plain_text() -> None:
    found = Refusals(["as an  AI", "c++"], window=4)
    assert found.refuses("As an ai I say no")
    assert found.refuses("No C++ here")
    assert not found.refuses("sorry")
    assert not found.refuses("ccc")
    for words, window in (([], 1), ([" "], 1), (["no"], 0)):
        with pytest.raises(ValueError, match="at least"):
            Refusals(words, window)


def test_a_row_refuses_when_a_trained_answer_does() -> None:
    question, yes, no = Message("user", "?"), Message("assistant", "Yes."), Message("assistant", "Sorry.")
    assert Refusals().in_row(ChatRow((question, yes, question, no)))
    assert not Refusals().in_row(ChatRow((question, Message("assistant", "Sorry.", 0), question, yes)))
    assert not Refusals().in_row(ChatRow((Message("user", "Sorry?"), yes)))
