"""What the report's template is given, gathered from the runs."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from holdtrue.runs.directory import Run
from holdtrue.runs.report import sureness, words
from holdtrue.runs.report.browser import choose_samples
from holdtrue.runs.report.card import Card, scorecard
from holdtrue.runs.report.drawing import looks
from holdtrue.runs.report.judged_plots import triggers_of
from holdtrue.runs.report.plots import draw
from holdtrue.runs.report.table import table
from holdtrue.runs.spec import differences

MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}


def context(runs: Sequence[Run], title: str) -> dict[str, Any]:
    """Return the template's variables.

    Raises:
        SpecError: no run was given.
        RunError: a file of a run is damaged.
    """
    card = scorecard(runs)
    style = looks(card)
    return {
        "title": title,
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "card": card,
        "color": {name: look.color for name, look in style.items()},
        "mark": {name: MARKS[look.marker] for name, look in style.items()},
        "headline": words.headline(card),
        "said": _said(card),
        "in_short": sureness.in_short(card),
        "gate": words.gate_lines(card),
        "gate_evidence": [
            (row.name, row.gate["evidence"]) for row in card.runs if row.gate and row.gate.get("evidence")
        ],
        "groups": table(card),
        "not_measured": sureness.not_measured(card),
        "how_sure": sureness.how_sure(card),
        "triggers": {row.name: triggers_of(row) for row in card.rows if row.conditional is not None},
        "questions": {row.name: row.general.questions for row in card.rows if row.general is not None},
        "seeds": card.comparison.seeds,
        "browser": choose_samples(card),
        "figures": draw(card),
        "models": _models(runs),
        "notes": card.comparison.notes,
        "others": _other_measures(card),
        "samples": _samples(card),
        "data": [entry for row in card.runs if row.run is not None for entry in _data(row.name, row.run)],
        "settings": [(row.name, _spec_yaml(row.run)) for row in card.runs if row.run is not None],
        "setting_names": _differing(runs),
        "defense_notes": [(row.name, _notes(row.run)) for row in card.runs if row.run is not None and _notes(row.run)],
        "versions": _versions(runs),
    }


def _said(card: Card) -> list[str]:
    """Return the sentences after the headline."""
    found = [words.trigger_line(card), words.margin_line(card), words.against_undefended(card)]
    return [line for line in found if line is not None and line != words.headline(card)]


def _models(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = [run.manifest.get("model") or {"name": run.spec.model, "revision": None, "origin": None} for run in runs]
    return [model for index, model in enumerate(found) if model not in found[:index]]


def _other_measures(card: Card) -> list[dict[str, Any]]:
    """Return the measures on rows other than the scorecard's, one for each suite, number and file."""
    return [
        {"measure": measure, "file": Path(measure.data).name, "cells": measure.cells}
        for measure in card.comparison.measures
        if measure.data_sha256 not in card.shown
    ]


def _samples(card: Card) -> list[dict[str, Any]]:
    """Return questions with the answers of each model, as (name, answer); an answer that is not there is left out."""
    questions: dict[str, dict[str, Any]] = {}
    for row in card.runs:
        records = [] if row.run is None else [r for r in row.run.evaluations() if r["suite"] == "samples"]
        for record in records:
            for item in record["rows"]:
                entry = questions.setdefault(
                    item["question"], {"question": item["question"], "origin": item.get("origin", ""), "answers": {}}
                )
                entry["limit"] = record.get("max_new_tokens")
                base = card.untouched[0].name if len(card.untouched) == 1 else f"untouched, before {row.name}"
                entry["answers"].setdefault(base, item["untouched"])
                entry["answers"][row.name] = item["tuned"]
    return list(questions.values())


def _data(name: str, run: Run) -> list[dict[str, Any]]:
    manifest = run.manifest
    report: dict[str, Any] = (run.marker("train") or {}).get("report", {})
    notes = list(manifest.get("defenses", {}).values())
    found = []
    for split, entry in manifest.get("data", {}).items():
        train = split == "train"
        added = {kind: n["rows"] for kind, n in entry.get("by_kind", {}).items() if kind != "task"}
        found.append(
            {
                "run": name,
                "split": split,
                "file": Path(entry["path"]).name,
                "sha256": entry["sha256"][:12],
                "file_rows": entry["file_rows"],
                "added": sum(added.values()) if train else None,
                "repeated": sum(note.get("repeated_rows", 0) for note in notes) if train else None,
                "sequences": entry["sequences"],
                "tokens": entry["tokens"],
                "trained_tokens": entry["trained_tokens"],
                "truncated_rows": entry["truncated_rows"],
                "dropped_tokens": entry["dropped_tokens"],
                "left_out": entry["rows_without_target"],
                "padding": report.get("padding") if train else None,
                "about": "about " if entry.get("late_rows") else "",
            }
        )
    return found or [{"run": name, "split": None}]


def _spec_yaml(run: Run) -> str:
    """Return the whole spec as YAML, paths written from its folder as its author did."""
    values = run.spec.canonical()
    folder = f"{values.pop('folder')}/"
    return yaml.safe_dump(_relative(values, folder), sort_keys=False, allow_unicode=True)


def _relative(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _relative(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    return value.removeprefix(folder) if isinstance(value, str) else value


def _differing(runs: Sequence[Run]) -> list[str]:
    first = runs[0].spec.canonical()
    lines = [line for run in runs[1:] for line in differences(first, run.spec.canonical())]
    return list(dict.fromkeys(line.split(": ")[0] for line in lines))


def _notes(run: Run) -> str:
    notes = {name: dict(note) for name, note in run.manifest.get("defenses", {}).items() if note}
    for name, note in run.finalise_notes.items():
        notes.setdefault(name, {}).update(note)
    return yaml.safe_dump(notes, sort_keys=False, allow_unicode=True) if notes else ""


def _versions(runs: Sequence[Run]) -> list[tuple[str, str]]:
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for package, version in run.manifest.get("versions", {}).items():
            found.setdefault(package, {})[version] = None
    listed = [(package, ", ".join(versions)) for package, versions in found.items()]
    return [*listed, ("this report", f"holdtrue {metadata.version('holdtrue')}, Python {platform.python_version()}")]
