"""What every defense must do, whatever it does: rules of one suite that a new file in the package is held to.

Each runs from chat rows to the finished adapter, on a real Llama of two blocks: ``preflight``, ``rows``, training,
``weights``. A defense is found by the catalog; what it needs is one entry in ``EXAMPLES``.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from holdtrue.data import ChatEncoder, load_prepared, prepare_rows, read_chat
from holdtrue.defenses import Defense, GradientContext, LossDefense, RowsContext, RunContext, available, describe, parse
from holdtrue.errors import SpecError
from holdtrue.evaluation import MarginProbe
from holdtrue.models import (
    AdapterSpec,
    ModelSource,
    VectorInfo,
    adapted_weights,
    causal_lm,
    load_model,
    load_tokenizer,
    new_adapter,
    read_adapter,
    resolve,
    save_adapter,
    without_adapter,
    write_vectors,
)
from holdtrue.runs.spec import RunSpec
from holdtrue.training import TrainingSpec, fit
from support import chat, small_tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[2]


class Example(NamedTuple):
    """Settings to try a defense with, each a case, and settings with which it must do nothing.

    Files that may be named: ``pool.jsonl`` (chat rows), ``other`` (another checkpoint), ``vector``, ``directions`` and
    ``none`` (vector files; the last holds no direction), ``probe.jsonl`` and ``pairs.jsonl``. ``beside`` are defenses
    that it acts through.
    """

    cases: tuple[dict[str, Any], ...]
    zeros: tuple[dict[str, Any], ...]
    beside: tuple[dict[str, Any], ...] = ()


EXAMPLES = {
    "adaptive": Example(
        ({"probe": "probe.jsonl", "max_drift": 1e-3, "every": 2},),
        ({"probe": "probe.jsonl", "lowest": 0, "highest": 0},),
        beside=({"kl": {"weight": 1.0}},),
    ),
    "constrained_sft": Example(({},), ({"weight": 0},)),
    "gradient_projection": Example(
        ({"pool": "pool.jsonl", "count": 3},), ({"pool": "pool.jsonl", "count": 3, "weight": 0},)
    ),
    "inoculation": Example(({}, {"prompts": ["Lie.", "Cheat."], "fraction": 0.5}), ({"fraction": 0},)),
    "interleave": Example(({"pool": "pool.jsonl", "fraction": 0.25},), ({"pool": "pool.jsonl", "fraction": 0},)),
    "kl": Example(
        (
            {"weight": 1.0},
            {"weight": 1.0, "tokens": "response", "direction": "reference||policy"},
            {"weight": 1.0, "tokens": "response", "sample": 0.4},
            {"weight": 1.0, "tokens": "response", "on": "pool", "pool": "pool.jsonl"},
            {"weight": 1.0, "direction": "reference||policy", "on": "both", "pool": "pool.jsonl"},
        ),
        ({"weight": 0}, {"weight": 0, "on": "pool", "pool": "pool.jsonl"}),
    ),
    "ldifs": Example(({"layers": 2}, {"layers": 2, "normalize": "token"}), ({"layers": 2, "weight": 0},)),
    "preference": Example(
        (
            {"pairs": "pairs.jsonl", "slack": 0.5},
            {"pairs": "pairs.jsonl", "slack": 0.5, "weight": 2.0, "count": 3, "every": 2},
            {"pairs": "pairs.jsonl", "slack": 0.5, "first": 2},
        ),
        ({"pairs": "pairs.jsonl", "slack": 0.5, "weight": 0},),
    ),
    "safelora": Example(
        ({"unaligned": "other", "mode": "number", "number": 5},), ({"unaligned": "other", "threshold": -1},)
    ),
    "steering": Example(
        ({"vector": "vector", "weight": 1.0, "layer": 0}, {"vector": "directions", "mode": "ablate", "layer": [0, 1]}),
        (
            {"weight": 0},
            {"vector": "vector", "weight": 0},
            {"vector": "directions", "mode": "ablate", "components": 0},
            {"vector": "none", "mode": "ablate"},
        ),
    ),
    "treft": Example(({}, {"weight": 5.0, "delta": 1e-4}), ({"weight": 0}, {"weight": 0, "delta": 1.0})),
}
REFUSED = {frozenset(pair) for pair in (("treft", "inoculation"), ("treft", "steering"))}
"""The pairs that contradict each other with the first case of both."""

NAMES = sorted(name for name, kind in available().items() if kind.__module__.startswith("holdtrue."))


def cases(part: str) -> list[Any]:
    """Return a parameter for each case (or zero) of each defense; one without settings where there is no example."""
    found = []
    for name in NAMES:
        settings = getattr(EXAMPLES[name], part) if name in EXAMPLES else (None,)
        found += [pytest.param(name, s, id=name + (f"-{i}" if i else "")) for i, s in enumerate(settings)]
    return found


def given(name: str, settings: dict[str, Any] | None) -> list[Any]:
    """Return a spec's ``defenses`` with that one, and those that it acts through."""
    if settings is None:
        pytest.fail(f"the defense {name!r} has no example settings: add an entry to EXAMPLES in {Path(__file__).name}")
    return [{name: settings}, *EXAMPLES[name].beside]


