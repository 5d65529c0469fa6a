from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdtrue.data import KINDS, ChatRow, Message, read_chat, validate_chat
from holdtrue.data.chat import parse_messages
from holdtrue.errors import DataError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_reads_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"id": 7, "messages": [SYSTEM, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1, "name": "x"}]},
        {"messages": [USER, ANSWER], "notice": "canary", "tools": []},
    )
    first, second = read_chat(path, kind="safe")
    assert first.messages == (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", "a", 0),
        Message("user", "q"),
        Message("assistant", "a", 1),
    )
    assert second == ChatRow((Message("user", "q"), Message("assistant", "a")), kind="safe")
    assert (first.ce, first.line, second.line, second.source) == (True, 1, 2, str(path))
    assert KINDS == {"task": 0, "safe": 1, "pool": 2, "aside": 3, "pair": 4}


def test_summary(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl", {"messages": [USER, {**ANSWER, "content": "é" * 9}]}, {"messages": [USER, ANSWER]}
    )
    summary = validate_chat(path)
    content = path.read_bytes()
    assert (summary.path, summary.rows, summary.turns, summary.max_chars) == (path, 2, 4, 10)
    assert (summary.bytes, summary.sha256) == (len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        ({}, "messages", "missing; the row has no keys"),
        ({"conversations": []}, "messages", "missing; the row has conversations"),
        ({"messages": "hi"}, "messages", "list of messages, not a string"),
        ({"messages": None}, "messages", "not null"),
        ({"messages": []}, "messages", "is empty"),
        ({"messages": ["hi"]}, "messages[0]", "must be an object, not a string"),
        ({"messages": [{"content": "q"}, ANSWER]}, "messages[0].role", "missing"),
        ({"messages": [{"role": "human", "content": "q"}, ANSWER]}, "messages[0].role", "did you mean 'user'"),
        ({"messages": [{"role": "User", "content": "q"}, ANSWER]}, "messages[0].role", "did you mean 'user'"),
        ({"messages": [{"role": "developer", "content": "q"}, USER, ANSWER]}, "messages[0].role", "mean 'system'"),
        ({"messages": [{"role": ["user"], "content": "q"}, ANSWER]}, "messages[0].role", "not a list"),
        ({"messages": [USER, ANSWER, {"role": "tool", "content": "q"}]}, "messages[2].role", "not supported yet"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "missing"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1].content", "empty"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "messages[1].content", "empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages[1].content", "not null"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "messages[0].content", "parts"),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "messages[0].content", "half of a character"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight", "0 or 1, not 2"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "messages[1].weight", "0 or 1, not True"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight", "0 or 1, not 0.5"),
        ({"messages": [USER, {**ANSWER, "weight": None}]}, "messages[1].weight", "not null"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "messages[0].weight", "only an assistant's"),
        ({"messages": [USER, {**ANSWER, "name": 3}]}, "messages[1].name", "must be a string"),
        ({"messages": [USER, {**ANSWER, "wieght": 1}]}, "messages[1].wieght", "did you mean 'weight'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": []}]}, "messages[1].tool_calls", "not supported yet"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            "messages[1].tool_calls",
            "not supported yet",
        ),
        ({"messages": [USER, ANSWER], "tools": [{}]}, "tools", "not supported yet"),
        ({"messages": [USER]}, "messages", "no assistant turn"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages", "all have weight 0"),
        ({"messages": [USER, ANSWER, SYSTEM]}, "messages[2].role", "only come first"),
        ({"messages": [ANSWER]}, "messages[0].role", "is assistant where user is due"),
        ({"messages": [USER, USER, ANSWER]}, "messages[1].role", "is user where assistant is due"),
        ({"messages": [USER, ANSWER, USER]}, "messages[2].role", "last turn must be the assistant's"),
    ],
)
def test_a_bad_row_is_one_problem(tmp_path: Path, record: dict[str, Any], field: str, message: str) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]}, record)
    with pytest.raises(DataError) as caught:
        validate_chat(path)
    (problem,) = caught.value.problems
    assert (problem.line, problem.field) == (2, field)
    assert message in problem.message
    assert f"{path}: 1 problem" in str(caught.value)


def test_all_faults_of_a_row_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"messages": [{"role": "x", "content": "", "weight": 3}, 5]})
    with pytest.raises(DataError) as caught:
        validate_chat(path)
    assert [problem.field for problem in caught.value.problems] == [
        "messages[0].role",
        "messages[0].content",
        "messages[0].weight",
        "messages[1]",
    ]


def test_a_row_of_many_faults_is_not_explained_to_its_end(tmp_path: Path) -> None:
    """Each unknown key and role is compared with the known ones: a crafted row would take minutes."""
    many = {f"key number {n}": 0 for n in range(100_000)}
    write(tmp_path / "keys.jsonl", {"messages": [USER | many, ANSWER]}, {"messages": [many] * 3})
    write(tmp_path / "role.jsonl", {"messages": [{"role": "user" * 10**6, "content": "a"}, ANSWER]})
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"key number": 1, "other": 2}]}\n' * 100_000)
    totals = []
    for name in ("keys", "role", "rows"):
        began = time.process_time()
        with pytest.raises(DataError) as caught:
            validate_chat(tmp_path / f"{name}.jsonl")
        assert time.process_time() - began < 3
        assert len(caught.value.problems) == min(50, caught.value.total)
        totals.append(caught.value.total)
    # Fifty are explained, four to a row in the last file, and each row after them is one.
    assert totals == [51, 1, 48 + 2 + 100_000 - 13]


def test_read_chat_refuses_a_kind_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind 'other'"):
        read_chat(tmp_path / "rows.jsonl", kind="other")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]) | JSON, "content": st.text(max_size=5) | JSON},
    optional={"weight": st.sampled_from([0, 1]) | JSON, "name": JSON, "tool_calls": JSON, "other": JSON},
)


@settings(max_examples=300, deadline=None)
@given(record=st.fixed_dictionaries({"messages": st.lists(MESSAGE | JSON, max_size=4) | JSON}))
def test_any_json_gives_valid_messages_or_problems(record: dict[str, Any]) -> None:
    found = parse_messages(record)
    if isinstance(found, list):
        assert found
        assert all(problem.field and problem.message for problem in found)
        return
    turns = [message.role for message in found if message.role != "system"]
    assert turns == ["user", "assistant"] * (len(turns) // 2)
    assert any(message.weight for message in found if message.role == "assistant")
    assert all(message.content.strip() for message in found)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    contents=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda s: not s.isspace()),
        min_size=2,
        max_size=6,
    ).filter(lambda items: len(items) % 2 == 0),
    escape=st.booleans(),
)
def test_valid_rows_come_back_as_written(tmp_path: Path, contents: list[str], escape: bool) -> None:
    messages = [{"role": ["user", "assistant"][i % 2], "content": text} for i, text in enumerate(contents)]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}, ensure_ascii=escape) + "\n", encoding="utf-8")
    (row,) = read_chat(path)
    assert [message.content for message in row.messages] == contents
