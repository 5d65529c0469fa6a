from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from holdtrue.errors import RunError, SpecError
from holdtrue.runs import Run, load_spec
from holdtrue.runs.files import disk_errors, read_json, replace_folder, write_json


@pytest.fixture
def run(folder: Path) -> Run:
    return Run.create(folder / "out", load_spec(folder / "spec.yaml"))


def test_a_run_opens_again_with_the_same_spec(run: Run) -> None:
    assert Run(run.path).spec == run.spec
    assert Run.create(run.path, run.spec).path == run.path


def test_a_folder_with_another_spec_is_refused_and_says_what_differs(run: Run, folder: Path) -> None:
    other = load_spec(folder / "spec.yaml", ["training.seed=5"])
    with pytest.raises(SpecError, match=r"(?s)another spec.*training.seed: 0 there, 5 here"):
        Run.create(run.path, other)


def test_a_folder_of_something_else_is_refused(run: Run, folder: Path) -> None:
    with pytest.raises(SpecError, match="no run and not empty"):
        Run.create(folder, run.spec)
    with pytest.raises(SpecError, match="is a file"):
        Run.create(folder / "train.jsonl", run.spec)
    with pytest.raises(SpecError, match="is not a run"):
        Run(folder)
    with pytest.raises(SpecError, match=r"no such run \(did you mean 'out'\?\)"):
        Run(folder / "outt")


def test_a_damaged_spec_is_named(run: Run) -> None:
    (run.path / "spec.json").write_text("{")
    with pytest.raises(RunError, match=r"spec\.json is damaged"):
        Run(run.path)


def test_a_stage_counts_only_for_the_inputs_it_had(run: Run) -> None:
    assert not run.is_done("prepare")
    run.mark("prepare", inputs=run.inputs("prepare"), seconds=1.0, report={})
    run.mark("train", inputs=run.inputs("train"), seconds=1.0, report={})
    assert run.is_done("train")
    run.mark("prepare", inputs=run.inputs("prepare"), seconds=2.0, report={})
    assert run.is_done("prepare")
    assert not run.is_done("train")


def test_events_survive_a_line_that_was_cut_short(run: Run) -> None:
    run.record("one")
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"event": "tw')
    run.record("three")
    assert [event["event"] for event in run.events()] == ["one", "three"]


HOLD = "import sys; from holdtrue.runs import Run\nwith Run(sys.argv[1]).lock(): print('held', flush=True); input()"


def test_two_processes_cannot_work_on_one_run(run: Run) -> None:
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="another process is working"), run.lock():
            pass
        # The lock goes with its holder, however it dies.
        process.kill()
        process.wait(60)
        with run.lock():
            pass


def test_a_full_disk_leaves_the_old_file_and_says_how_to_go_on(run: Run, tmp_path: Path) -> None:
    (run.path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(RunError, match=r"(?s)disk is full.*holdtrue resume"), disk_errors(run.path):
        run.record("anything")


def test_a_full_disk_is_recognized_behind_another_error(run: Run) -> None:
    hidden = RunError("adapter: cannot be written")
    hidden.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RunError, match=r"(?s)disk is full: adapter: cannot be written.*resume"), disk_errors(run.path):
        raise hidden
    with pytest.raises(RunError, match=r"^diverged$"), disk_errors(run.path):
        raise RunError("diverged")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    replace_folder(target, lambda folder: (folder / "a").write_text("1"))

    def fail(folder: Path) -> None:
        (folder / "a").write_text("2")
        raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        replace_folder(target, fail)
    assert (target / "a").read_text() == "1"
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir() if "adapter" in p.name)) == '["adapter"]'
