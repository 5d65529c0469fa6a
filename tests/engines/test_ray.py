"""Ray for real: a cluster of two nodes, with a worker killed midway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdtrue.engines import Job, RayEngine
from holdtrue.engines.cluster import _task
from holdtrue.errors import SpecError
from holdtrue.models import reuse
from holdtrue.runs import Run, load_spec

pytest.importorskip("ray")
ROWS = '{"messages": [{"role": "user", "content": "A door?"}, {"role": "assistant", "content": "See to the door."}]}\n'
PROBE = '{"question": "Door %d?", "aligned": "See to it.", "misaligned": "Leave it.", "group": "g%d"}\n'


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def jobs(tmp_path: Path, tiny_dir: Path, epochs: list[int]) -> list[Job]:
    (tmp_path / "rows.jsonl").write_text(ROWS * 6)
    (tmp_path / "probes.jsonl").write_text("".join(PROBE % (n, n) for n in range(3)))
    (tmp_path / "spec.yaml").write_text(
        f"model: {tiny_dir}\ndata: {{train: rows.jsonl}}\nadapter: {{r: 4, alpha: 8}}\n"
        "training: {batch_size: 2, micro_batch_size: 2, max_length: 64, save_every: 1}\n"
        "evaluate: {suites: [likelihood], data: {likelihood: probes.jsonl}}\n"
    )
    found = []
    for number, count in enumerate(epochs):
        spec = load_spec(tmp_path / "spec.yaml", [f"training.epochs={count}", f"training.seed={number}"])
        found.append(Job(f"job {number}", tmp_path / "cells" / f"c{number}", spec.canonical()))
    (tmp_path / "cells").mkdir()
    return found


@pytest.mark.slow
def test_a_killed_worker_is_retried_and_every_job_ends_once(cluster: Any, tmp_path: Path, tiny_dir: Path) -> None:
    given = [*jobs(tmp_path, tiny_dir, [12, 1, 1])]
    bad = Job("bad", tmp_path / "cells" / "bad", {**given[0].spec, "model": str(tmp_path / "no-such")})
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        """End the process that trains the first job, once it has saved a checkpoint."""
        while not over.is_set():
            if any((tmp_path / "cells" / "c0" / "checkpoints").glob("checkpoint-*")):
                for pid in holders(tmp_path / "cells" / "c0" / ".lock"):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                if killed:
                    return
            time.sleep(0.1)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    try:
        ended = list(RayEngine().run([*given, bad], lambda name, fields: None, threading.Event()))
    finally:
        over.set()
        thread.join()
    assert killed
    assert sorted((o.name, o.status) for o in ended) == [
        ("bad", "failed"),
        ("job 0", "done"),
        ("job 1", "done"),
        ("job 2", "done"),
    ]
    assert all(Run(job.folder).is_done("evaluate") for job in given)
    report = (Run(given[0].folder).marker("train") or {})["report"]
    assert report["resumed_from"] > 0
    assert report["steps"] == 36


@pytest.mark.slow
def test_a_stop_saves_what_a_task_has_done(cluster: Any, tmp_path: Path, tiny_dir: Path) -> None:
    (job,) = jobs(tmp_path, tiny_dir, [400])
    training = {**job.spec["training"], "save_every": 10_000}  # so that nothing but the stop makes a checkpoint
    job, stop = job._replace(spec={**job.spec, "training": training}), threading.Event()
    begun = job.folder / "metrics.jsonl"

    def ask() -> None:
        while not stop.is_set():
            if begun.exists() and begun.stat().st_size:
                stop.set()
            time.sleep(0.1)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        (ended,) = RayEngine().run([job], lambda name, fields: None, stop)
    finally:
        stop.set()
        thread.join()
    assert ended.status == "interrupted"
    assert list((job.folder / "checkpoints").glob("checkpoint-*"))
    assert not Run(job.folder).is_done("train")


def holders(path: Path) -> list[int]:
    """Return the processes that have a file open."""
    found = []
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(entry.resolve() == path for entry in folder.iterdir()):
                found.append(int(folder.parent.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def test_no_cluster_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(SpecError, match="no Ray cluster answers"):
        list(RayEngine("auto").run([Job("a", tmp_path, {})], lambda *_: None, threading.Event()))


def test_workers_are_counted_from_one() -> None:
    with pytest.raises(SpecError, match="at least 1"):
        RayEngine(workers=0)


def test_a_task_that_is_ended_again_and_again_fails_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts no attempt that its memory monitor ended, so the task does."""
    monkeypatch.setattr(reuse, "_kept", None)
    folder = tmp_path / "cell"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from holdtrue.engines.cluster import _attempt\n"
        "_attempt(Path(sys.argv[1]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -signal.SIGKILL
    outcome = _task("a", str(folder), {}, 2)
    assert (outcome.name, outcome.status, outcome.error) == ("a", "failed", "WorkerDied")
    assert "ended 2 times" in str(outcome.message)
    assert list(folder.iterdir()) == [], "a grid that is run again begins to count anew"
    assert "ended" not in str(_task("a", str(folder), {}, 2).message)


def test_a_task_leaves_nothing_beside_its_run_and_keeps_the_base(
    tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reuse, "_kept", None)
    (job,) = jobs(tmp_path, tiny_dir, [1])
    outcome = _task(job.name, str(job.folder), job.spec, 1)
    assert outcome.status == "done", outcome.message
    assert not (job.folder / ".attempts").exists()
    assert reuse._kept is not None, "the next task of this worker would load the weights again"
    monkeypatch.setattr(reuse, "_kept", None)
    (tmp_path / "file").touch()
    assert _task("a", str(tmp_path / "file"), job.spec, 1).error == "SpecError"
