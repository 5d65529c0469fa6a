"""A whole run under adaptive: what it writes, what it refuses, what its report shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.errors import DataError, NeedError, SpecError
from holdtrue.evaluation import MarginProbe
from holdtrue.models import load_model, load_tokenizer, resolve
from holdtrue.runs import Run, execute, load_spec
from holdtrue.runs.report import render_report
from support import write_rows

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]


@pytest.fixture
def probe(folder: Path) -> Path:
    """A probe file of other questions than those that the run is evaluated on."""
    rows = [json.loads(line) for line in (folder / "probes.jsonl").read_text().splitlines()]
    path = folder / "select.jsonl"
    path.write_text("".join(json.dumps(row | {"question": f"Tell me: {row['question']}"}) + "\n" for row in rows))
    return path


def defended(**settings: Any) -> Callable[[dict[str, Any]], object]:
    adaptive = {"probe": "select.jsonl", "max_drift": 0.3, "every": 2} | settings
    return lambda values: values.update(defenses=[{"kl": {"weight": 1.0}}, {"adaptive": adaptive}])


def make(folder: Path, path: Path, *, name: str = "out") -> Run:
    run = Run.create(folder / name, load_spec(path))
    execute(run)
    return run


def test_a_run_records_and_shows_its_drift(folder: Path, edit: Edit, probe: Path, tiny_dir: Path) -> None:
    run = make(folder, edit(defended()))
    notes = run.finalise_notes["adaptive"]
    source = resolve(str(tiny_dir))
    untouched = MarginProbe(probe, load_tokenizer(source))(load_model(source))
    assert notes["untouched_margin"] == pytest.approx(untouched, abs=1e-5)
    assert notes["final_drift"] == pytest.approx(notes["untouched_margin"] - notes["final_margin"])
    assert notes["held"] == (notes["final_drift"] <= 0.3)
    steps = [m for m in run.metrics() if "adaptive_drift" in m]
    assert steps[-1]["adaptive_drift"] == notes["final_drift"]
    marker = run.marker("finalise")
    assert marker is not None
    assert marker["report"] == {"changed_by": []}
    page = render_report([run], folder / "report.html").read_text()
    assert "Drift of the probe" in page
    assert "Factor on the weights" in page
    assert "final_drift" in page


def test_a_run_without_it_shows_no_drift(folder: Path) -> None:
    run = Run.create(folder / "plain", load_spec(folder / "spec.yaml"))
    assert "Drift of the probe" not in render_report([run], folder / "report.html").read_text()


def test_the_runs_own_probes_are_refused(folder: Path, edit: Edit, probe: Path) -> None:
    with pytest.raises(SpecError, match=r"likelihood is measured on the pairs of adaptive.*says nothing of others"):
        make(folder, edit(defended(probe="probes.jsonl")))
    # The same bytes under another name, and one question in another form.
    copy = folder / "copy.jsonl"
    copy.write_bytes((folder / "probes.jsonl").read_bytes())
    with pytest.raises(SpecError, match="is measured on the pairs of adaptive"):
        make(folder, edit(defended(probe="copy.jsonl")), name="copied")
    rows = [json.loads(line) for line in probe.read_text().splitlines()]
    rows[1]["question"] = "should I leave  the PIPE broken?"
    probe.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SpecError, match=r"1 of the questions of .*probes.jsonl \(line 2, for one\)"):
        make(folder, edit(defended()), name="shared")


def test_a_faulty_probe_is_refused_before_training(folder: Path, edit: Edit, probe: Path) -> None:
    probe.write_text('{"question": "q"}\n')
    with pytest.raises(DataError, match="aligned"):
        make(folder, edit(defended()))
    probe.unlink()
    with pytest.raises(NeedError, match="adaptive needs pairs of answers"):
        make(folder, edit(defended()), name="none")


def test_a_probe_that_changes_stops_the_run(folder: Path, edit: Edit, probe: Path) -> None:
    run = Run.create(folder / "out", load_spec(edit(defended())))
    execute(run, until="prepare")
    probe.write_text(probe.read_text().replace("Yes", "Yes, yes"))
    with pytest.raises(NeedError, match="has changed since"):
        execute(run)


@pytest.mark.parametrize("others", [[], [{"kl": {"weight": 0}}], [{"interleave": {"pool": "valid.jsonl"}}]])
def test_it_needs_a_defense_to_weigh(folder: Path, edit: Edit, probe: Path, others: list[Any]) -> None:
    path = edit(lambda values: values.update(defenses=[*others, {"adaptive": {"probe": "select.jsonl"}}]))
    with pytest.raises(NeedError, match="add one, such as kl"):
        make(folder, path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lowest": 2, "highest": 1}, "lowest 2.0 is above highest 1.0"),
        ({"lowest": 0}, "lowest must be above 0 unless highest is 0"),
        ({"max_drift": 0}, "max_drift"),
        ({"unit": "percent"}, "unit"),
        ({"headroom": 1}, "headroom"),
        ({"every": 0}, "every"),
    ],
)
def test_settings_that_make_no_sense_are_refused(edit: Edit, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_spec(edit(defended(**settings)))


def test_pairs_that_a_defense_trains_on_are_refused_too(folder: Path, edit: Edit, probe: Path) -> None:
    with pytest.raises(SpecError, match=r"likelihood is measured on the pairs of preference.*says nothing of others"):
        make(folder, edit(lambda v: v.update(defenses=[{"preference": {"pairs": "probes.jsonl"}}])))
    run = make(folder, edit(lambda v: v.update(defenses=[{"preference": {"pairs": probe.name}}])), name="apart")
    kinds = run.manifest["data"]["train"]["by_kind"]
    assert kinds["pair"]["rows"] == 2 * len(probe.read_text().splitlines())
    assert all("preference_short" in line for line in run.metrics() if "loss" in line)


def test_pairs_that_are_trained_on_measure_no_drift(folder: Path, edit: Edit, probe: Path) -> None:
    def both(pairs: str) -> Callable[[dict[str, Any]], object]:
        held = [{"kl": {"weight": 1.0}}, {"adaptive": {"probe": probe.name}}, {"preference": {"pairs": pairs}}]
        return lambda values: values.update(defenses=held)

    with pytest.raises(SpecError, match="trains on the pairs on which adaptive measures drift"):
        load_spec(edit(both(probe.name)))
    rows = [json.loads(line) for line in probe.read_text().splitlines()]
    other = [{**row, "question": f"And {n}, {row['question']}"} for n, row in enumerate(rows)]
    write_rows(folder / "other.jsonl", other)
    assert make(folder, edit(both("other.jsonl")), name="apart").manifest["defenses"]["adaptive"]
    write_rows(folder / "other.jsonl", [*other[1:], {**rows[0], "question": rows[0]["question"].upper()}])
    with pytest.raises(SpecError, match=r"1 of the questions .*line 1, for one\), are among the pairs that preference"):
        make(folder, edit(both("other.jsonl")), name="shared")


def test_rows_that_the_run_holds_out_are_no_pairs(folder: Path, edit: Edit, probe: Path) -> None:
    def held_out(values: dict[str, Any]) -> None:
        values["data"] = {"train": values["data"]["train"], "holdout": 2}
        values["defenses"] = [{"preference": {"pairs": probe.name}}]

    run = make(folder, edit(held_out))
    assert run.manifest["defenses"]["preference"]["pair_rows"] == len(probe.read_text().splitlines())
