"""The projection difference: how far a data set's answers lie along a persona vector beyond the model's own.

Chen et al. 2025 (arXiv 2507.21509).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from holdtrue.data import ChatRow, Message
from holdtrue.errors import NeedError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from holdtrue.models import ModelSource, VectorFile
    from holdtrue.screening.sample import WindowEncoder

PAIRS = "probes-select"
"""Shipped pairs that the default vector is made of."""
LABEL = "screen-own-answer"


class Direction(NamedTuple):
    """A unit vector at a block, (width,) float64, with the SHA-256 of what was read of its file."""

    unit: Tensor
    layer: int
    sha256: str


class Shape(NamedTuple):
    """A model's number of blocks, and the width of its residual stream."""

    blocks: int
    width: int


def shape_of(source: ModelSource) -> Shape:
    """Return a model's shape from its configuration; no weight is loaded."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from holdtrue.models import decoder_blocks

    config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    with torch.device("meta"):
        blocks = len(decoder_blocks(AutoModelForCausalLM.from_config(config)))
    return Shape(blocks, config.get_text_config(decoder=True).hidden_size)


def direction(file: VectorFile, source: ModelSource, shape: Shape, layer: int | None) -> Direction:
    """Return the unit vector of a file at a block, by default that of the defense ``steering``.

    Raises:
        NeedError: the file is of another model, holds directions, or has no vector other than zero for the block.
    """
    file.check(source, shape.blocks, shape.width)
    if file.info.kind != "vector":
        raise NeedError(f"{file.path} holds directions; a projection takes a vector, from holdtrue persona extract")
    index = 20 * shape.blocks // 28 if layer is None else layer
    if index not in file.tensors:
        has = ", ".join(map(str, file.tensors))
        raise NeedError(f"{file.path} has no vector for block {index}, which is asked for; it has {has}")
    vector = file.tensors[index].double()
    size = vector.norm()
    if not size > 0:
        raise NeedError(f"{file.path}: the vector for block {index} is zero: nothing lies along it")
    digest = hashlib.sha256(vector.numpy().tobytes()).hexdigest()
    return Direction(vector / size, index, digest)


def projections(model: nn.Module, encoder: WindowEncoder, rows: Sequence[ChatRow], along: Direction) -> list[float]:
    """Return each answer's mean state over its first tokens, projected on the unit vector; nan where none is read.

    a(x, y) · v,   a: the mean over the answer's tokens (without what ends the turn) of the block's output
    """
    from holdtrue.persona.states import mean_states

    means, tokens = mean_states(model, encoder, rows)
    values = means[:, along.layer] @ along.unit
    return values.where(tokens > 0, float("nan")).tolist()


def own_answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[ChatRow], tokens: int, seed: int
) -> list[ChatRow | None]:
    """Return the rows with the model's own answers, sampled at temperature 1, of at most ``tokens`` tokens.

    Returns:
        a row each; ``None`` where the conversation leaves no room for an answer, or the answer is empty.

    Raises:
        DataError: the chat template refuses a conversation.
    """
    from holdtrue.evaluation.sampling import Decoding, Request, TransformersSampler
    from holdtrue.scoring import position_limit
    from holdtrue.screening.sample import WindowEncoder

    encoder = WindowEncoder(tokenizer, tokens, position_limit(model))
    assert encoder.max_length is not None
    prompts = [_prompt(row) for row in rows]
    fits = [i for i, p in enumerate(prompts) if p and len(encoder.prompt_ids(p)) + tokens <= encoder.max_length]
    requests = [Request(prompts[i], _seed(seed, rows[i])) for i in fits]
    found: list[ChatRow | None] = [None] * len(rows)
    sampler = TransformersSampler(model, tokenizer, batch_size=max(1, len(requests)))
    for answers in sampler.sample(requests, Decoding(temperature=1.0, max_new_tokens=tokens)):
        for answer in answers:
            if answer.text.strip():
                place = fits[answer.index]
                found[place] = ChatRow((*prompts[place], Message("assistant", answer.text)))
    return found


def _prompt(row: ChatRow) -> tuple[Message, ...]:
    """Return the turns before the answer; none where the row has no trained answer at its end."""
    last = row.messages[-1]
    return row.messages[:-1] if last.role == "assistant" and last.weight else ()


def _seed(seed: int, row: ChatRow) -> int:
    return int.from_bytes(hashlib.sha256(f"{LABEL}/{seed}/{row.line}".encode()).digest()[:4], "big")
