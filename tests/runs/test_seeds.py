from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from holdtrue.runs import Run, compare_runs, execute, load_spec

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]


def test_runs_of_several_seeds_are_taken_together(edit: Edit, tmp_path: Path) -> None:
    def update(values: dict[str, Any]) -> None:
        values["training"]["epochs"] = 1
        values["defenses"] = []

    spec = edit(update)
    runs: list[Run] = []
    for seed in (0, 1):
        run = Run.create(tmp_path / f"seed-{seed}", load_spec(spec, [f"training.seed={seed}"]))
        execute(run)
        runs.append(run)
    together = {measure.metric: measure for measure in compare_runs(runs).seeds}
    assert set(together) == {"margin", "misaligned_preferred", "nll"}
    for metric, suite in (("margin", "likelihood"), ("nll", "fit")):
        alone = [run.evaluation(suite) or {} for run in runs]
        assert together[metric].runs == ("seed-0", "seed-1")
        assert together[metric].value == pytest.approx(np.mean([record[metric] for record in alone]))
        changes = [record["change"][f"{metric}_change"] for record in alone]
        assert together[metric].change == pytest.approx(np.mean(changes))
        low, high = together[metric].change_interval or (0.0, 0.0)
        assert low <= together[metric].change <= high
    assert compare_runs(runs[:1]).seeds == ()


def test_runs_that_differ_in_more_than_the_seed_are_not(edit: Edit, tmp_path: Path) -> None:
    spec = edit(lambda values: values["training"].update(epochs=1))
    runs: list[Run] = []
    for index, overrides in enumerate((["training.seed=0"], ["training.seed=1", "training.learning_rate=0.001"])):
        run = Run.create(tmp_path / str(index), load_spec(spec, overrides))
        execute(run)
        runs.append(run)
    assert compare_runs(runs).seeds == ()
