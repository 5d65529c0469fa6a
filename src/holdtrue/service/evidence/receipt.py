"""The receipt: what was done to a model and what was measured on it, as an in-toto statement about its adapter."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdtrue.errors import RunError
from holdtrue.runs import Run
from holdtrue.runs.report.card import scorecard

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:holdtrue:receipt:v1"
HIDDEN = ("questions", "path", "spec")
"""Fields of a scorecard that may carry a customer's words or a machine's folders."""


@dataclass(frozen=True)
class Issue:
    """What the run itself does not know.

    Attributes:
        model: the model's name.
        adapter_digest: of the adapter's folder (``holdtrue.models.digest.tree_digest``).
        job: the job's id.
        attempt: 0 for the first training.
        policy: ``base_model``, ``version`` and ``sha256`` of the policy that was in force when the job began.
        action: what followed the gate: ``release``, ``block``, ``retrain``, ``hold``.
        parent: digest of the adapter that the job started from, or ``None``.
        override: a person's decision (``decision``, ``by``, ``reason``, ``at``), or ``None``.
    """

    model: str
    adapter_digest: str
    job: str
    attempt: int
    policy: Mapping[str, Any]
    action: str
    parent: str | None = None
    override: Mapping[str, Any] | None = None


def build(run: Run, issue: Issue) -> dict[str, Any]:
    """Return the statement about a finished run's adapter; JSON values, without customer content or local paths.

    Raises:
        RunError: the run has not been through its gate: there is nothing to attest.
    """
    gate = run.gate
    if gate is None or not run.is_done("gate"):
        raise RunError(f"{run.path} has not been through its gate; a receipt says what a gate decided")
    manifest = run.manifest
    training = (run.marker("train") or {}).get("report", {})
    row = next(row for row in scorecard([run]).to_json()["rows"] if row["path"] is not None)
    return {
        "_type": STATEMENT,
        "subject": [{"name": issue.model, "digest": {"sha256": issue.adapter_digest}}],
        "predicateType": PREDICATE,
        "predicate": {
            "job": {"id": issue.job, "attempt": issue.attempt, "parent": issue.parent},
            "policy": dict(issue.policy),
            "base": _clean({key: manifest["model"][key] for key in ("name", "revision")}),
            "data": {split: _data(found) for split, found in manifest["data"].items() if found},
            "defenses": [_defense(run, item) for item in run.spec.canonical()["defenses"]],
            "training": {key: training.get(key) for key in ("steps", "tokens", "target_tokens", "train_seconds")},
            "scorecard": _clean({key: value for key, value in row.items() if key not in (*HIDDEN, "gate", "name")}),
            "gate": {key: gate.get(key) for key in ("outcome", "alpha", "decisions")},
            "action": issue.action,
            "override": None if issue.override is None else dict(issue.override),
            "versions": {**manifest["versions"], "python": platform.python_version()},
            "issued_at": int(time.time()),
        },
    }


def _data(found: Mapping[str, Any]) -> dict[str, Any]:
    wanted = ("sha256", "bytes", "file_rows", "rows", "tokens", "trained_tokens", "truncated_rows", "by_kind")
    wanted += ("late_rows", "sampled_rows") if found.get("late_rows") else ()
    return {key: found[key] for key in wanted if key in found}


def _defense(run: Run, item: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a defense was told and what it measurably did: its notes, and its term's first and last values."""
    ((name, parameters),) = item.items()
    terms = [step[f"{name}_term"] for step in run.metrics() if f"{name}_term" in step]
    measured = {"steps": len(terms), "first": terms[0], "last": terms[-1]} if terms else None
    notes = run.manifest.get("defenses", {}).get(name, {}) | run.finalise_notes.get(name, {})
    return {"name": name, "parameters": _clean(parameters), "notes": _clean(notes), "term": measured}


def _clean(value: Any) -> Any:
    """Return the value without hidden fields, and with the last part alone of every absolute path."""
    if isinstance(value, Mapping):
        return {key: _clean(each) for key, each in value.items() if key not in HIDDEN}
    if isinstance(value, list | tuple):
        return [_clean(each) for each in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value
