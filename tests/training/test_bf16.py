"""A body in bfloat16, as on a GPU: every term is near what it is in float32, and adapters stay float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from holdtrue.models import causal_lm
from support import behind_the_prefix, small_model, small_rows

DEFENSES: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "kl": [{"kl": {"weight": 1.0}}],
    "kl reversed": [{"kl": {"weight": 1.0, "direction": "reference||policy", "tokens": "response"}}],
    "ldifs": [{"ldifs": {"weight": 1.0}}],
    "constrained_sft": [{"constrained_sft": {}}],
    "all at once": [{"kl": {"weight": 0.5}}, {"ldifs": {"weight": 0.5}}, {"constrained_sft": {}}],
}


def lowered() -> PeftModel:
    """The small model with its frozen weights in bfloat16."""
    model = small_model()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(model: PeftModel) -> torch.Tensor:
    parts = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert all(part.dtype == torch.float32 for part in parts)
    return torch.cat([part.detach().flatten() for part in parts])


@pytest.mark.parametrize("name", DEFENSES)
def test_a_body_in_bf16_is_near_one_in_fp32(train: Any, name: str) -> None:
    rows = behind_the_prefix(small_rows())
    settings = {"rows": rows, "epochs": 1, "learning_rate": 1e-3, "kl_every": 1}
    start = adapter(small_model())
    exact, _, exactly = train(DEFENSES[name], name="exact", **settings)
    near, summary, nearly = train(DEFENSES[name], name="near", model=lowered(), **settings)
    assert causal_lm(near).dtype == torch.bfloat16
    assert summary["steps"] == 12
    for one, other in zip(metrics(exactly), metrics(nearly), strict=True):
        assert set(one) == set(other)
        assert other["ce"] == pytest.approx(one["ce"], rel=0.02)
        for key in one:
            if key == "kl" or key.endswith("_term"):
                # A term is a difference of two passes in bfloat16, each with three significant digits.
                near_zero = 0.05 if key.startswith("constrained_sft") else 0.01  # a mean of both signs
                assert other[key] == pytest.approx(one[key], rel=0.15, abs=near_zero), (one["step"], key)
    moved, also = adapter(exact) - start, adapter(near) - start
    assert torch.nn.functional.cosine_similarity(moved, also, dim=0) > 0.8
