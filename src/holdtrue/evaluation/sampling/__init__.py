"""Samplers: whatever answers chat prompts, behind one port; imported on first use, since some need extras."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from holdtrue.evaluation.sampling.port import Answer, Decoding, Request, Sampler

if TYPE_CHECKING:
    from holdtrue.evaluation.sampling.endpoint import EndpointSampler
    from holdtrue.evaluation.sampling.in_process import TransformersSampler
    from holdtrue.evaluation.sampling.vllm import VllmSampler

_LATE = {
    "EndpointSampler": "endpoint",
    "TransformersSampler": "in_process",
    "VllmSampler": "vllm",
}

__all__ = [
    "Answer",
    "Decoding",
    "EndpointSampler",
    "Request",
    "Sampler",
    "TransformersSampler",
    "VllmSampler",
]


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
