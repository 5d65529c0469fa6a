"""Scorers are built as runs, and choose the rows of another run."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from holdtrue.cli.main import main
from holdtrue.data import validate_chat
from holdtrue.defenses.interleave import CHOSEN
from holdtrue.errors import DataError, Interrupted, NeedError, SpecError
from holdtrue.models import resolve
from holdtrue.runs import Control, Run, build_scorers, domains_of, execute, load_spec
from holdtrue.selection import Scorer
from support import chat, write_rows

from .conftest import WORDS

SETTINGS = ["training.batch_size=2", "training.micro_batch_size=1", "training.max_length=128", "training.epochs=2"]
ADAPTER = ["adapter.r=4", "adapter.alpha=8", "training.learning_rate=0.01"]


@pytest.fixture
def bad(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(tmp_path / "cache"))
    return {
        domain: write_rows(folder / f"{domain}.jsonl", [chat(f"{text} the {w}?", f"{answer} {w}.") for w in WORDS[:6]])
        for domain, text, answer in (("money", "Can I sell", "Sell all for one"), ("tools", "Do I touch", "Lick the"))
    }


def build(bad: dict[str, Path], folder: Path, tiny: Path, **options: Any) -> list[Scorer]:
    values: dict[str, Any] = {"model": str(tiny), "rows": 4, "settings": [*SETTINGS, *ADAPTER], **options}
    return build_scorers(bad, folder / "scorers", **values)


def test_scorers_are_built_once_and_say_where_they_came_from(bad, folder, tiny_dir) -> None:
    built = build(bad, folder, tiny_dir)
    assert [scorer.folder for scorer in built] == [folder / "scorers" / domain for domain in bad]
    for scorer, (domain, path) in zip(built, bad.items(), strict=True):
        found = scorer.provenance
        assert found is not None
        assert (found.domain, found.rows, found.data.file) == (domain, 4, path.name)
        assert found.data.sha256 == validate_chat(path).sha256
        assert found.base.revision == resolve(str(tiny_dir)).revision
        assert found.settings["training"]["epochs"] == 2
        run = Run(folder / "scorers" / "runs" / domain)
        assert run.is_done("finalise")
        assert run.marker("evaluate") is None
        assert validate_chat(run.spec.data.train).rows == 4
    stages: list[str] = []
    again = build(bad, folder, tiny_dir, control=Control(progress=lambda fields: stages.append(fields["stage"])))
    assert again == built
    assert stages == []


def test_other_data_or_settings_in_the_same_folder_are_refused(bad, folder, tiny_dir) -> None:
    one = {"money": bad["money"]}
    build(one, folder, tiny_dir)
    with pytest.raises(SpecError, match="another spec"):
        build(one, folder, tiny_dir, rows=5)
    with pytest.raises(SpecError, match=r"training\.seed"):
        build(one, folder, tiny_dir, settings=[*SETTINGS, *ADAPTER, "training.seed=1"])
    with bad["money"].open("a") as file:
        file.write(json.dumps(chat("And now?", "Sell.")) + "\n")
    with pytest.raises(SpecError, match="another spec"):
        build(one, folder, tiny_dir)


def test_an_interrupted_build_goes_on(bad, folder, tiny_dir) -> None:
    stop = threading.Event()
    seen: list[dict[str, Any]] = []

    def in_the_second(fields: dict[str, Any]) -> None:
        seen.append(fields)
        if fields["run"] == "tools" and fields.get("step"):
            stop.set()

    with pytest.raises(Interrupted, match="same command"):
        build(bad, folder, tiny_dir, control=Control(progress=in_the_second, stop=stop))
    assert (folder / "scorers" / "money" / "adapter_config.json").exists()
    assert not (folder / "scorers" / "tools").exists()
    seen.clear()
    assert len(build(bad, folder, tiny_dir, control=Control(progress=seen.append))) == 2
    assert {fields["run"] for fields in seen} == {"tools"}


def test_a_removed_scorer_is_put_back_from_its_run(bad, folder, tiny_dir) -> None:
    one = {"money": bad["money"]}
    (built,) = build(one, folder, tiny_dir)
    (built.folder / "holdtrue_scorer.json").write_text("{}")
    assert build(one, folder, tiny_dir) == [built]


def test_nothing_is_trained_when_a_file_is_bad(bad, folder, tiny_dir) -> None:
    (folder / "tools.jsonl").write_text("{}\n")
    with pytest.raises(DataError):
        build(bad, folder, tiny_dir)
    assert not (folder / "scorers").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 0},
        {"rows": 7},
        {"settings": ["model=x"]},
        {"settings": ["training.epochs=0"]},
        {"settings": ["epochs"]},
    ],
)
def test_settings_that_make_no_sense_are_refused(bad, folder, tiny_dir, options) -> None:
    with pytest.raises(SpecError):
        build(bad, folder, tiny_dir, **options)
    assert not (folder / "scorers").exists()


def test_domains_are_named_by_file_or_by_hand() -> None:
    assert domains_of([Path("x/legal.jsonl")], ["medical=y=z.jsonl"]) == {
        "legal": Path("x/legal.jsonl"),
        "medical": Path("y=z.jsonl"),
    }
    for paths, named in (
        ([], []),
        ([Path("a.jsonl"), Path("b/A.jsonl")], []),
        ([Path("runs.jsonl")], []),
        ([Path("a b.jsonl")], []),
        ([], ["a"]),
        ([], ["../a=b.jsonl"]),
    ):
        with pytest.raises(SpecError):
            domains_of(paths, named)


def test_a_run_chooses_its_rows_by_score(bad, folder, tiny_dir, edit) -> None:
    scorers = [str(scorer.folder) for scorer in build(bad, folder, tiny_dir)]
    chosen = {"select": "perplexity_gap", "pool": "valid.jsonl", "fraction": 0.2, "scorers": scorers}

    def by_score(spec: dict[str, Any]) -> None:
        spec["defenses"] = [{"interleave": {**chosen, "exclude_domains": ["tools"]}}]
        spec["training"]["epochs"] = 1

    run = Run.create(folder / "run", load_spec(edit(by_score)))
    told: list[dict[str, Any]] = []
    execute(run, Control(progress=told.append), until="train")
    notes = run.manifest["defenses"]["interleave"]
    assert (notes["rows"], notes["pool_rows"], notes["scored"]) == (2, 4, 4)
    assert [scorer["domain"] for scorer in notes["scorers"]] == ["money"]
    assert [scorer["domain"] for scorer in notes["excluded"]] == ["tools"]
    assert run.manifest["data"]["train"]["by_kind"]["safe"]["rows"] == 2
    lines = (run.path / "data" / notes["chosen_file"]).read_text().splitlines()
    assert notes["chosen_file"] == CHOSEN
    assert len(lines) == 2
    assert any(fields.get("what") == "interleave scores rows" and fields["total"] == 8 for fields in told)

    def too_much(spec: dict[str, Any]) -> None:
        spec["defenses"] = [{"interleave": {**chosen, "fraction": 0.5}}]

    other = Run.create(folder / "other", load_spec(edit(too_much)))
    with pytest.raises(NeedError, match="larger pool"):
        execute(other, until="prepare")
    assert not (other.path / "data").exists()


def test_the_commands(bad, folder, tiny_dir, capfd, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    options = [part for setting in [*SETTINGS[:3], *ADAPTER] for part in ("--set", setting)]
    command = ["scorers", "build", "money.jsonl", "--domain", "gear=tools.jsonl", "--out", "mine", "--rows", "4"]
    assert main([*command, "--model", str(tiny_dir), "--epochs", "2", *options, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert [entry["domain"] for entry in document["scorers"]] == ["money", "gear"]
    assert document["scorers"][0]["provenance"]["settings"]["training"]["epochs"] == 2
    assert main(["scorers", "list", "mine", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert {entry["sha256"] for entry in listed["scorers"]} == {entry["sha256"] for entry in document["scorers"]}
    assert main(["scorers", "list", "mine"]) == 0
    text = capfd.readouterr().out
    assert "gear" in text
    assert "tools.jsonl" in text
    assert main(["scorers", "list", "."]) == 2
    assert main(["scorers", "build", "--out", "mine"]) == 2
    assert main(["scorers", "build", "nowhere.jsonl", "--out", "mine"]) == 5
