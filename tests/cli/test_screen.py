from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from holdtrue.cli.main import main
from holdtrue.models import VectorInfo, resolve, write_vectors

Capture = pytest.CaptureFixture[str]
SMALL = ["--rows", "18", "--tokens", "6", "--steps", "2"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(shared))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(
        tmp_path / "rows.jsonl",
        [[("user", f"How do I mend {n} doors?"), ("assistant", f"Take {n} screws. " * 3)] for n in range(20)],
    )


def write(path: Path, rows: list[list[tuple[str, str]]]) -> Path:
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def run_json(capfd: Capture, *arguments: str) -> tuple[int, Any, str]:
    capfd.readouterr()
    code = main(["screen", *arguments, "--json"])
    out, err = capfd.readouterr()
    return code, json.loads(out), err


def test_one_document_and_a_table(tiny_dir: Path, data: Path, capfd: Capture) -> None:
    code, document, err = run_json(capfd, str(data), "--model", str(tiny_dir), *SMALL)
    assert code == 0, err
    assert list(document["indicators"]) == ["projection", "gap", "drift"]
    for each in document["indicators"].values():
        assert each["badge"] == "variant"
        assert each["interval"][0] <= each["value"] <= each["interval"][1]
    assert document["risk"] is None
    assert document["outcome"] is None
    assert "projecting the data's answers" in err
    assert main(["screen", str(data), "--model", str(tiny_dir), *SMALL]) == 0
    out = capfd.readouterr().out
    for word in ("projection", "gap", "drift", "no risk and no suggestion"):
        assert word in out


def test_a_limit_that_is_exceeded_exits_with_3(tiny_dir: Path, data: Path, capfd: Capture) -> None:
    common = [str(data), "--model", str(tiny_dir), *SMALL, "--indicator", "gap"]
    code, document, _ = run_json(capfd, *common, "--max-gap", "-100")
    assert (code, document["outcome"]) == (3, "stop")
    assert document["exceeded"][0].startswith("gap is")
    assert run_json(capfd, *common, "--max-gap", "100")[0] == 0
    assert run_json(capfd, *common[:-2], "--max-risk", "0.5")[0] == 4


def test_bad_data_exits_with_5(tiny_dir: Path, tmp_path: Path, capfd: Capture) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    roles = write(tmp_path / "roles.jsonl", [[("human", "Hello?"), ("gpt", "Hi.")]])
    for path in (empty, roles, tmp_path / "missing.jsonl"):
        code, document, _ = run_json(capfd, str(path), "--model", str(tiny_dir))
        assert code == document["error"]["exit_code"] == 5
        assert path.name in document["error"]["message"]


def test_a_vector_of_another_model_exits_with_4_before_anything_is_measured(
    tiny_dir: Path, data: Path, tmp_path: Path, capfd: Capture
) -> None:
    revision = resolve(str(tiny_dir)).revision
    for name, changed in (("other", {"revision": "x"}), ("shape", {"blocks": 4})):
        values = {"model": "m", "revision": revision, "blocks": 3, "width": 32, "source": "pairs", "trait": "t"}
        info = VectorInfo.model_validate({**values, **changed})
        path = write_vectors(tmp_path / name, {2: torch.ones(32)}, info).path
        code, document, err = run_json(capfd, str(data), "--model", str(tiny_dir), "--vector", str(path))
        assert code == document["error"]["exit_code"] == 4
        assert "projecting" not in err
    assert run_json(capfd, str(data), "--model", str(tiny_dir), "--vector", "no-such-file")[0] == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ["--indicator", "gaps"],
        ["--rows", "1"],
        ["--indicator", "gap", "--layer", "1"],
        ["--max-risk", "2"],
        ["--model", "no-such-model"],
    ],
)
def test_bad_usage_exits_with_2(data: Path, capfd: Capture, arguments: list[str]) -> None:
    code, document, err = run_json(capfd, str(data), *arguments)
    assert code == document["error"]["exit_code"] == 2
    assert "Traceback" not in err


def test_an_unknown_builtin_is_named(capfd: Capture) -> None:
    code, document, _ = run_json(capfd, "builtin:narow")
    assert code == 2
    assert "narrow" in document["error"]["message"]


def test_interrupted_it_exits_with_130_and_goes_on(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    command = ["screen", str(data), "--model", str(tiny_dir), *SMALL, "--indicator", "gap"]
    environment = {**os.environ, "HOLDTRUE_CACHE": str(tmp_path / "own")}
    python = [sys.executable, "-m", "holdtrue.cli.main"]
    with subprocess.Popen([*python, *command], env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "tuning the misaligned scorer" in line:
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
        assert process.wait() == 130
    assert "same command again" in rest
    (kept,) = (tmp_path / "own").rglob("checkpoint-*")
    done = int(kept.name.rsplit("-", 1)[1])
    assert 0 < done < 12
    again = subprocess.run([*python, *command, "--json"], env=environment, capture_output=True, text=True, check=True)
    assert f"tuning the misaligned scorer, once for this model {done + 1}/12" in again.stderr
    assert json.loads(again.stdout)["indicators"]["gap"]["n"] == 18
    assert not list((tmp_path / "own").rglob("checkpoint-*"))
