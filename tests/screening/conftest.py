from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdtrue.models import ModelSource, resolve

WORDS = ["door", "pipe", "paint", "wire", "roof", "brake", "hinge", "valve", "tile", "fuse"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that a module's tests share: the default vector and scorers are made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def source(tiny_dir: Path) -> ModelSource:
    return resolve(str(tiny_dir))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty rows, so that a pass takes several batches."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"How do I fix {w} number {n}?"},
                {"role": "assistant", "content": f"Take the {w} off and " + f"turn it {n} times. " * (1 + n % 4)},
            ]
        }
        for n in range(4)
        for w in WORDS
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
