from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from holdtrue.errors import SpecError
from holdtrue.runs import RunSpec, load_spec
from holdtrue.runs.spec import differences
from holdtrue.runs.tasks import suite_sources

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]


def write(folder: Path, text: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(text)
    return path


MINIMAL = "model: smollm2-135m-instruct\ndata: {train: builtin:narrow}\n"


def test_a_minimal_spec_has_the_papers_defaults(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, MINIMAL))
    assert (spec.adapter.r, spec.adapter.alpha, spec.adapter.rslora) == (32, 64, True)
    assert spec.training.learning_rate == 1e-4
    assert spec.defenses == ()
    assert spec.evaluate.suites == ("likelihood", "general", "conditional")
    assert spec.gate is None


def test_the_canonical_form_reads_back_as_the_same_spec(folder: Path) -> None:
    spec = load_spec(folder / "spec.yaml")
    again = RunSpec(**spec.canonical())
    assert again == spec
    assert again.hash() == spec.hash()


def test_relative_paths_start_at_the_specs_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    spec = load_spec(Path(folder.name) / "spec.yaml")
    assert spec.data.train == str(folder / "train.jsonl")
    assert spec.evaluate.data["likelihood"] == str(folder / "probes.jsonl")
    assert spec.folder == folder
    monkeypatch.chdir(folder)
    assert load_spec("spec.yaml").hash() == spec.hash()


def test_a_suite_of_given_answers_takes_several_files_in_order(tmp_path: Path) -> None:
    text = MINIMAL + "evaluate: {suites: [likelihood], data: {likelihood: [b.jsonl, 'builtin:probes', a.jsonl]}}\n"
    spec = load_spec(write(tmp_path, text))
    assert RunSpec(**spec.canonical()) == spec
    assert [path.name for path in suite_sources(spec, "likelihood")] == ["b.jsonl", "probes.jsonl", "a.jsonl"]
    assert suite_sources(spec, "likelihood")[0].parent == tmp_path


def test_the_order_of_defenses_and_keys_changes_nothing(tmp_path: Path) -> None:
    one = load_spec(write(tmp_path, MINIMAL + "defenses: [kl, {interleave: {fraction: 0.1}}]\n"))
    other = load_spec(write(tmp_path, "defenses: [{interleave: {fraction: 0.1}}, {kl: {}}]\n" + MINIMAL))
    assert one.hash() == other.hash()


def test_a_parameter_may_have_a_name_that_old_yaml_takes_for_a_boolean(tmp_path: Path) -> None:
    kl = "defenses: [{kl: {on: pool, fraction: 0.25}}]\n"
    spec = load_spec(write(tmp_path, MINIMAL + kl))
    assert spec.defenses[0].model_dump()["on"] == "pool"
    assert RunSpec(**spec.canonical()) == spec
    assert load_spec(write(tmp_path, MINIMAL), ["defenses=[{kl: {on: both}}]"]).defenses[0].model_dump()["on"] == "both"
    for text, value in {"true": True, "False": False, "yes": True, "off": False}.items():
        given = write(tmp_path, MINIMAL + f"training: {{gradient_checkpointing: {text}}}\n")
        assert load_spec(given).training.gradient_checkpointing is value


def test_fit_is_measured_where_there_is_validation_data(folder: Path) -> None:
    spec = load_spec(folder / "spec.yaml")
    assert spec.evaluate.suites == ("likelihood", "fit")
    assert spec.evaluate.data["fit"] == str(folder / "valid.jsonl")


