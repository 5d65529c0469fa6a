"""How many cells run at a time: bounded by cores, cells and the largest cell's memory."""

from __future__ import annotations

import os

import pytest

from holdtrue.bench.estimate import LIBRARIES, Estimate, fitting_workers

GIB = 2**30


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
