"""From a customer's wishes and the provider's policy to the spec of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdtrue.runs.spec import RunSpec
from holdtrue.service.policy.document import Count, Factor, PolicyDocument, RefusalError

NEED_HELD_OUT = ("fit", "in_domain")


@dataclass(frozen=True)
class JobRequest:
    """What of a job reaches the run: nothing here can name a defense, a suite or a threshold.

    Attributes:
        training: chat rows, already fetched and validated.
        validation: held-out rows, or ``None``.
        hyperparameters: ``n_epochs``, ``batch_size``, ``learning_rate_multiplier``: ``"auto"`` or a number each.
        seed: of the run.
        parent: folder of the tuned model's adapter that the job starts from, or ``None``.
        folder: where the run's relative paths would start; there are none in a resolved spec.
    """

    training: Path
    validation: Path | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    parent: Path | None = None
    folder: Path = field(default_factory=Path.cwd)


def settle(document: PolicyDocument, wishes: Mapping[str, Any]) -> dict[str, int | float]:
    """Return the hyperparameters in force, each a number in its range.

    Raises:
        RefusalError: a number outside its range, or a name the API does not have.
    """
    ranges = document.hyperparameters
    unknown = sorted(set(wishes) - set(type(ranges).model_fields))
    if unknown:
        raise RefusalError(f"hyperparameters.{unknown[0]}", f"there is no hyperparameter {unknown[0]!r}")
    return {name: _settle(name, getattr(ranges, name), wishes.get(name)) for name in type(ranges).model_fields}


def _settle(name: str, allowed: Count | Factor, wish: Any) -> int | float:
    param = f"hyperparameters.{name}"
    if wish is None or wish == "auto":
        return allowed.auto
    whole = isinstance(allowed, Count)
    if isinstance(wish, bool) or not isinstance(wish, int if whole else int | float):
        raise RefusalError(param, f"{name} must be 'auto' or a {'whole ' if whole else ''}number")
    if not allowed.min <= wish <= allowed.max:
        raise RefusalError(param, f"{name} must be between {allowed.min} and {allowed.max}; {wish} was asked for")
    return wish


def resolve(document: PolicyDocument, request: JobRequest, attempt: int = 0) -> RunSpec:
    """Return the run of a job.

    Args:
        document: the policy version that the job began with.
        request: the customer's part.
        attempt: 0 for the first training; the k-th after a gate that was not passed takes ``on_fail.retrain[k - 1]``.

    Raises:
        RefusalError: a hyperparameter out of its range.
        SpecError: the policy cannot be carried out for this job.
    """
    numbers = settle(document, request.hyperparameters)
    batch = int(numbers["batch_size"])
    training = document.training
    micro = next(size for size in range(min(batch, training.micro_batch_size), 0, -1) if batch % size == 0)
    held_out = request.validation is not None
    # A spec without suites would get all of them: the gate measures for itself, so that one is enough.
    suites = [name for name in document.evaluate.suites if held_out or name not in NEED_HELD_OUT] or ["likelihood"]
    adapter: dict[str, Any] = document.adapter.model_dump(mode="json")
    if request.parent is not None:
        adapter = {**shape_of(request.parent), "dropout": document.adapter.dropout, "start": str(request.parent)}
    return RunSpec(
        model=document.base_model,
        data={"train": str(request.training), "validation": str(request.validation) if held_out else None},
        adapter=adapter,
        training={
            **training.model_dump(mode="json"),
            "save_epochs": True,
            "epochs": int(numbers["n_epochs"]),
            "batch_size": batch,
            "micro_batch_size": micro,
            "learning_rate": training.learning_rate * numbers["learning_rate_multiplier"],
            "seed": request.seed,
        },
        defenses=document.defenses_of(attempt),
        evaluate={**document.evaluate.model_dump(mode="json"), "suites": suites},
        gate=document.gate.model_dump(mode="json"),
        screen=None if document.screen is None else document.screen.model_dump(mode="json"),
        folder=request.folder,
    )


def shape_of(adapter: Path) -> dict[str, Any]:
    """Return the keys of a spec's ``adapter`` that make one of the shape that a saved adapter has."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    targets = config["target_modules"]
    return {
        "r": config["r"],
        "alpha": config["lora_alpha"],
        "rslora": config.get("use_rslora", False),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
