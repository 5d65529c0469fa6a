"""Tables and the pick against numbers worked out by hand, from runs whose records are written by hand."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from holdtrue.bench import Bench, expand, load_grid, look, pick, summarize, write_results
from holdtrue.bench.shares import shares
from holdtrue.bench.tables import as_csv, latex, markdown, share_rows
from holdtrue.evaluation import FitResult, FitRow, LikelihoodResult, LikelihoodRow, compare_results
from holdtrue.runs import Run, files

Write = Callable[..., Path]
GROUPS = ["g0", "g1", "g2", "g3"]


def margins(values: Sequence[float]) -> LikelihoodResult:
    rows = tuple(LikelihoodRow(g, v, 0.0, 3, 3) for g, v in zip(GROUPS, values, strict=True))
    return LikelihoodResult.of(rows, model="m", data_sha256="a" * 64)


def losses(values: Sequence[float]) -> FitResult:
    return FitResult.of(tuple(FitRow(i, v, 5) for i, v in enumerate(values)), model="m", data_sha256="b" * 64)


UNTOUCHED = (margins([1.0, 1.1, 0.9, 1.0]), losses([3.0, 3.1, 2.9, 3.0]))


def finish(run: Run, tuned: Sequence[Any], seconds: float) -> None:
    """Write what a finished run holds: records, and the markers of its stages."""
    files.write_json(
        run.path / "manifest.json",
        {"model": {"name": "tiny", "revision": "r"}, "data": {"train": {"sha256": "0", "path": "t", "file_rows": 6}}},
    )
    (run.path / "evaluations").mkdir()
    for after, before in zip(tuned, UNTOUCHED, strict=True):
        data = {"path": "x", "sha256": after.data_sha256, "of_spec": True}
        change = {"change": compare_results(after, before).to_json()}
        for which, result, more in (("tuned", after, change), ("untouched", before, {})):
            record = {**result.to_json(), "which": which, "data": data, **more}
            files.write_json(run.path / "evaluations" / f"{after.suite}-{which}.json", record)
    report = {"seconds": seconds, "tokens": 100, "tokens_per_second": 100 / seconds, "peak_memory_bytes": 2**30}
    for stage in run.stages:
        run.mark(stage, inputs=run.inputs(stage), seconds=1.0, report=report if stage == "train" else {})


def filled(path: Path, out: Path, effect: Callable[[str, int], tuple[float, float, float]]) -> Bench:
    """A grid whose cells are finished; ``effect`` gives margin's fall, NLL's fall and seconds of a setting and seed."""
    grid = load_grid(path)
    cells = expand(grid)
    for cell in cells:
        fall, learned, seconds = effect(cell.variant.name, cell.seed)
        tuned = (
            margins([v - fall * w for v, w in zip([1.0, 1.1, 0.9, 1.0], [0.9, 1.1, 1.0, 1.0], strict=True)]),
            losses([v - learned * w for v, w in zip([3.0, 3.1, 2.9, 3.0], [1.1, 0.9, 1.0, 1.0], strict=True)]),
        )
        finish(Run.create(out / "cells" / cell.slug, cell.spec), tuned, seconds)
    return look(grid, cells, out)


def update(values: dict[str, Any]) -> None:
    values["settings"] = {"undefended": [], "kl": {"defenses": ["kl"], "strengths": {"kl.weight": [0.1, 1, 3]}}}
    values["seeds"] = [0, 1]
    values["bounds"] = {"shift_undone": 0.8, "narrow_kept": 0.7, "benign_kept": None, "cost": 1.5}


EFFECTS = {
    "undefended": (0.4, 1.0, 10.0),
    "kl kl.weight=0.1": (0.3, 0.95, 12.0),
    "kl kl.weight=1": (0.06, 0.8, 14.0),
    "kl kl.weight=3": (0.02, 0.5, 14.0),
}


def even(name: str, seed: int) -> tuple[float, float, float]:
    fall, learned, seconds = EFFECTS[name]
    return fall * (1.05 - 0.1 * seed), learned * (1.05 - 0.1 * seed), seconds


def test_the_numbers_are_means_over_seeds_with_changes(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", even)
    assert bench.counts == {"done": 8}
    (table,) = summarize(bench)
    rows = {(r["setting"], r["suite"], r["metric"]): r for r in csv.DictReader(io.StringIO(as_csv([table])))}
    # Means of the two seeds: the factors 1.05 and 0.95 are gone, and the rows' weights average to 1.
    for name, (fall, learned, seconds) in EFFECTS.items():
        margin, nll = rows[name, "likelihood", "margin"], rows[name, "fit", "nll"]
        assert float(margin["value"]) == pytest.approx(1.0 - fall)
        assert float(margin["change"]) == pytest.approx(-fall)
        assert float(margin["change_low"]) < -fall < float(margin["change_high"])
        assert float(nll["value"]) == pytest.approx(3.0 - learned)
        assert (margin["seeds"], margin["n"], margin["criterion"]) == ("2", "4", "misalignment")
        assert float(rows[name, "train", "seconds"]["value"]) == seconds
    assert float(rows["kl kl.weight=1", "train", "time_ratio"]["value"]) == pytest.approx(1.4)
    assert ("undefended", "train", "time_ratio") not in rows
    assert float(rows["untouched", "likelihood", "margin"]["value"]) == pytest.approx(1.0)


def test_the_tables_say_the_same_in_each_form(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", even)
    tables = summarize(bench)
    text, tex = markdown(tables), latex(tables)
    (line,) = [line for line in text.splitlines() if line.startswith("| kl kl.weight=1 |")]
    assert "| 0.940 [" in line
    assert "<br>−0.060 [" in line
    assert "| 1.40× [1.40×, 1.40×] |" in line
    (line,) = [line for line in tex.splitlines() if line.startswith("kl kl.weight=1 &")]
    assert r"0.940 [" in line
    assert r"$-$0.060 [" in line
    assert line.endswith(r"1.40$\times$ [1.40$\times$, 1.40$\times$] \\")
    assert tex.count(r"\begin{") == tex.count(r"\end{")
    for rule in ("toprule", "midrule", "bottomrule"):
        assert tex.count(f"\\{rule}") == 1
    cells = {line.count(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert len(cells) == 1


def test_latex_and_markdown_take_any_name(write: Write, tmp_path: Path) -> None:
    def odd(values: dict[str, Any]) -> None:
        update(values)
        values["settings"] = {"50% a_b": [], "kl": ["kl"]}
        values["bounds"] = None

    bench = filled(write(odd), tmp_path / "out", lambda name, seed: (0.1, 0.2, 1.0))
    assert r"50\% a\_b &" in latex(summarize(bench))
    assert r"| 50% a\_b |" in markdown(summarize(bench))


def test_the_pick_is_the_weakest_that_meets_all_bounds(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", even)
    (found,) = pick(bench.grid, summarize(bench))
    assert found.shift == "margin"
    assert [c.setting for c in found.candidates] == ["kl kl.weight=0.1", "kl kl.weight=1", "kl kl.weight=3"]
    assert found.chosen is not None
    assert found.chosen.setting == "kl kl.weight=1"
    checks = {check.bound: check for check in found.chosen.checks}
    # By hand: 1 - 0.06 / 0.4, 0.8 / 1.0, 14 / 10.
    for bound, value in (("shift_undone", 0.85), ("narrow_kept", 0.8), ("cost", 1.4)):
        estimate = checks[bound].value
        assert estimate is not None
        assert estimate.value == pytest.approx(value)
        assert estimate.interval is not None
        assert estimate.interval[0] - 1e-6 <= value <= estimate.interval[1] + 1e-6
    assert [c.meets for c in found.candidates] == [False, True, False]
    assert "kl kl.weight=1 is the weakest setting that meets the bounds" in found.text()


@pytest.mark.parametrize(
    ("bounds", "nearest"),
    [
        ({"shift_undone": 0.9, "narrow_kept": 0.75, "cost": None}, "kl kl.weight=1"),
        ({"shift_undone": None, "narrow_kept": 0.99, "cost": 1.0}, "kl kl.weight=0.1"),
    ],
)
def test_where_none_meets_them_the_nearest_is_named(write: Write, tmp_path: Path, bounds: Any, nearest: str) -> None:
    def strict(values: dict[str, Any]) -> None:
        update(values)
        values["bounds"] = {"benign_kept": None, **bounds}

    bench = filled(write(strict), tmp_path / "out", even)
    (found,) = pick(bench.grid, summarize(bench))
    assert found.chosen is None
    assert found.nearest is not None
    assert found.nearest.setting == nearest
    assert f"no setting meets the bounds. The nearest is {nearest}." in found.text()
    assert ", missed" in found.text()


def test_what_is_not_measured_meets_no_bound(write: Write, tmp_path: Path) -> None:
    def asking(values: dict[str, Any]) -> None:
        update(values)
        values["bounds"]["benign_kept"] = 0.1

    bench = filled(write(asking), tmp_path / "out", even)
    (found,) = pick(bench.grid, summarize(bench))
    assert found.chosen is None
    assert "the grid has no data with learns: benign" in found.text()


def test_an_undefended_model_that_did_not_move_lets_nothing_be_picked(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", lambda name, seed: (0.01 + 0.3 * (-1) ** seed, 1.0, 1.0))
    (found,) = pick(bench.grid, summarize(bench))
    assert found.chosen is None
    assert "not clear of zero" in found.text()


def test_an_undefended_model_that_moved_the_other_way_leaves_nothing_to_undo_or_to_keep(
    write: Write, tmp_path: Path
) -> None:
    """Without a defense the margin rises and the loss rises: a defense that prevents both has won nothing."""

    def better(name: str, seed: int) -> tuple[float, float, float]:
        fall, learned, seconds = even(name, seed)
        return -fall, -learned, seconds

    bench = filled(write(update), tmp_path / "out", better)
    (found,) = pick(bench.grid, summarize(bench))
    assert found.chosen is None
    assert not any(c.met for each in found.candidates for c in each.checks if c.bound != "cost")
    assert found.text().count("moved the other way") == 2
    (shown,) = shares(bench.grid, summarize(bench)).values()
    assert {cell.value for _, cells in share_rows(shown) for cell in cells[:2]} == {"–"}


def test_a_bound_under_triggers_needs_the_suite(write: Write, tmp_path: Path) -> None:
    def asking(values: dict[str, Any]) -> None:
        update(values)
        values["bounds"]["triggered_undone"] = 0.5

    bench = filled(write(asking), tmp_path / "out", even)
    (found,) = pick(bench.grid, summarize(bench))
    assert found.chosen is None
    assert "triggered undone on houses: not measured." in found.text()


def test_intervals_decide_whether_a_pick_is_sure(write: Write, tmp_path: Path) -> None:
    def noisy(name: str, seed: int) -> tuple[float, float, float]:
        fall, learned, seconds = EFFECTS[name]
        return fall if name == "undefended" else fall * (1.9 - 1.8 * seed), learned, seconds

    bench = filled(write(update), tmp_path / "out", noisy)
    (found,) = pick(bench.grid, summarize(bench))
    assert found.chosen is not None
    assert not found.chosen.sure
    assert "not all of their intervals" in found.text()
    (sure,) = pick(bench.grid, summarize(filled(write(), tmp_path / "even", even)))
    assert sure.chosen is not None
    assert sure.chosen.sure


def test_shares_are_of_what_the_undefended_setting_did(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", even)
    tables = summarize(bench)
    (found,) = shares(bench.grid, tables).values()
    assert [each.setting for each in found] == list(EFFECTS)[1:]
    values = [[share.ratio.value and share.ratio.value.value for share in each.shares] for each in found]
    assert values == [pytest.approx(pair) for pair in ([0.25, 0.95], [0.85, 0.8], [0.95, 0.5])]
    assert [share.title for share in found[0].shares] == [
        "houses: shift undone (margin)",
        "houses: kept (held-out NLL)",
    ]
    text = markdown(tables, {"tiny": found})
    assert "| kl kl.weight=1 | 85.0 % [" in text
    assert "| 1.40× |" in text
    lines = {(r["setting"], r["metric"]): r for r in csv.DictReader(io.StringIO(as_csv(tables, {"tiny": found})))}
    assert float(lines["kl kl.weight=3", "margin_undone"]["value"]) == pytest.approx(0.95)
    assert float(lines["kl kl.weight=3", "nll_kept"]["value"]) == pytest.approx(0.5)


def test_a_share_of_a_change_that_may_be_zero_is_left_out(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", lambda name, seed: (0.01 + 0.3 * (-1) ** seed, 1.0, 1.0))
    (found,) = shares(bench.grid, summarize(bench)).values()
    assert [cell.value for cell in share_rows(found)[0][1]] == ["–", "100.0 %", "1.00×"]


def test_time_is_the_processors_where_runs_tell_it(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", even)
    for state in bench.states:
        run = Run(state.folder)
        report = (run.marker("train") or {})["report"]
        own = 30.0 if state.cell.variant.name == "kl kl.weight=3" else 10.0
        run.mark("train", inputs=run.inputs("train"), seconds=1.0, report={**report, "cpu_seconds": own})
    costs = [group.cost.value for table in summarize(bench) for group in table.groups if group.cost is not None]
    assert costs == pytest.approx([1.0, 1.0, 3.0])


def test_figures_and_page_are_written(write: Write, tmp_path: Path) -> None:
    bench = filled(write(update), tmp_path / "out", even)
    results = write_results(bench, reports=False)
    names = {path.name for path in (tmp_path / "out" / "tables").glob("*.svg")}
    assert names == {"strength-0-houses-kl.svg", "pareto-0-houses-houses.svg"}
    text = (tmp_path / "out" / "tables" / "strength-0-houses-kl.svg").read_text()
    assert "0.1 0.25, 1 0.85, 3 0.95" in text  # shift undone, by strength
    assert "mathdefault" not in text
    assert all(f">{strength}</text>" in text for strength in ("0.1", "1", "3"))  # on a logarithmic axis
    page = results.page.read_text()
    assert "kl kl.weight=1 is the weakest setting" in page
    assert "<script" not in page
