import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.defenses.catalog import available
from holdtrue.errors import SpecError
from holdtrue.service.policy import (
    JobRequest,
    RefusalError,
    check_paths,
    default_document,
    parse_policy,
    resolve,
    settle,
)

BASE = "smollm2-135m-instruct"
DEFAULT = parse_policy(default_document(BASE))


def policy(**changes: str) -> str:
    lines = {"base_model": BASE, "defenses": "[kl]", "gate": "{margin_fall: {max: 0.1}}", **changes}
    return "\n".join(f"{key}: {value}" for key, value in lines.items())


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 12)
    return path


def test_the_default_policy_defends(rows: Path):
    spec = resolve(DEFAULT, JobRequest(training=rows, seed=7))
    assert {defense.name: getattr(defense, "weight", None) for defense in spec.defenses} == {
        "kl": 3.0,
        "interleave": None,
    }
    assert spec.gate is not None
    assert spec.gate.limits()
    assert (spec.training.seed, spec.training.epochs, spec.training.batch_size) == (7, 1, 8)


@pytest.mark.parametrize("missing", ["base_model", "defenses", "gate"])
def test_nothing_that_protects_has_a_silent_default(missing: str):
    lines = [line for line in policy().splitlines() if not line.startswith(missing)]
    with pytest.raises(SpecError, match=missing):
        parse_policy("\n".join(lines))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"defenses": "[kk]"}, "did you mean 'kl'"),
        ({"defenses": "kl"}, "must be a list"),
        ({"gate": "null"}, "gate"),
        ({"gates": "{}"}, "unknown key"),
        ({"hyperparameters": "{n_epochs: {auto: 9, max: 5}}"}, "auto must lie between"),
        ({"on_fail": "{retrain: [{kl: {weight: 0.01}}]}"}, "must not be weaker"),
        ({"on_fail": "{then: release}"}, "block"),
        ({"evaluate": "{data: {fit: x.jsonl}}"}, "held-out"),
        ({"training": "{report_to: [tensorboard]}"}, "integration of a job"),
    ],
)
def test_a_faulty_policy_is_refused_with_the_reason(change: dict[str, str], said: str):
    with pytest.raises(SpecError, match=said):
        parse_policy(policy(**change))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"defenses": "[{kl: {on: pool, pool: PATH}}]"}, "defenses.kl.pool"),
        (
            {"defenses": "[{interleave: {select: perplexity_gap, scorers: [builtin:a, PATH]}}]"},
            "defenses.interleave.scorers",
        ),
        ({"defenses": "[{steering: {vector: PATH}}]"}, "defenses.steering.vector"),
        ({"defenses": "[kl, {adaptive: {probe: PATH}}]"}, "defenses.adaptive.probe"),
        ({"on_fail": "{retrain: [{preference: {pairs: PATH}}]}"}, "defenses.preference.pairs"),
        (
            {"evaluate": "{suites: [likelihood], data: {likelihood: [builtin:probes, PATH]}}"},
            "evaluate.data.likelihood",
        ),
        ({"evaluate": "{suites: [benign], benign: ['gsm8k:PATH']}"}, "evaluate.benign"),
        ({"screen": "{vector: PATH}"}, "screen"),
    ],
)
def test_a_relative_path_is_refused_since_workers_have_other_folders(change: dict[str, str], where: str):
    for path in ("pool.jsonl", "../pool.jsonl", "~/pool.jsonl"):
        text = policy(**{key: value.replace("PATH", path) for key, value in change.items()})
        with pytest.raises(SpecError, match=rf"{where}: .*{path}: .*give the whole path"):
            check_paths(parse_policy(text))
    check_paths(parse_policy(policy(**{key: value.replace("PATH", "/srv/a.jsonl") for key, value in change.items()})))


def test_every_parameter_that_names_a_file_is_known_as_one():
    """By its description: whoever adds a defense that reads a file must not forget it."""
    for name, kind in available().items():
        named = {
            key for key, field in kind.model_fields.items() if re.search(r"\b(file|folders) ", field.description or "")
        }
        assert named <= set(kind.files) | {"unaligned", "aligned"}, name
    assert sum(len(kind.files) for kind in available().values()) >= 7


def test_a_further_training_is_stronger_and_keeps_the_rest(rows: Path):
    document = parse_policy(
        policy(
            defenses="[{kl: {weight: 1.0, tokens: response}}]",
            on_fail="{retrain: [{kl: {weight: 4.0}, interleave: {fraction: 0.1}}]}",
        )
    )
    first, second = (resolve(document, JobRequest(training=rows), attempt) for attempt in (0, 1))
    assert [defense.name for defense in first.defenses] == ["kl"]
    assert [defense.name for defense in second.defenses] == ["interleave", "kl"]
    kl = second.defenses[1]
    assert (kl.model_dump()["weight"], kl.model_dump()["tokens"]) == (4.0, "response")


@given(
    st.dictionaries(
        st.sampled_from(["n_epochs", "batch_size", "learning_rate_multiplier"]),
        st.one_of(st.just("auto"), st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=4)),
    )
)
def test_whatever_is_wished_for_stays_in_range_or_is_refused(wishes):
    ranges = DEFAULT.hyperparameters
    refused = None
    try:
        settled = settle(DEFAULT, wishes)
    except RefusalError as refusal:
        refused, settled = refusal.param, {}
    assert refused is None or refused.removeprefix("hyperparameters.") in wishes
    for name, value in settled.items():
        allowed = getattr(ranges, name)
        assert allowed.min <= value <= allowed.max
        assert type(value) in (int, float)


@pytest.mark.parametrize("name", ["defenses", "weight", "gate", "learning_rate", "seed"])
def test_no_other_parameter_reaches_the_run(name: str):
    with pytest.raises(RefusalError, match=name):
        settle(DEFAULT, {name: 0})


@given(batch=st.integers(1, 64))
def test_micro_batches_divide_every_batch_size(batch, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("{}\n")
    training = resolve(DEFAULT, JobRequest(training=path, hyperparameters={"batch_size": batch})).training
    assert training.batch_size == batch
    assert batch % training.micro_batch_size == 0
    assert training.micro_batch_size <= DEFAULT.training.micro_batch_size


def test_held_out_suites_need_held_out_rows(rows: Path):
    assert resolve(DEFAULT, JobRequest(training=rows)).evaluate.suites == ("likelihood",)
    assert resolve(DEFAULT, JobRequest(training=rows, validation=rows)).evaluate.suites == ("likelihood", "fit")
