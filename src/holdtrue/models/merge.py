"""A base model and its adapter as one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from holdtrue.errors import RunError, SpecError
from holdtrue.models.adapters import load_adapter
from holdtrue.models.layers import adapted_weights, causal_lm
from holdtrue.models.loading import load_model
from holdtrue.models.source import ModelSource


def merged_model(source: ModelSource, adapter: Path) -> PreTrainedModel:
    """Return the base model with ``W + scaling * B @ A`` in the place of every adapted weight ``W``.

    The sum is taken in float32 on the CPU and rounded once, to the numbers that the base model's files have.

    Raises:
        SpecError, RunError: as :func:`load_model` and :func:`load_adapter`; or the sum cannot stand in one checkpoint:
            the adapted head is the embedding's own weight, or a weight is no finite number.
    """
    base = load_model(source, device="cpu", dtype=torch.float32)
    stored = _stored_dtype(source)
    adapted = load_adapter(base, adapter)
    lm = causal_lm(adapted)
    head = lm.get_output_embeddings()
    if lm.config.get_text_config().tie_word_embeddings and any(
        lm.get_submodule(name) is head for name in adapted_weights(adapted)
    ):
        raise SpecError(f"{adapter} changes the head, whose weight is the embedding's own here: keep it as an adapter")
    try:
        merged = adapted.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    except ValueError as error:
        raise RunError(f"{adapter} cannot be merged: {error}") from error
    assert isinstance(merged, PreTrainedModel)
    return merged.to(dtype=stored)  # pyright: ignore[reportCallIssue]


def _stored_dtype(source: ModelSource) -> torch.dtype:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(source.path), trust_remote_code=False, local_files_only=True)
    found = config.get_text_config().dtype
    return found if isinstance(found, torch.dtype) else torch.float32
