"""Seconds of a sweep over KL weights: one loaded model with a shared reference cache, against a naive run for each.

Both begin with their imports done, and take turns at every weight. The sweep loads the base model once and gives each
weight a new adapter and a new Trainer, its start-up included; its cache begins empty and is filled by the first weight.
A naive run loads both of its models, steps through the rows, and is dropped.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.arms import CACHE_BYTES, MissingError, NaiveArm
from benchmarks.workload import BATCH, MODEL, Workload, draw, settings

WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0)


def ours(work: Workload, folder: Path) -> Iterator[float]:
    """Yield the seconds of each weight; the first one's are with the model's load and the cache's filling.

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
            yield time.perf_counter() - started
            started = time.perf_counter()


def naive(work: Workload) -> Iterator[float]:
    """Yield the seconds of one naive run after another, one for each weight."""
    for weight in WEIGHTS:
        started = time.perf_counter()
        arm = NaiveArm(weight)
        for batch in arm.batches(work.rows, 1):
            arm.run(batch)
        del arm
        gc.collect()
        yield time.perf_counter() - started


def measure(runs: int, steps: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """Time both in turns; return seconds by name, of whole sweeps and of their weights.

    Raises:
        MissingError: there is no reference cache.
    """
    raw: dict[str, list[float]] = {"sweep": [], "naive sweep": [], "a weight": [], "a naive run": []}
    work = draw(BATCH * steps, seed=1)
    for number in range(1, runs + 1):
        found: list[tuple[float, float]] = []
        with tempfile.TemporaryDirectory() as folder:
            for weight, mine, theirs in zip(WEIGHTS, ours(work, Path(folder)), naive(work), strict=True):
                found.append((mine, theirs))
                say(f"sweep {number} of {runs}, weight {weight:g}: {mine:.1f} s, naive run {theirs:.1f} s")
        for part, name, total in ((0, "a weight", "sweep"), (1, "a naive run", "naive sweep")):
            raw[name] += [round(each[part], 3) for each in found]
            raw[total].append(round(sum(each[part] for each in found), 3))
    return raw
