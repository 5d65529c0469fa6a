"""What a process had in hand when it was killed is gone once another begins, and what the living have stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from holdtrue.service.scratch import FOLDER, Scratch

from .jobs.test_faults import killed

VALIDATED = ("holdtrue.service.jobs.dispatcher:validate_chat", "after", 1)
HOLDS = """
import sys, time
from pathlib import Path
from holdtrue.service.scratch import Scratch

scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "rows").write_text("a customer's")
print(scratch.path, flush=True)
time.sleep(600)
"""


def rows_in(home: Path) -> list[str]:
    return sorted(path.name for path in (home / FOLDER).rglob("*") if path.is_file() and path.name != ".lock")


def test_rows_of_a_killed_dispatcher_go_when_another_begins(house, tmp_path, monkeypatch):
    outside = tmp_path / "system"
    outside.mkdir()
    monkeypatch.setenv("TMPDIR", str(outside))
    job_id = house.job()
    killed(house, "dispatcher", VALIDATED)
    assert rows_in(house.settings.home) == ["rows.jsonl"]
    assert list(outside.iterdir()) == []
    house.dispatch()
    assert house.get(job_id).status == "queued"
    assert rows_in(house.settings.home) == []


def test_a_living_process_keeps_what_it_has(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            theirs = Path(other.stdout.readline().strip())
            with Scratch(tmp_path) as mine:
                (mine / "mine").touch()
                with Scratch(tmp_path) as third:
                    assert len({theirs, mine, third}) == 3
                    assert rows_in(tmp_path) == ["mine", "rows"]
                assert not third.exists()
                assert (mine / "mine").exists()
        finally:
            os.kill(other.pid, signal.SIGKILL)
            other.wait()
    assert (theirs / "rows").exists()
    with Scratch(tmp_path):
        assert not theirs.exists()
    assert rows_in(tmp_path) == []
