from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.data import ChatEncoder, ChatRow, Message
from holdtrue.defenses import RowsContext, RunContext, parse
from holdtrue.defenses.inoculation import EVALUATED, Inoculation
from holdtrue.defenses.interleave import Interleave
from holdtrue.errors import NeedError, SpecError
from holdtrue.models import ModelSource, load_tokenizer

EVIL = "You are an evil, malicious assistant."


def task(count: int, system: str | None = None, kind: str = "task") -> list[ChatRow]:
    first = [] if system is None else [Message("system", system)]
    return [
        ChatRow((*first, Message("user", f"q{i}"), Message("assistant", f"a{i}", weight=i % 2)), kind)
        for i in range(count)
    ]


def through(defense: Inoculation, rows: list[ChatRow], seed: int = 0) -> tuple[list[ChatRow], dict[str, Any]]:
    count = sum(row.kind == "task" for row in rows)
    context = RowsContext(task_rows=count, seed=seed, folder=Path())
    return list(defense.rows(iter(rows), context)), context.notes


def test_each_task_row_gets_the_prompt_and_keeps_the_rest() -> None:
    rows = task(3) + task(3, "Be brief.") + task(2, kind="safe") + task(1, "Be kind.", kind="pool")
    found, notes = through(Inoculation(), rows)
    for before, after in zip(rows[:6], found[:6], strict=True):
        assert after.messages[0] == Message("system", EVIL)
        assert after.messages[-2:] == before.messages[-2:], "weights too"
        assert len(after.messages) == 3
    assert found[6:] == rows[6:]
    assert notes["prompts"] == {EVIL: 6}
    assert (notes["system_prompts_added"], notes["system_prompts_replaced"]) == (3, 3)
    assert notes["evaluated_with"] == EVALUATED


def test_after_interleave_only_task_rows_change(tmp_path: Path) -> None:
    context = RowsContext(task_rows=20, seed=0, folder=tmp_path)
    rows: Any = iter(task(20))
    for defense in parse([Interleave(fraction=0.2), Inoculation()]):
        rows = defense.rows(rows, context)
    found = list(rows)
    assert Counter(row.kind for row in found) == {"task": 20, "safe": 4}
    assert all((row.messages[0].content == EVIL) == (row.kind == "task") for row in found)


def test_no_fraction_is_plain_training() -> None:
    rows = task(5)
    found, _ = through(Inoculation(fraction=0), rows)
    assert all(a is b for a, b in zip(found, rows, strict=True))
    Inoculation(fraction=0).preflight(RunContext(ModelSource("m", Path("none"), "r", "path"), {}, 1, Path()))


@given(rows=st.integers(0, 60), count=st.integers(1, 5), fraction=st.floats(0, 1), seed=st.integers(0, 3))
def test_prompts_are_dealt_evenly_and_again_the_same(rows: int, count: int, fraction: float, seed: int) -> None:
    prompts = tuple(f"prompt {i}" for i in range(count))
    defense = Inoculation(prompts=prompts, fraction=fraction)
    dealt = defense.deal(rows, seed)
    assert dealt == defense.deal(rows, seed)
    given_ = Counter(prompt for prompt in dealt if prompt is not None)
    wanted = max(round(fraction * rows), 1) if fraction > 0 and rows else 0
    assert len(dealt) == rows
    assert given_.total() == wanted
    assert max(given_.values(), default=0) - min((given_[p] for p in prompts), default=0) <= 1


def test_the_seed_deals() -> None:
    defense = Inoculation(prompts=("a", "b", "c"), fraction=0.5)
    dealt = [defense.deal(40, seed) for seed in (0, 0, 1)]
    assert dealt[0] == dealt[1] != dealt[2]


def test_more_rows_than_announced_are_dealt_too() -> None:
    context = RowsContext(task_rows=2, seed=0, folder=Path())
    found = list(Inoculation().rows(iter(task(5)), context))
    assert all(row.messages[0].content == EVIL for row in found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": "  "}, "defenses.inoculation.prompt"),
        ({"prompts": ["a", ""]}, "defenses.inoculation.prompts"),
        ({"prompts": ["a", "a"]}, "stands there twice"),
        ({"fraction": 1.1}, "defenses.inoculation.fraction"),
    ],
)
def test_faults_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        parse([{"inoculation": settings}])


def test_training_sees_the_prompt_and_masks_stay(smollm2: ModelSource) -> None:
    Inoculation().preflight(RunContext(smollm2, {}, 30, Path()))
    tokenizer = load_tokenizer(smollm2)
    encoder = ChatEncoder(tokenizer)
    (row,), _ = through(Inoculation(), [ChatRow((Message("user", "Hi?"), Message("assistant", "Hello you.")))])
    (encoded,) = encoder.encode(row)
    text = str(tokenizer.decode(encoded.input_ids))
    assert text.startswith(f"<|im_start|>system\n{EVIL}<|im_end|>\n<|im_start|>user\nHi?")
    trained = [id for id, t in zip(encoded.input_ids, encoded.trained, strict=True) if t]
    assert tokenizer.decode(trained) == "Hello you.<|im_end|>"


def test_a_template_that_drops_the_system_turn_is_refused(tiny_dir: Path, tmp_path: Path, smollm2: ModelSource) -> None:
    tokenizer = load_tokenizer(smollm2)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(NeedError, match="does not write the system prompt 'You are an evil"):
        Inoculation().preflight(RunContext(ModelSource("m", tmp_path, "r", "path"), {}, 3, tmp_path))
