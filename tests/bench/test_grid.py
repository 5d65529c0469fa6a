"""Whole grids on the tiny model: filled, killed, changed, failing, contended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.bench import expand, fill, load_grid, look, summarize, write_results
from holdtrue.bench.grid import lock
from holdtrue.bench.pick import shift_undone
from holdtrue.bench.tables import headings
from holdtrue.cli.main import main
from holdtrue.engines import LocalEngine
from holdtrue.errors import Interrupted, RunError, SpecError
from holdtrue.runs import Run
from holdtrue.runs.tasks import sha256_of
from support import write_rows

Write = Callable[..., Path]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(path: Path, out: Path) -> tuple[int, dict[str, Any]]:
    code = main(["bench", str(path), "--out", str(out), "--workers", "1", "--json"])
    return code, json.loads((out / "grid.json").read_text())


def trained(out: Path) -> dict[str, int]:
    """When each cell was trained, by its folder."""
    return {path.parent.parent.name: path.stat().st_mtime_ns for path in out.glob("cells/*/stages/train.json")}


def test_each_file_of_a_suite_has_a_column_and_the_first_decides(write: Write, tmp_path: Path) -> None:
    write()
    lines = (tmp_path / "probes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "four.jsonl").write_text("".join(lines[:4]))
    # Records lie by the hashes of their files: the spec has them the other way round.
    files = sorted(("four.jsonl", "probes.jsonl"), key=lambda n: sha256_of(tmp_path / n), reverse=True)
    out = tmp_path / "out"

    def several(values: dict[str, Any]) -> None:
        values["evaluate"]["data"]["likelihood"] = files
        values["bounds"] = {"benign_kept": None, "narrow_kept": None, "cost": None}

    code, index = run(write(several), out)
    assert code == 0
    grid = load_grid(tmp_path / "grid.yaml")
    (table,) = summarize(look(grid, expand(grid), out))
    assert headings(table)[:2] == [f"margin, {Path(name).stem}" for name in files]
    cells = [Run(out / cell["folder"]) for cell in index["cells"]]
    by_file = {
        name: [cell.evaluation("likelihood", "tuned", sha256_of(tmp_path / name)) for cell in cells] for name in files
    }
    assert {record["n"] for record in by_file["four.jsonl"] if record} == {4}
    changes = [record["change"]["margin_change"] for record in by_file[files[0]] if record]
    base, defended = table.groups
    assert [group.entry("likelihood", "margin").change.value for group in (base, defended)] == pytest.approx(changes)
    ratio = shift_undone(defended, base, "margin").value
    assert ratio is not None
    assert ratio.value == pytest.approx(1 - changes[1] / changes[0])


def test_cells_share_what_the_reference_computed(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(tmp_path / "cache"))

    def sweep(values: dict[str, Any]) -> None:
        values["settings"] = {"kl": {"defenses": ["kl"], "strengths": {"kl.weight": [0.1, 1, 10]}}}
        values["training"] |= {"reference_cache": 0.1, "kl_every": 0}

    code, index = run(write(sweep), tmp_path / "out")
    assert code == 0
    stats = [
        (Run(tmp_path / "out" / cell["folder"]).marker("train") or {})["report"]["reference_cache"]
        for cell in index["cells"]
    ]
    assert stats[0]["misses"] > 0
    assert [each["misses"] for each in stats[1:]] == [0, 0]
    assert stats[1]["hits"] == stats[2]["hits"] >= stats[0]["misses"]


def test_a_grid_is_filled_and_a_changed_one_runs_only_what_changed(
    write: Write, tmp_path: Path, capfd: Capture
) -> None:
    out = tmp_path / "out"
    code, index = run(write(lambda v: v.update(bounds={"benign_kept": None})), out)
    assert code == 0
    document = json.loads(capfd.readouterr().out)
    assert document["counts"] == {"done": 2}
    assert document["picks"][0]["text"].startswith("tiny: ")
    assert [cell["status"] for cell in index["cells"]] == ["done", "done"]
    assert all(Run(out / cell["folder"]).is_done("evaluate") for cell in index["cells"])
    # The second cell takes the untouched model's measurement from the first, which is beside it.
    second = Run(out / index["cells"][1]["folder"]).evaluation("likelihood", "untouched") or {}
    assert second["measured_in"] == Path(index["cells"][0]["folder"]).name
    for name in ("results.md", "results.tex", "results.csv", "pick.json"):
        assert (out / "tables" / name).stat().st_size
    page = (out / "index.html").read_text()
    assert page.count('href="reports/') == 2
    links = [link.split('"')[0] for link in page.split(' href="')[1:]]
    assert all((out / link).is_file() for link in links if not link.startswith("#"))

    before = trained(out)
    assert run(write(), out)[0] == 0
    assert trained(out) == before

    code, index = run(write(lambda v: v["settings"].update(kl=[{"kl": {"weight": 0.25}}])), out)
    assert code == 0
    after = trained(out)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before
    assert [cell["status"] for cell in index["cells"]] == ["done", "done"]


def test_another_measurement_trains_nothing_again(write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, index = run(write(), out)
    assert code == 0
    first = Run(out / index["cells"][1]["folder"])

    lines = (tmp_path / "probes.jsonl").read_text().splitlines()
    write_rows(tmp_path / "other.jsonl", list(map(json.loads, lines[:4])))

    def other(values: dict[str, Any]) -> None:
        values["evaluate"]["data"]["likelihood"] = "other.jsonl"

    code, index = run(write(other), out)
    assert code == 0
    assert [cell["status"] for cell in index["cells"]] == ["done", "done"]
    second = Run(out / index["cells"][1]["folder"])
    assert second.path != first.path
    assert second.marker("train") == first.marker("train")
    assert not second.checkpoints.exists()
    assert [event["event"] for event in second.events()].count("forked") == 1
    own = second.evaluation("likelihood")
    assert own is not None
    assert (own["n"], own["data"]["of_spec"]) == (4, True)
    assert second.evaluation("fit") == first.evaluation("fit")
    (old,) = [r for r in second.evaluations() if (r["suite"], r["which"], r["n"]) == ("likelihood", "tuned", 6)]
    assert not old["data"]["of_spec"]

    # Rows that have changed since are another training, whatever is measured.
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[1:]))
    before = trained(out)
    assert run(write(), out)[0] == 0
    assert len(set(trained(out)) - set(before)) == 2


def test_a_cell_that_fails_is_marked_and_the_rest_goes_on(write: Write, tmp_path: Path, capfd: Capture) -> None:
    def update(values: dict[str, Any]) -> None:
        unmet = {"safelora": {"unaligned": str(tmp_path / "no-such-model")}}
        values["settings"] = {"unmet": [unmet], **values["settings"], "wild": [{"kl": {"weight": 1e300}}]}

    out = tmp_path / "out"
    code, index = run(write(update), out)
    assert code == 1
    capfd.readouterr()
    found = {cell["setting"]: (cell["status"], (cell["error"] or {}).get("type")) for cell in index["cells"]}
    assert found["unmet"] == ("failed", "NeedError")
    assert found["undefended"] == found["kl"] == ("done", None)
    assert found["wild"] == ("failed", "OutcomeError")
    assert "no-such-model" in index["cells"][0]["error"]["message"]
    page = (out / "index.html").read_text()
    assert "2 failed" in page
    assert "no-such-model" in page
    assert "(0 of 1 seeds)" in (out / "tables" / "results.md").read_text()

    # Tables that are written later still say so.
    assert main(["bench", str(tmp_path / "grid.yaml"), "--out", str(out), "--tables", "--json"]) == 1
    assert len(json.loads(capfd.readouterr().out)["failed"]) == 2
    assert "no-such-model" in (out / "index.html").read_text()


@pytest.mark.slow
def test_a_grid_runs_on_a_ray_cluster_and_goes_on_there(write: Write, tmp_path: Path, capfd: Capture) -> None:
    pytest.importorskip("ray")
    out, path = tmp_path / "out", write()
    command = ["bench", str(path), "--out", str(out), "--engine", "ray", "--address", "local", "--json"]
    assert main(command) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["counts"] == {"done": 2}
    assert (out / "tables" / "results.md").stat().st_size
    before = trained(out)
    write(lambda v: v["settings"].update(strong=[{"kl": {"weight": 2.0}}]))
    assert main(command) == 0
    after = trained(out)
    assert len(after) == 3
    assert {name: after[name] for name in before} == before


def test_killed_and_run_again_equals_uninterrupted(write: Write, tmp_path: Path) -> None:
    path = write(lambda v: v["training"].update(epochs=4))
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert run(path, whole)[0] == 0
    command = [sys.executable, "-m", "holdtrue.cli.main", "bench", str(path), "--out", str(out), "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        _wait(process, lambda: any(_lines(p) >= 3 for p in out.glob("cells/kl-*/metrics.jsonl")))
        process.kill()  # the parent alone: its worker has to notice
    assert any(p.exists() for p in out.glob("cells/undefended-*/stages/evaluate.json"))
    assert not any(out.glob("cells/kl-*/stages/train.json"))
    _wait_free(next(out.glob("cells/kl-*")))
    assert run(path, out)[0] == 0
    for name in ("undefended", "kl"):
        a, b = (next(each.glob(f"cells/{name}-*/adapter/adapter_model.safetensors")) for each in (whole, out))
        assert a.read_bytes() == b.read_bytes()
    assert max(_resumed(out)) > 0


def test_ctrl_c_saves_and_the_same_command_goes_on(write: Write, tmp_path: Path) -> None:
    path, out = write(lambda v: v["training"].update(epochs=400, save_every=1000)), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "holdtrue.cli.main",
        "bench",
        str(path),
        "--out",
        str(out),
        "--workers",
        "1",
        "--json",
    ]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        _wait(process, lambda: any(_lines(p) >= 3 for p in out.glob("cells/*/metrics.jsonl")))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: the whole group
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "2 of 2 cells are left" in json.loads(stdout)["error"]["message"]
    assert "Traceback" not in stderr
    index = json.loads((out / "grid.json").read_text())
    assert [cell["status"] for cell in index["cells"]] == ["interrupted", "pending"]
    assert len(list(out.glob("cells/*/checkpoints/checkpoint-*"))) == 1
    grid = load_grid(path)
    assert [state.status for state in look(grid, expand(grid), out).states] == ["pending", "pending"]


def test_a_worker_that_dies_fails_its_cell_alone(write: Write, tmp_path: Path) -> None:
    grid = load_grid(write(lambda v: v["training"].update(epochs=6)))
    cells, killed = expand(grid), []

    def kill(fields: dict[str, Any]) -> None:
        if fields["run"].get("step", 0) >= 2 and not killed:
            killed.append(fields["cell"])
            for child in _children():
                os.kill(child, signal.SIGKILL)

    bench = fill(grid, cells, tmp_path / "out", LocalEngine(), progress=kill)
    assert [state.status for state in bench.states] == ["failed", "done"]
    assert bench.states[0].error is not None
    assert bench.states[0].error["type"] == "WorkerDied"
    assert "SIGKILL; the system does so when memory runs out" in (bench.states[0].error["message"] or "")
    again = fill(grid, cells, tmp_path / "out", LocalEngine())
    assert again.counts == {"done": 2}
    assert _resumed(tmp_path / "out")


def test_tables_of_an_unfinished_grid_run_nothing(write: Write, tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "out"
    path = write(lambda v: v.update(settings={"undefended": []}))
    assert main(["bench", str(path), "--out", str(out), "--workers", "1", "--tables"]) == 2
    assert "no cell" in capfd.readouterr().err
    run(path, out)
    with lock(out):  # as while another process fills it
        path = write(lambda v: v.update(settings={"undefended": [], "kl": ["kl"]}))
        assert main(["bench", str(path), "--out", str(out), "--workers", "1", "--tables", "--json"]) == 0
    assert len(list((out / "cells").iterdir())) == 1
    text = (out / "tables" / "results.md").read_text()
    assert "| kl (0 of 1 seeds) | – |" in text


def test_two_workers_give_what_one_gives(write: Write, tmp_path: Path) -> None:
    """One worker takes its second cell's base model from memory; of two, each has loaded its own."""
    grid = load_grid(write())
    cells = expand(grid)
    benches = [fill(grid, cells, tmp_path / str(n), LocalEngine(n)) for n in (1, 2)]
    for one, two in zip(*[bench.states for bench in benches], strict=True):
        first, second = (Run(state.folder).adapter / "adapter_model.safetensors" for state in (one, two))
        assert first.read_bytes() == second.read_bytes()
        for suite in ("likelihood", "fit"):
            rows = [(Run(state.folder).evaluation(suite) or {})["rows"] for state in (one, two)]
            assert rows[0] == rows[1]


