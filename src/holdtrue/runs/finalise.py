"""Finalise: the defenses' last hook, from the raw trained adapter to the one that is used."""

from __future__ import annotations

import dataclasses
from typing import Any

from holdtrue.errors import HoldtrueError, RunError
from holdtrue.runs import files
from holdtrue.runs.control import Control
from holdtrue.runs.directory import Run
from holdtrue.runs.prepare import run_context
from holdtrue.runs.train import pinned_model


def finalise_stage(run: Run, control: Control) -> dict[str, Any]:
    """Apply each defense's ``weights`` to the raw adapter, always that one; writes ``adapter/``, ``finalise.json``."""
    from holdtrue.models import read_adapter, write_adapter

    try:
        raw = read_adapter(run.adapter_raw)
    except (HoldtrueError, OSError, ValueError) as error:
        raise RunError(
            f"{run.adapter_raw} cannot be read ({error}); delete {run.path / 'stages' / 'train.json'}, "
            f"then run: holdtrue resume {run.path}"
        ) from error
    tensors = dict(raw.tensors)
    notes: dict[str, dict[str, Any]] = {}
    if run.spec.defenses:
        shared = run_context(run, pinned_model(run))
        for defense in run.spec.defenses:
            context = dataclasses.replace(shared, notes={})
            tensors = defense.weights(tensors, raw.scaling, context)
            if context.notes:
                notes[defense.name] = context.notes
    changed = list(notes)
    trained: dict[str, Any] = (run.marker("train") or {}).get("report", {})
    for name, note in trained.get("runtimes", {}).items():
        notes[name] = note | notes.get(name, {})
    files.replace_folder(run.adapter, lambda folder: write_adapter(folder, tensors, raw.config))
    files.write_json(run.path / "finalise.json", notes)
    return {"changed_by": changed}
