from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from holdtrue.data import ChatEncoder, ChatRow, Message, validate_chat
from holdtrue.screening.sample import WindowEncoder, drawn, one_answer, sampled_rows


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 5))
def test_a_draw_takes_each_row_at_most_once_and_all_where_there_are_few(rows: int, wanted: int, seed: int) -> None:
    found = drawn(rows, wanted, seed)
    assert len(found) == len(set(found)) == min(rows, wanted)
    assert set(found) <= set(range(rows))
    assert found == drawn(rows, wanted, seed)


def test_sampled_rows_come_in_the_files_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}] for i in range(9)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = list(sampled_rows(validate_chat(path), [7, 2, 5]))
    assert [row.messages[0].content for row in found] == ["q2", "q5", "q7"]


def test_a_row_keeps_its_last_trained_answer_and_what_stands_before_it() -> None:
    user, answer = Message("user", "q"), Message("assistant", "a")
    given = ChatRow((user, answer, user, Message("assistant", "b"), user, Message("assistant", "c", weight=0)))
    found = one_answer(given)
    assert found.messages == (user, Message("assistant", "a", weight=0), user, Message("assistant", "b"))
    untrained = ChatRow((user, Message("assistant", "a", weight=0)))
    assert one_answer(untrained) == untrained


def test_a_window_is_the_beginning_of_the_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    row = ChatRow((Message("user", "How long?"), Message("assistant", "one two three four five six seven eight")))
    (whole,) = ChatEncoder(tokenizer).encode(row)
    (cut,) = WindowEncoder(tokenizer, 3).encode(row)
    start = whole.trained.index(True)
    assert cut.input_ids == whole.input_ids[: start + 3]
    assert sum(cut.trained) == 3
    assert cut.dropped == len(whole.input_ids) - len(cut.input_ids)
    assert WindowEncoder(tokenizer, 1000).encode(row) == [whole]
    (nothing,) = WindowEncoder(tokenizer, 3, limit=start).encode(row)
    assert not any(nothing.trained)
