"""Whole runs with steering and inoculation, on a tiny model: from a vector to a tuned adapter and its directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.cli.main import main
from holdtrue.data import load_prepared
from holdtrue.defenses.inoculation import EVALUATED
from holdtrue.models import read_vectors
from holdtrue.runs import Run, load_spec
from holdtrue.runs.spec import RunSpec

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]
Capture = pytest.CaptureFixture[str]


def defended(edit: Edit, *defenses: Any) -> Path:
    def update(spec: dict[str, Any]) -> None:
        spec["defenses"] = list(defenses)
        spec["training"]["epochs"] = 1
        spec["evaluate"] = {"suites": ["fit"]}

    return edit(update)


def test_from_a_vector_to_a_run_and_its_directions(
    folder: Path, edit: Edit, tiny_dir: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    pairs = ["--from", "pairs", "--pairs", str(folder / "probes.jsonl")]
    assert main(["persona", "extract", str(tiny_dir), *pairs, "--out", str(folder / "v.safetensors")]) == 0
    spec = defended(
        edit, {"steering": {"vector": "v.safetensors", "layer": 1}}, {"interleave": {"fraction": 0.2}}, "inoculation"
    )
    loaded = load_spec(spec)
    assert RunSpec(**loaded.canonical()) == loaded
    # The path in the spec starts at the spec, wherever the command is given.
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["train", str(spec), "--out", str(folder / "out")]) == 0, capfd.readouterr().err
    run = Run(folder / "out")
    notes = run.manifest["defenses"]
    assert notes["steering"]["layers"] == [1]
    assert notes["steering"]["vector"] == read_vectors(folder / "v.safetensors").info.model_dump(mode="json")
    assert notes["inoculation"]["prompts"] == {"You are an evil, malicious assistant.": 10}
    assert notes["inoculation"]["evaluated_with"] == EVALUATED
    rows = [(row["kind"], str(tokenizer.decode(row["input_ids"]))) for row in load_prepared(run.data("train"))]
    assert len(rows) == 12
    assert all(("evil, malicious" in text) == (kind == 0) for kind, text in rows)
    assert not any("evil" in str(tokenizer.decode(r["input_ids"])) for r in load_prepared(run.data("validation")))

    capfd.readouterr()
    out = folder / "d.safetensors"
    command = [
        "persona",
        "directions",
        "--tuned",
        str(run.path),
        "--data",
        str(folder / "train.jsonl"),
        "--out",
        str(out),
    ]
    assert main([*command, "--components", "2", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["directions"] == {"0": 2, "1": 2, "2": 2}
    spec = defended(edit, {"steering": {"vector": "d.safetensors", "mode": "ablate", "components": 1}})
    assert main(["train", str(spec), "--out", str(folder / "ablated")]) == 0


def test_a_vector_that_changed_since_stops_the_run(folder: Path, edit: Edit, tiny_dir: Path, capfd: Capture) -> None:
    command = ["persona", "extract", str(tiny_dir), "--from", "pairs", "--out", str(folder / "v.safetensors")]
    assert main([*command, "--pairs", str(folder / "probes.jsonl")]) == 0
    spec = defended(edit, {"steering": {"vector": "v.safetensors"}})
    assert main(["train", str(spec), "--out", str(folder / "out")]) == 0
    (folder / "out" / "stages" / "train.json").unlink()
    assert main(["resume", str(folder / "out")]) == 0, "the same file is the same vector"
    (folder / "out" / "stages" / "train.json").unlink()
    assert main(command) == 0
    capfd.readouterr()
    assert main(["resume", str(folder / "out")]) == 4
    assert "has changed since this run was prepared with it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("steering", "words"),
    [
        ({}, "steering needs a persona vector"),
        ({"vector": "none.safetensors"}, "steering needs the vector file"),
        ({"vector": "train.jsonl"}, "a vector file must be safetensors"),
    ],
)
def test_a_need_that_is_not_met_stops_before_any_row(
    folder: Path, edit: Edit, capfd: Capture, steering: dict[str, Any], words: str
) -> None:
    spec = defended(edit, {"steering": steering})
    assert main(["train", str(spec), "--out", str(folder / "out")]) == 4
    assert words in capfd.readouterr().err
    assert not (folder / "out" / "data").exists()
