"""The ways of training that are timed: each has a model of its own and trains the batches that it makes of the rows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from benchmarks.workload import BATCH, CLIP, LEARNING_RATE, MODEL, WEIGHT_DECAY, Workload, adapted, settings, targets

KL = {"kl": {"weight": 1.0, "tokens": "response"}}
LDIFS = {"ldifs": {"weight": 1.0}}
CACHE_BYTES = 2**30


class MissingError(Exception):
    """This version of holdtrue, or of what is installed, cannot build the arm."""


class Arm(Protocol):
    """A way of training.

    ``batches`` splits an epoch's rows into those of each optimizer step, as the way's own loader does. ``run`` trains
    some rows for one epoch and returns the seconds between the epoch's begin and end.
    """

    def batches(self, rows: Any, number: int) -> list[Any]: ...

    def run(self, rows: Any) -> float: ...


def grouped(rows: Any, number: int) -> list[Any]:
    """Return an epoch's batches in the order of our own sampler, rows of like length together."""
    from holdtrue.data.batching import WindowSampler

    sampler = WindowSampler(rows["length"], batch_size=BATCH, micro_batch_size=BATCH)
    sampler.set_epoch(number)
    return [rows.select(indices) for indices in sampler]


def shuffled(rows: Any, number: int) -> list[Any]:
    """Return an epoch's batches in random order."""
    order = list(range(len(rows)))
    random.Random(number).shuffle(order)
    return [rows.select(order[start : start + BATCH]) for start in range(0, len(order), BATCH)]


class TrainerArm:
    """A ``transformers.Trainer`` whose own loop does the work; only the epoch is timed, not the making of the loop."""

    def __init__(self, trainer: Any, split: Callable[[Any, int], list[Any]] = grouped) -> None:
        from transformers import PrinterCallback, TrainerCallback

        clock = self

        class Clock(TrainerCallback):
            def on_epoch_begin(self, *_: Any, **__: Any) -> None:
                clock.started = time.perf_counter()

            def on_epoch_end(self, *_: Any, **__: Any) -> None:
                clock.seconds = time.perf_counter() - clock.started

        self.trainer, self.batches = trainer, split
        self.cache: Any = None
        self.started = self.seconds = 0.0
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock())

    def run(self, rows: Any) -> float:
        self.trainer.train_dataset = rows
        self.trainer.train()
        return self.seconds


