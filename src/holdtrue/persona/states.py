"""Hidden states of answers: means over an answer's tokens, and how a tuned model's differ from the base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from holdtrue.scoring import final_hidden, length_batches, scoring_mode
from holdtrue.training.reference import captured_blocks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdtrue.data import ChatEncoder, ChatRow

Progress = Callable[[int, int], None]
"""Called with the answers done and the answers there are."""


class Answers(NamedTuple):
    """A batch of answers: the tokens and the answers' own places, both (batch, length), and the rows' indices."""

    input_ids: Tensor
    answer: Tensor
    rows: list[int]


def mean_states(
    model: nn.Module,
    encoder: ChatEncoder,
    rows: Sequence[ChatRow],
    *,
    tokens_per_batch: int = 1024,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each answer's mean output of each block over the answer's tokens.

    The tokens are those of the assistant's turns of weight 1, without what ends a turn. An answer of which none is left
    (cut by the encoder's ``max_length``, or empty) counts nothing.

    Args:
        model: a causal language model, with or without an adapter; left in the modes it was in.
        encoder: renders rows with the model's own chat template.
        rows: chat rows. A row that the template cuts into several sequences is averaged over all their tokens.
        tokens_per_batch: tokens of a batch, padding included.
        progress: called with (rows done, rows there are).

    Returns:
        the means, (rows, blocks, width) float64 on the CPU, zero where a row counts nothing; and the answers' tokens,
        (rows,) float64.
    """
    import torch

    from holdtrue.models import decoder_blocks

    blocks = len(decoder_blocks(model))
    width = _width(model)
    sums = torch.zeros(len(rows), blocks, width, dtype=torch.float64)
    tokens = torch.zeros(len(rows), dtype=torch.float64)
    with scoring_mode(model) as lm:
        for batch in answer_batches(lm, encoder, rows, tokens_per_batch, progress):
            with captured_blocks(lm, range(blocks)) as outputs:
                final_hidden(lm, batch.input_ids)
            mask = batch.answer.double()
            index = torch.tensor(batch.rows)
            tokens.index_add_(0, index, mask.sum(1).cpu())
            for block, h in outputs.items():
                sums[:, block].index_add_(0, index, (h.double() * mask.unsqueeze(-1)).sum(1).cpu())
    return sums / tokens.clamp_min(1)[:, None, None], tokens


def answer_batches(
    lm: nn.Module, encoder: ChatEncoder, rows: Sequence[ChatRow], tokens_per_batch: int, progress: Progress | None
) -> Iterator[Answers]:
    """Yield the rows' sequences that have an answer, right-padded, those of like length together."""
    import torch

    encoded = [(index, sequence) for index, row in enumerate(rows) for sequence in encoder.encode(row)]
    device = next(lm.parameters()).device
    done = 0
    if progress is not None:
        progress(0, len(encoded))
    for batch in length_batches([len(sequence.input_ids) for _, sequence in encoded], tokens_per_batch):
        longest = max(len(encoded[i][1].input_ids) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        answer = torch.zeros(len(batch), longest, dtype=torch.bool)
        for place, i in enumerate(batch):
            sequence = encoded[i][1]
            ids[place, : len(sequence.input_ids)] = torch.tensor(sequence.input_ids)
            own = [t and id not in encoder.control_ids for id, t in zip(*sequence[:2], strict=True)]
            answer[place, : len(own)] = torch.tensor(own)
        if answer.any():
            yield Answers(ids.to(device), answer.to(device), [encoded[i][0] for i in batch])
        done += len(batch)
        if progress is not None:
            progress(done, len(encoded))


def _width(model: nn.Module) -> int:
    from holdtrue.models import causal_lm

    return causal_lm(model).config.get_text_config(decoder=True).hidden_size
