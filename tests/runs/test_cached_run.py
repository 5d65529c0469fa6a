"""Runs that keep the reference's states: the second on the same rows reads none anew, and the first says their size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from holdtrue.models import load_model, resolve
from holdtrue.runs import Run, execute, load_spec
from holdtrue.runs.train import namespace, states_wanted
from holdtrue.training.cache_store import PAGE

WIDTH, DEPTH = 32, 3
"""Of the tiny model."""
CASES: dict[str, list[dict[str, Any]]] = {
    "all tokens, blocks": [{"kl": {"weight": 0.1}}, {"ldifs": {"layers": 2}}],
    "a pool": [{"kl": {"weight": 0.1, "tokens": "response", "on": "pool", "pool": "valid.jsonl", "fraction": 0.4}}],
    "rows aside": [{"gradient_projection": {"pool": "valid.jsonl", "count": 3}}],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(tmp_path / "cache"))


def trained(spec: Path, out: Path, sets: list[str], until: Any = "train") -> Run:
    run = Run.create(out, load_spec(spec, sets))
    execute(run, until=until)
    return run


def report(run: Run) -> dict[str, Any]:
    return (run.marker("train") or {})["report"]["reference_cache"]


@pytest.mark.parametrize("case", CASES)
def test_the_second_run_reads_nothing_anew(
    folder: Path,
    edit: Callable[[Callable[[dict[str, Any]], object]], Path],
    caplog: pytest.LogCaptureFixture,
    case: str,
) -> None:
    spec = edit(lambda values: values.update(defenses=CASES[case]))
    sets = ["training.reference_cache=0.05", "training.kl_every=1", "training.epochs=2"]
    with caplog.at_level(logging.INFO, "holdtrue"):
        first = trained(spec, folder / "first", sets)
    told = states_wanted(first, WIDTH, DEPTH, 4)
    place = folder / "cache" / "reference"
    assert f"take about {told / 2**20:.2f} MiB; up to 51.20 MiB are kept in {place}" in caplog.text
    stats = report(first)
    assert stats["misses"] == stats["entries"] > 0
    assert stats["hits"] > 0
    # What is told is an upper bound, by a page for each entry.
    assert 0 <= told - stats["bytes"] <= stats["entries"] * (PAGE + 64)
    second = report(trained(spec, folder / "second", [*sets, "training.learning_rate=0.001"]))
    assert second["misses"] == 0
    assert second["hits"] == stats["hits"] + stats["misses"]
    assert second["entries"] == stats["entries"]


def test_steps_that_measure_and_a_sample_ask_for_a_share_of_the_rows(
    folder: Path, edit: Callable[[Callable[[dict[str, Any]], object]], Path]
) -> None:
    def wanted(name: str, *sets: str) -> int:
        spec = edit(lambda values: values.update(defenses=[]))
        run = trained(spec, folder / name, ["training.epochs=1", *sets], until="prepare")
        return states_wanted(run, WIDTH, DEPTH, 4)

    never, often, seldom = wanted("a", "training.kl_every=0"), wanted("b", "training.kl_every=1"), wanted("c")
    assert never < seldom < often  # the validation rows are read in any case
    assert seldom - never == pytest.approx((often - never) / 10, abs=1)


def test_states_of_another_version_or_attention_are_not_served(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = resolve(str(tiny_dir))
    base = load_model(source, device="cpu")
    own = namespace(source, base)
    assert namespace(source, load_model(source, device="cpu")) == own
    base.set_attn_implementation("eager")
    assert namespace(source, base) != own
    base.set_attn_implementation("sdpa")
    real = metadata.version
    for package in ("torch", "transformers"):
        monkeypatch.setattr(metadata, "version", lambda name, p=package: "0.1" if name == p else real(name))
        assert namespace(source, base) != own
