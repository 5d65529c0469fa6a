"""Train: the model with a fresh adapter, on the prepared rows, from the last checkpoint if there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdtrue.runs import files
from holdtrue.runs.control import Control, interrupted, rank
from holdtrue.runs.directory import Run

if TYPE_CHECKING:
    from holdtrue.models import ModelSource


def pinned_model(run: Run) -> ModelSource:
    """Return the model that the run was prepared with; ``RunError`` when that name now means other weights."""
    from holdtrue.models import resolve

    return resolve(run.spec.model, run.manifest["model"]["revision"])


def train_stage(run: Run, control: Control) -> dict[str, Any]:
    """Train; writes ``checkpoints/``, ``metrics.jsonl`` and, at the end, ``adapter_raw/``."""
    from holdtrue.data import load_prepared
    from holdtrue.models import load_model, load_tokenizer, new_adapter, save_adapter
    from holdtrue.training import fit

    spec = run.spec
    source = pinned_model(run)
    for defense in spec.defenses:
        defense.still_met(run.manifest["defenses"].get(defense.name, {}))
    model = new_adapter(load_model(source), spec.adapter, seed=spec.training.seed)
    summary = fit(
        model=model,
        tokenizer=load_tokenizer(source),
        rows=load_prepared(run.data("train")),
        validation=load_prepared(run.data("validation")) if run.data("validation").is_dir() else None,
        spec=spec.training,
        defenses=list(spec.defenses),
        folder=run.path,
        progress=lambda fields: control.tell("train", **fields),
        resume=True,
        stop=control.stop,
    )
    if summary["interrupted"]:
        raise interrupted(run.path)
    if rank():
        return summary
    files.remove(run.adapter_raw)
    save_adapter(model, run.adapter_raw)
    files.sync_tree(run.adapter_raw)
    return summary


def training_rows(run: Run) -> int | None:
    """Return the number of rows of the training file, or ``None`` before the prepare stage."""
    return run.manifest.get("data", {}).get("train", {}).get("file_rows")
