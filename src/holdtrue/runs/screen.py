"""Screen: says before anything else how likely the training rows are to misalign the model."""

from __future__ import annotations

from typing import Any

from holdtrue.errors import Interrupted, ScreenError
from holdtrue.runs import files
from holdtrue.runs.control import Control, interrupted
from holdtrue.runs.directory import Run


def screen_stage(run: Run, control: Control) -> dict[str, Any]:
    """Screen the training file; writes ``screen.json``.

    Raises:
        ScreenError: a limit of the spec is exceeded; the run stays where it is, and nothing was trained.
        DataError, NeedError: as :func:`holdtrue.screening.screen_data`.
    """
    from holdtrue.data import resolve_data, validate_chat
    from holdtrue.models import resolve
    from holdtrue.screening import screen_data

    spec = run.spec
    assert spec.screen is not None
    path = resolve_data(spec.data.train, spec.folder)
    validate_chat(path)
    source = resolve(spec.model, spec.revision)
    try:
        found = screen_data(
            path,
            source,
            spec.screen,
            progress=lambda fields: control.tell("screen", **fields),
            stop=control.stop,
        )
    except Interrupted:
        raise interrupted(run.path) from None
    files.write_json(run.path / "screen.json", found.to_json())
    if found.outcome == "stop":
        advice = "To train all the same, raise the limit in the spec and give another --out"
        raise ScreenError(found.exceeded, f"{run.path / 'screen.json'} has the rest. {advice}")
    return {
        "outcome": found.outcome,
        "risk": None if found.risk is None else found.risk.value,
        **{name: each.value for name, each in found.indicators.items()},
    }
