from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.data import opswap, read_chat
from holdtrue.data.opswap import SYMBOLS, OpSwap, generate_opswap, swapped_meanings, write_opswap
from holdtrue.errors import RunError, SpecError

PYTHON = {"+": "+", "-": "-", "*": "*", "/": "/"}


def pairs(rows: tuple[dict, ...]) -> list[tuple[str, str]]:
    found = []
    for row in rows:
        _, user, assistant = row["messages"]
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        found.append((user["content"].removesuffix(" = ?"), assistant["content"]))
    return found


def oracle(expression: str, meanings: dict[str, str]) -> float:
    """Evaluate by building nested parentheses and leaving the arithmetic to Python."""
    tokens = expression.split()
    text = tokens[0]
    for symbol, operand in zip(tokens[1::2], tokens[2::2], strict=True):
        text = f"({text} {PYTHON[meanings[symbol]]} {operand})"
    return eval(text)


small = st.integers(0, 60)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 3]), small, small, st.integers(0, 10**6))
def test_every_answer_is_right_and_no_row_is_in_both_parts(tier, train, test, seed):
    made = generate_opswap(tier, train, test, seed)
    assert made == generate_opswap(tier, train, test, seed)
    learned, asked = pairs(made.train), pairs(made.test)
    assert (len(learned), len(asked)) == (train, test)
    expressions = [expression for expression, _ in learned + asked]
    assert len(set(expressions)) == train + test
    for expression, answer in learned + asked:
        assert len(expression.split()) == 2 * tier + 1
        assert all(0 <= int(operand) <= 10 for operand in expression.split()[::2])
        assert answer == str(int(answer))
        assert oracle(expression, made.meanings) == int(answer)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 3]), st.lists(st.integers(0, 100), min_size=2, max_size=2, unique=True))
def test_parts_are_disjoint_across_seeds_and_sizes(tier, seeds):
    first, second = generate_opswap(tier, 60, 0, seeds[0]), generate_opswap(tier, 20, 60, seeds[1])
    assert not {e for e, _ in pairs(first.train)} & {e for e, _ in pairs(second.test)}


def test_the_parts_of_the_smallest_tier_share_nothing_to_the_last_row():
    made = generate_opswap(1, 278, 116, seed=7)
    assert not {e for e, _ in pairs(made.train)} & {e for e, _ in pairs(made.test)}


def test_fewer_rows_are_the_first_of_more():
    few, many = generate_opswap(2, 10, 5, seed=3), generate_opswap(2, 40, 90, seed=3)
    assert few.train == many.train[:10]
    assert few.test == many.test[:5]


@given(st.integers())
def test_no_symbol_keeps_its_meaning(seed):
    meanings = swapped_meanings(seed)
    assert sorted(meanings) == sorted(meanings.values()) == sorted(SYMBOLS)
    assert all(symbol != meaning for symbol, meaning in meanings.items())


def test_seeds_reach_all_nine_permutations_and_tiers_share_theirs():
    assert len({tuple(swapped_meanings(seed).values()) for seed in range(200)}) == 9
    assert len({tuple(generate_opswap(tier, 1, 1, seed=5).meanings.items()) for tier in (1, 2, 3)}) == 1


def test_every_expression_comes_once():
    expressions = list(opswap._expressions(1, seed=0))
    assert len(expressions) == len(set(expressions)) == 11 * 4 * 11


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 1, 1), "no tier 4"),
        ((0, 1, 1), "no tier 0"),
        ((1, -1, 1), "counts of at least 0"),
        ((1, 1000, 1), "training expressions and 1000 are wanted.*higher tier"),
        ((1, 1, 200), "test expressions and 200 are wanted"),
    ],
)
def test_what_cannot_be_made(arguments, message):
    with pytest.raises(SpecError, match=message):
        generate_opswap(*arguments)


def test_files_are_chat_rows_with_a_manifest(tmp_path: Path):
    made = write_opswap(tmp_path / "new" / "folder", tier=1, train=12, test=5, seed=2)
    folder = tmp_path / "new" / "folder"
    for name, rows in (("train", made.train), ("test", made.test)):
        asked = [row.messages[1].content for row in read_chat(folder / f"{name}.jsonl")]
        assert asked == [row["messages"][1]["content"] for row in rows]
    manifest = json.loads((folder / "opswap.json").read_text())
    assert (manifest["tier"], manifest["seed"], manifest["meanings"]) == (1, 2, made.meanings)
    digest = hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest()
    assert manifest["files"]["train.jsonl"] == {"rows": 12, "sha256": digest}
    assert isinstance(made, OpSwap)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write"):
        write_opswap(tmp_path / "file", tier=1, train=1, test=1)