class NaiveArm:
    """The usual way to write the KL: a second model, full float32 logits of both, padded random batches."""

    batches = staticmethod(shuffled)

    def __init__(self, weight: float = 1.0) -> None:
        import torch

        from holdtrue.models import load_model, resolve

        self.weight = weight
        self.model = adapted().train()
        self.reference = load_model(resolve(MODEL), device="cpu")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def run(self, rows: Any) -> float:
        from holdtrue.data.batching import Collator

        collate = Collator(0)
        started = time.perf_counter()
        for start in range(0, len(rows), BATCH):
            self.step(collate([rows[i] for i in range(start, min(start + BATCH, len(rows)))]))
        return time.perf_counter() - started

    def step(self, batch: dict[str, Any]) -> None:
        """Take one optimizer step: cross-entropy and KL(policy ‖ reference), both over the targets."""
        import torch

        ids, mask = batch["input_ids"], batch["attention_mask"]
        wanted = batch["labels"][:, 1:] != -100
        logits = self.model(input_ids=ids, attention_mask=mask).logits.float()[:, :-1]
        with torch.no_grad():
            other = self.reference(input_ids=ids, attention_mask=mask).logits.float()[:, :-1]
        p, q = logits.log_softmax(-1), other.log_softmax(-1)
        ce = -p.gather(-1, ids[:, 1:, None]).squeeze(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        loss = ((ce + self.weight * kl) * wanted).sum() / wanted.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()


def defended(work: Workload, folder: Path, defenses: list[Any], *, cached: bool = False) -> TrainerArm:
    """Return our Trainer with these defenses, and with ``cached`` a reference cache in the folder."""
    import transformers

    from holdtrue.training import DefendedTrainer

    more: dict[str, Any] = {}
    if cached:
        from holdtrue.training.reference_cache import ReferenceCache

        more["reference_cache"] = ReferenceCache(folder / "cache", limit_bytes=CACHE_BYTES, namespace="benchmark")
    trainer = DefendedTrainer(
        adapted(),
        transformers.TrainingArguments(**settings(folder)),
        train_dataset=work.rows,
        processing_class=work.tokenizer,
        defenses=defenses,
        kl_every=0,
        **more,
    )
    arm = TrainerArm(trainer)
    arm.cache = more.get("reference_cache")
    return arm


def trl(work: Workload, folder: Path) -> TrainerArm:
    """Return TRL's ``SFTTrainer``: its collator, its head, batches in random order; the same tokens and targets."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    def labeled(rows: Any) -> Any:
        kept = rows.select_columns(["input_ids", "trained"])
        return kept.map(
            lambda row: {"labels": [i if t else -100 for i, t in zip(row["input_ids"], row["trained"], strict=True)]},
            remove_columns=["trained"],
        )

    trainer = SFTTrainer(
        adapted(),
        SFTConfig(**settings(folder), max_length=2048),
        train_dataset=labeled(work.rows),
        processing_class=work.tokenizer,
    )
    seen = targets([[label != -100 for label in row] for row in trainer.train_dataset["labels"]])
    if seen != targets(work.rows["trained"]):
        raise RuntimeError(f"TRL trains {seen} targets of these rows, and holdtrue {targets(work.rows['trained'])}")
    return TrainerArm(trainer, lambda rows, number: shuffled(labeled(rows), number))


def steering(work: Workload, folder: Path) -> TrainerArm:
    """Return our Trainer with a random vector of length 1 added to the output of the default block."""
    import torch
    from transformers import AutoConfig

    from holdtrue.models import resolve
    from holdtrue.models.vectors import VectorInfo, write_vectors  # type: ignore[import-not-found]

    source = resolve(MODEL)
    config = AutoConfig.from_pretrained(source.path)
    width, blocks = config.hidden_size, config.num_hidden_layers
    vector = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(0)), dim=0)
    info = VectorInfo(
        model=source.name, revision=source.revision, blocks=blocks, width=width, source="pairs", trait="noise"
    )
    path = folder / "vector.safetensors"
    write_vectors(path, {20 * blocks // 28: vector}, info)
    return defended(work, folder, [{"steering": {"vector": str(path), "weight": 1.0}}])


BUILDERS: dict[str, Callable[[Workload, Path], Arm]] = {
    "plain": lambda work, folder: defended(work, folder, []),
    "trl": trl,
    "kl": lambda work, folder: defended(work, folder, [KL]),
    "kl_sampled": lambda work, folder: defended(work, folder, [{"kl": {**KL["kl"], "sample": 0.5}}]),
    "kl_cached": lambda work, folder: defended(work, folder, [KL], cached=True),
    "ldifs": lambda work, folder: defended(work, folder, [LDIFS]),
    "ldifs_cached": lambda work, folder: defended(work, folder, [LDIFS], cached=True),
    "kl_ldifs": lambda work, folder: defended(work, folder, [KL, LDIFS]),
    "steering": steering,
    "naive": lambda work, folder: NaiveArm(),
}
FILLS_FIRST = frozenset({"kl_cached", "ldifs_cached"})
"""Arms whose warm-up goes over all the rows, so that the timed epochs find the reference's states."""


def build(name: str, work: Workload, folder: Path) -> Arm:
    """Make an arm ready to run.

    Raises:
        MissingError: what it measures is not there yet.
    """
    from holdtrue.errors import SpecError

    folder.mkdir(parents=True, exist_ok=True)
    try:
        return BUILDERS[name](work, folder)
    except (TypeError, SpecError, ImportError) as error:
        raise MissingError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
