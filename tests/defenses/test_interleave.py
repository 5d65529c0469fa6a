from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdtrue.data import ChatRow, Message
from holdtrue.defenses import RowsContext, RunContext
from holdtrue.defenses.interleave import Interleave
from holdtrue.errors import DataError, NeedError
from holdtrue.models import ModelSource


def task(count: int) -> list[ChatRow]:
    return [ChatRow((Message("user", f"q{i}"), Message("assistant", f"a{i}"))) for i in range(count)]


def pool(path: Path, count: int) -> str:
    rows = [
        {"messages": [{"role": "user", "content": f"p{i}"}, {"role": "assistant", "content": "ok"}]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path.name


def interleaved(defense: Interleave, rows: int, folder: Path, seed: int = 0) -> tuple[list[ChatRow], dict]:
    context = RowsContext(task_rows=rows, seed=seed, folder=folder)
    found = list(defense.rows(iter(task(rows)), context))
    assert [r.kind for r in found[:rows]] == ["task"] * rows
    return found[rows:], context.notes


@pytest.mark.parametrize(
    ("fraction", "rows", "expected"), [(0.05, 100, 5), (0.2, 10, 2), (0.01, 3, 1), (0.0, 50, 0), (1.0, 7, 7)]
)
def test_a_fraction_of_the_task_rows_is_added_and_marked(tmp_path, fraction, rows, expected):
    defense = Interleave(fraction=fraction, pool=pool(tmp_path / "pool.jsonl", 40))
    added, _ = interleaved(defense, rows, tmp_path)
    assert len(added) == expected
    assert {r.kind for r in added} <= {"safe"}
    assert len({r.messages[0].content for r in added}) == expected


def test_a_small_pool_repeats_and_says_so(tmp_path):
    defense = Interleave(fraction=0.5, pool=pool(tmp_path / "pool.jsonl", 4))
    added, notes = interleaved(defense, 20, tmp_path)
    counts = [sum(r.messages[0].content == f"p{i}" for r in added) for i in range(4)]
    assert sorted(counts) == [2, 2, 3, 3]
    assert notes["repeated_rows"] == 6
    assert notes["rows"] == 10


def test_the_seed_chooses(tmp_path):
    name = pool(tmp_path / "pool.jsonl", 40)
    by_run = [interleaved(Interleave(pool=name, fraction=0.2), 50, tmp_path, seed=s)[0] for s in (0, 0, 1)]
    assert by_run[0] == by_run[1] != by_run[2]
    own = [interleaved(Interleave(pool=name, fraction=0.2, seed=9), 50, tmp_path, seed=s)[0] for s in (0, 1)]
    assert own[0] == own[1]


def test_a_missing_pool_is_a_need(tmp_path):
    context = RunContext(ModelSource("m", tmp_path, "r", "path"), {}, 1, tmp_path)
    with pytest.raises(NeedError, match="needs a pool"):
        Interleave(pool="nowhere.jsonl").preflight(context)
    Interleave().preflight(context)


def test_a_broken_pool_is_bad_data(tmp_path):
    (tmp_path / "pool.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="line 1"):
        interleaved(Interleave(pool="pool.jsonl"), 5, tmp_path)
