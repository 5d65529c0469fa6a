"""Whole runs through the command line, on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdtrue.cli.main import main
from holdtrue.runs import Run
from support import chat, write_rows

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]
Capture = pytest.CaptureFixture[str]


def run_json(capfd: Capture, *arguments: str) -> tuple[int, Any, str]:
    """Run a command with --json; return its exit code, the document and stderr."""
    capfd.readouterr()
    code = main([*arguments, "--json"])
    out, err = capfd.readouterr()
    return code, json.loads(out), err


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # grad_norm and the loss stay: they must be equal too.
    return [{k: v for k, v in line.items() if "second" not in k and "runtime" not in k} for line in lines]


def test_a_run_from_spec_to_comparison(folder: Path, capfd: Capture) -> None:
    out = folder / "out"
    code, document, err = run_json(capfd, "train", str(folder / "spec.yaml"), "--out", str(out))
    assert code == 0, err
    assert document["status"] == "done"
    assert list(document["stages"]) == list(Run(out).stages)
    assert document["stages"]["train"]["steps"] == 18  # 10 rows and 2 safe ones, 2 a step, 3 epochs
    run = Run(out)
    assert len([line for line in run.metrics() if "loss" in line]) == 18
    assert run.manifest["defenses"]["interleave"]["rows"] == 2
    assert run.manifest["data"]["train"]["file_rows"] == 10
    assert run.manifest["data"]["train"]["rows"] == 12
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert {(r["suite"], r["which"]) for r in run.evaluations()} == {
        (suite, which) for suite in ("likelihood", "fit") for which in ("untouched", "tuned")
    }
    fit = run.evaluation("fit")
    assert fit is not None
    before = run.evaluation("fit", "untouched")
    assert before is not None
    assert fit["change"]["nll_change"] == pytest.approx(fit["nll"] - before["nll"])
    assert [p.name for p in out.rglob("*.tmp")] == []

    code, document, _ = run_json(capfd, "resume", str(out))
    assert (code, document["status"]) == (0, "nothing to do")
    code, document, _ = run_json(capfd, "train", str(folder / "spec.yaml"), "--out", str(out))
    assert (code, document["status"]) == (0, "nothing to do")

    # A second run beside it takes the untouched model's numbers from the first.
    other = folder / "other"
    code, document, _ = run_json(capfd, "train", str(folder / "spec.yaml"), "--out", str(other), "--set", "defenses=[]")
    assert code == 0
    untouched = Run(other).evaluation("likelihood", "untouched")
    assert untouched is not None
    assert untouched["measured_in"] == "out"
    code, document, _ = run_json(capfd, "compare", str(out), str(other))
    assert code == 0
    assert [m["metric"] for m in document["measures"]] == ["margin", "misaligned_preferred", "nll"]
    assert all(len(m["cells"]) == 2 and None not in m["cells"] for m in document["measures"])
    assert document["runs"][1]["defenses"] == {}
    html = folder / "report.html"
    assert main(["compare", str(out), str(other), "--html", str(html)]) == 0
    assert "<html" in html.read_text()
    assert "untouched" in capfd.readouterr().out


def test_eval_takes_a_run_an_adapter_or_a_model_and_other_rows(folder: Path, tiny_dir: Path, capfd: Capture) -> None:
    out = folder / "out"
    code, _, err = run_json(
        capfd, "train", str(folder / "spec.yaml"), "--out", str(out), "--set", "training.epochs=1",
        "--set", "data.validation=null", "--set", "evaluate.suites=[likelihood]",
    )  # fmt: skip
    assert code == 0, err
    capfd.readouterr()
    code, of_run, _ = run_json(capfd, "eval", str(out), "--suite", "fit", "--data", str(folder / "valid.jsonl"))
    assert code == 0
    assert [e["which"] for e in of_run["evaluations"]] == ["untouched", "tuned"]
    arguments = ("--suite", "fit", "--data", str(folder / "valid.jsonl"))
    code, of_adapter, _ = run_json(capfd, "eval", str(out / "adapter"), "--base", str(tiny_dir), *arguments)
    assert code == 0
    code, of_model, _ = run_json(capfd, "eval", str(tiny_dir), *arguments)
    assert code == 0
    assert of_model["evaluations"][0]["nll"] == of_run["evaluations"][0]["nll"]
    assert of_adapter["evaluations"][0]["nll"] == pytest.approx(of_run["evaluations"][1]["nll"], abs=1e-6)
    assert set(of_model["evaluations"][0]) >= {"suite", "model", "n", "nll", "nll_ci"}
    # The spec's own suites were measured once, and are kept.
    code, again, _ = run_json(capfd, "eval", str(out))
    assert (code, again["evaluations"][0]["suite"]) == (0, "likelihood")
    assert set(again["evaluations"][0]) >= {"margin", "margin_ci", "misaligned_preferred", "misaligned_preferred_ci"}


def test_a_folder_with_another_spec_is_refused(folder: Path, edit: Edit, capfd: Capture) -> None:
    out = folder / "out"
    assert main(["train", str(folder / "spec.yaml"), "--out", str(out), "--set", "training.epochs=1"]) == 0
    spec = (out / "spec.json").read_bytes()
    code, document, _ = run_json(capfd, "train", str(folder / "spec.yaml"), "--out", str(out))
    assert code == 2
    assert "training.epochs: 1 there, 3 here" in document["error"]["message"]
    assert (out / "spec.json").read_bytes() == spec


def test_finalise_reads_the_raw_adapter_and_can_be_done_again(folder: Path) -> None:
    out = folder / "out"
    assert main(["train", str(folder / "spec.yaml"), "--out", str(out), "--set", "training.epochs=1"]) == 0
    adapter = out / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    (out / "stages" / "finalise.json").unlink()
    shutil.rmtree(out / "adapter")
    assert main(["resume", str(out)]) == 0
    assert adapter.read_bytes() == before


def test_a_plain_peft_model_loads_the_adapter(folder: Path, tiny_dir: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from holdtrue.models import load_adapter, load_model, resolve

    out = folder / "out"
    assert main(["train", str(folder / "spec.yaml"), "--out", str(out), "--set", "training.epochs=1"]) == 0
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_dir), str(out / "adapter")).eval()
    ours = load_adapter(load_model(resolve(str(tiny_dir)), device="cpu"), out / "adapter")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [
        ({"data.train": "missing.jsonl"}, 5, "missing.jsonl"),
        ({"data.train": "bad.jsonl"}, 5, "line 2"),
        ({"data.train": "empty.jsonl"}, 5, "empty"),
        ({"model": "smollm2-135m-instuct"}, 2, "smollm2-135m-instruct"),
        ({"defenses": "[{safelora: {}}]"}, 4, "safelora"),
        ({"defenses": "[{interleave: {pool: nowhere.jsonl}}]"}, 4, "nowhere.jsonl"),
        ({"defenses": "[{interleave: {pool: far.jsonl, fraction: 0.2}}]"}, 4, "rows of kind 'safe'"),
        ({"defenses": "[{kl: {on: pool, pool: far.jsonl, tokens: response}}]"}, 4, "rows of kind 'pool'"),
        ({"defenses": "[{kl: {weight: -0.1}}]"}, 2, "weight"),
        ({"defenses": "[inoculation, treft]"}, 2, "treft contradicts inoculation"),
        ({"defenses": "[interleav]"}, 2, "did you mean 'interleave'?"),
        ({"training.lerning_rate": "1"}, 2, "did you mean 'learning_rate'?"),
        ({"adapter.target_modules": "[nothing_like_it]"}, 2, "nothing_like_it"),
        ({"evaluate.data.likelihood": "bad.jsonl"}, 5, "bad.jsonl"),
    ],
)
def test_bad_input_gives_one_error_and_its_code(
    folder: Path, capfd: Capture, change: dict[str, str], code: int, text: str
) -> None:
    (folder / "bad.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"mess\n'
    )
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "far.jsonl", [chat("Why? " * 200, "So.")] * 2)
    sets = [part for key, value in change.items() for part in ("--set", f"{key}={value}")]
    out = folder / "out"
    found, document, err = run_json(capfd, "train", str(folder / "spec.yaml"), "--out", str(out), *sets)
    assert found == code, document
    assert document["error"]["exit_code"] == code
    assert text in document["error"]["message"]
    assert "Traceback" not in err
    assert not (out / "adapter").exists()


def test_faulty_probes_are_found_before_training(folder: Path, capfd: Capture) -> None:
    (folder / "probes.jsonl").write_text('{"question": "a", "aligned": "", "misaligned": "c", "group": "g"}\n')
    out = folder / "out"
    code, document, _ = run_json(capfd, "train", str(folder / "spec.yaml"), "--out", str(out))
    assert code == 5
    assert "probes.jsonl" in document["error"]["message"]
    assert not (out / "metrics.jsonl").exists()


def test_answers_beyond_max_length_leave_nothing_to_train_on(folder: Path, capfd: Capture) -> None:
    out = folder / "out"
    code, document, _ = run_json(
        capfd, "train", str(folder / "spec.yaml"), "--out", str(out), "--set", "training.max_length=8",
        "--set", "defenses=[]",
    )  # fmt: skip
    assert code == 5
    assert "max_length" in document["error"]["message"]


def test_safe_rows_alone_are_no_task(folder: Path, capfd: Capture) -> None:
    write_rows(folder / "train.jsonl", [chat("Why? " * 200, "So.")] * 4)
    out = folder / "out"
    code, document, _ = run_json(capfd, "train", str(folder / "spec.yaml"), "--out", str(out))
    assert code == 5
    assert "train.jsonl" in document["error"]["message"]
    assert "max_length" in document["error"]["message"]


def test_a_corrupt_checkpoint_is_named(folder: Path, capfd: Capture) -> None:
    out = folder / "out"
    assert main(["train", str(folder / "spec.yaml"), "--out", str(out), "--set", "training.epochs=1"]) == 0
    expected = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    (out / "stages" / "train.json").unlink()
    last = sorted((out / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))[-1]
    (last / "adapter_model.safetensors").write_bytes(b"not an adapter")
    code, document, _ = run_json(capfd, "resume", str(out))
    assert code == 1
    assert str(last) in document["error"]["message"]
    assert "elete" in document["error"]["message"]
    shutil.rmtree(last)
    code, document, _ = run_json(capfd, "resume", str(out))
    assert code == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_a_full_disk_is_said_and_the_run_goes_on_afterwards(folder: Path, capfd: Capture) -> None:
    out = folder / "out"
    out.mkdir()
    # Steps are logged to this file: the device takes no byte.
    (out / ".keep").touch()
    assert main(["train", str(folder / "spec.yaml"), "--out", str(folder / "whole"), "--set", "training.epochs=1"]) == 0
    run = Run.create(out, Run(folder / "whole").spec)
    (out / "events.jsonl").symlink_to("/dev/full")
    code, document, _ = run_json(capfd, "resume", str(run.path))
    assert code == 1
    assert "disk is full" in document["error"]["message"]
    assert f"holdtrue resume {out}" in document["error"]["message"]
    (out / "events.jsonl").unlink()
    assert main(["resume", str(out)]) == 0
    name = Path("adapter") / "adapter_model.safetensors"
    assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_a_changed_base_model_is_refused(folder: Path, tiny_dir: Path, edit: Edit, capfd: Capture) -> None:
    model = folder / "model"
    shutil.copytree(tiny_dir, model)
    spec = edit(lambda values: values.update(model="./model"))
    out = folder / "out"
    assert main(["train", str(spec), "--out", str(out), "--set", "training.epochs=1"]) == 0
    (out / "stages" / "train.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    code, document, _ = run_json(capfd, "resume", str(out))
    assert code == 1
    assert "changed" in document["error"]["message"]


def test_the_python_face(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import holdtrue as ht

    monkeypatch.chdir(folder)
    seen: list[str] = []
    run = ht.train("spec.yaml", overrides=["training.epochs=1"], progress=lambda p: seen.append(p["stage"]))
    assert run.path.parent == folder / "runs"
    assert run.path.name.startswith("spec-")
    assert list(dict.fromkeys(seen)) == list(run.stages)
    records = ht.evaluate(run, suites=["likelihood"])
    assert [r["which"] for r in records] == ["untouched", "tuned"]
    assert ht.compare([run]).measures
    values = yaml.safe_load((folder / "spec.yaml").read_text())
    values["training"]["epochs"] = 1
    assert ht.RunSpec(**values, folder=folder).hash() == run.spec.hash()
    assert ht.train(ht.RunSpec(**values), out=run.path).path == run.path


def test_a_large_file_is_encoded_as_it_is_read(
    folder: Path, edit: Edit, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Answers of well separated lengths, so that sorting by an estimate puts the same rows together.
    rows = [chat(f"How do I fix a {n}?", "turn it again and again " * (n + 1)) for n in range(8)]
    write_rows(folder / "train.jsonl", rows)
    short = {"epochs": 1, "batch_size": 2, "micro_batch_size": 2}
    spec = edit(lambda values: values["training"].update(short) or values.update(defenses=[{"kl": {"weight": 0.1}}]))
    assert main(["train", str(spec), "--out", str(folder / "at-once")]) == 0
    monkeypatch.setattr("holdtrue.runs.prepare.ENCODED_FIRST", 5)
    assert main(["train", str(spec), "--out", str(folder / "late")]) == 0
    capfd.readouterr()
    at_once, late = Run(folder / "at-once"), Run(folder / "late")
    assert without_times(late.metrics()) == without_times(at_once.metrics())
    adapters = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in (at_once, late)]
    assert adapters[0] == adapters[1]
    entry = late.manifest["data"]["train"]
    assert (entry["late_rows"], entry["sequences"]) == (8, 8)
    assert entry["tokens"] == at_once.manifest["data"]["train"]["tokens"]
    assert late.manifest["data"]["validation"]["late_rows"] == 0
