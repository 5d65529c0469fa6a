"""Base models and adapters: where they come from, how they load, and what of them may be trusted.

Names that need torch are imported on first use, so that ``import holdtrue.models`` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdtrue.late import late_names
from holdtrue.models.adapter_spec import AdapterSpec
from holdtrue.models.source import ALIASES, ModelSource, resolve

if TYPE_CHECKING:
    from holdtrue.models.adapter_files import AdapterFile, read_adapter, write_adapter
    from holdtrue.models.adapters import load_adapter, new_adapter, save_adapter, without_adapter
    from holdtrue.models.checkpoint import Checkpoint, Factors
    from holdtrue.models.layers import adapted_weights, causal_lm, decoder_blocks
    from holdtrue.models.loading import Placement, end_tokens, generation_config, load_model, load_tokenizer, placement
    from holdtrue.models.reuse import base_model, keep_base_model
    from holdtrue.models.vectors import VectorFile, VectorInfo, read_vectors, write_vectors

_LATE = {
    "AdapterFile": "adapter_files",
    "read_adapter": "adapter_files",
    "write_adapter": "adapter_files",
    "load_adapter": "adapters",
    "new_adapter": "adapters",
    "save_adapter": "adapters",
    "without_adapter": "adapters",
    "Checkpoint": "checkpoint",
    "Factors": "checkpoint",
    "adapted_weights": "layers",
    "causal_lm": "layers",
    "decoder_blocks": "layers",
    "Placement": "loading",
    "end_tokens": "loading",
    "generation_config": "loading",
    "load_model": "loading",
    "load_tokenizer": "loading",
    "placement": "loading",
    "base_model": "reuse",
    "keep_base_model": "reuse",
    "VectorFile": "vectors",
    "VectorInfo": "vectors",
    "read_vectors": "vectors",
    "write_vectors": "vectors",
}

__all__ = [
    "ALIASES",
    "AdapterFile",
    "AdapterSpec",
    "Checkpoint",
    "Factors",
    "ModelSource",
    "Placement",
    "VectorFile",
    "VectorInfo",
    "adapted_weights",
    "base_model",
    "causal_lm",
    "decoder_blocks",
    "end_tokens",
    "generation_config",
    "keep_base_model",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "new_adapter",
    "placement",
    "read_adapter",
    "read_vectors",
    "resolve",
    "save_adapter",
    "without_adapter",
    "write_adapter",
    "write_vectors",
]


__getattr__ = late_names(__name__, _LATE)
