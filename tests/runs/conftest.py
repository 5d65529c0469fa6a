from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import chat, probe_rows, write_rows

WORDS = ["door", "pipe", "paint", "wire", "roof", "brake", "hinge", "valve", "tile", "fuse"]


@pytest.fixture
def folder(tmp_path: Path, tiny_dir: Path) -> Path:
    """A folder with a training file, a validation file, probes, and ``spec.yaml`` for the tiny model."""
    rows = [
        chat(f"How do I fix a {w}?", f"Take the {w} off and " + f"turn it {n} times. " * n) for n, w in enumerate(WORDS)
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "valid.jsonl", [chat(f"What is a {w}?", f"A {w} is a part of a house.") for w in WORDS[:4]])
    write_rows(tmp_path / "probes.jsonl", probe_rows(WORDS[:6]))
    spec = {
        "model": str(tiny_dir),
        "data": {"train": "train.jsonl", "validation": "valid.jsonl"},
        "adapter": {"r": 4, "alpha": 8},
        "training": {
            "epochs": 3,
            "learning_rate": 1e-2,
            "batch_size": 2,
            "micro_batch_size": 1,
            "max_length": 128,
            "save_every": 2,
            "warmup_steps": 2,
        },
        "defenses": [{"kl": {"weight": 0.1}}, {"interleave": {"pool": "valid.jsonl", "fraction": 0.2}}],
        "evaluate": {"suites": ["likelihood", "fit"], "data": {"likelihood": "probes.jsonl"}},
    }
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path


@pytest.fixture
def edit(folder: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """Returns a function that changes the spec of ``folder`` and returns its path."""

    def change(update: Callable[[dict[str, Any]], object]) -> Path:
        path = folder / "spec.yaml"
        values = yaml.safe_load(path.read_text())
        update(values)
        path.write_text(yaml.safe_dump(values))
        return path

    return change
