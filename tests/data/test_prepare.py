from __future__ import annotations

import copy
import dataclasses
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdtrue.data import ChatEncoder, ChatRow, Message, load_prepared, prepare_rows, read_chat
from holdtrue.errors import DataError, RunError


def row(question: str, answer: str, **fields: Any) -> ChatRow:
    return ChatRow((Message("user", question), Message("assistant", answer)), **fields)


ROWS = [
    row("One?", "First."),
    row("Two?", "Second, and longer.", kind="safe"),
    row("Three?", "3", kind="pool", ce=False),
]


@pytest.fixture(scope="session")
def encoder(tokenizer: Any) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def test_what_is_written_is_what_was_encoded(encoder: ChatEncoder, tmp_path: Path) -> None:
    prepared = prepare_rows(iter(ROWS), encoder, tmp_path / "data" / "train")
    dataset = load_prepared(tmp_path / "data" / "train")
    sequences = [encoder.encode(one)[0] for one in ROWS]
    assert [record["input_ids"] for record in dataset] == [one.input_ids for one in sequences]
    assert [record["trained"] for record in dataset] == [one.trained for one in sequences]
    assert dataset["kind"][:] == [0, 1, 2]
    assert dataset["ce"][:] == [True, True, False]
    assert dataset["length"][:] == [len(one.input_ids) for one in sequences]
    assert {name: str(feature) for name, feature in dataset.features.items()} == {
        "input_ids": "List(Value('int32'))",
        "trained": "List(Value('bool'))",
        "kind": "Value('int8')",
        "length": "Value('int32')",
        "ce": "Value('bool')",
    }
    assert dataset.cache_files, "the rows are in memory"

    assert (prepared.rows, prepared.sequences) == (3, 3)
    assert prepared.tokens == sum(dataset["length"][:])
    assert prepared.trained_tokens == sum(sum(one.trained) for one in sequences[:2])
    assert {kind: count.rows for kind, count in prepared.by_kind.items()} == {"task": 1, "safe": 1, "pool": 1}
    assert prepared.by_kind["pool"].trained_tokens == 0
    assert prepared.by_kind["pool"].response_tokens == sum(sequences[2].trained) > 0
    assert prepared.response_tokens == sum(sum(one.trained) for one in sequences)
    assert json.loads((tmp_path / "data" / "train" / "manifest.json").read_text()) == dataclasses.asdict(prepared)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["train"]


def test_truncation_is_counted(tokenizer: Any, encoder: ChatEncoder, tmp_path: Path) -> None:
    long = row("Q", "A long answer with more words than there is room for, and then some.")
    (whole,) = encoder.encode(long)
    start = whole.trained.index(True)
    beyond = row("Q " * 40, "A")
    (whole_beyond,) = encoder.encode(beyond)
    limit = start + 4
    rows = [long, beyond, dataclasses.replace(beyond, ce=False, kind="pool"), row("Q", "A")]
    prepared = prepare_rows(rows, ChatEncoder(tokenizer, limit), tmp_path / "out")
    assert (prepared.rows, prepared.sequences, prepared.rows_without_target) == (4, 3, 1)
    assert prepared.truncated_rows == 3
    assert prepared.dropped_tokens == len(whole.input_ids) + 2 * len(whole_beyond.input_ids) - 3 * limit
    assert load_prepared(tmp_path / "out")["length"][:2] == [limit, limit]


def test_a_row_of_several_sequences(tokenizer: Any, tmp_path: Path) -> None:
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + ('' if m['role'] == 'user' or loop.last else '(old) ')"
        " + m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    turns = (Message("user", "a"), Message("assistant", "A"))
    first, second = ChatEncoder(rewriting).encode(ChatRow(turns * 2))
    encoder = ChatEncoder(rewriting, max_length=len(first.input_ids))
    assert second.trained.index(True) > len(first.input_ids)
    prepared = prepare_rows([ChatRow(turns * 2)], encoder, tmp_path / "out")
    assert (prepared.rows, prepared.sequences, prepared.truncated_rows, prepared.rows_without_target) == (1, 1, 1, 0)


def test_replaces_what_was_there(encoder: ChatEncoder, tmp_path: Path) -> None:
    prepare_rows(ROWS, encoder, tmp_path / "out")
    prepare_rows(ROWS[:1], encoder, tmp_path / "out")
    assert len(load_prepared(tmp_path / "out")) == 1


def test_nothing_half_written_is_left(encoder: ChatEncoder, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant"}]}\n')
    with pytest.raises(DataError, match=r"line 1, messages\[1\].content"):
        prepare_rows(read_chat(tmp_path / "rows.jsonl"), encoder, tmp_path / "out")

    def interrupted() -> Iterator[ChatRow]:
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_rows(interrupted(), encoder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_that_cannot_be_encoded_are_listed(tokenizer: Any, tmp_path: Path) -> None:
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
        "{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    rows = [row("bad" if i % 2 else "good", "A", source="rows.jsonl", line=i + 1) for i in range(140)]
    with pytest.raises(DataError, match=r"rows\.jsonl: 70 problems") as caught:
        prepare_rows(rows, ChatEncoder(refusing), tmp_path / "out")
    assert [problem.line for problem in caught.value.problems] == list(range(2, 102, 2))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written(encoder: ChatEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        prepare_rows(ROWS, encoder, tmp_path / "file" / "out")


def test_damaged_or_missing_rows_are_named(encoder: ChatEncoder, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no prepared rows"):
        load_prepared(tmp_path / "out")
    prepare_rows(ROWS, encoder, tmp_path / "out")
    (tmp_path / "out" / "rows.arrow").write_bytes(b"not arrow")
    with pytest.raises(RunError, match="damaged"):
        load_prepared(tmp_path / "out")


def test_memory_does_not_grow_with_the_rows(encoder: ChatEncoder, tmp_path: Path) -> None:
    import pyarrow as pa

    def peak(count: int) -> int:
        tracemalloc.start()
        prepare_rows((ROWS[i % 3] for i in range(count)), encoder, tmp_path / str(count))
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(50)
    assert peak(900) < peak(300) + 300_000
    assert pa.total_allocated_bytes() < 2**20
