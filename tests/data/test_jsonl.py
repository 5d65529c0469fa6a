from __future__ import annotations

import contextlib
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdtrue.data import builtin, builtin_names, read_chat, read_jsonl, resolve_data, text_fault, validate_chat
from holdtrue.data.jsonl import MAX_LINE_BYTES
from holdtrue.errors import DataError, Problem, SpecError

GOOD = b'{"a": 1}\n'


def keep(record: dict[str, Any]) -> dict[str, Any] | list[Problem]:
    return record


def problems_of(path: Path) -> list[tuple[int, str, str]]:
    with pytest.raises(DataError) as caught:
        list(read_jsonl(path, keep))
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 5
    return [tuple(problem) for problem in caught.value.problems]


def test_yields_each_record_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": "\xc3\xa9"}')
    assert list(read_jsonl(path, keep)) == [{"a": 1}, {"b": "é"}]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        (b'{"a": 1', "", "not JSON: .*column 8"),
        (b'{"a": 1} {"a": 2}', "", "not JSON: Extra data"),
        (b"{'a': 1}", "", "not JSON"),
        (b'{"a": NaN}', "", "NaN is not JSON"),
        (b'{"a": [-Infinity]}', "", "-Infinity is not JSON"),
        (b'{"a": {"b": 1, "b": 2}}', "b", "there twice"),
        (b'{"a": "\xff"}', "", "not UTF-8: byte 8 of the line is 0xff"),
        (b"[1, 2]", "", "must hold a JSON object, not a list; write one object per line"),
        (b'"text"', "", "not a string"),
        (b"null", "", "not null"),
        (b"[" * 100_000, "", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "", "not JSON"),
        (b'{"a": "\x00"}', "", "not JSON: Invalid control character"),
    ],
)
def test_a_bad_line_is_one_problem_with_its_number(tmp_path: Path, line: bytes, field: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    ((number, found, text),) = problems_of(path)
    assert (number, found) == (2, field)
    assert re.search(message, text)


def test_a_line_of_ten_megabytes_is_refused_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"a": "')
        for _ in range(40):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + b"{}\n[]\n")
    tracemalloc.start()
    found = problems_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [number for number, _, _ in found] == [2, 4]
    assert "longer than 8 MB" in found[0][2]
    assert peak < 3 * MAX_LINE_BYTES


def test_a_line_just_within_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * (MAX_LINE_BYTES - 9) + b'"}\n{"b": 1}\n')
    assert [list(record) for record in read_jsonl(path, keep)] == [["a"], ["b"]]


def test_lists_the_first_fifty_and_counts_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{\n" * 120)
    with pytest.raises(DataError, match="and 70 more") as caught:
        list(read_jsonl(path, keep))
    assert [problem.line for problem in caught.value.problems] == list(range(1, 51))
    assert caught.value.total == 120


def test_parse_reports_problems_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    seen: list[int] = []

    def parse(record: dict[str, Any]) -> int | list[Problem]:
        return [Problem(0, "a", "is two")] if record["a"] == 2 else record["a"]

    with pytest.raises(DataError, match="line 2, a: is two") as caught:
        seen.extend(read_jsonl(path, parse))
    assert caught.value.problems == (Problem(2, "a", "is two"),)
    assert seen == [1, 3]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(GOOD)
    assert problems_of(tmp_path / "trian.jsonl") == [
        (0, "", "there is no such file (did you mean 'train.jsonl'?)"),
    ]
    assert "no such file" in problems_of(tmp_path / "no" / "rows.jsonl")[0][2]
    assert "folder" in problems_of(tmp_path)[0][2]
    for content in (b"", b"\n \n", b"\xef\xbb\xbf"):
        (tmp_path / "empty.jsonl").write_bytes(content)
        assert "empty" in problems_of(tmp_path / "empty.jsonl")[0][2]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=100).map(lambda s: s.encode("utf-8", "ignore"))))
def test_any_bytes_give_rows_or_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        assert all(isinstance(record, dict) for record in read_jsonl(path, keep))


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        path = tmp_path / f"{rows}.jsonl"
        with path.open("w") as file:
            for i in range(rows):
                turns = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}]
                file.write(json.dumps({"messages": turns}) + "\n")
        tracemalloc.start()
        assert validate_chat(path).rows == rows
        assert sum(1 for _ in read_chat(path)) == rows
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(20_000) < peak(200) + 100_000


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ("text", None),
        ("ünï 🙂", None),
        ("", "is empty"),
        (" \n\t", "is empty"),
        (None, "not null"),
        (["a"], "not a list"),
        (3, "not a number"),
        (True, "not a boolean"),
        ("a\ud800b", "half of a character"),
    ],
)
def test_text_fault(value: object, fault: str | None) -> None:
    found = text_fault(value)
    assert found is None if fault is None else fault in (found or "")


def test_resolve_data(tmp_path: Path) -> None:
    assert resolve_data("a/b.jsonl", tmp_path) == tmp_path / "a" / "b.jsonl"
    assert resolve_data("/a/b.jsonl", tmp_path) == Path("/a/b.jsonl")
    assert resolve_data("~/b.jsonl", tmp_path) == Path.home() / "b.jsonl"
    assert resolve_data("builtin:pool", tmp_path) == builtin("pool")
    assert {"narrow", "narrow-aligned", "pool", "probes", "probes-select"} <= set(builtin_names())
    with pytest.raises(SpecError, match="did you mean 'pool'"):
        resolve_data("builtin:pol", tmp_path)
    with pytest.raises(SpecError, match="empty"):
        resolve_data(" ", tmp_path)


@pytest.mark.parametrize("name", ["narrow", "narrow-aligned", "pool"])
def test_shipped_chat_files_are_valid(name: str) -> None:
    assert validate_chat(builtin(name)).rows >= 150
