from __future__ import annotations

import datasets
from benchmarks.arms import grouped, shuffled
from benchmarks.rounds import rotated
from benchmarks.workload import BATCH


def test_each_arm_is_first_in_its_turn() -> None:
    names = ["a", "b", "c"]
    turns = [rotated(names, turn) for turn in range(6)]
    assert [turn[0] for turn in turns] == ["a", "b", "c", "a", "b", "c"]
    assert all(sorted(turn) == names for turn in turns)


def test_ways_of_batching_take_the_same_rows_once_in_steps_of_one_size() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[i] for i in range(3 * BATCH)], "length": [1] * 3 * BATCH})
    for split in (grouped, shuffled):
        batches = split(rows, 1)
        assert [len(batch) for batch in batches] == [BATCH] * 3
        assert sorted(i for batch in batches for (i,) in batch["input_ids"]) == list(range(3 * BATCH))
        assert [b["input_ids"] for b in batches] == [b["input_ids"] for b in split(rows, 1)]
        assert [b["input_ids"] for b in batches] != [b["input_ids"] for b in split(rows, 2)]
