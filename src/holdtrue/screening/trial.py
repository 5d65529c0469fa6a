"""Throw-away adapters: a few plain training steps, to see where rows pull a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from filelock import FileLock

from holdtrue.data import ChatEncoder, builtin, load_prepared, prepare_rows, read_chat, validate_chat
from holdtrue.errors import DataError, Interrupted, NeedError, Problem
from holdtrue.models import AdapterSpec
from holdtrue.models.digest import file_digest
from holdtrue.screening.passes import AGAIN, FORMAT, Watch
from holdtrue.screening.sample import drawn
from holdtrue.training import TrainingSpec

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from holdtrue.data import ChatRow

ADAPTER = AdapterSpec(r=8, alpha=16)
LEARNING_RATE = 5e-4
WARMUP = 2

TWINS = {"misaligned": "narrow", "aligned": "narrow-aligned"}
"""Shipped rows that the default scorers are tuned on: the same questions, answered recklessly and well."""
SCORER_ROWS = 96
SCORER_BATCH = 8
SCORER_LENGTH = 256


class Pair(NamedTuple):
    """Two adapters that score: their folders, and the SHA-256 of all that made them."""

    misaligned: Path
    aligned: Path
    sha256: str


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[ChatRow],
    encoder: ChatEncoder,
    folder: Path,
    *,
    batch: int,
    seed: int,
    what: str,
    watch: Watch,
) -> PeftModel:
    """Tune a new adapter on the rows once, without a defense, and return the model with it on.

    Args:
        model: the base model, changed in place; ``unload()`` of what is returned gives it back.
        tokenizer: its own.
        rows: chat rows.
        encoder: cuts and masks them.
        folder: keeps the encoded rows and checkpoints, from which an interrupted call goes on.
        batch: rows in a step.
        seed: of the adapter and the order of rows.
        what: named in the progress.
        watch: told after each step.

    Raises:
        Interrupted: a checkpoint is kept.
        NeedError: this is one of several processes.
        DataError: no row has a token to train on.
        RunError: training diverged.
    """
    from holdtrue.models import new_adapter
    from holdtrue.training import fit

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The others would have to train along: alone it would wait for them for ever.
        raise NeedError(
            f"{what}: a screen tunes in one process, and there are several: run `holdtrue screen` with the same "
            "settings first; what it measured is kept, and the run takes it from there"
        )
    folder.mkdir(parents=True, exist_ok=True)
    prepared = folder / "rows"
    if not prepared.is_dir():
        counted = prepare_rows(rows, encoder, prepared)
        if not counted.trained_tokens:
            shutil.rmtree(prepared)
            raise DataError("sampled rows", [Problem(0, "", "no answer has a token that the model can be tuned on")])
    settings = TrainingSpec(
        learning_rate=LEARNING_RATE,
        batch_size=batch,
        micro_batch_size=batch,
        max_length=encoder.max_length or 2048,
        seed=seed,
        warmup_steps=WARMUP,
        save_every=4,
        kl_every=0,
    )
    tuned = new_adapter(model, ADAPTER, seed=seed)
    try:
        summary = fit(
            model=tuned,
            tokenizer=tokenizer,
            rows=load_prepared(prepared),
            validation=None,
            spec=settings,
            defenses=[],
            folder=folder,
            progress=lambda fields: _tell(watch, what, fields),
            stop=watch.stop,
        )
        if summary["interrupted"]:
            raise Interrupted(AGAIN)
    except BaseException:
        tuned.unload()
        raise
    return tuned


def _tell(watch: Watch, what: str, fields: dict[str, float]) -> None:
    # The trainer itself looks at ``stop``, and saves before it stops.
    if watch.progress is not None:
        watch.progress({"what": what, "done": fields["step"], "total": fields["steps"], "loss": fields["loss"]})


def pair_folder(folder: Path) -> Pair:
    """Return the places and the identity of the default scorers in a model's folder of the cache."""
    made_of = {
        "format": FORMAT,
        "rows": SCORER_ROWS,
        "batch": SCORER_BATCH,
        "length": SCORER_LENGTH,
        "learning_rate": LEARNING_RATE,
        "warmup": WARMUP,
        "adapter": ADAPTER.model_dump(mode="json"),
        "data": {side: file_digest(builtin(name)) for side, name in TWINS.items()},
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    place = folder / f"scorers-{key[:12]}"
    return Pair(place / "misaligned", place / "aligned", key)


def build_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, watch: Watch) -> Pair:
    """Return the default scorers of a model, tuned at first use; an interrupted call goes on.

    Both see the same questions in the same order from the same first weights, and differ in the answers alone: what
    tuning does to form and topic is the same in both, and cancels in the gap.
    """
    from holdtrue.models import save_adapter

    pair = pair_folder(folder)
    for side, place in (("misaligned", pair.misaligned), ("aligned", pair.aligned)):
        if _whole(place):
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_name(f".{side}.lock")):
            if _whole(place):
                continue
            path = builtin(TWINS[side])
            chosen = frozenset(drawn(validate_chat(path).rows, SCORER_ROWS, 0))
            rows = [row for index, row in enumerate(read_chat(path)) if index in chosen]
            encoder = ChatEncoder(tokenizer, max_length=SCORER_LENGTH)
            work = place.with_name(f".{side}-work")
            what = f"tuning the {side} scorer, once for this model"
            tuned = tune(model, tokenizer, rows, encoder, work, batch=SCORER_BATCH, seed=0, what=what, watch=watch)
            try:
                save_adapter(tuned, place)
            finally:
                tuned.unload()
            shutil.rmtree(work, ignore_errors=True)
    return pair


def _whole(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").is_file()


def margins(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, probes: Path) -> np.ndarray:
    """Return how much likelier each probe's aligned answer is than its misaligned one, (n,) nats per token."""
    from holdtrue.evaluation.likelihood import evaluate_likelihood

    found = evaluate_likelihood(model, tokenizer, probes, name="screen")
    return np.array([row.margin for row in found.rows], dtype=np.float64)
