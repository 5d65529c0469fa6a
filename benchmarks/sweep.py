"""Seconds of a sweep over KL weights: one loaded model with a shared reference cache, against a naive run for each.

Both begin with their imports done. The sweep loads the base model once and gives each weight a new adapter and a new
Trainer, its start-up included; its cache begins empty and is filled by the first weight. A naive run loads both of its
models, steps through the rows, and is dropped.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arms import CACHE_BYTES, MissingError, NaiveArm
from benchmarks.workload import BATCH, MODEL, Workload, draw, settings

WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)


def ours(work: Workload, folder: Path) -> float:
    """Return the seconds of the sweep.

    Raises:
        MissingError: there is no reference cache yet.
    """
    import transformers

    from holdtrue.models import AdapterSpec, load_model, new_adapter, resolve
    from holdtrue.training import DefendedTrainer

    try:
        from holdtrue.training.reference_cache import ReferenceCache
    except ImportError as error:
        raise MissingError(f"ImportError: {error}") from error

    started = time.perf_counter()
    base: Any = load_model(resolve(MODEL), device="cpu")
    with ReferenceCache(folder / "cache", limit_bytes=CACHE_BYTES, namespace="benchmark") as cache:
        for weight in WEIGHTS:
            model = new_adapter(base, AdapterSpec(), seed=0)
            trainer = DefendedTrainer(
                model,
                transformers.TrainingArguments(**settings(folder)),
                train_dataset=work.rows,
                processing_class=work.tokenizer,
                defenses=[{"kl": {"weight": weight, "tokens": "response"}}],
                kl_every=0,
                reference_cache=cache,
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()
            base = model.unload()
    return time.perf_counter() - started


def naive(work: Workload) -> float:
    """Return the seconds of one naive run after another, one for each weight."""
    started = time.perf_counter()
    for weight in WEIGHTS:
        arm = NaiveArm(weight)
        for batch in arm.batches(work.rows, 1):
            arm.run(batch)
        del arm
        gc.collect()
    return time.perf_counter() - started


def measure(runs: int, steps: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Time both in turns; return seconds by name. ``MissingError`` where there is no reference cache."""
    raw: dict[str, list[float]] = {"sweep": [], "naive sweep": []}
    work = draw(BATCH * steps, seed=1)
    for number in range(1, runs + 1):
        with tempfile.TemporaryDirectory() as folder:
            raw["sweep"].append(round(ours(work, Path(folder)), 3))
        say(f"sweep {number} of {runs}: {len(WEIGHTS)} weights in {raw['sweep'][-1]:.1f} s")
        raw["naive sweep"].append(round(naive(work), 3))
        say(f"sweep {number} of {runs}: {len(WEIGHTS)} naive runs in {raw['naive sweep'][-1]:.1f} s")
    return raw
