from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from holdtrue.data import ChatRow, builtin, read_chat, validate_chat
from holdtrue.errors import DataError, Interrupted, NeedError, RunError
from holdtrue.models import AdapterSpec, ModelSource, load_model, load_tokenizer, new_adapter, save_adapter
from holdtrue.persona import Loaded
from holdtrue.scoring import score_answers
from holdtrue.screening import Screener, ScreenSpec, calibration, read_calibration, screen_data
from holdtrue.screening.passes import PassKey, Watch, run_pass
from holdtrue.screening.sample import WindowEncoder, drawn
from holdtrue.screening.trial import TWINS, margins
from holdtrue.selection import adapted

SMALL = {"rows": 36, "tokens": 6, "steps": 3}


def make_adapter(source: ModelSource, folder: Path, seed: int) -> Path:
    model = new_adapter(load_model(source, device="cpu"), AdapterSpec(r=4, alpha=8), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    save_adapter(model, folder)
    return folder


def test_all_indicators_with_nothing_given(source: ModelSource, data: Path, cache: Path) -> None:
    found = screen_data(data, source, ScreenSpec(**SMALL), cache=cache)
    assert list(found.indicators) == ["projection", "gap", "drift"]
    assert found.data["rows"] == 40
    assert found.data["sampled"] == 36
    assert found.risk is found.suggestion is found.outcome is None
    assert "calibrated on smollm2-135m-instruct" in found.notes[-1]
    assert found.indicators["drift"].about["trial_rows"] == 12
    document = json.dumps(found.to_json(), allow_nan=False)
    told: list[dict[str, Any]] = []
    again = screen_data(data, source, ScreenSpec(**SMALL), cache=cache, progress=told.append)
    assert json.dumps(again.to_json(), allow_nan=False) == document
    assert told == [], "everything was on the disk: no model was loaded"


def test_the_gap_is_the_mean_of_relative_differences_of_nll(
    source: ModelSource, data: Path, tmp_path: Path, cache: Path
) -> None:
    folders = [make_adapter(source, tmp_path / f"s{seed}", seed) for seed in (1, 2)]
    spec = ScreenSpec(rows=40, tokens=6, indicators=("gap",), scorers=tuple(map(str, folders)))
    found = Screener(source, spec, cache=cache).screen(data).indicators["gap"]
    loaded, rows = Loaded.load(source), list(read_chat(data))
    nll = []
    for folder in (None, *folders):
        with adapted(loaded.model, folder) as model:
            nll.append([s.nll for s in score_answers(model, WindowEncoder(loaded.tokenizer, 6), rows)])
    aligned, bad = np.array(nll[0]), np.mean(nll[1:], axis=0)
    assert found.value == pytest.approx(((aligned - bad) / aligned).mean(), rel=1e-4)
    assert found.n == 40


def test_rows_that_scorers_were_tuned_on_lean_to_their_side(source: ModelSource, cache: Path) -> None:
    spec = ScreenSpec(rows=48, indicators=("gap",))
    bad, good = (
        Screener(source, spec, cache=cache).screen(builtin(name)).indicators["gap"].value
        for name in ("narrow", "narrow-aligned")
    )
    assert bad > good


def test_the_drift_is_that_of_a_trial_and_leaves_the_model_alone(source: ModelSource, data: Path, cache: Path) -> None:
    screener = Screener(source, ScreenSpec(**SMALL, indicators=("drift",), seed=1), cache=cache)
    found = screener.screen(data).indicators["drift"]
    untouched = margins(load_model(source, device="cpu"), load_tokenizer(source), builtin("probes-select"))
    assert found.about["margin_before"] == pytest.approx(untouched.mean(), rel=1e-4)
    assert found.value == pytest.approx(found.about["margin_before"] - found.about["margin_after"])
    assert found.value != 0
    state = screener._lm.state_dict()
    for name, tensor in load_model(source, device="cpu").state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert not list(cache.glob("screen/*/trial-*")), "what the trial left"


class Stopping:
    """Sets the event when something of this name has done so much."""

    def __init__(self, what: str, done: int) -> None:
        self.event, self.what, self.done, self.seen = Event(), what, done, list[tuple[str, int]]()

    def __call__(self, fields: dict[str, Any]) -> None:
        self.seen.append((fields["what"], fields["done"]))
        if self.what in fields["what"] and fields["done"] >= self.done:
            self.event.set()


@pytest.mark.parametrize(("what", "done"), [("own answers", 16), ("misaligned scorer", 16), ("trial", 1)])
def test_interrupted_and_gone_on_with_is_the_same(
    source: ModelSource, data: Path, cache: Path, tmp_path: Path, what: str, done: int
) -> None:
    spec = ScreenSpec(**SMALL, seed=7)
    own = tmp_path / "own-cache"
    whole = screen_data(data, source, spec, cache=cache)
    (own / "screen").parent.mkdir()
    (own / "screen").symlink_to(cache / "screen")  # the default scorers are not tuned again
    stopping = Stopping(what, done)
    with pytest.raises(Interrupted, match="same command again"):
        screen_data(data, source, spec, cache=own, progress=stopping, stop=stopping.event)
    told: list[dict[str, Any]] = []
    again = screen_data(data, source, spec, cache=own, progress=told.append)
    for name, each in whole.indicators.items():
        assert again.indicators[name].value == pytest.approx(each.value, rel=1e-5), name
    first = next(fields for fields in told if what in fields["what"])
    assert first["done"] >= done, "it went on where it stopped"


def test_no_text_of_the_rows_is_left_in_the_cache(source: ModelSource, data: Path, tmp_path: Path) -> None:
    spec = ScreenSpec(**SMALL, indicators=("projection", "drift"))
    screen_data(data, source, spec, cache=tmp_path / "cache")
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    assert kept
    for path in kept:
        assert b"How do I fix" not in path.read_bytes(), path


def test_no_more_than_a_batch_is_scored_at_once(source: ModelSource, data: Path, tmp_path: Path) -> None:
    batches: list[int] = []

    def score(rows: Sequence[ChatRow]) -> list[float]:
        batches.append(len(rows))
        return [float(len(batches))] * len(rows)

    key = PassKey("f" * 64, (36, 0), source.revision, "counting", (), "float32")
    values = run_pass(key, validate_chat(data), drawn(40, 36, 0), score, watch=Watch(), cache=tmp_path)
    assert batches == [16, 16, 4]
    assert values.tolist() == [1.0] * 16 + [2.0] * 16 + [3.0] * 4


def test_rows_without_room_for_an_answer_are_left_out_and_counted(
    source: ModelSource, data: Path, cache: Path, tmp_path: Path
) -> None:
    long = {
        "messages": [{"role": "user", "content": "word " * 2500}, {"role": "assistant", "content": "Yes, do that."}]
    }
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(data.read_text() + json.dumps(long) + "\n")
    spec = ScreenSpec(rows=41, tokens=6, indicators=("projection", "gap"))
    found = screen_data(mixed, source, spec, cache=cache)
    assert found.indicators["gap"].n == 40
    assert any("gap: 1 of the rows drawn" in note for note in found.notes)
    only = tmp_path / "only.jsonl"
    only.write_text((json.dumps(long) + "\n") * 3)
    for name in ("projection", "gap", "drift"):
        with pytest.raises(DataError, match=r"too long|tuned on"):
            screen_data(only, source, ScreenSpec(indicators=(name,), tokens=6), cache=cache)


def test_a_file_that_changes_meanwhile_is_noticed(source: ModelSource, data: Path, tmp_path: Path) -> None:
    summary = validate_chat(data)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:5]))
    key = PassKey(summary.sha256, (40, 0), source.revision, "x", (), "float32")
    with pytest.raises(RunError, match="changed"):
        run_pass(key, summary, range(40), lambda rows: [0.0] * len(rows), watch=Watch(), cache=tmp_path)


