"""A run's model leaves it once its gate has passed, and is the same model then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from holdtrue.cli.main import main
from holdtrue.errors import SpecError
from holdtrue.models import load_adapter, load_model, new_adapter, resolve, save_adapter
from holdtrue.models.adapter_spec import AdapterSpec
from holdtrue.models.digest import tree_digest
from holdtrue.models.merge import merged_model
from holdtrue.runs import Run
from holdtrue.runs.files import write_json
from support import chat, write_rows


@pytest.fixture(scope="module")
def trained(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps. Read only: other tests share it."""
    root = tmp_path_factory.mktemp("export")
    write_rows(root / "train.jsonl", [chat(f"How do I fix {n}?", f"Turn it {n} times.") for n in range(4)])
    spec = {
        "model": str(tiny_dir),
        "data": {"train": "train.jsonl", "validation": "train.jsonl"},
        "adapter": {"r": 4, "alpha": 8},
        "training": {"learning_rate": 1e-2, "batch_size": 2, "micro_batch_size": 2, "warmup_steps": 1},
        "defenses": [],
        "evaluate": {"suites": ["fit"]},
    }
    (root / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert main(["train", str(root / "spec.yaml"), "--out", str(root / "run")]) == 0
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def decide(run: Run, outcome: str) -> None:
    write_json(run.path / "gate.json", {"outcome": outcome, "decisions": [], "evidence": []})


def test_a_merged_checkpoint_is_the_same_model(run: Run, tiny_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decide(run, "pass")
    out = tmp_path / "merged"
    assert main(["export", str(run.path), "--merge", "--out", str(out)]) == 0
    merged = AutoModelForCausalLM.from_pretrained(out)
    base = load_model(resolve(str(tiny_dir)), device="cpu")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        untouched = base(ids).logits
        tuned, found = load_adapter(base, run.adapter)(ids).logits, merged(ids).logits
    torch.testing.assert_close(found, tuned, rtol=1e-4, atol=1e-4)
    assert (found - untouched).abs().max() > 100 * (found - tuned).abs().max()
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not list(out.glob("*.bin"))
    record = json.loads((out / "holdtrue.json").read_text())
    assert record["adapter_digest"] == tree_digest(run.adapter)
    assert (record["gate"], record["merged"], record["released_without_gate"]) == ("pass", True, None)
    assert main(["export", str(run.path), "--merge", "--out", str(out)]) == 2  # it is there already


def test_an_exported_adapter_is_byte_for_byte_the_runs(run: Run, tmp_path: Path) -> None:
    decide(run, "pass")
    assert main(["export", str(run.path), "--out", str(tmp_path / "adapter")]) == 0
    for file in run.adapter.iterdir():
        assert (tmp_path / "adapter" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("outcome", [None, "fail", "undecided"])
def test_nothing_leaves_before_the_gate_unless_somebody_says_why(
    run: Run, tmp_path: Path, outcome: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    if outcome is not None:
        decide(run, outcome)
    out = tmp_path / "out"
    assert main(["export", str(run.path), "--out", str(out)]) == 3
    assert main(["export", str(run.path), "--out", str(out), "--force-with-reason", " "]) == 2
    assert not out.exists()
    capfd.readouterr()
    assert main(["export", str(run.path), "--out", str(out), "--force-with-reason", "a study", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["gate"], document["released_without_gate"]) == (outcome, "a study")
    assert [e["released_without_gate"] for e in run.events() if e["event"] == "export"] == ["a study"]


def test_a_run_without_an_adapter_is_named(trained: Path, tmp_path: Path) -> None:
    from holdtrue.runs import load_spec

    run = Run.create(tmp_path / "begun", load_spec(trained / "spec.yaml"))
    assert main(["export", str(run.path), "--out", str(tmp_path / "out")]) == 1


def test_a_head_that_is_the_embedding_is_not_merged(tiny_dir: Path, tmp_path: Path) -> None:
    source = resolve(str(tiny_dir))
    model = new_adapter(load_model(source, device="cpu"), AdapterSpec(r=2, target_modules=["lm_head"]), seed=0)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(SpecError, match="embedding's own"):
        merged_model(source, tmp_path / "adapter")
