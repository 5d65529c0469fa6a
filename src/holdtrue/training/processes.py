"""What the processes of a run make of their gradients together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


def over_processes(
    accelerator: Accelerator, gradients: Sequence[Tensor], reduction: Literal["sum", "mean"]
) -> list[Tensor]:
    """Return the sum or the mean over all processes of each gradient, with the same bits on each process."""
    if accelerator.num_processes == 1:
        return list(gradients)
    # In one piece: there are hundreds of small ones.
    whole = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction=reduction)
    assert isinstance(whole, Tensor)
    pieces = whole.split([gradient.numel() for gradient in gradients])
    return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
