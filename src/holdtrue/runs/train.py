"""Train: the model with a fresh adapter, on the prepared rows, from the last checkpoint if there is one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from importlib import metadata
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
    from holdtrue.training.reference_cache import ReferenceCache

    folder = cache_root() / "reference"
    wanted = states_wanted(
        run, base.config.get_text_config().hidden_size, len(decoder_blocks(base)), base.dtype.itemsize
    )
    logger.info(
        "the reference's states of these rows take about %s; up to %s are kept in %s",
        _size(wanted),
        _size(limit),
        folder,
    )
    with ReferenceCache(folder, limit_bytes=limit, namespace=namespace(source, base)) as cache:
        yield cache


def namespace(source: ModelSource, base: PreTrainedModel) -> str:
    """Return all that the reference's states depend on beside the row.

    Versions are part of it, since another one may compute other bits.
    """
    attention = base.config._attn_implementation
    versions = "/".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    return f"{source.revision}/{base.dtype}/{base.device.type}/{attention}/{versions}"


def states_wanted(run: Run, width: int, depth: int, itemsize: int) -> int:
    """Return how many bytes of the reference cache a prepared run's rows will take, as far as their counts tell.

    Args:
        run: after its prepare stage.
        width, depth, itemsize: the model's hidden size, number of decoder blocks, and bytes of a number.
    """
    from holdtrue.training.reference_cache import bytes_needed

    training, data = run.spec.training, run.manifest["data"]
    losses = [d for d in run.spec.defenses if isinstance(d, LossDefense) and d.weight]
    needs = [need for need in (defense.needs() for defense in losses) if need.live]
    blocks = {index for need in needs if need.blocks and not need.prefix for index in need.blocks(depth)}

    def stored(count: dict[str, int], share: float, *, everywhere: bool = False) -> float:
        # A run that an earlier version prepared has not counted the answers of rows without cross-entropy.
        tokens = count["tokens"] if everywhere else count.get("response_tokens", count["tokens"])
        return share * bytes_needed(tokens, width, 1, itemsize, rows=count["sequences"])

    # The steps that measure the KL, and a sampled term, see some of the rows in each epoch.
    measured = 1 - (1 - 1 / training.kl_every) ** training.epochs if training.kl_every else 0.0
    total = stored(data["validation"], 1.0) if "validation" in data else 0.0
    for kind, count in data["train"]["by_kind"].items():
        if kind == "aside":
            total += stored(count, 1.0)
            continue
        reading = [need for need in needs if need.tokens and (need.kinds is None or kind in need.kinds)]
        shares = [1 - (1 - need.sample) ** training.epochs for need in reading]
        share = 1.0 if blocks else max([measured, *shares])
        total += stored(count, share, everywhere=any(need.tokens == "all" for need in reading))
        total += bytes_needed(count["tokens"], width, len(blocks), itemsize, rows=count["sequences"])
    return round(total)


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def training_rows(run: Run) -> int | None:
    """Return the number of rows of the training file, or ``None`` before the prepare stage."""
    return run.manifest.get("data", {}).get("train", {}).get("file_rows")
