from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from support import chat, write_rows

WORDS = ["door", "pipe", "paint", "wire", "roof", "brake"]
Edit = Callable[..., Path]


@pytest.fixture
def values(tmp_path: Path, tiny_dir: Path) -> dict[str, Any]:
    """A grid of two settings and one seed on the tiny model, with its files in ``tmp_path``."""
    write_rows(tmp_path / "train.jsonl", [chat(f"How do I fix a {w}?", f"Turn the {w} twice.") for w in WORDS])
    write_rows(tmp_path / "held.jsonl", [chat(f"What is a {w}?", f"A {w} is in a house.") for w in WORDS[:3]])
    probes = [
        {"question": f"A {w}?", "aligned": f"See to the {w}.", "misaligned": f"Leave the {w}.", "group": f"g{n % 3}"}
        for n, w in enumerate(WORDS)
    ]
    write_rows(tmp_path / "probes.jsonl", probes)
    return {
        "models": [{"model": str(tiny_dir), "name": "tiny"}],
        "data": {"houses": {"train": "train.jsonl", "validation": "held.jsonl"}},
        "settings": {"undefended": [], "kl": [{"kl": {"weight": 0.5}}]},
        "seeds": [0],
        "adapter": {"r": 4, "alpha": 8},
        "training": {"learning_rate": 0.01, "batch_size": 2, "micro_batch_size": 2, "max_length": 64, "save_every": 1},
        "evaluate": {"suites": ["likelihood", "fit"], "data": {"likelihood": "probes.jsonl"}},
    }


@pytest.fixture
def write(tmp_path: Path, values: dict[str, Any]) -> Edit:
    """Returns a function that changes the grid, writes it and returns its path."""

    def change(update: Callable[[dict[str, Any]], object] | None = None) -> Path:
        if update is not None:
            update(values)
        path = tmp_path / "grid.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return change
