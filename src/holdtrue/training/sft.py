"""``DefendedSFTTrainer``: TRL's ``SFTTrainer`` with defenses (extra ``trl``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from holdtrue.errors import SpecError
from holdtrue.training.mixin import DefenseMixin

try:
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise SpecError("DefendedSFTTrainer needs TRL: pip install 'holdtrue[trl]'") from error


def _check_kinds(defenses: Sequence[Any]) -> None:
    from holdtrue.defenses import parse

    for defense in parse(defenses):
        needs = defense.needs()
        if needs.requires or needs.aside or needs.pairs is not None:
            raise SpecError(
                f"{defense.name}, as it is set, reads rows that are no task's, and TRL's batches do not tell one kind "
                "from another: use DefendedTrainer, or holdtrue train"
            )


class DefendedSFTTrainer(DefenseMixin, SFTTrainer):
    """TRL's ``SFTTrainer`` that takes ``defenses=[...]``; data, masks and batches stay TRL's.

    Raises:
        NeedError: the model has no LoRA adapter (give ``peft_config`` or a ``PeftModel``).
        SpecError: packing or padding-free batches are asked for, whose rows the objective cannot tell apart, or
            another ``loss_type`` than ``nll``; or a defense reads rows of a kind, which TRL's batches do not tell.
    """

    def __init__(self, *args: Any, defenses: Sequence[Any] = (), **kwargs: Any) -> None:
        _check_kinds(defenses)
        super().__init__(*args, defenses=defenses, **kwargs)
        config: Any = self.args
        if config.packing or config.padding_free:
            raise SpecError("defenses need padded batches: set packing=False and padding_free=False")
        if config.loss_type != "nll":
            raise SpecError(f"loss_type {config.loss_type!r} is not supported beside defenses: set it to 'nll'")
