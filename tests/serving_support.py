"""Adapters for tests of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from holdtrue.models import AdapterSpec, new_adapter, save_adapter
from holdtrue.models.digest import tree_digest
from holdtrue.serving.port import AdapterRef


def make_adapter(model: Any, folder: Path, seed: int, scale: float = 1.0) -> AdapterRef:
    """Write an adapter of random weights for a model."""
    adapted = new_adapter(model, AdapterSpec(r=2, alpha=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    save_adapter(adapted, folder)
    return AdapterRef(digest=tree_digest(folder), location=str(folder))
