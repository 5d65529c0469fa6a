"""Train: the model with a fresh adapter, on the prepared rows, from the last checkpoint if there is one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from holdtrue.defenses import LossDefense
from holdtrue.errors import RunError
from holdtrue.runs import files
from holdtrue.runs.control import Control, interrupted, rank
from holdtrue.runs.directory import Run
from holdtrue.runs.prepare import start_digest
from holdtrue.runs.probe import load_probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from holdtrue.models import ModelSource
    from holdtrue.training.reference_cache import ReferenceCache

logger = logging.getLogger(__name__)


def pinned_model(run: Run) -> ModelSource:
    """Return the model that the run was prepared with; ``RunError`` when that name now means other weights."""
    from holdtrue.models import resolve

    return resolve(run.spec.model, run.manifest["model"]["revision"])


def train_stage(run: Run, control: Control) -> dict[str, Any]:
    """Train; writes ``checkpoints/``, ``metrics.jsonl`` and, at the end, ``adapter_raw/``."""
    from holdtrue.data import ChatEncoder, load_prepared
    from holdtrue.models import base_model, load_tokenizer, new_adapter, save_adapter
    from holdtrue.training import fit

    spec = run.spec
    source = pinned_model(run)
    for defense in spec.defenses:
        defense.still_met(run.manifest["defenses"].get(defense.name, {}))
    if spec.adapter.start is not None and start_digest(spec) != run.manifest["model"].get("start"):
        raise RunError(
            f"{spec.adapter.start} has changed since this run was prepared: put it back, or begin another run"
        )
    base = base_model(source)
    with _reference_cache(run, source, base) as cache:
        model = new_adapter(base, spec.adapter, seed=spec.training.seed)
        tokenizer = load_tokenizer(source)
        encoder = ChatEncoder(tokenizer, max_length=spec.training.max_length)
        summary = fit(
            model=model,
            tokenizer=tokenizer,
            rows=load_prepared(run.data("train"), encoder),
            validation=load_prepared(run.data("validation"), encoder) if run.data("validation").is_dir() else None,
            spec=spec.training,
            defenses=list(spec.defenses),
            folder=run.path,
            progress=lambda fields: control.tell("train", **fields),
            resume=True,
            stop=control.stop,
            reference_cache=cache,
            probe=load_probe(spec, tokenizer),
        )
        if cache is not None:
            summary["reference_cache"] = cache.stats()._asdict()
    if summary["interrupted"]:
        raise interrupted(run.path)
    if rank():
        return summary
    files.remove(run.adapter_raw)
    save_adapter(model, run.adapter_raw)
    files.sync_tree(run.adapter_raw)
    return summary


@contextlib.contextmanager
def _reference_cache(run: Run, source: ModelSource, base: PreTrainedModel) -> Iterator[ReferenceCache | None]:
    """Open the cache of the reference's states, where the spec gives it room, and say how much the run will want."""
    limit = round(run.spec.training.reference_cache * 2**30)
    if not limit:
        yield None
        return
    from holdtrue.models.layers import decoder_blocks
    from holdtrue.models.store import cache_root
    from holdtrue.training.reference_cache import ReferenceCache, bytes_needed

    needs = [defense.needs() for defense in run.spec.defenses if isinstance(defense, LossDefense) and defense.weight]
    depth = len(decoder_blocks(base))
    blocks = {
        index
        for need in needs
        if need.blocks is not None and need.live and not need.prefix
        for index in need.blocks(depth)
    }
    rows = run.manifest["data"]["train"]
    everywhere = any(need.tokens == "all" and need.reference for need in needs)
    width, itemsize, count = base.config.get_text_config().hidden_size, base.dtype.itemsize, rows["sequences"]
    final = rows["tokens"] if everywhere else rows["trained_tokens"]
    wanted = bytes_needed(final, width, 1, itemsize, rows=count)
    wanted += bytes_needed(rows["tokens"], width, len(blocks), itemsize, rows=count)
    folder = cache_root() / "reference"
    logger.info(
        "the reference's states of these rows take about %.2f GiB; up to %.2f GiB are kept in %s",
        wanted / 2**30,
        limit / 2**30,
        folder,
    )
    namespace = f"{source.revision}/{base.dtype}/{base.device.type}"
    with ReferenceCache(folder, limit_bytes=limit, namespace=namespace) as cache:
        yield cache


def training_rows(run: Run) -> int | None:
    """Return the number of rows of the training file, or ``None`` before the prepare stage."""
    return run.manifest.get("data", {}).get("train", {}).get("file_rows")
