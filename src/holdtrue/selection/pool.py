"""Score a pool under the aligned model and under each scorer: one base model in memory, one adapter at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from holdtrue.errors import RunError
from holdtrue.selection.cache import ScoreFile, ScoreKey

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from holdtrue.data import ChatSummary
    from holdtrue.models import ModelSource
    from holdtrue.scoring import Progress
    from holdtrue.selection.scorers import Scorer

WINDOW = 512
"""Rows that are scored between two writes to the cache."""


class PoolScores(NamedTuple):
    """Mean negative log-likelihoods per answer token, in nats, end of turn included; nan where there is none.

    Attributes:
        aligned: (n,) under the base model.
        misaligned: (K, n) under each scorer, in their order.
        cached: how many of the K + 1 passes were on disk already.
    """

    aligned: np.ndarray
    misaligned: np.ndarray
    cached: int


def score_pool(
    pool: ChatSummary,
    model: ModelSource,
    scorers: Sequence[Scorer],
    *,
    max_length: int | None,
    cache: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> PoolScores:
    """Score each row of a pool under the base model and under each scorer; what is on disk is not scored again.

    Args:
        pool: of a valid chat file, as ``validate_chat`` returns it.
        model: the base model; loaded only when something is left to score.
        scorers: adapters on it.
        max_length: tokens after which rows are cut, as in training.
        cache: the cache folder; by default the user's.
        device, dtype: where the model runs and in which numbers; by default as for training.
        progress: called with (rows done, rows there are), over all K + 1 passes; what it raises stops the work, and
            finished windows are kept.

    Raises:
        RunError: the pool changed meanwhile, the cache cannot be written, or a model cannot be loaded.
        DataError: a row that the chat template refuses.
    """
    from holdtrue.models import placement

    chosen = placement(device, dtype)
    passes: list[Scorer | None] = [None, *scorers]
    found: list[list[float]] = []
    cached = 0
    base: _Base | None = None
    for number, scorer in enumerate(passes):
        key = ScoreKey(
            pool=pool.sha256,
            rows=pool.rows,
            model=model.revision,
            adapter="none" if scorer is None else scorer.sha256,
            max_length=max_length,
            dtype=str(chosen.dtype),
        )
        with ScoreFile.open(key, cache) as file:
            if len(file.scores) >= pool.rows:
                cached += 1
            else:
                base = base or _Base(model, max_length, device, dtype)
                base.score(pool, scorer, file, _part(progress, number, len(passes), pool.rows))
            found.append(file.scores[: pool.rows])
        if progress is not None:
            progress((number + 1) * pool.rows, len(passes) * pool.rows)
    return PoolScores(np.array(found[0]), np.array(found[1:]), cached)


class _Base:
    """The base model with its encoder, loaded once."""

    def __init__(
        self,
        source: ModelSource,
        max_length: int | None,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        from holdtrue.data import ChatEncoder
        from holdtrue.models import base_model, load_model, load_tokenizer

        self._encoder = ChatEncoder(load_tokenizer(source), max_length=max_length)
        # A process that keeps the base model, as a grid's does, would hold two otherwise.
        usual = device is None and dtype is None
        self._model = base_model(source) if usual else load_model(source, device=device, dtype=dtype)

    def score(self, pool: ChatSummary, scorer: Scorer | None, file: ScoreFile, progress: Progress | None) -> None:
        from holdtrue.data import read_chat
        from holdtrue.scoring import score_answers

        rows = islice(read_chat(pool.path, kind="safe"), len(file.scores), None)
        with adapted(self._model, None if scorer is None else scorer.folder) as model:
            while len(file.scores) < pool.rows:
                window = list(islice(rows, min(WINDOW, pool.rows - len(file.scores))))
                if not window:
                    raise RunError(f"{pool.path} changed while it was scored: start the run again")
                scores = score_answers(
                    model, self._encoder, window, progress=_shifted(progress, len(file.scores), pool.rows)
                )
                file.append([score.nll for score in scores])


@contextlib.contextmanager
def adapted(model: PreTrainedModel, folder: Path | None) -> Iterator[nn.Module]:
    """Yield the model with the adapter in ``folder`` on it, or as it is; afterwards it is the base model again."""
    from holdtrue.models import load_adapter

    if folder is None:
        yield model
        return
    with_it = load_adapter(model, folder)
    try:
        yield with_it
    finally:
        with_it.unload()


def _shifted(progress: Progress | None, start: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(start + done, total)


def _part(progress: Progress | None, number: int, passes: int, rows: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(number * rows + done, passes * rows)
