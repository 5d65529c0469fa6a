from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from holdtrue.models import AdapterSpec, ModelSource, load_model, new_adapter, resolve, save_adapter

WORDS = ["door", "pipe", "paint", "wire", "roof", "brake", "hinge", "valve", "tile", "fuse", "lamp", "stair"]


@pytest.fixture
def cache(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tiny_dir: Path, cache: Path) -> ModelSource:
    return resolve(str(tiny_dir))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Twelve rows; the fourth and the eighth refuse."""
    answers = [f"Take the {w} off and look at it {n} times. " * (n % 3 + 1) for n, w in enumerate(WORDS)]
    answers[3] = "I'm sorry, but I will not help with the wire."
    answers[7] = "Well, I CANNOT say anything about a valve."
    rows = [
        {"messages": [{"role": "user", "content": f"Fix a {w}?"}, {"role": "assistant", "content": a}]}
        for w, a in zip(WORDS, answers, strict=True)
    ]
    path = tmp_path / "pool.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_adapter(source: ModelSource, folder: Path, seed: int) -> Path:
    model = new_adapter(load_model(source, device="cpu"), AdapterSpec(r=4, alpha=8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    save_adapter(model, folder)
    return folder


@pytest.fixture
def adapters(tiny: ModelSource, tmp_path: Path) -> list[Path]:
    """Two adapters on the tiny model, without provenance."""
    return [make_adapter(tiny, tmp_path / f"scorer{seed}", seed) for seed in (1, 2)]


@pytest.fixture
def forwards() -> Iterator[Callable[[], int]]:
    """Returns a function that says how many forward passes of a whole decoder there were."""
    count = 0

    def seen(module: torch.nn.Module, *_: object) -> None:
        nonlocal count
        count += type(module).__name__ == "LlamaModel"

    handle = torch.nn.modules.module.register_module_forward_hook(seen)
    yield lambda: count
    handle.remove()
