"""The frozen reference: the policy itself with its adapter off, run once a batch for all who ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from holdtrue.models import causal_lm, decoder_blocks, without_adapter
from holdtrue.scoring import final_hidden


@dataclass(frozen=True)
class ReferenceOutputs:
    """``hidden``: (batch, length, width) final states after the final norm. ``blocks``: index -> block outputs."""

    hidden: Tensor
    blocks: dict[int, Tensor]


@contextlib.contextmanager
def captured_blocks(model: nn.Module, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of the decoder blocks ``indices`` while the context is open.

    They are what each block itself gives out, before another hook (a defense's ``forward``) changes it.
    """
    outputs: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(_module: nn.Module, _arguments: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    blocks = decoder_blocks(model)
    handles = [blocks[i].register_forward_hook(keep(i), prepend=True) for i in indices]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def reference_outputs(model: nn.Module, input_ids: Tensor, blocks: Sequence[int] = ()) -> ReferenceOutputs:
    """Run the model with its adapter off, without dropout or gradient, and leave it as it was found."""
    with without_adapter(model), captured_blocks(model, blocks) as outputs:
        hidden = final_hidden(causal_lm(model), input_ids)
    return ReferenceOutputs(hidden, outputs)
