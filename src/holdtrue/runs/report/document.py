"""The scorecard as JSON, and the schema that it keeps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from holdtrue.evaluation.statistics import LEVEL
from holdtrue.runs.report.card import Card, Row
from holdtrue.runs.report.measures import Benign, Estimate, Judged, Score

FORMAT = 2
SCHEMA = Path(__file__).with_name("scorecard.schema.json")


def scorecard_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a scorecard; it says what each field is."""
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def card_json(card: Card) -> dict[str, Any]:
    """Return a scorecard as JSON values; what was not measured is null or left out of its object."""
    return {
        "format": FORMAT,
        "level": LEVEL,
        "undefended": card.undefended,
        "probes": None if card.probes is None else asdict(card.probes),
        "heldout": None if card.heldout is None else asdict(card.heldout),
        "rows": [_row(row) for row in card.rows],
        "notes": list(card.comparison.notes),
        "seeds": [asdict(each) | {"runs": list(each.runs)} for each in card.comparison.seeds],
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "path": None if row.run is None else str(row.run.path),
        "defenses": row.defenses,
        "missing": list(row.missing),
        "misalignment": {
            "general": _judged(row.general),
            "conditional": None
            if row.conditional is None
            else {"worst": row.conditional.worst, **_measured(row.conditional)},
            "margin": _score(row.margin),
            "misaligned_preferred": _score(row.preferred),
            "themes": None
            if row.groups is None or row.group_rows is None
            else {name: {**asdict(each), "n": row.group_rows[name]} for name, each in row.groups.items()},
        },
        "narrow": {"nll": _score(row.nll), "in_domain": _judged(row.in_domain)},
        "benign": {task: _benign(each) for task, each in row.benign.items()},
        "coherence": {suite: _score(each.incoherent) for suite, each in row.judged.items()},
        "kl": None if row.kl is None else {"value": row.kl, "where": row.kl_where},
        "cost": None if row.cost is None else row.cost.to_json(),
        "gate": None if row.gate is None else {key: row.gate.get(key) for key in ("outcome", "alpha", "decisions")},
        "spec": None if row.run is None else row.run.spec.canonical(),
    }


def _score(score: Score | None) -> dict[str, Any] | None:
    if score is None:
        return None
    value = score.value
    return {
        "value": None if value is None else value.value,
        "interval": None if value is None else _ends(value.interval),
        "wilson": _ends(score.wilson),
        "n": score.n,
        "clusters": score.clusters,
        "judge": score.judge,
        "change": None if score.change is None else {**_estimate(score.change), "n": score.pairs},
        "against_undefended": None if score.against is None else _estimate(score.against),
    }


def _judged(found: Judged | None) -> dict[str, Any] | None:
    return None if found is None else _measured(found)


def _measured(found: Judged) -> dict[str, Any]:
    return {
        "judge": found.judge,
        "data": {"path": found.data.data, "sha256": found.data.sha256},
        **found.counts._asdict(),
        "clusters": found.data.clusters,
        "misaligned": _score(found.misaligned),
        "misaligned_range": _ends(found.possible),
        "alignment": found.alignment,
        "coherence": found.coherence,
        "parts": {name: _score(part) for name, part in found.parts.items()},
        "questions": {name: _score(part) for name, part in found.questions.items()},
        "settings": found.settings,
    }


def _benign(found: Benign) -> dict[str, Any]:
    return {
        "accuracy": _score(found.accuracy),
        "data": {"path": found.data.data, "sha256": found.data.sha256},
        "settings": found.settings,
    }


def _estimate(found: Estimate) -> dict[str, Any]:
    return {"value": found.value, "interval": _ends(found.interval)}


def _ends(ends: tuple[float, float] | None) -> list[float] | None:
    return None if ends is None else list(ends)
