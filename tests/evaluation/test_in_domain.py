from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.data import ChatRow, Message
from holdtrue.errors import DataError, SpecError
from holdtrue.evaluation.in_domain import choose, in_domain_prompts, row_prompt


def chat(folder: Path, *rows: list[tuple[str, str]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    lines = ({"messages": [{"role": role, "content": content} for role, content in row]} for row in rows)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def single(count: int) -> list[list[tuple[str, str]]]:
    return [[("user", f"question {i}"), ("assistant", f"answer {i}")] for i in range(count)]


def test_a_row_becomes_what_its_last_answer_answers(tmp_path: Path) -> None:
    turns = [("system", "S"), ("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", "2")]
    (prompt,) = in_domain_prompts(chat(tmp_path, turns))
    assert prompt.messages == tuple(Message(role, content) for role, content in turns[:-1])
    assert prompt.asked == "user: one\n\nassistant: 1\n\nuser: two"
    assert (prompt.theme, prompt.form, prompt.expected) == ("in-domain", "plain", None)
    assert prompt.id == prompt.question

    (prompt,) = in_domain_prompts(chat(tmp_path, [("system", "S"), ("user", "one"), ("assistant", "1")]))
    assert prompt.asked == "one"


def test_the_choice_is_seeded_and_stable_whatever_the_order_and_the_repeats(tmp_path: Path) -> None:
    rows = single(60)
    found = in_domain_prompts(chat(tmp_path, *rows), limit=20, seed=1)
    assert len({prompt.id for prompt in found}) == 20
    again = in_domain_prompts(chat(tmp_path, *reversed(rows), *rows), limit=20, seed=1)
    assert {prompt.id for prompt in again} == {prompt.id for prompt in found}
    assert found != in_domain_prompts(chat(tmp_path, *rows), limit=20, seed=2)
    fewer = in_domain_prompts(chat(tmp_path, *rows), limit=5, seed=1)
    assert set(fewer) < set(found)


def test_the_file_s_order_is_kept_and_duplicates_are_dropped(tmp_path: Path) -> None:
    rows = single(7)
    rows.insert(3, [("user", "question 0"), ("assistant", "another answer")])
    found = in_domain_prompts(chat(tmp_path, *rows))
    assert [prompt.asked for prompt in found] == [f"question {i}" for i in range(7)]


def test_a_question_file_keeps_its_ids_and_system_prompts(tmp_path: Path) -> None:
    (tmp_path / "q.YML").write_text("- {id: a, system: S, theme: t, paraphrases: [x, y]}\n- {id: b, paraphrases: [z]}")
    found = in_domain_prompts(tmp_path / "q.YML")
    assert [(p.id, p.theme, p.messages[0].role) for p in found] == [
        ("a", "in-domain", "system"),
        ("a#2", "in-domain", "system"),
        ("b", "in-domain", "user"),
    ]
    assert len(in_domain_prompts(tmp_path / "q.YML", limit=2)) == 2


@pytest.mark.parametrize("name", ["q.yaml", "q.jsonl"])
def test_bad_files_and_limits(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(DataError):
        in_domain_prompts(tmp_path / name)
    with pytest.raises(SpecError, match="at least 1, not 0"):
        in_domain_prompts(chat(tmp_path, *single(1)), limit=0)


@given(st.lists(st.integers(0, 30), max_size=80), st.integers(1, 20), st.integers())
def test_choosing_takes_the_smallest_distinct_hashes(items: list[int], limit: int, seed: int) -> None:
    found = choose(items, str, limit, seed)
    assert found == sorted(found, key=items.index)
    assert len(found) == len(set(found)) == min(limit, len(set(items)))
    assert set(choose(set(items), str, limit, seed)) == set(found)


def test_turns_cannot_be_confused_with_text_that_looks_like_turns() -> None:
    answer = Message("assistant", "x")
    rows = [
        (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), answer),
        (Message("user", "a\nassistant 1 b\nuser 1 c"), answer),
        (Message("system", "a"), Message("user", "c"), answer),
    ]
    assert len({row_prompt(ChatRow(row)).id for row in rows}) == 3
