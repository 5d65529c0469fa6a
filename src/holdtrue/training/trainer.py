"""``DefendedTrainer``: a ``transformers.Trainer`` that tunes with defenses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from holdtrue.data.batching import Collator, WindowSampler, WithGhost
from holdtrue.errors import RunError
from holdtrue.models.digest import file_digest
from holdtrue.training.mixin import DefenseMixin

PARTIAL = "partial"
SEAL = "holdtrue_seal.json"


class DefendedTrainer(DefenseMixin, transformers.Trainer):
    """A ``transformers.Trainer`` that takes ``defenses=[...]``.

    Rows have ``input_ids`` and ``trained`` or ``labels`` (see :class:`holdtrue.data.batching.Collator`), and may have
    ``length``, ``kind`` and ``ce``. Batches are made by :class:`holdtrue.data.batching.WindowSampler`; the rows of an
    optimizer step do not depend on how they are split over micro-batches and ranks.

    Args:
        model: a ``PeftModel`` with a LoRA adapter.
        args: ``transformers.TrainingArguments``.
        defenses: values, names or mappings, in any order.
        kl_every: optimizer steps between measurements of the KL to the reference where no defense pays for one.
        kwargs: everything else that ``transformers.Trainer`` takes.

    Raises:
        NeedError: the model has no adapter, or its output head is trainable.
        RunError: the model computes its logits in a way that is not known; or, while training, it diverged.
        SpecError: an unknown defense or parameter.
    """

    def __init__(
        self,
        model: Any,
        args: transformers.TrainingArguments,
        *,
        defenses: Sequence[Any] = (),
        kl_every: int = 0,
        **kwargs: Any,
    ) -> None:
        tokenizer = kwargs.get("processing_class")
        pad = getattr(tokenizer, "pad_token_id", None)
        kwargs.setdefault("data_collator", Collator(0 if pad is None else pad))
        args.remove_unused_columns = False
        super().__init__(model, args, defenses=defenses, kl_every=kl_every, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """Return this rank's micro-batches; already sharded, so not to be prepared by accelerate."""
        return self._loader(self.train_dataset, self.args.per_device_train_batch_size, shuffle=True)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the validation rows.

        ``<prefix>_loss`` is the CE and ``<prefix>_kl`` the KL to the reference, in nats per response token;
        ``<prefix>_accuracy`` the share of the targets that the policy finds likelier than any other token.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        loader = self._loader(rows, self.args.per_device_eval_batch_size, shuffle=False)
        found = self.validation_metrics(loader)
        metrics = {
            f"{metric_key_prefix}_loss": found["ce"],
            f"{metric_key_prefix}_kl": found["kl"],
            f"{metric_key_prefix}_accuracy": found["accuracy"],
            f"{metric_key_prefix}_target_tokens": found["target_tokens"],
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _loader(self, rows: Any, micro_batch_size: int, *, shuffle: bool) -> DataLoader:
        columns = getattr(rows, "column_names", None) or list(rows[0])
        lengths = rows["length"] if "length" in columns else [len(row["input_ids"]) for row in rows]
        ranks = self.args.world_size
        sampler = WindowSampler(
            lengths,
            rows["kind"] if "kind" in columns and shuffle else None,
            batch_size=micro_batch_size * ranks * (self.args.gradient_accumulation_steps if shuffle else 1),
            micro_batch_size=micro_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.args.process_index,
            ranks=ranks,
            shuffle=shuffle,
        )
        return _EpochLoader(
            WithGhost(rows),  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    # Checkpoints appear whole or not at all

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(super()._get_output_dir(trial)) / PARTIAL) if self._saving else super()._get_output_dir(trial)

    _saving = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Left to itself, PEFT asks the hub for the base model's configuration at every checkpoint.
        folder = output_dir or self.args.output_dir
        assert folder is not None
        self._policy.save_pretrained(folder, save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        partial = folder / PARTIAL
        self._saving = True
        try:
            if self.args.should_save:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch says RuntimeError of a full disk
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(folder).free / 2**20
            raise RunError(
                f"the checkpoint of step {self.state.global_step} cannot be written to {folder}, where {free:.0f} "
                f"MiB are free now: {str(error).splitlines()[0]}. Make room there and resume: the run goes on from "
                "the checkpoint before it, or from the start"
            ) from error
        finally:
            self._saving = False
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            seal(partial / name)
            shutil.rmtree(folder / name, ignore_errors=True)
            (partial / name).replace(folder / name)
            partial.rmdir()
            for old in checkpoints(folder)[: -(self.args.save_total_limit or 10**9)]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()


class _EpochLoader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a folder, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if (p / SEAL).is_file()]
    return sorted(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint's files to disk, and write down their digests."""
    digests = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digests[str(path.relative_to(checkpoint))] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    (checkpoint / SEAL).write_text(json.dumps(digests, indent=1), encoding="utf-8")


def verify(checkpoint: Path) -> None:
    """Compare a checkpoint with its seal.

    Raises:
        RunError: a file is missing or differs.
    """
    try:
        digests = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        for name, digest in digests.items():
            if file_digest(checkpoint / name) != digest:
                raise ValueError(f"{name} has changed since it was written")
    except (OSError, ValueError) as error:
        raise RunError(
            f"checkpoint {checkpoint} is corrupt: {error}. Delete that folder and resume: "
            "the run goes on from the checkpoint before it, or from the start"
        ) from error
