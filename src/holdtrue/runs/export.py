"""A run's model for others: the adapter alone, or one checkpoint that needs no adapter. Not before its gate passed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from holdtrue.errors import GateError, RunError, SpecError
from holdtrue.runs import files
from holdtrue.runs.directory import Run
from holdtrue.runs.train import pinned_model

RECORD = "holdtrue.json"


def export_run(run: Run, out: str | Path, *, merge: bool = False, reason: str | None = None) -> dict[str, Any]:
    """Write a run's adapter, or base model and adapter merged, to a new folder; return its ``holdtrue.json``.

    Args:
        merge: write a whole model that transformers alone loads; else PEFT's format.
        reason: why it is exported although its gate has not passed; kept in the folder and in the run's events.

    Raises:
        GateError: the run's gate failed, stayed undecided or was never asked, and there is no ``reason``.
        SpecError: the folder holds something already, or ``reason`` is empty.
        RunError: the run has no adapter yet, or the folder cannot be written.
    """
    from holdtrue.models.digest import tree_digest

    if not run.is_done("finalise"):
        raise RunError(f"{run.path} has no adapter yet: holdtrue resume {run.path}")
    outcome = None if run.gate is None else run.gate["outcome"]
    _check_release(run, outcome, reason)
    out = Path(out).expanduser().absolute()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SpecError(f"{out} is there already; name a new folder")
    record = {
        "run": run.name,
        "base_model": run.spec.model,
        "base_revision": run.manifest["model"]["revision"],
        "adapter_digest": tree_digest(run.adapter),
        "merged": merge,
        "gate": outcome,
        "released_without_gate": reason,
    }
    with run.lock(), files.disk_errors(out):
        _write(run, out, record, merge)
        run.record("export", to=str(out), **record)
    return record


def _check_release(run: Run, outcome: str | None, reason: str | None) -> None:
    if reason is not None and not reason.strip():
        raise SpecError("--force-with-reason needs a reason, which is kept")
    if outcome == "pass" or reason is not None:
        return
    what = {
        None: "it was never asked: `holdtrue eval RUN --gate` does",
        "fail": "it failed",
    }.get(outcome, "it stayed undecided: measure more")
    raise GateError(
        f"{run.path} may not be released by its gate: {what}. To export it all the same, say why with "
        "--force-with-reason; the reason is kept with the export"
    )


def _write(run: Run, out: Path, record: dict[str, Any], merge: bool) -> None:
    from holdtrue.models.store import new_folder

    with new_folder(out) as folder:
        if merge:
            from holdtrue.models import load_tokenizer
            from holdtrue.models.merge import merged_model

            source = pinned_model(run)
            merged_model(source, run.adapter).save_pretrained(str(folder))
            load_tokenizer(source).save_pretrained(str(folder))
        else:
            shutil.copytree(run.adapter, folder, dirs_exist_ok=True)
        files.write_json(folder / RECORD, record)
