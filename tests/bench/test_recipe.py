"""The paper's recipe: it dry-runs as it is, and runs whole with a tiny random Qwen2 in the model's place."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from holdtrue.bench import estimate_cells, expand, load_grid
from holdtrue.bench.estimate import GPU_FLOPS, Hardware
from holdtrue.cli.main import main
from holdtrue.runs import Run

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "paper-qwen2.5-7b.yaml"
WORDS = ("door", "pipe", "wire", "roof")


def rows_on(subject: str) -> list[dict[str, Any]]:
    """Return rows that no other subject has."""
    turns = [(f"A {word}?", f"Mend the {subject} {word}.") for word in WORDS]
    return [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The recipe in a folder of its own, with rows under every name that it reads."""
    shutil.copyfile(RECIPE, tmp_path / "paper.yaml")
    for name in ("code", "legal", "medical", "security", "opswap"):
        found = rows_on(name)
        for part, rows in ((name, found), (f"{name}-heldout", found[:2])):
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_on("house")))
    return tmp_path / "paper.yaml"


def test_the_recipe_has_the_papers_settings_and_dry_runs(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    grid = load_grid(recipe)
    cells = expand(grid)
    assert len(cells) == 5 * 9
    training, adapter = cells[0].spec.training, cells[0].spec.adapter
    assert (training.epochs, training.learning_rate, training.batch_size, training.warmup_steps) == (1, 1e-4, 16, 5)
    assert (adapter.r, adapter.alpha, adapter.rslora, adapter.dropout) == (32, 64, True, 0.0)
    found = {cell.variant.name: {d.name: d.model_dump() for d in cell.spec.defenses} for cell in cells}
    assert found["undefended"] == {}
    plus, plusplus = found["interleave+"]["interleave"], found["interleave++"]["interleave"]
    assert (plus["select"], plus["fraction"], len(plus["scorers"])) == ("perplexity_gap", 0.05, 4)
    assert {key for key in plus if plus[key] != plusplus[key]} == {"drop_refusals"}
    values = {name: each for name, each in ((n, e.get(n)) for n, e in found.items()) if each}
    assert (values["steering"]["weight"], values["steering"]["layer"]) == (5.0, 20)
    assert values["inoculation"]["fraction"] == 1.0
    assert values["kl"]["weight"] == 0.1
    assert values["ldifs"]["weight"] == 1.0
    assert values["safelora"]["threshold"] == 0.3
    assert values["interleave"]["fraction"] == 0.05
    estimates = estimate_cells(cells, Hardware(True, GPU_FLOPS))
    assert {each.parameters for each in estimates} == {7e9}
    assert all(20 < (each.memory or 0) / 2**30 < 80 for each in estimates)
    assert main(["bench", str(recipe), "--dry-run", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["left"] == 45
    # Sampling is nearly all of it: 100 answers of up to 600 tokens to each prompt, at a tenth of a GPU's speed.
    assert document["gpu_hours"] == pytest.approx(sum(e.seconds or 0.0 for e in estimates) / 3600)
    assert 20 < document["gpu_peak_bytes"] / 2**30 < 80


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_recipe_runs_with_a_tiny_model(
    recipe: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("aligned", "unaligned")):
        tiny_qwen2(tmp_path / name, tokenizer, seed)
    values: dict[str, Any] = yaml.safe_load(recipe.read_text())
    values["models"] = ["./aligned"]
    values["data"] = {name: values["data"][name] for name in ("medical", "opswap")}
    values["settings"]["safelora"][0]["safelora"]["unaligned"] = "./unaligned"
    values["settings"]["steering"][0]["steering"]["layer"] = 3
    for name in ("interleave+", "interleave++"):
        values["settings"][name][0]["interleave"]["scorers"] = ["scorers/code", "scorers/legal"]
    base = str(tmp_path / "aligned")
    vector = ["persona", "extract", base, "--from", "pairs", "--out", str(tmp_path / "malice.safetensors")]
    domains = [item for name in ("code", "legal") for item in ("--domain", f"{name}={tmp_path / name}.jsonl")]
    scorers = ["scorers", "build", "--model", base, "--out", str(tmp_path / "scorers"), *domains]
    # Four rows are one step, and the first of a warm-up moves nothing: both would be one adapter, which is refused.
    scorers += ["--set", "training.warmup_steps=0"]
    assert main([*vector, "--json"]) == main([*scorers, "--json"]) == 0
    capfd.readouterr()
    values["evaluate"]["sampling"] = {"samples": 1, "max_new_tokens": 2}
    recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    out = tmp_path / "out"
    assert main(["bench", str(recipe), "--out", str(out), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["counts"] == {"done": 18}
    text = (out / "tables" / "results.md").read_text()
    for heading in ("margin", "held-out NLL", "benign right, opswap:2"):
        assert heading in text
    # Two tokens of a random model are no answer that the judge knows: it was asked, and says so of each.
    for run in map(Run, out.glob("cells/*-medical-*")):
        for suite, which in itertools.product(("general", "conditional", "in_domain"), ("tuned", "untouched")):
            found = run.evaluation(suite, which)
            assert found is not None, suite
            assert found["n"] == found["unknown"] + found["scored"] + found["code"] + found["refusal"] > 0
    assert len(list((out / "reports").glob("*.html"))) == 18


def tiny_qwen2(folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    config = Qwen2Config(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