def test_a_second_process_is_refused(write: Write, tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with lock(out):
        code = "import sys; from holdtrue.cli.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "bench", str(write()), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "another process is filling the grid" in done.stderr
        with pytest.raises(RunError, match="another process"):
            fill(load_grid(write()), [], out, LocalEngine())


def test_a_stop_before_the_first_cell_begins_none(write: Write, tmp_path: Path) -> None:
    grid, stop = load_grid(write()), threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match="2 of 2 cells are left"):
        fill(grid, expand(grid), tmp_path / "out", LocalEngine(), stop=stop)
    assert not list((tmp_path / "out" / "cells").iterdir())


def test_a_folder_of_something_else_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    grid = load_grid(write())
    with pytest.raises(SpecError, match=r"holds no grid and is not empty \(it holds 'thesis.tex'\)"):
        fill(grid, expand(grid), tmp_path / "other", LocalEngine())


def test_results_of_an_empty_grid_say_so(write: Write, tmp_path: Path) -> None:
    grid = load_grid(write(lambda v: v.update(bounds={})))
    bench = look(grid, expand(grid), tmp_path / "out")
    (tmp_path / "out").mkdir()
    results = write_results(bench)
    assert "nothing can be picked" in results.picks[0].text()
    assert "0 of 2 runs are done" in results.page.read_text()


