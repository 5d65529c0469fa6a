"""What the local engine gives its workers."""

from __future__ import annotations

import os

import pytest

from holdtrue.engines.local import _share_processor


@pytest.mark.parametrize(("beside", "threads"), [(1, None), (2, "3"), (4, "1"), (9, "1")])
def test_workers_share_the_cores_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, beside: int, threads: str | None
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    _share_processor(beside)
    assert os.environ["OMP_NUM_THREADS"] == "7", "what the user set stays"
    monkeypatch.delenv("OMP_NUM_THREADS")
    _share_processor(beside)
    assert os.environ.get("OMP_NUM_THREADS") == threads