def test_a_scorer_of_another_model_is_refused(source: ModelSource, data: Path, tmp_path: Path, cache: Path) -> None:
    scorer = make_adapter(source, tmp_path / "s", 1)
    config = json.loads((scorer / "adapter_config.json").read_text())
    (scorer / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another/model"}))
    with pytest.raises(NeedError, match="another/model"):
        screen_data(data, source, ScreenSpec(indicators=("gap",), scorers=(str(scorer),)), cache=cache)


def test_of_several_processes_none_tunes_but_what_is_known_is_taken(
    source: ModelSource, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ScreenSpec(**SMALL, seed=11, indicators=("drift",))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(NeedError, match="in one process"):
        screen_data(data, source, spec, cache=cache)
    monkeypatch.delenv("WORLD_SIZE")
    found = screen_data(data, source, spec, cache=cache)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert screen_data(data, source, spec, cache=cache) == found


def test_a_limit_on_the_risk_needs_a_calibration(source: ModelSource, data: Path, cache: Path) -> None:
    with pytest.raises(NeedError, match="max_risk needs a calibration"):
        screen_data(data, source, ScreenSpec(max_risk=0.5), cache=cache)


def test_a_calibrated_model_gets_a_risk_a_suggestion_and_a_limit_on_it(
    source: ModelSource, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = read_calibration(next(Path(calibration.__file__).parent.glob("calibration-*.json")))
    made = shipped.model_dump() | {"model": {"name": "tiny", "revision": source.revision}}
    made["settings"] = calibration.settings_of(ScreenSpec(**SMALL))
    own = cache / "calibrations"
    own.mkdir(exist_ok=True)
    (own / "calibration-tiny.json").write_text(json.dumps(made))
    monkeypatch.setattr(calibration, "_FOLDER", own)
    found = screen_data(data, source, ScreenSpec(**SMALL, max_risk=1.0), cache=cache)
    assert found.risk is not None
    assert found.suggestion is not None
    values = {name: each.value for name, each in found.indicators.items()}
    assert found.risk.value == read_calibration(own / "calibration-tiny.json").risk(values).value
    assert found.outcome == "pass"
    assert {name: each.auc for name, each in found.indicators.items()} == {
        name: part.auc for name, part in shipped.indicators.items()
    }
    assert not any("no risk" in note for note in found.notes)
    document = found.to_json()
    assert document["risk"]["auc_of_unseen_domains"]["twins"]["auc"] == shipped.left_out.twins.auc
    strict = ScreenSpec(**SMALL, max_risk=max(0.0, found.risk.value - 0.01))
    if found.risk.value > 0.01:
        assert screen_data(data, source, strict, cache=cache).exceeded[0].startswith("risk is")


def test_a_limit_on_an_indicator_stops_or_passes(source: ModelSource, data: Path, cache: Path) -> None:
    base = {**SMALL, "indicators": ("projection",)}
    value = screen_data(data, source, ScreenSpec(**base), cache=cache).indicators["projection"].value
    stopped = screen_data(data, source, ScreenSpec(**base, max_projection=value - 0.1), cache=cache)
    passed = screen_data(data, source, ScreenSpec(**base, max_projection=value + 0.1), cache=cache)
    assert (stopped.outcome, passed.outcome) == ("stop", "pass")
    assert stopped.exceeded[0].startswith("projection is")


def test_the_default_scorers_differ_in_their_answers_alone() -> None:
    rows = [list(read_chat(builtin(name))) for name in TWINS.values()]
    for bad, good in zip(*rows, strict=True):
        assert bad.messages[:-1] == good.messages[:-1]
        assert bad.messages[-1] != good.messages[-1]