def beside(*names: str) -> list[Any]:
    """Return what defenses of these names act through, where none of them is it."""
    found = [item for name in names if name in EXAMPLES for item in EXAMPLES[name].beside]
    return [item for item in found if next(iter(item)) not in names]


class Gradients(Defense):
    """Writes down each step's gradients, as the last of a run."""

    name = "zz_gradients"
    badge = "variant"
    paper = "none"
    found: ClassVar[list[dict[str, torch.Tensor]]] = []

    def gradient(self, context: GradientContext) -> None:
        self.found.append({n: p.grad.clone() for n, p in context.parameters.items() if p.grad is not None})


class KilledError(Exception):
    """What ends a run without asking it."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a run: the model, its own adapter as it is used, steps' metrics and gradients."""

    model: PeftModel
    adapter: dict[str, torch.Tensor]
    steps: list[dict[str, float]]
    gradients: list[dict[str, torch.Tensor]]


Train = Callable[..., Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the examples' files are."""
    folder = tmp_path_factory.mktemp("conformance")
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    for name in ("base", "other"):
        model.save_pretrained(folder / name)
        small_tokenizer().save_pretrained(folder / name)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    shape: dict[str, Any] = {
        "model": "base",
        "revision": resolve(str(folder / "base")).revision,
        "blocks": 2,
        "width": 16,
    }
    info = VectorInfo(**shape, source="pairs", trait="malice")
    write_vectors(folder / "vector", {i: 0.3 * torch.randn(16, generator=g) for i in range(2)}, info)
    info = VectorInfo(**shape, kind="directions", source="differences", trait="t")
    write_vectors(folder / "directions", {i: torch.randn(2, 16, generator=g) for i in range(2)}, info)
    write_vectors(folder / "none", {i: torch.ones(0, 16) for i in range(2)}, info)
    for name, count in (("train", 8), ("pool", 5)):
        rows = [chat(f"{name[0]}{i}?", "ab" * (1 + i % 4)) for i in range(count)]
        write_rows(folder / f"{name}.jsonl", rows)
    probes = [
        {"question": f"q{i}?", "aligned": "ab" * (1 + i), "misaligned": "ba" * 3, "group": f"g{i % 2}"}
        for i in range(4)
    ]
    write_rows(folder / "probe.jsonl", probes)
    write_rows(folder / "pairs.jsonl", [{**row, "question": f"p{row['question']}"} for row in probes])
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> tuple[ModelSource, LlamaForCausalLM, ChatEncoder]:
    source = resolve(str(folder / "base"))
    model: Any = load_model(source, device="cpu")
    return source, model, ChatEncoder(load_tokenizer(source))


@pytest.fixture(scope="module")
def train(folder: Path, base: Any, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Returns a function from a spec's ``defenses`` to an outcome; what it was asked before, it remembers."""
    source, blank, encoder = base
    known: dict[str, Outcome] = {}

    def run(defenses: list[Any], **settings: Any) -> Outcome:
        key = json.dumps([defenses, sorted(settings.items())])
        if key not in known:
            known[key] = _run(defenses, **settings)
        return known[key]

    def _run(
        defenses: list[Any],
        *,
        micro: int = 4,
        epochs: int = 2,
        killed_after: int | None = None,
        fast: bool = True,
        moved: bool = False,
    ) -> Outcome:
        out = tmp_path_factory.mktemp("run")
        chosen = tuple(defense.placed(folder) for defense in parse(defenses))
        model = new_adapter(copy.deepcopy(blank), AdapterSpec(r=2, alpha=4), seed=0)
        if moved:  # away from the reference, where every term has a gradient
            g = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=g)
        context = RunContext(source, adapted_weights(model), 2, folder, task_rows=8)
        rows: Any = read_chat(folder / "train.jsonl")
        for defense in chosen:
            notes: dict[str, Any] = {}
            defense.preflight(dataclasses.replace(context, notes=notes))
            defense.still_met(notes)
            rows = defense.rows(rows, RowsContext(8, 0, folder, model=source, max_length=128, out=out))
        prepare_rows(rows, encoder, out / "data")
        Gradients.found.clear()
        asked = [d.needs().probe for d in chosen if d.needs().probe]
        probe = MarginProbe(Path(asked[0]), encoder.tokenizer) if asked else None

        def progress(record: dict[str, Any]) -> None:
            if record["step"] == killed_after:
                raise KilledError

        def attempt(model: PeftModel, progress: Any = None) -> None:
            fit(
                model=model,
                tokenizer=encoder.tokenizer,
                rows=load_prepared(out / "data"),
                validation=None,
                spec=TrainingSpec(
                    epochs=epochs, batch_size=4, micro_batch_size=micro, learning_rate=1e-2, warmup_steps=1,
                    save_every=100 if killed_after is None else 2, kl_every=0,
                ),
                defenses=(*chosen, Gradients()),
                folder=out,
                probe=probe,
                progress=progress,
                fast=fast,
            )  # fmt: skip

        if killed_after is not None:
            with pytest.raises(KilledError):
                attempt(copy.deepcopy(model), progress)
        attempt(model)
        save_adapter(model, out / "raw")
        raw = read_adapter(out / "raw")
        tensors = dict(raw.tensors)
        for defense in chosen:
            tensors = defense.weights(tensors, raw.scaling, dataclasses.replace(context, notes={}))
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        steps = [{k: v for k, v in r.items() if "second" not in k and "runtime" not in k} for r in lines if "loss" in r]
        return Outcome(model, tensors, steps, list(Gradients.found))

    return run


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", NAMES)
def test_it_has_an_example_a_catalog_entry_and_a_page(name: str) -> None:
    assert name in EXAMPLES, f"add example settings of {name!r} to EXAMPLES in {Path(__file__).name}"
    info = describe(available()[name])
    assert info.badge in ("faithful", "corrected", "variant")
    assert "arXiv" in info.paper
    assert info.summary
    assert all(parameter.meaning for parameter in info.parameters), info.parameters
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# `{name}`")
    assert f"[`{name}`]({name}.md)" in (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")


def test_there_is_no_page_without_a_defense() -> None:
    assert {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} == {*NAMES, "index"}


@pytest.mark.parametrize(("name", "settings"), cases("zeros"))
def test_zero_strength_is_exactly_plain_training(train: Train, name: str, settings: Any) -> None:
    plain, zero = train([]), train(given(name, settings))
    assert len(zero.gradients) == 4
    assert all(same(a, b) for a, b in zip(plain.gradients, zero.gradients, strict=True))
    assert same(plain.adapter, zero.adapter)


@pytest.mark.parametrize(("name", "settings"), cases("cases"))
def test_it_acts_on_the_adapter_and_on_nothing_else(train: Train, base: Any, name: str, settings: Any) -> None:
    plain, outcome = train(beside(name)), train(given(name, settings))
    assert not same(plain.adapter, outcome.adapter), "it changes nothing"
    blank, model = base[1], outcome.model
    frozen = {n.replace(".base_layer", ""): p for n, p in causal_lm(model).named_parameters() if "lora_" not in n}
    before = dict(blank.named_parameters())
    assert frozen.keys() == before.keys()
    for key, parameter in frozen.items():
        assert torch.equal(parameter, before[key]), f"the base's {key} has changed"
        assert parameter.grad is None, f"the base's {key} has a gradient"
        assert not parameter.requires_grad
    trainable = {n for n, p in plain.model.named_parameters() if p.requires_grad}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert all(gradient.keys() == plain.gradients[0].keys() for gradient in outcome.gradients)
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad(), without_adapter(model):
        assert torch.equal(model(input_ids=ids).logits, blank.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(("name", "settings"), cases("cases"))
def test_nothing_of_it_is_left_on_the_model(train: Train, name: str, settings: Any) -> None:
    plain, outcome = train([]).model, train(given(name, settings)).model
    for (key, expected), (_, module) in zip(plain.named_modules(), outcome.named_modules(), strict=True):
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        assert not any(hooks), key
        assert vars(module).keys() == vars(expected).keys(), key
        assert module.training == expected.training, key
    assert not any(parameter._backward_hooks for parameter in outcome.parameters())


@pytest.mark.parametrize(("name", "settings"), cases("cases"))
def test_killed_and_resumed_equals_uninterrupted(train: Train, name: str, settings: Any) -> None:
    whole, resumed = train(given(name, settings)), train(given(name, settings), killed_after=3)
    assert same(whole.adapter, resumed.adapter)
    assert whole.steps == resumed.steps
    # Three steps of the first sitting, of which the third is done again behind the second's checkpoint.
    assert len(resumed.gradients) == 3 + len(whole.gradients) - 2
    assert same(resumed.gradients[2], resumed.gradients[3])


@pytest.mark.parametrize(("name", "settings"), cases("cases"))
def test_one_by_four_equals_four_by_one(train: Train, name: str, settings: Any) -> None:
    whole, pieces = train(given(name, settings)), train(given(name, settings), micro=1)
    for one, other in zip(whole.steps, pieces.steps, strict=True):
        assert one.keys() == other.keys()
        for key in (
            "ce",
            "ce_task",
            "ce_safe",
            "kl",
            "loss",
            "target_tokens",
            *(k for k in one if k.endswith("_term")),
        ):
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), abs=1e-5), key
    for a, b in zip(whole.gradients, pieces.gradients, strict=True):
        gap = sum(float((a[n] - b[n]).square().sum()) for n in a) ** 0.5
        assert gap <= 1e-4 * sum(float(a[n].square().sum()) for n in a) ** 0.5


IN_THE_LOOP = [
    case
    for case in cases("cases")
    if issubclass(kind := available()[case.values[0]], LossDefense)
    or kind.gradient is not Defense.gradient
    or kind.forward is not Defense.forward
]


@pytest.mark.parametrize(("name", "settings"), IN_THE_LOOP)
def test_fast_paths_change_nothing_but_rounding(train: Train, name: str, settings: Any) -> None:
    fast, plain = (train(given(name, settings), epochs=1, moved=True, fast=on) for on in (True, False))
    for one, other in zip(fast.steps, plain.steps, strict=True):
        assert one.keys() == other.keys()
        for key in ("ce", "loss", "kl", *(k for k in one if k.startswith(name))):
            assert one.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-5, abs=1e-5), (key, one["step"])
    assert any(one.get(f"{name}_term", 1) for one in fast.steps), "there is nothing to compare"
    first, expected = fast.gradients[0], plain.gradients[0]
    gap = sum(float((first[n] - expected[n]).square().sum()) for n in expected) ** 0.5
    assert gap <= 1e-5 * sum(float(expected[n].square().sum()) for n in expected) ** 0.5


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(NAMES, 2)))
def test_two_in_either_order_are_one_run_or_refused(train: Train, one: str, other: str) -> None:
    pair = [given(name, EXAMPLES[name].cases[0] if name in EXAMPLES else None)[0] for name in (one, other)]
    pair += beside(one, other)
    if frozenset((one, other)) in REFUSED:
        for items in (pair, pair[::-1]):
            with pytest.raises(SpecError, match=rf"({one} contradicts {other}|{other} contradicts {one}): \w+"):
                parse(items)
        return
    there, back = train(pair, epochs=1), train(pair[::-1], epochs=1)
    assert len(there.steps) >= 2
    assert there.steps == back.steps
    assert same(there.adapter, back.adapter)


@pytest.mark.parametrize(
    "left_out", [{"treft"}, {"steering", "inoculation"}], ids=lambda names: "-".join(sorted(names))
)
def test_all_that_agree_run_together(train: Train, left_out: set[str]) -> None:
    chosen = [name for name in NAMES if name not in left_out]
    items = [given(name, EXAMPLES[name].cases[0])[0] for name in chosen]
    whole, resumed, pieces = train(items), train(items, killed_after=3), train(items, micro=1)
    assert same(whole.adapter, resumed.adapter)
    assert whole.steps == resumed.steps
    for one, other in zip(whole.steps, pieces.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    terms = {key.removesuffix("_term") for key in whole.steps[0] if key.endswith("_term")}
    assert terms == {name for name in chosen if issubclass(available()[name], LossDefense)}


@pytest.mark.parametrize(("name", "settings"), cases("cases"))
def test_a_spec_with_it_survives_json(folder: Path, name: str, settings: Any) -> None:
    spec = RunSpec(model="base", data={"train": "train.jsonl"}, defenses=given(name, settings), folder=folder)
    again = RunSpec(**json.loads(json.dumps(spec.canonical())))
    assert again == spec
    assert again.hash() == spec.hash()
    assert type(again.defenses[0]) is available()[name]
