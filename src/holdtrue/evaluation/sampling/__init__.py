"""Samplers: whatever answers chat prompts, behind one port; imported on first use, since some need extras."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdtrue.evaluation.sampling.port import Answer, Decoding, Request, Sampler
from holdtrue.late import late_names

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


__getattr__ = late_names(__name__, _LATE)
