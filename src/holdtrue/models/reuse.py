"""One base model's weights kept in memory, from which a process that does run after run takes fresh models."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from holdtrue.models.loading import load_model, placement
from holdtrue.models.source import ModelSource

logger = logging.getLogger("holdtrue.models")
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class KeptModel:
    """Hands out models that are as if loaded afresh, and loads the weights once.

    The first model is never used: what is handed out is a copy of its modules, configs and buffers, whose parameters
    are new objects on the same memory. So an adapter, a hook, a changed mode or flag stays with the copy. What writes
    into the weights themselves is found by their bits' sum before the next copy is made, and then they are loaded
    again.
    """

    def __init__(self) -> None:
        self._key: Any = None
        self._first: PreTrainedModel | None = None
        self._sums: list[int] = []

    def model(self, source: ModelSource) -> PreTrainedModel:
        """Return a model of that source, on the device and in the numbers that ``load_model`` chooses.

        Raises:
            SpecError, RunError: as :func:`load_model`.
        """
        where = placement()
        key = (source, where.device, where.dtype)
        if self._first is not None and self._key == key and _sums(self._first) != self._sums:
            logger.warning("%s: its weights in memory were changed; they are loaded again", source.name)
            self._first = None
        if self._first is None or self._key != key:
            self._first = None  # so that two models are never held
            self._first, self._key = load_model(source), key
            self._sums = _sums(self._first)
        return _copy(self._first)


_kept: KeptModel | None = None


def keep_base_model() -> None:
    """From now on keep the last base model that :func:`base_model` loads; for processes that do many runs."""
    global _kept
    _kept = _kept or KeptModel()


def base_model(source: ModelSource) -> PreTrainedModel:
    """Return a base model as :func:`load_model` does, from memory where this process keeps it."""
    return load_model(source) if _kept is None else _kept.model(source)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    # deepcopy asks its memo first: parameters found there are not copied, and tied ones stay tied.
    memo: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()
    }
    return copy.deepcopy(model, memo)


def _sums(model: nn.Module) -> list[int]:
    return [
        int(w.detach().contiguous().view(_WORDS[w.element_size()]).sum(dtype=torch.int64)) for w in model.parameters()
    ]
