"""Interleaving+ and Interleaving++, as the defense's hooks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdtrue.data import ChatRow, Message, read_chat, validate_chat
from holdtrue.defenses import RowsContext, RunContext, parse
from holdtrue.defenses.interleave import CHOSEN, Interleave
from holdtrue.errors import DataError, NeedError, SpecError
from holdtrue.models import ModelSource
from holdtrue.selection import gap, read_scorer, score_pool


@pytest.fixture
def defense(adapters: list[Path], pool: Path) -> Interleave:
    names = tuple(folder.name for folder in adapters)
    return Interleave(pool=pool.name, fraction=0.5, select="perplexity_gap", scorers=names)


@pytest.fixture
def context(tiny: ModelSource, tmp_path: Path) -> RowsContext:
    (tmp_path / "out").mkdir()
    return RowsContext(10, 0, tmp_path, model=tiny, max_length=128, out=tmp_path / "out")


def preflight(defense: Interleave, context: RowsContext) -> None:
    assert context.model is not None
    defense.preflight(RunContext(context.model, {}, 1, context.folder, task_rows=context.task_rows))


def task() -> Iterator[ChatRow]:
    return (ChatRow((Message("user", f"q{i}"), Message("assistant", f"a{i}"))) for i in range(10))


def added(defense: Interleave, context: RowsContext) -> list[ChatRow]:
    preflight(defense, context)
    found = list(defense.rows(task(), context))
    assert found[:10] == list(task())
    return found[10:]


def test_the_largest_gaps_are_added_in_the_pools_order(defense, context, adapters, pool) -> None:
    found = added(defense, context)
    assert context.model is not None
    scored = score_pool(validate_chat(pool), context.model, [read_scorer(f) for f in adapters], max_length=128)
    scores = gap(scored.aligned, scored.misaligned, defense.eps)
    chosen = sorted(sorted(range(12), key=lambda row: -scores[row])[:5])
    rows = list(read_chat(pool, kind="safe"))
    assert found == [rows[i] for i in chosen]
    assert {row.kind for row in found} == {"safe"}
    kept = [json.loads(line) for line in (context.folder / "out" / CHOSEN).read_text().splitlines()]
    assert [entry["row"] for entry in kept] == chosen
    assert [entry["score"] for entry in kept] == [float(scores[row]) for row in chosen]
    for entry in kept:
        mean = sum(entry["misaligned"]) / 2
        assert entry["score"] == pytest.approx((mean - entry["aligned"]) / entry["aligned"], abs=1e-6)


def test_the_notes_tell_what_was_chosen(defense, context) -> None:
    added(defense, context)
    notes = json.loads(json.dumps(context.notes, allow_nan=False))
    assert (
        notes.items()
        >= {
            "pool_rows": 12,
            "rows": 5,
            "repeated_rows": 0,
            "select": "perplexity_gap",
            "scored": 12,
            "unscored": 0,
            "refusals_dropped": 0,
            "passes_cached": 0,
            "excluded": [],
            "chosen_file": CHOSEN,
        }.items()
    )
    assert [len(scorer["sha256"]) for scorer in notes["scorers"]] == [64, 64]
    assert notes["chosen_scores"]["min"] >= notes["other_scores"]["max"]


def test_refusals_are_dropped_before_the_choice(defense, context, pool) -> None:
    plus = defense.model_copy(update={"fraction": 1.0})
    assert any("sorry" in row.messages[1].content for row in added(plus, dataclasses.replace(context, task_rows=12)))
    without = plus.model_copy(update={"drop_refusals": True})
    rows = added(without, context)
    assert {row.messages[0].content for row in rows} == {
        row.messages[0].content for i, row in enumerate(read_chat(pool)) if i not in (3, 7)
    }
    assert context.notes["refusals_dropped"] == 2
    assert context.notes["passes_cached"] == 3
    other = without.model_copy(update={"refusal_words": ("door",), "fraction": 0.9})
    added(other, context)
    assert context.notes["refusals_dropped"] == 1


def test_rows_without_a_score_are_left_out_and_counted(defense, context, pool) -> None:
    long = {"messages": [{"role": "user", "content": "why? " * 300}, {"role": "assistant", "content": "So."}]}
    with pool.open("a") as file:
        file.write(json.dumps(long) + "\n")
    everything = defense.model_copy(update={"fraction": 1.0})
    rows = added(everything, dataclasses.replace(context, task_rows=12))
    assert len(rows) == 12
    assert context.notes["unscored"] == 1
    assert context.notes["other_scores"] is None
    with pytest.raises(NeedError, match=r"12 are left \(with a score\)"):
        next(iter(everything.rows(task(), dataclasses.replace(context, task_rows=13))))


def test_a_pool_that_is_too_small_stops_before_anything_is_run(defense, context, forwards) -> None:
    for changes, rows in (({}, 26), ({"drop_refusals": True}, 22)):
        with pytest.raises(NeedError, match="larger pool"):
            preflight(defense.model_copy(update=changes), dataclasses.replace(context, task_rows=rows))
    preflight(defense, dataclasses.replace(context, task_rows=24))
    assert forwards() == 0


def test_preflight_refuses_what_cannot_score(defense, context, pool) -> None:
    with pytest.raises(NeedError, match="needs scorers"):
        preflight(defense.model_copy(update={"scorers": ()}), context)
    with pytest.raises(NeedError, match="no such folder"):
        preflight(defense.model_copy(update={"scorers": ("nowhere",)}), context)
    with pytest.raises(NeedError, match="does not say"):
        preflight(defense.model_copy(update={"exclude_domains": ("medical",)}), context)
    pool.write_text("{}\n")
    with pytest.raises(DataError):
        preflight(defense, context)


def test_outside_a_run_the_model_must_be_given(defense, context) -> None:
    with pytest.raises(NeedError, match=r"RowsContext\.model"):
        next(iter(defense.rows(task(), dataclasses.replace(context, model=None))))
    found = list(defense.rows(task(), dataclasses.replace(context, out=None)))
    assert len(found) == 15
    assert context.notes["chosen_file"] is None


def test_it_fails_before_the_first_row(defense, context, adapters) -> None:
    (adapters[0] / "adapter_model.safetensors").unlink()
    with pytest.raises(NeedError):
        next(iter(defense.rows(task(), context)))


def test_a_fraction_of_zero_asks_for_nothing(context) -> None:
    nothing = Interleave(pool="nowhere.jsonl", fraction=0, select="perplexity_gap")
    assert added(nothing, context) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"scorers": ["a"]},
        {"drop_refusals": True},
        {"exclude_domains": ["medical"]},
        {"select": "random", "scorers": ["a"]},
    ],
)
def test_what_a_random_draw_ignores_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="select: perplexity_gap"):
        parse([{"interleave": settings}])


@pytest.mark.parametrize(
    "settings",
    [
        {"select": "largest"},
        {"eps": 0},
        {"refusal_window": 0},
        {"refusal_words": []},
        {"refusal_words": ["sorry", " "]},
        {"scorers": [""]},
        {"scorers": "folder"},
    ],
)
def test_bad_values_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(settings))):
        parse([{"interleave": {"select": "perplexity_gap", **settings}}])
