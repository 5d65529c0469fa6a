"""Rows that are encoded when they are read are the rows that would have been encoded at once."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdtrue.data import (
    ChatEncoder,
    ChatRow,
    Message,
    load_prepared,
    prepare_rows,
    read_chat,
    read_valid,
    validate_chat,
)
from holdtrue.data.late import TEXT, LateRows, from_text, to_text
from holdtrue.errors import DataError, RunError

LIMIT = 64
COLUMNS = ("input_ids", "trained", "kind", "ce")


def row(*contents: str, system: str = "", weights: tuple[int, ...] = (), **fields: Any) -> ChatRow:
    turns = [Message("system", system)] if system else []
    for i, text in enumerate(contents):
        turns.append(Message(("user", "assistant")[i % 2], text, weights[i // 2] if weights and i % 2 else 1))
    return ChatRow(tuple(turns), **fields)


WAITING = [
    row("One?", "First."),
    row("Two?", "Second, and rather longer. " * 12, kind="safe"),
    row("Q", "A", system="Be brief.", kind="pool", ce=False),
    row("Wie geht's?", "Schön, daß du fragst 🌿"),
    row("Three?", "4", "Sure?", "3", weights=(0, 1)),
]
ENCODED = [
    row("Three?", "4", "Sure?", "3"),
    row("Three?", "3", "Sure?", "Yes", weights=(1, 0)),
    row("Say <|im_end|>", "No."),
    row("Say it", "<|im_start|>system"),
    row("Long " * 40, "A", ce=False, kind="pool"),
]


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer, LIMIT)


def both(rows: list[ChatRow], encoder: ChatEncoder, folder: Path) -> tuple[Any, Any]:
    """Prepare the rows at once and late; return both, and check that the manifests agree."""
    at_once = prepare_rows(rows, encoder, folder / "now")
    late = prepare_rows(rows, encoder, folder / "late", late=len(rows))
    assert late.sampled_rows == late.late_rows, "few rows are all sampled, so that nothing is estimated"
    assert dataclasses.replace(late, late_rows=0, sampled_rows=0) == at_once
    assert json.loads((folder / "late" / "manifest.json").read_text())["late_rows"] == late.late_rows
    return load_prepared(folder / "now", encoder), load_prepared(folder / "late", encoder)


def test_the_same_rows_either_way(encoder: ChatEncoder, tmp_path: Path) -> None:
    now, late = both(WAITING + ENCODED, encoder, tmp_path)
    assert isinstance(late, LateRows)
    assert not isinstance(now, LateRows)
    assert len(late) == len(now) == 10
    for i in range(10):
        assert {key: late[i][key] for key in (*COLUMNS, "length")} == now[i]
    assert late["kind"].tolist() == now["kind"][:]
    assert late["ce"].tolist() == now["ce"][:]
    assert late.column_names == tuple(now.column_names)
    waits = [text is not None for text in late._table[TEXT]]
    assert waits == [True] * 5 + [False] * 5


def test_lengths_that_wait_are_about_right(tokenizer: Any, tmp_path: Path) -> None:
    words = [
        "a",
        "pipe",
        "that",
        "drips",
        "is",
        "closed",
        "at",
        "the",
        "valve",
        "before",
        "anything",
        "else",
        "happens",
    ]
    rows = [row(" ".join(words[: 3 + i % 9]), " ".join(words * (1 + i % 7))) for i in range(60)]
    now, late = both(rows, ChatEncoder(tokenizer, 512), tmp_path)
    exact = now["length"][:]
    assert max(abs(a - b) / b for a, b in zip(late["length"], exact, strict=True)) < 0.2


text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60).filter(lambda t: not t.isspace())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.tuples(text, text), min_size=1, max_size=3), weights=st.lists(st.booleans(), min_size=3))
def test_any_content(
    encoder: ChatEncoder, tmp_path: Path, contents: list[tuple[str, str]], weights: list[bool]
) -> None:
    kept = [int(weight) for weight in weights[: len(contents) - 1]] + [1]
    rows = [row(*[part for pair in contents for part in pair], weights=tuple(kept))]
    now, late = both(rows, encoder, tmp_path)
    assert len(late) == len(now)
    for i in range(len(now)):
        assert {key: late[i][key] for key in COLUMNS} == {key: now[i][key] for key in COLUMNS}


@given(contents=st.lists(st.tuples(text, text), min_size=1, max_size=3), line=st.integers(0, 10**9))
def test_text_gives_the_row_back(contents: list[tuple[str, str]], line: int) -> None:
    one = row(
        *[part for pair in contents for part in pair], source="some where.jsonl", line=line, kind="safe", ce=False
    )
    back = from_text(to_text(one).decode(), 1, False)
    assert back == one
    assert (back.source, back.line) == (one.source, line)


def test_estimates_are_from_a_sample_of_each_kind(encoder: ChatEncoder, tmp_path: Path) -> None:
    rows = [row(f"What is {i}?", "A number. " * (1 + i % 3)) for i in range(3000)]
    rows += [row(f"Who is {i}?", "Someone.", kind="safe") for i in range(7)]
    found = prepare_rows(rows, encoder, tmp_path / "out", late=3000)
    exact = prepare_rows(rows, encoder, tmp_path / "exact")
    assert (found.rows, found.sequences, found.late_rows) == (3007, 3007, 3007)
    assert 500 <= found.sampled_rows <= 503
    assert found.tokens == pytest.approx(exact.tokens, rel=0.03)
    assert found.trained_tokens == pytest.approx(exact.trained_tokens, rel=0.03)
    assert found.response_tokens == pytest.approx(exact.response_tokens, rel=0.03)
    assert found.by_kind["safe"].rows == 7
    assert found.by_kind["safe"].tokens == pytest.approx(exact.by_kind["safe"].tokens, rel=0.1)


def test_what_the_template_refuses_is_told_before_training(tokenizer: Any, tmp_path: Path) -> None:
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    rows = [row("Q", "A", source="rows.jsonl", line=i, system="Be brief." if i % 9 == 0 else "") for i in range(1, 100)]
    with pytest.raises(DataError, match=r"11 problems[^z]*no system role here"):
        prepare_rows(rows, ChatEncoder(refusing), tmp_path / "out", late=99)
    assert not (tmp_path / "out").exists()


def test_a_row_that_cannot_be_encoded_late_is_named(tokenizer: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    rows = [row(f"What is {i}?", "A number.", source="rows.jsonl", line=i + 1) for i in range(1200)]
    prepare_rows(rows, encoder, tmp_path / "out", late=1200)
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = "{% if '1001' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}" + (
        tokenizer.chat_template
    )
    late = load_prepared(tmp_path / "out", ChatEncoder(refusing))
    assert late[1000]["input_ids"]
    with pytest.raises(DataError, match=r"rows\.jsonl: 1 problem\n  line 1002, messages: .*not this"):
        late[1001]


def test_late_rows_need_an_encoder(encoder: ChatEncoder, tmp_path: Path) -> None:
    prepare_rows(WAITING, encoder, tmp_path / "out", late=5)
    with pytest.raises(RunError, match="only an encoder can read"):
        load_prepared(tmp_path / "out")


# A file read a second time


def lines(path: Path, count: int) -> Path:
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A: {}", "weight": 1}]
    path.write_text("\ufeff" + "".join(json.dumps({"messages": turns, "id": i}) + "\n\n" for i in range(count)))
    return path


def test_read_again_are_the_same_rows(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", 5)
    rows = list(read_valid(validate_chat(path)))
    assert rows == list(read_chat(path))
    assert [(one.source, one.line) for one in rows] == [(one.source, one.line) for one in read_chat(path)]


def test_keys_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    text = lines(tmp_path / "rows.jsonl", 3).read_text()
    deep = "[" * 400 + "]" * 400
    for value in ('"\\ud800"', deep, "1" * 400, "1e999"):
        path = tmp_path / "odd.jsonl"
        path.write_text(text.replace('"id": 1', f'"id": {value}'))
        assert list(read_valid(validate_chat(path))) == list(read_chat(path))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + text.splitlines()[0] + "\n",
        lambda text: text.replace("A: {}", "B: {}", 1),
        lambda text: text.replace('"A: {}"', "null", 1),
        lambda text: text.replace('"messages"', '"turns"', 1),
        lambda text: text[:-4],
        lambda text: "[]\n",
        lambda text: text.replace('"content"', '"text"'),
    ],
)
def test_a_file_that_changed_since_is_refused(tmp_path: Path, change: Any) -> None:
    path = lines(tmp_path / "rows.jsonl", 5)
    summary = validate_chat(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=r"rows\.jsonl: 1 problem\n  file: the file changed while it was read"):
        list(read_valid(summary))
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        list(read_valid(summary))
