from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.cli.main import main
from holdtrue.errors import GateError, RunError
from holdtrue.runs import Run, RunSpec, execute, load_spec

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]
SCREEN = {"rows": 6, "tokens": 6, "indicators": ["projection"]}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(shared))


def made(edit: Edit, folder: Path, name: str, **screen: Any) -> Run:
    path = edit(lambda values: values.update(screen={**SCREEN, **screen}, defenses=[]))
    return Run.create(folder / name, load_spec(path))


def test_the_screen_is_recorded_before_rows_are_prepared(
    folder: Path, edit: Edit, capfd: pytest.CaptureFixture[str]
) -> None:
    path = edit(lambda values: values.update(screen=SCREEN, defenses=[]))
    assert main(["train", str(path), "--out", str(folder / "out"), "--set", "training.epochs=1", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    run = Run(folder / "out")
    assert list(document["stages"])[:2] == ["screen", "prepare"]
    assert document["screen"] == run.screen
    assert run.screen is not None
    assert run.screen["data"]["sha256"] == run.manifest["data"]["train"]["sha256"]
    assert run.screen["model"]["revision"] == run.manifest["model"]["revision"]
    assert run.screen["settings"]["rows"] == 6
    assert run.screen["outcome"] is None
    before = (folder / "out" / "screen.json").stat().st_mtime_ns
    assert execute(Run(folder / "out")) is False
    assert (folder / "out" / "screen.json").stat().st_mtime_ns == before


def test_a_limit_stops_the_run_with_3_and_nothing_is_trained(folder: Path, edit: Edit) -> None:
    run = made(edit, folder, "out", max_projection=-1e9)
    for _ in range(2):  # a resumed run is stopped again
        with pytest.raises(GateError, match="stops this run before training: projection is") as caught:
            execute(run)
        assert caught.value.exit_code == 3
        assert run.screen is not None
        assert run.screen["outcome"] == "stop"
        assert not run.is_done("screen")
        assert not (run.path / "data").exists()
    assert main(["resume", str(run.path)]) == 3
    passed = made(edit, folder, "passed", max_projection=1e9)
    assert execute(passed, until="screen")
    assert passed.is_done("screen")
    assert not passed.is_done("prepare")


def test_a_limit_on_the_risk_of_another_model_is_a_need_not_met(folder: Path, edit: Edit) -> None:
    path = edit(lambda values: values.update(screen={"max_risk": 0.5}))
    assert main(["train", str(path), "--out", str(folder / "out")]) == 4


def test_rows_that_change_after_they_were_screened_are_not_trained_on(folder: Path, edit: Edit) -> None:
    run = made(edit, folder, "out")
    execute(run, until="screen")
    train = folder / "train.jsonl"
    train.write_text(train.read_text() + train.read_text().splitlines()[0] + "\n")
    with pytest.raises(RunError, match="changed since it was screened"):
        execute(run)


def test_a_run_without_a_screen_has_the_stages_and_markers_that_it_had(folder: Path) -> None:
    spec = load_spec(folder / "spec.yaml")
    run = Run.create(folder / "out", spec)
    assert run.stages == ("prepare", "train", "finalise", "evaluate", "gate")
    assert run.screen is None
    assert run.is_done("screen"), "there is nothing to do"
    run.mark("prepare", inputs=run.inputs("prepare"), seconds=0, report={})
    assert run.is_done("prepare")


def test_paths_of_the_screen_start_at_the_specs_folder(folder: Path, edit: Edit) -> None:
    path = edit(lambda values: values.update(screen={"vector": "v.safetensors", "scorers": ["s"]}))
    spec = load_spec(path)
    assert spec.screen is not None
    assert spec.screen.vector == str(folder / "v.safetensors")
    assert spec.screen.scorers == (str(folder / "s"),)
    assert RunSpec(**spec.canonical()) == spec


def test_a_misspelled_key_of_the_screen_is_named(folder: Path, edit: Edit, capfd: pytest.CaptureFixture[str]) -> None:
    path = edit(lambda values: values.update(screen={"max_rsk": 0.5}))
    assert main(["train", str(path)]) == 2
    assert "did you mean 'max_risk'" in capfd.readouterr().err
