from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdtrue.cli.main import main
from holdtrue.data import builtin
from holdtrue.evaluation import read_probes
from holdtrue.models import read_vectors

Capture = pytest.CaptureFixture[str]


def run_json(capfd: Capture, *arguments: str) -> tuple[int, Any]:
    capfd.readouterr()
    code = main([*arguments, "--json"])
    return code, json.loads(capfd.readouterr().out)


def test_vectors_from_pairs(tiny_dir: Path, tmp_path: Path, capfd: Capture) -> None:
    out = tmp_path / "v.safetensors"
    code, document = run_json(capfd, "persona", "extract", str(tiny_dir), "--from", "pairs", "--out", str(out))
    assert code == 0
    assert document["out"] == str(out)
    assert list(document["norms"]) == ["0", "1", "2"]
    assert document["info"] == read_vectors(out).info.model_dump(mode="json")
    selected = read_probes(builtin("probes-select"))
    assert document["info"]["material"] == {"pairs": selected.sha256}, "not the pairs that are reported on"
    assert document["info"]["counts"]["pairs_kept"] == len(selected.rows)
    assert main(["persona", "extract", str(tiny_dir), "--from", "pairs", "--out", str(out)]) == 0
    assert f"steering: {{vector: {out}}}" in capfd.readouterr().out


def test_rollouts_that_nobody_can_use_are_a_failure_with_counts(
    tiny_dir: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(tmp_path / "cache"))
    small = ["--rollouts", "1", "--instructions", "1", "--questions", "2", "--max-new-tokens", "4"]
    code, document = run_json(
        capfd, "persona", "extract", str(tiny_dir), "--out", str(tmp_path / "v"), *small, "--threshold", "100"
    )
    assert code == 1
    assert "of 2 answers under" in document["error"]["message"]
    (kept,) = (tmp_path / "cache" / "persona").glob("malice-*.jsonl")
    assert len(kept.read_text().splitlines()) == 4
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--from", "rolouts"], 2),
        (["--from", "pairs", "--rollouts", "3"], 2),
        (["--from", "pairs", "--judge", "offline"], 2),
        (["--from", "pairs", "--pairs", "no-such.jsonl"], 5),
        (["--from", "pairs", "--pairs", "builtin:nothing"], 2),
        (["--pairs", "builtin:probes"], 2),
        (["--rollouts", "0"], 2),
        (["--questions", "21"], 2),
        (["--judge", "nobody"], 2),
        (["--threshold", "101"], 2),
    ],
)
def test_bad_usage_is_named(tiny_dir: Path, tmp_path: Path, capfd: Capture, arguments: list[str], code: int) -> None:
    found, document = run_json(capfd, "persona", "extract", str(tiny_dir), "--out", str(tmp_path / "v"), *arguments)
    assert found == document["error"]["exit_code"] == code
    assert "Traceback" not in capfd.readouterr().err


def test_an_option_of_the_other_source_is_named_as_it_was_given(tmp_path: Path, capfd: Capture) -> None:
    command = ["persona", "extract", "m", "--from", "pairs", "--rollouts", "3", "--max-new-tokens", "4"]
    assert main([*command, "--out", str(tmp_path / "v")]) == 2
    assert "--max-new-tokens, --rollouts: for --from rollouts only" in capfd.readouterr().err


def test_directions_need_a_tuned_model(tiny_dir: Path, tmp_path: Path, capfd: Capture) -> None:
    for arguments in (["--tuned", str(tiny_dir)], ["--tuned", str(tmp_path), "--pairs", "x", "--data", "y"]):
        assert run_json(capfd, "persona", "directions", "--out", str(tmp_path / "v"), *arguments)[0] == 2