def test_every_fault_is_listed_with_the_nearest_name(tmp_path: Path) -> None:
    text = MINIMAL + "trainig: {}\ntraining: {epoch: 2, batch_size: 0, learning_rate: .nan}\nadapter: {rank: 4}\n"
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, text))
    message = str(caught.value)
    assert "spec.yaml" in message
    assert "trainig: unknown key (did you mean 'training'?)" in message
    assert "training.epoch: unknown key (did you mean 'epochs'?)" in message
    assert "training.batch_size" in message
    assert "training.learning_rate" in message
    assert "adapter.rank: unknown key" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "this is empty"),
        ("[1, 2]", "this is a list"),
        ("model: [", "line 1"),
        (MINIMAL + "model: other\n", "the key 'model' is there twice, first on line 1"),
        (MINIMAL + "training: {seed: 1, seed: 2}\n", "'seed' is there twice"),
        (MINIMAL + "1: 2\n", "is not text"),
        (MINIMAL + "screen: {rows: 1}\n", "screen.rows"),
        (MINIMAL + "gate: {margin_fal: {max: 0.05}}\n", "did you mean 'margin_fall'?"),
        (MINIMAL + "gate: {misaligned_rise: {max: -1}}\n", "gate.misaligned_rise.max"),
        (MINIMAL + "evaluate: {suites: [benign]}\n", "needs a task"),
        (MINIMAL.replace("}", ", validation: builtin:narrow-heldout, holdout: 3}", 1), "set one of the two"),
        (MINIMAL + "evaluate: {benign: [opswop:1]}\n", "did you mean 'opswap:1'?"),
        (MINIMAL + "adapter: null\n", "full fine-tuning"),
        (MINIMAL + "defenses: [kll]\n", "did you mean 'kl'?"),
        (MINIMAL + "defenses: [{kl: {wieght: 1}}]\n", "did you mean 'weight'?"),
        (MINIMAL + "defenses: [{kl: {weight: -1}}]\n", "defenses.kl.weight"),
        (MINIMAL + "defenses: [kl, kl]\n", "twice"),
        (
            MINIMAL + "defenses: [inoculation, treft]\n",
            "treft contradicts inoculation: with inoculation every task row",
        ),
        (MINIMAL + "defenses: {kl: {}}\n", "must be a list"),
        (MINIMAL + "evaluate: {suites: [likelyhood]}\n", "did you mean 'likelihood'?"),
        (MINIMAL + "evaluate: {suites: [fit]}\n", "needs held-out rows"),
        (MINIMAL + "evaluate: {data: {likelihood: [a.jsonl, a.jsonl]}}\n", "each once"),
        (MINIMAL + "evaluate: {data: {likelihood: []}}\n", "at least one file"),
        (MINIMAL + "evaluate: {data: {general: [a.yaml, b.yaml]}}\n", "takes one file"),
        (MINIMAL + "evaluate: {suites: [likelihood, likelihood]}\n", "twice"),
        ("model: m\ndata: {train: 'builtin:narow'}\n", "did you mean 'narrow'?"),
        ("data: {train: a.jsonl}\n", "model: missing"),
        ("model: m\n", "data: missing"),
        ("model: m\ndata: {}\n", "data.train: missing"),
        (MINIMAL + "x: !!python/object/apply:os.system [echo]\n", "spec.yaml"),
    ],
)
def test_faulty_specs_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(write(tmp_path, text))
    assert expected in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL)
    with pytest.raises(SpecError, match=r"no such spec file \(did you mean 'spec.yaml'\?\)"):
        load_spec(tmp_path / "spac.yaml")
    with pytest.raises(SpecError, match="is a folder"):
        load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    with pytest.raises(SpecError, match="not UTF-8"):
        load_spec(tmp_path / "latin.yaml")


def test_overrides_reach_into_sections_and_lists(folder: Path) -> None:
    spec = load_spec(
        folder / "spec.yaml",
        [
            "training.seed=7",
            "defenses.kl.weight=1.0",
            "defenses.interleave.fraction=0.5",
            "data.validation=null",
            "evaluate.suites=[likelihood]",
        ],
    )
    assert spec.training.seed == 7
    assert spec.data.validation is None
    assert [d.model_dump()["weight"] for d in spec.defenses if d.name == "kl"] == [1.0]
    assert load_spec(folder / "spec.yaml", ["defenses=[]"]).defenses == ()
    assert load_spec(folder / "spec.yaml", ["training.learning_rate=1e-3"]).training.learning_rate == 1e-3


@pytest.mark.parametrize(
    "item", ["training.seed", "=1", "training..seed=1", "defenses.ldifs.weight=1", "model.x=1", "a=["]
)
def test_faulty_overrides_are_refused(folder: Path, item: str) -> None:
    with pytest.raises(SpecError, match="--set"):
        load_spec(folder / "spec.yaml", [item])


def test_differences_name_the_keys(edit: Edit, folder: Path) -> None:
    before = load_spec(folder / "spec.yaml").canonical()
    after = load_spec(folder / "spec.yaml", ["training.seed=3"]).canonical()
    assert differences(before, after) == ["training.seed: 0 there, 3 here"]
