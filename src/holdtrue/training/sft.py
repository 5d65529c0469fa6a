"""``DefendedSFTTrainer``: TRL's ``SFTTrainer`` with defenses (extra ``trl``)."""

from __future__ import annotations

from typing import Any

from holdtrue.errors import SpecError
from holdtrue.training.mixin import DefenseMixin

try:
    from trl.trainer.sft_trainer import SFTTrainer
except ImportError as error:
    raise SpecError("DefendedSFTTrainer needs TRL: pip install 'holdtrue[trl]'") from error


class DefendedSFTTrainer(DefenseMixin, SFTTrainer):
    """TRL's ``SFTTrainer`` that takes ``defenses=[...]``; data, masks and batches stay TRL's.

    Raises:
        NeedError: the model has no LoRA adapter (give ``peft_config`` or a ``PeftModel``).
        SpecError: packing or padding-free batches are asked for, whose rows the objective cannot tell apart, or
            another ``loss_type`` than ``nll``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config: Any = self.args
        if config.packing or config.padding_free:
            raise SpecError("defenses need padded batches: set packing=False and padding_free=False")
        if config.loss_type != "nll":
            raise SpecError(f"loss_type {config.loss_type!r} is not supported beside defenses: set it to 'nll'")
