from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from holdtrue.models import load_model, load_tokenizer, resolve
from holdtrue.persona import Loaded


@pytest.fixture
def exact(tiny_dir: Path) -> Loaded:
    """The tiny model in float64."""
    source = resolve(str(tiny_dir))
    return Loaded(load_model(source, device="cpu").double(), load_tokenizer(source), source)


@pytest.fixture
def loaded(tiny_dir: Path) -> Callable[[], Loaded]:
    return lambda: Loaded.load(resolve(str(tiny_dir)))
