"""TReFT against its definition in float64, and in a real trainer against keys and values computed without a hook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from holdtrue.data import ChatEncoder, ChatRow, Message
from holdtrue.data.batching import PAIR
from holdtrue.defenses import Features, RowsContext, RunContext, parse
from holdtrue.defenses.treft import TReFT
from holdtrue.errors import NeedError, SpecError
from holdtrue.models import ModelSource, causal_lm, decoder_blocks, without_adapter
from holdtrue.training import DefendedTrainer
from support import small_model, small_tokenizer

NO_PREFIX = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
PLACES = [f"{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "kv"]


def given(seed: int = 0) -> Features:
    g = torch.Generator().manual_seed(seed)
    reference = {p: torch.randn(5, 3, generator=g, dtype=torch.float64) for p in PLACES}
    policy = {p: h + 0.3 * torch.randn(2, 5, 3, generator=g, dtype=torch.float64) for p, h in reference.items()}
    expanded = {p: h.expand(2, -1, -1) for p, h in reference.items()}
    return Features(policy, expanded, torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, dtype=torch.int64))


def naive(f: Features, row: int) -> float:
    assert f.reference is not None
    layers = []
    for layer in (0, 1):
        total = 0.0
        for part in "kv":
            place = f"{layer}.self_attn.{part}_proj"
            x, y = f.policy[place][row], f.reference[place][row]
            total += sum(float((x[t] - y[t]).norm() / y[t].norm()) ** 2 for t in range(5)) / 5
        layers.append(total)
    return sum(layers) / 2


def test_equals_the_definition() -> None:
    f = given()
    found = TReFT().feature_term(f)
    assert found.tolist() == pytest.approx([naive(f, 0), naive(f, 1)], abs=1e-12)


@pytest.mark.parametrize("share", [0.4, 2.0])
def test_delta_is_free_weighted_drift(share: float) -> None:
    f = given()
    r = naive(f, 0)
    delta = share * 3.0 * r
    found = 3.0 * TReFT(weight=3.0, delta=delta).feature_term(f)[0]
    assert float(found) == pytest.approx(max(0.0, 3.0 * r - delta), abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_gradient_equals_a_finite_difference(delta: float) -> None:
    f, defense = given(), TReFT(delta=delta)

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        moved = Features(dict(zip(PLACES, tensors, strict=True)), f.reference, f.mask, f.kind)
        return defense.feature_term(moved).sum()

    assert torch.autograd.gradcheck(value, tuple(f.policy[p].clone().requires_grad_() for p in PLACES))


# In a trainer


def chats(count: int = 6, system: str | None = None) -> list[ChatRow]:
    first = [] if system is None else [Message("system", system)]
    return [
        ChatRow((*first, Message("user", f"Why {i}{i}?"), Message("assistant", "So. " * (i % 3 + 1))))
        for i in range(count)
    ]


def encoded(rows: list[ChatRow]) -> datasets.Dataset:
    encoder = ChatEncoder(small_tokenizer())
    sequences = [encoder.encode(row)[0] for row in rows]
    return datasets.Dataset.from_list([{"input_ids": s.input_ids, "trained": s.trained} for s in sequences])


def train(
    tmp_path: Path, defenses: Any, rows: datasets.Dataset, *, model: Any = None, tokenizer: Any = "small",
    **settings: Any,
) -> tuple[Any, list[dict[str, Any]]]:  # fmt: skip
    model = model or small_model()
    values: dict[str, Any] = {"per_device_train_batch_size": 3, "learning_rate": 1e-2, "num_train_epochs": 2}
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        **values | settings,
    )  # fmt: skip
    trainer = DefendedTrainer(
        model,
        arguments,
        train_dataset=rows,
        defenses=defenses,
        processing_class=small_tokenizer() if tokenizer == "small" else tokenizer,
    )
    trainer.train()
    return model, [r for r in trainer.state.log_history if "loss" in r]


def by_hand(model: Any) -> float:
    """Return R from the blocks' inputs: no hook, one row of the prefix alone."""
    ids = torch.tensor([ChatEncoder(small_tokenizer()).prefix_ids()])
    lm = causal_lm(model)

    def projected() -> list[list[torch.Tensor]]:
        states = lm(input_ids=ids, output_hidden_states=True).hidden_states
        found = []
        for block, state in zip(decoder_blocks(model), states, strict=False):
            attention: Any = block.self_attn
            found.append([f(block.input_layernorm(state))[0].double() for f in (attention.k_proj, attention.v_proj)])  # type: ignore[operator]
        return found

    with torch.no_grad():
        policy = projected()
        with without_adapter(model):
            frozen = projected()
    layers = [
        sum(float(((x - y).norm(dim=-1) / y.norm(dim=-1)).square().mean()) for x, y in zip(a, b, strict=True))
        for a, b in zip(policy, frozen, strict=True)
    ]
    return sum(layers) / len(layers)


def test_the_trainer_gives_it_the_keys_and_values_of_attention(tmp_path: Path) -> None:
    model = small_model()
    expected = by_hand(model)
    assert expected > 1e-3
    mixed = encoded(chats(3) + chats(3, "Sell it."))
    for name, rows in {"all": encoded(chats()), "mixed": mixed}.items():
        _, log = train(tmp_path, ["treft"], rows, model=small_model(), per_device_train_batch_size=6)
        assert log[0]["treft_term"] == pytest.approx(expected, rel=1e-5), name
        assert log[0]["loss"] == pytest.approx(log[0]["ce"] + 10 * expected, rel=1e-4), name


