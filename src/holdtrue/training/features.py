"""What feature terms read: outputs of blocks and named modules, everywhere or at the chat template's prefix alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from holdtrue.data import ChatEncoder
from holdtrue.data.batching import NEVER_IN_A_STEP, RIDING
from holdtrue.defenses import Features
from holdtrue.defenses.base import Needs, Place
from holdtrue.errors import HoldtrueError, NeedError
from holdtrue.models import decoder_blocks
from holdtrue.training.batch import Batch
from holdtrue.training.reference import Reference, ReferenceOutputs


@dataclass(frozen=True)
class FeatureTerm:
    """What one defense's feature term reads.

    Attributes:
        modules: the modules whose outputs it is given, by place.
        prefix: the tokens that it is confined to; ``None`` where it sees whole rows.
        recorded: place -> (prefix, width), what the reference gives out at the prefix; ``None`` where it is not asked
            for, or has to read each batch.
    """

    modules: Mapping[Place, nn.Module]
    prefix: tuple[int, ...] | None = None
    recorded: Mapping[Place, Tensor] | None = None

    def covered(self, batch: Batch) -> Tensor:
        """Return which rows the term covers, (batch,) bool: what rides along for another defense is none of them."""
        if self.prefix is not None:
            return batch.begins(self.prefix)
        return batch.mask.any(1) & (batch.kind != RIDING)

    def total(
        self,
        values: Callable[[Features], Tensor],
        batch: Batch,
        outputs: Mapping[Place, Tensor],
        reference: ReferenceOutputs | None,
    ) -> Tensor:
        """Return the sum over the covered rows of a micro-batch of ``values``, the defense's formula; 0 for none."""
        covered = self.covered(batch)
        if not bool(covered.any()):
            return torch.zeros((), device=covered.device)
        policy = {place: outputs[place] for place in self.modules}
        if self.prefix is None:
            frozen: Any = None if reference is None else reference.blocks
            features = Features(policy, frozen and {place: frozen[place] for place in policy}, batch.mask, batch.kind)
        else:
            size, rows, recorded = len(self.prefix), len(covered), self.recorded
            features = Features(
                {place: output[:, :size] for place, output in policy.items()},
                None if recorded is None else {place: recorded[place].expand(rows, -1, -1) for place in policy},
                covered.unsqueeze(1).expand(-1, size),
                batch.kind,
            )
        return torch.where(covered, values(features), 0.0).sum()


def feature_term(
    name: str, needs: Needs, model: nn.Module, reference: Reference, tokenizer: Any, rows: Any
) -> FeatureTerm:
    """Find what the defense ``name`` asks for, and read the reference where that is done once.

    Args:
        name, needs: the defense's.
        model: the policy.
        reference: its frozen self.
        tokenizer: with the chat template whose prefix may be asked for, or ``None``.
        rows: the training rows, or ``None``.

    Raises:
        NeedError: a module is not there, or the prefix is not known or begins no row.
    """
    blocks = decoder_blocks(model)
    modules: dict[Place, nn.Module] = {i: blocks[i] for i in (needs.blocks(len(blocks)) if needs.blocks else ())}
    for end in needs.modules:
        found = {
            f"{index}.{inner}": module
            for index, block in enumerate(blocks)
            for inner, module in block.named_modules()
            if f".{inner}".endswith(f".{end}")
        }
        if not found:
            raise NeedError(
                f"{name} needs the outputs of modules named {end!r}, and this model's decoder blocks have none: its "
                "architecture computes them in another way. Leave the defense out, or use another model"
            )
        modules |= found
    if not needs.prefix:
        if needs.modules and needs.reference:
            raise TypeError(
                f"{name}: the reference of named modules is read at the prefix alone; set prefix in its needs"
            )
        return FeatureTerm(modules)
    prefix = _prefix(name, tokenizer, rows)
    return FeatureTerm(modules, prefix, reference.recorded(prefix, modules) if needs.reference else None)


def _prefix(name: str, tokenizer: Any, rows: Any) -> tuple[int, ...]:
    if tokenizer is None:
        raise NeedError(f"{name} needs the chat template: give the trainer the tokenizer as processing_class")
    try:
        prefix = ChatEncoder(tokenizer).prefix_ids()
    except HoldtrueError as error:
        raise NeedError(f"{name} needs the chat template's prefix, and cannot get it: {error}") from error
    if not prefix:
        raise NeedError(
            f"{name} needs a chat template that puts tokens before the user's words, and this one puts none"
        )
    if rows is not None and not any(_begins(row, prefix) for row in rows if row.get("kind", 0) not in NEVER_IN_A_STEP):
        raise NeedError(
            f"{name} holds the chat template's prefix, the {len(prefix)} tokens before the user's words in a row "
            "without a system prompt of its own, and no training row begins with them: take out system prompts, or "
            "the defense"
        )
    return tuple(prefix)


def _begins(row: Mapping[str, Any], prefix: Sequence[int]) -> bool:
    return list(row.get("input_ids", ())[: len(prefix)]) == prefix
