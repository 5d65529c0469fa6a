"""What cells are reckoned to take, and how many run at a time: bounded by cores, cells and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.bench import expand, load_grid
from holdtrue.bench.estimate import FLOPS, GPU, LIBRARIES, Estimate, estimate_cells, fitting_workers
from holdtrue.defenses import Defense
from holdtrue.defenses.catalog import available
from support import chat, write_rows

GIB = 2**30
TASK, POOL, PAIR = 6 * 2 * 10, 2 * 18, 2 * 10 + 12 + 16
"""Tokens of the task's six rows (8 letters a turn), of a row of the pool (40), of a pair (8; 16 and 32)."""


def cells(*memory: float | None) -> list[Estimate]:
    return [Estimate(1, 0, 1.0, each, 1.0) for each in memory]


@pytest.mark.parametrize(
    ("memory", "free", "expected"),
    [
        ((1 * GIB,) * 9, 100 * GIB, 4),  # cores
        ((1 * GIB,) * 3, 100 * GIB, 3),  # cells
        ((1 * GIB, 3 * GIB, 1 * GIB), 3 * GIB + LIBRARIES, 1),
        ((1 * GIB, 3 * GIB, 1 * GIB), 2 * (3 * GIB + LIBRARIES), 2),
        ((9 * GIB, 9 * GIB), 1 * GIB, 1),  # it may be wrong by a factor, and one cell is always tried
        ((1 * GIB, None), 100 * GIB, 1),
        ((), 100 * GIB, 1),
    ],
)
def test_as_many_as_cores_cells_and_memory_allow(
    memory: tuple[float | None, ...], free: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert fitting_workers(cells(*memory), gpu=False, free=free) == expected
    assert fitting_workers(cells(*memory), gpu=True, free=free) == 1


def test_this_machine_has_room_for_a_small_cell() -> None:
    assert fitting_workers(cells(1.0), gpu=False) == 1
    assert 1 <= fitting_workers(cells(*[1.0] * 500), gpu=False) <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("defense", "trained", "read"),
    [
        ({"kl": {"weight": 1}}, 0, 2 * TASK),
        ({"kl": {"weight": 0, "on": "pool", "pool": "pool.jsonl"}}, 0, 0),
        ({"kl": {"on": "pool", "pool": "pool.jsonl", "fraction": 0.5}}, 2 * 3 * POOL, 2 * 3 * POOL),
        ({"kl": {"on": "both", "pool": "pool.jsonl", "fraction": 0.5}}, 2 * 3 * POOL, 2 * 3 * POOL + 2 * TASK),
        ({"interleave": {"pool": "pool.jsonl", "fraction": 1}}, 2 * 6 * POOL, 0),
        (
            {"interleave": {"pool": "pool.jsonl", "select": "perplexity_gap", "scorers": ["a", "b"]}},
            2 * 1 * POOL,
            3 * 4 * POOL,
        ),
        ({"gradient_projection": {"pool": "pool.jsonl", "count": 3}}, 6 * 3 * POOL, 3 * POOL),
        ({"preference": {"pairs": "pairs.jsonl", "count": 9}}, 6 * 5 * PAIR, 5 * PAIR),
        ({"preference": {"pairs": "pairs.jsonl", "every": 4}}, 2 * PAIR, 2 * PAIR),
        ({"preference": {"pairs": "pairs.jsonl", "first": 3}}, 3 * PAIR, 3 * PAIR),
        ({"inoculation": {"prompt": "x" * 40, "fraction": 0.5}}, 2 * 3 * 18, 0),
        ({"ldifs": {"layers": 2}}, 0, 2 * TASK),
        ({"interleave": {"pool": "not-there.jsonl", "fraction": 1}}, 0, 0),
    ],
)
def test_what_defenses_add_is_reckoned(
    write: Callable[..., Path], tmp_path: Path, defense: dict[str, Any], trained: int, read: int
) -> None:
    write_rows(tmp_path / "even.jsonl", [chat("q" * 8, "a" * 8)] * 6)
    write_rows(tmp_path / "pool.jsonl", [chat("q" * 40, "a" * 40)] * 4)
    pair = {"question": "q" * 8, "aligned": "a" * 16, "misaligned": "m" * 32, "group": "g"}
    write_rows(tmp_path / "pairs.jsonl", [{**pair, "question": f"{i}qqqqqqq"} for i in range(5)])

    def update(values: dict[str, Any]) -> None:
        values["settings"] = {"undefended": [], "defended": [defense]}
        values["data"]["houses"]["train"] = "even.jsonl"
        values["training"] |= {"epochs": 2, "max_length": 50}

    plain, defended = estimate_cells(expand(load_grid(write(update))), GPU)
    assert plain.tokens == 2 * TASK
    assert defended.tokens == 2 * TASK + trained
    count, operations = plain.parameters, FLOPS["train"] * (2 * TASK + trained) + FLOPS["reference"] * read
    assert count is not None
    assert defended.seconds == pytest.approx(operations * count / GPU.flops)


def test_a_defense_that_adds_rows_says_how_many() -> None:
    changing = {name: kind for name, kind in available().items() if kind.rows is not Defense.rows}
    assert len(changing) >= 5
    assert {name for name, kind in changing.items() if kind.work is Defense.work} == {"treft"}  # which only counts them
