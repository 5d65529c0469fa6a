"""Persona vectors: the difference of mean hidden states between answers with a trait and answers without it.

Chen et al. 2025 (arXiv 2507.21509).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from holdtrue.data import ChatEncoder, ChatRow, Message
from holdtrue.errors import RunError
from holdtrue.persona.states import Progress, mean_states
from holdtrue.scoring import position_limit

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from holdtrue.evaluation import Probes
    from holdtrue.models import ModelSource, VectorFile

WINDOW = 256
"""Answers (or pairs) whose means are in memory at once: 0.2 GB for a model of 28 blocks of width 3,584."""


class Loaded(NamedTuple):
    """A base model in memory, its tokenizer, and where it came from."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource

    @classmethod
    def load(cls, source: ModelSource) -> Loaded:
        """Load a resolved model and its tokenizer."""
        from holdtrue.models import load_model, load_tokenizer

        return cls(load_model(source), load_tokenizer(source), source)

    def encoder(self) -> ChatEncoder:
        """Return an encoder that cuts what the model's positions do not hold."""
        return ChatEncoder(self.tokenizer, max_length=position_limit(self.model))


def extract_from_pairs(
    loaded: Loaded, probes: Probes, out: str | Path, *, trait: str = "misalignment", progress: Progress | None = None
) -> VectorFile:
    """Write the vectors of pairs of given answers: mean of the misaligned ones minus mean of the aligned ones.

    e_l = mean over pairs of (mean over tokens of h_l of the misaligned answer − the same of the aligned answer)

    A variant of ours: no answer is sampled and nobody judges, so it takes seconds, but the answers are not the model's
    own.

    Args:
        loaded: the base model.
        probes: pairs, as :func:`holdtrue.evaluation.read_probes` reads them.
        out: the safetensors file to write.
        trait: what the pairs differ in, for the record.
        progress: called with (answers done, answers there are).

    Raises:
        RunError: no pair is left (all are cut by the model's positions), or the file cannot be written.
    """
    encoder, total, kept = loaded.encoder(), None, 0
    for start in range(0, len(probes.rows), WINDOW):
        pairs = probes.rows[start : start + WINDOW]
        rows = [_row(p.question, answer) for p in pairs for answer in (p.misaligned, p.aligned)]
        tell = _shifted(progress, 2 * start, 2 * len(probes.rows))
        means, tokens = mean_states(loaded.model, encoder, rows, progress=tell)
        whole = (tokens[0::2] > 0) & (tokens[1::2] > 0)
        part = (means[0::2] - means[1::2])[whole].sum(0)
        total, kept = part if total is None else total + part, kept + int(whole.sum())
    if total is None or not kept:
        raise RunError(f"no pair has two answers that fit {loaded.source.name}: shorten them, or use another model")
    return write_difference(
        loaded,
        total / kept,
        out,
        source="pairs",
        trait=trait,
        material={"pairs": probes.sha256},
        counts={"pairs": len(probes.rows), "pairs_kept": kept},
    )


def mean_difference(
    loaded: Loaded, positive: Sequence[ChatRow], negative: Sequence[ChatRow], progress: Progress | None = None
) -> Tensor:
    """Return the mean over answers with the trait minus that over answers without it, (blocks, width) float64.

    Raises:
        RunError: a side has no answer with any token.
    """
    both = len(positive) + len(negative)
    with_it = _mean(loaded, "with the trait", positive, _shifted(progress, 0, both))
    return with_it - _mean(loaded, "without the trait", negative, _shifted(progress, len(positive), both))


def _mean(loaded: Loaded, name: str, rows: Sequence[ChatRow], progress: Progress | None) -> Tensor:
    encoder, total, kept = loaded.encoder(), None, 0
    for start in range(0, len(rows), WINDOW):
        tell = _shifted(progress, start, len(rows))
        means, tokens = mean_states(loaded.model, encoder, rows[start : start + WINDOW], progress=tell)
        part = means[tokens > 0].sum(0)
        total, kept = part if total is None else total + part, kept + int((tokens > 0).sum())
    if total is None or not kept:
        raise RunError(f"no answer {name} is left to average")
    return total / kept


def _row(question: str, answer: str) -> ChatRow:
    return ChatRow((Message("user", question), Message("assistant", answer)))


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


def write_difference(loaded: Loaded, vectors: Tensor, out: str | Path, **info: Any) -> VectorFile:
    """Write (blocks, width) vectors with what is known of the model."""
    from holdtrue.models import VectorInfo, write_vectors

    source = loaded.source
    described = VectorInfo(
        model=source.name,
        revision=source.revision,
        blocks=vectors.shape[0],
        width=vectors.shape[1],
        version=version("holdtrue"),
        **info,
    )
    return write_vectors(out, dict(enumerate(vectors)), described)
