from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from holdtrue.defenses import parse
from holdtrue.training import TrainingSpec, fit
from support import small_model, small_rows


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[PeftModel, dict[str, Any], Path]]:
    """Train the small model with given defenses and settings; return model, summary and folder."""

    def run(
        defenses: Any = (), *, name: str = "run", model: PeftModel | None = None, rows: Any = None, **settings: Any
    ) -> tuple[PeftModel, dict[str, Any], Path]:
        extra = {
            k: settings.pop(k)
            for k in ("stop", "progress", "resume", "validation", "fast", "reference_cache", "probe")
            if k in settings
        }
        values = {"batch_size": 4, "micro_batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "save_every": 4}
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        model = model or small_model()
        summary = fit(
            model=model,
            tokenizer=None,
            rows=small_rows() if rows is None else rows,
            validation=extra.pop("validation", None),
            spec=TrainingSpec(**(values | settings)),
            defenses=parse(defenses),
            folder=folder,
            **extra,
        )
        return model, summary, folder

    return run