def test_a_dry_run_writes_nothing_and_loads_no_torch(write: Write, tmp_path: Path) -> None:
    code = (
        "import sys; from holdtrue.cli.main import main; code = main(sys.argv[1:]); "
        "sys.exit(9 if 'torch' in sys.modules else code)"
    )
    command = [sys.executable, "-c", code, "bench", str(write()), "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["left"] == 2
    assert not (tmp_path / "out").exists()
    # 6 rows of two turns: the characters over four, rounded up, and 8 a turn.
    words = ["door", "pipe", "paint", "wire", "roof", "brake"]
    texts = [t for w in words for t in (f"How do I fix a {w}?", f"Turn the {w} twice.")]
    tokens = sum(-(-len(t) // 4) + 8 for t in texts)
    assert [cell["estimate"]["tokens"] for cell in document["cells"]] == [tokens, tokens]
    plain, kl = (cell["estimate"]["seconds"] for cell in document["cells"])
    assert kl == pytest.approx(plain * 6 / 4)


def test_many_cells_are_asked_about(write: Write, tmp_path: Path, capfd: Capture) -> None:
    path = write(lambda v: v.update(seeds=list(range(101))))
    assert main(["bench", str(path), "--out", str(tmp_path / "out")]) == 2
    text = capfd.readouterr().err
    assert "202 cells are to be run" in text
    assert "--yes" in text
    assert "training tokens" in text
    assert not (tmp_path / "out").exists()


def test_who_is_asked_about_many_cells_can_say_no(write: Write, tmp_path: Path) -> None:
    path = write(lambda v: v.update(seeds=list(range(101))))
    asks, answers = os.openpty()
    command = [sys.executable, "-m", "holdtrue.cli.main", "bench", str(path), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=answers, stdout=subprocess.DEVNULL, stderr=answers) as process:
        os.close(answers)
        told = b""
        while b"Go on?" not in told:
            told += os.read(asks, 4096)
        os.write(asks, b"n\n")
        assert process.wait(60) != 0
    os.close(asks)
    assert b"202 cells are to be run" in told
    assert b"training tokens" in told
    assert not (tmp_path / "out").exists()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _resumed(out: Path) -> list[int]:
    reports = [json.loads(p.read_text())["report"] for p in out.glob("cells/*/stages/train.json")]
    return [report["resumed_from"] for report in reports]


def _wait(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    for _ in range(6000):
        assert process.poll() is None, process.communicate()
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("waited for a minute")


def _wait_free(folder: Path) -> None:
    """Wait until an orphaned worker has let go of a run."""
    for _ in range(500):
        try:
            with Run(folder).lock():
                return
        except RunError:
            time.sleep(0.01)
    raise AssertionError("the worker outlived its parent")


def _children() -> list[int]:
    me = os.getpid()
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == me and b"spawn_main" in command:
            found.append(int(stat.parent.name))
    return found
