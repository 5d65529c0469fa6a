from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.data.batching import GHOST, Collator, WindowSampler, spread_evenly


def sampler(lengths, kinds=None, micro=4, ranks=1, rank=0, **kw):
    kw = {"batch_size": 16, **kw}
    return WindowSampler(lengths, kinds, micro_batch_size=micro, ranks=ranks, rank=rank, **kw)


lengths_of = st.lists(st.integers(1, 200), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, seed=st.integers(0, 99), ranks=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]))
def test_steps_hold_the_same_rows_however_they_are_split(lengths, seed, ranks, micro):
    whole = list(sampler(lengths, micro=16, seed=seed).batches())
    assert sorted(i for rows in whole for i in rows) == list(range(len(lengths)))
    parts = [list(sampler(lengths, micro=micro, ranks=ranks, rank=r, seed=seed)) for r in range(ranks)]
    expected = len(sampler(lengths, micro=micro, ranks=ranks, seed=seed))
    assert [len(p) for p in parts] == [expected] * ranks
    per_step = 16 // (micro * ranks)
    for step, rows in enumerate(whole):
        found = [i for p in parts for piece in p[step * per_step : (step + 1) * per_step] for i in piece]
        assert sorted(i for i in found if i != GHOST) == sorted(rows)
        assert all(len(piece) <= micro for p in parts for piece in p)


@settings(max_examples=60, deadline=None)
@given(
    task=st.integers(1, 60), riding=st.integers(0, 60), micro=st.sampled_from([1, 2, 4]), ranks=st.sampled_from([1, 2])
)
def test_pool_rows_ride_along_and_change_nothing_else(task, riding, micro, ranks):
    lengths = np.random.default_rng(3).integers(1, 50, task + riding)
    kinds = [0] * task + [2] * riding
    alone = list(sampler(lengths[:task], micro=16).batches())
    parts = [list(sampler(lengths, kinds, micro=micro, ranks=ranks, rank=r)) for r in range(ranks)]
    per_step = 16 // (micro * ranks)
    seen = []
    for step, rows in enumerate(alone):
        found = [i for p in parts for piece in p[step * per_step : (step + 1) * per_step] for i in piece if i != GHOST]
        assert sorted(i for i in found if i < task) == sorted(rows)
        others = [i for i in found if i >= task]
        assert abs(len(others) - riding / len(alone)) < 1
        seen += others
    assert sorted(seen) == list(range(task, task + riding))


def test_epochs_differ_and_repeat():
    s = sampler(np.random.default_rng(0).integers(10, 90, 100))
    first = list(s)
    s.set_epoch(1)
    assert list(s) != first
    s.set_epoch(0)
    assert list(s) == first


def test_other_kinds_are_spread():
    kinds = [0] * 950 + [1] * 50
    lengths = np.random.default_rng(1).integers(20, 90, 1000)
    flat = [kinds[i] for rows in sampler(lengths, kinds).batches() for i in rows]
    per_window = [sum(flat[i : i + 64]) for i in range(0, 960, 64)]
    assert max(per_window) - min(per_window) <= 1


def test_spread_evenly_keeps_both_orders():
    merged = spread_evenly(np.arange(10), np.array([100, 101])).tolist()
    assert [x for x in merged if x < 100] == list(range(10))
    assert merged.index(100) in (2, 3)
    assert merged.index(101) in (8, 9)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiple of micro_batch_size 4 x 3 processes"):
        sampler([1, 2], ranks=3)


def test_collator_pads_right_and_hides_ghosts():
    rows = [
        {"input_ids": [5, 6, 7], "trained": [False, True, True], "kind": 1, "ce": False},
        {"input_ids": [8], "labels": [8]},
        {"input_ids": [0], "ghost": True},
    ]
    batch = Collator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2], [2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100], [-100] * 3]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert batch["kind"].tolist() == [1, 0, 0]
    assert batch["ce"].tolist() == [False, True, True]