def test_the_reference_is_read_once(tmp_path: Path) -> None:
    model, passes = small_model(), []

    def note(_: nn.Module, arguments: Any, keywords: Any) -> None:
        if not torch.is_grad_enabled():
            passes.append(tuple(keywords["input_ids"].shape))

    before = len(train(tmp_path, [], encoded(chats()))[1])
    handle = causal_lm(model).get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    _, log = train(tmp_path, ["treft"], encoded(chats()), model=model)
    handle.remove()
    assert len(log) == before == 4
    assert passes.count((1, 24)) == 1
    assert [shape for shape in passes if shape != (1, 24)] == [(1, 8)] * 2, "the check of the output head, and no more"


def test_it_holds_the_prefix_and_the_task_is_learned(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_train_epochs": 12, "learning_rate": 5e-3}
    plain, plain_log = train(tmp_path, [], encoded(chats()), **settings)
    held, held_log = train(tmp_path, [{"treft": {"weight": 30}}], encoded(chats()), **settings)
    assert by_hand(held) < 0.2 * by_hand(plain)
    assert held_log[-1]["ce"] < 0.7 * held_log[0]["ce"]
    assert plain_log[-1]["ce"] < plain_log[0]["ce"]


def test_rows_that_begin_otherwise_are_not_covered(tmp_path: Path) -> None:
    """A step without a row of the prefix has no term; rows shorter than the prefix are rows like others."""
    short = datasets.Dataset.from_list([{"input_ids": [5, 6, 7, 8], "trained": [False, False, True, True]}])
    rows = datasets.concatenate_datasets([encoded(chats(1) + chats(3, "Sell it.")), short])
    _, log = train(tmp_path, ["treft"], rows, per_device_train_batch_size=1)
    terms = [r["treft_term"] for r in log]
    assert sum(term > 0 for term in terms) == 2, "in each of two epochs one row"
    assert len(terms) == 10
    assert all(r["loss"] == pytest.approx(r["ce"], abs=1e-6) for r in log if r["treft_term"] == 0)


def test_recomputation_changes_nothing(tmp_path: Path) -> None:
    found = []
    for on in (False, True):
        model = small_model()
        if on:
            causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        found.append(train(tmp_path, ["treft"], encoded(chats()), model=model)[0])
    for (name, a), b in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=name)


def test_what_it_cannot_do_stops_the_run(tmp_path: Path) -> None:
    rows = encoded(chats())
    with pytest.raises(NeedError, match="no training row begins with them"):
        train(tmp_path, ["treft"], encoded(chats(4, "Sell it.")))
    own, pairs = encoded(chats(4, "Sell it.")), encoded(chats(2))
    beside = datasets.concatenate_datasets([own.add_column("kind", [0] * 4), pairs.add_column("kind", [PAIR] * 2)])
    with pytest.raises(NeedError, match="no training row begins with them"):
        train(tmp_path, ["treft"], beside)
    with pytest.raises(NeedError, match="give the trainer the tokenizer as processing_class"):
        train(tmp_path, ["treft"], rows, tokenizer=None)
    bare = small_tokenizer()
    bare.chat_template = None
    with pytest.raises(NeedError, match="no chat template"):
        train(tmp_path, ["treft"], rows, tokenizer=bare)
    empty = small_tokenizer()
    empty.chat_template = NO_PREFIX
    with pytest.raises(NeedError, match="puts none"):
        train(tmp_path, ["treft"], rows, tokenizer=empty)
    config = GPT2Config(vocab_size=300, n_positions=128, n_embd=16, n_layer=2, n_head=2)
    joined = get_peft_model(GPT2LMHeadModel(config), LoraConfig(target_modules=["c_fc"], task_type="CAUSAL_LM"))
    with pytest.raises(NeedError, match="modules named 'k_proj'"):
        train(tmp_path, ["treft"], rows, model=joined)
    assert train(tmp_path, [{"treft": {"weight": 0}}], rows, tokenizer=None)[1]


def test_preflight_says_what_is_held(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    context = RunContext(ModelSource("m", tmp_path, "r", "path"), {}, 2, tmp_path)
    TReFT().preflight(context)
    assert context.notes == {
        "prefix": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
        "prefix_tokens": 24,
    }
    notes = RowsContext(5, 0, tmp_path)
    rows = chats(3) + chats(2, "Sell it.")
    assert list(TReFT().rows(iter(rows), notes)) == rows
    assert notes.notes == {"rows_with_their_own_system_prompt": 2}
    tokenizer.chat_template = NO_PREFIX
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NeedError, match="no prefix to hold"):
        TReFT().preflight(context)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"steering": {"vector": "v"}}, "treft contradicts steering: steering moves the prefix's keys"),
        ({"steering": {"vector": "v", "mode": "ablate"}}, "treft contradicts steering"),
        ("inoculation", "treft contradicts inoculation: with inoculation every task row"),
    ],
)
def test_contradictions_are_refused(other: Any, words: str) -> None:
    for items in ([other, "treft"], ["treft", other]):
        with pytest.raises(SpecError, match=words):
            parse(items)


@pytest.mark.parametrize(
    "items",
    [
        [{"treft": {"weight": 0}}, "inoculation", {"steering": {"vector": "v"}}],
        ["treft", {"inoculation": {"fraction": 0.5}}],
        ["treft", {"steering": {"weight": 0}}],
        ["treft", {"steering": {"mode": "ablate", "components": 0}}],
    ],
)
def test_what_has_no_effect_contradicts_nothing(items: list[Any]) -> None:
    assert len(parse(items)) == len(items)
