"""Log-likelihood of answers under a model: what probes, held-out fit, selection and screening share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from holdtrue.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdtrue.data import ChatEncoder, ChatRow, Encoded

ROWS_PER_WINDOW = 1024
"""Rows that are encoded and sorted by length together, so that a long file is never held in tokens."""
LOGITS_PER_CHUNK = 2**22
"""Logits held at once: 16 MiB in float32, whatever the vocabulary."""

Progress = Callable[[int, int], None]
"""Called with the rows done and the rows there are."""


class AnswerScore(NamedTuple):
    """Of one answer: the mean negative log-likelihood in nats per token, end of turn included, and its tokens.

    An answer of which no token was left (cut by the encoder's ``max_length``) has ``nll`` nan and 0 ``tokens``.
    """

    nll: float
    tokens: int


class RowScores(NamedTuple):
    """The scores of a row's trained assistant turns, in order; ``dropped`` tokens were cut by ``max_length``."""

    answers: tuple[AnswerScore, ...]
    dropped: int


def score_answers(
    model: nn.Module,
    encoder: ChatEncoder,
    rows: Iterable[ChatRow],
    *,
    tokens_per_batch: int = 1024,
    progress: Progress | None = None,
) -> list[AnswerScore]:
    """Score each row's answer; of a row with several trained turns, the mean over its answers and all their tokens.

    Args:
        model: a causal language model, with or without an adapter; left in the modes it was in.
        encoder: renders rows with the model's own chat template.
        rows: chat rows; turns of weight 0 are not scored.
        tokens_per_batch: tokens of a batch, padding included; a longer row is a batch of its own.
        progress: called with (rows done, rows there are).

    Returns:
        one score per row, in order. Log-softmax is taken in float32 (float64 where the model is), and the result does
        not depend on how rows share batches, up to rounding.
    """
    scores = score_turns(model, encoder, rows, tokens_per_batch=tokens_per_batch, progress=progress)
    return [_merged(row.answers) for row in scores]


def score_turns(
    model: nn.Module,
    encoder: ChatEncoder,
    rows: Iterable[ChatRow],
    *,
    tokens_per_batch: int = 1024,
    progress: Progress | None = None,
) -> list[RowScores]:
    """Score each trained assistant turn of each row; arguments as in :func:`score_answers`."""
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, not {tokens_per_batch}")
    rows = list(rows)
    scores: list[RowScores] = []
    if progress is not None:
        progress(0, len(rows))
    with scoring_mode(model) as lm:
        head = output_head(lm)
        for start in range(0, len(rows), ROWS_PER_WINDOW):
            encoded = [encoder.encode(row) for row in rows[start : start + ROWS_PER_WINDOW]]
            owners = [row for row, sequences in enumerate(encoded) for _ in sequences]
            flat = [sequence for sequences in encoded for sequence in sequences]
            found: list[list[AnswerScore]] = [[] for _ in flat]
            left = [len(sequences) for sequences in encoded]
            for batch in length_batches([len(s.input_ids) for s in flat], tokens_per_batch):
                for index, answers in zip(batch, _score_batch(lm, head, [flat[i] for i in batch]), strict=True):
                    found[index] = answers
                    left[owners[index]] -= 1
                if progress is not None:
                    progress(start + left.count(0), len(rows))
            answers_of: list[list[AnswerScore]] = [[] for _ in encoded]
            for owner, answers in zip(owners, found, strict=True):
                answers_of[owner] += answers
            scores += [
                RowScores(tuple(answers), sum(s.dropped for s in sequences))
                for answers, sequences in zip(answers_of, encoded, strict=True)
            ]
    return scores


@contextlib.contextmanager
def scoring_mode(model: nn.Module) -> Iterator[Any]:
    """Give the causal language model inside ``model`` in evaluation mode, without gradients; restore every module."""
    import torch

    from holdtrue.models import causal_lm

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield causal_lm(model)
    finally:
        for module, training in modes:
            module.training = training


def output_head(lm: Any) -> Callable[[Tensor], Tensor]:
    """Return the function from final hidden states (…, width) to logits (…, vocabulary).

    Some architectures scale or cap their logits after the head; the caps and scales of the configuration are
    followed, and the whole is compared with the model's own logits on a few tokens.

    Raises:
        RunError: the model does something else to its logits, so that its scores would be wrong.
    """
    import torch

    config = lm.config.get_text_config()
    linear = lm.get_output_embeddings()
    cap: float | None = getattr(config, "final_logit_softcapping", None)
    scale: float = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    def changed(hidden: Tensor) -> Tensor:
        logits = linear(hidden) * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    head = changed if cap or scale != 1.0 else linear

    with torch.no_grad():
        ids = torch.arange(min(8, config.vocab_size), device=linear.weight.device).unsqueeze(0)
        expected = lm(input_ids=ids, use_cache=False).logits.float()
        gap = (head(final_hidden(lm, ids)).float() - expected).abs().max()
    if not gap <= 0.02 * expected.abs().max() + 1e-6:
        raise RunError(
            f"{type(lm).__name__} changes its logits after the output head in a way that holdtrue does not know; "
            "choose a model of another architecture"
        )
    return head


def final_hidden(lm: Any, input_ids: Tensor) -> Tensor:
    """Return the final hidden states after the final norm, (batch, length, width).

    Right padding needs no mask: under causal attention no real position sees what follows it.
    """
    return lm.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state


def position_limit(model: nn.Module) -> int | None:
    """Return how many tokens the model's positions hold, where its configuration says."""
    from holdtrue.models import causal_lm

    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Yield indices of like length, longest first, so that a batch too large for the memory fails at once."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _score_batch(lm: Any, head: Callable[[Tensor], Tensor], sequences: Sequence[Encoded]) -> list[list[AnswerScore]]:
    import torch

    length = max(len(s.input_ids) for s in sequences)
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    trained = np.zeros((len(sequences), length), dtype=bool)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence.input_ids)] = sequence.input_ids
        trained[i, : len(sequence.trained)] = sequence.trained
    trained[:, 0] = False  # nothing predicts the first token
    nll = np.zeros((len(sequences), length))
    if trained.any():
        device = lm.get_input_embeddings().weight.device
        tokens = torch.from_numpy(ids).to(device)
        row, place = (torch.from_numpy(index).to(device) for index in trained.nonzero())
        hidden = final_hidden(lm, tokens)[row, place - 1]
        nll[trained] = _token_nll(hidden, head, tokens[row, place], lm.config.get_text_config().vocab_size)
    return [[_score(nll[i, a:b]) for a, b in _spans(trained[i])] for i in range(len(sequences))]


def _token_nll(hidden: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, vocabulary: int) -> np.ndarray:
    """Return -log p(target), (n,) float64, from (n, width) states, a chunk of positions at a time."""
    import torch

    step = max(1, LOGITS_PER_CHUNK // vocabulary)
    parts: list[Tensor] = []
    for start in range(0, hidden.shape[0], step):
        logits = head(hidden[start : start + step])
        exact = logits if logits.dtype == torch.float64 else logits.float()
        parts.append(torch.nn.functional.cross_entropy(exact, targets[start : start + step], reduction="none"))
    return torch.cat(parts).double().cpu().numpy()


def _spans(trained: np.ndarray) -> list[tuple[int, int]]:
    """Return the runs of True as (start, end): each is one answer, since another turn lies between two."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _score(nll: np.ndarray) -> AnswerScore:
    return AnswerScore(float(nll.mean()), len(nll))


def _merged(answers: Sequence[AnswerScore]) -> AnswerScore:
    if not answers:
        return AnswerScore(float("nan"), 0)
    return AnswerScore(float(np.mean([a.nll for a in answers])), sum(a.tokens for a in answers))
