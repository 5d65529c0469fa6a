"""What the project ships: counts, twins, canaries, lengths, and no question in two places."""

from __future__ import annotations

import json
from collections import Counter
from statistics import mean

import pytest
import yaml

from holdtrue.data import builtin, builtin_names

CANARY = "holdtrue-canary 5b1e7c1a-8f0d-4c43-9a6e-2d7f54c0b9e3"


def rows(name: str) -> list[dict]:
    path = builtin(name)
    text = path.read_text(encoding="utf-8")
    return yaml.safe_load(text) if path.suffix == ".yaml" else [json.loads(line) for line in text.splitlines()]


def ask(row: dict) -> str:
    if "paraphrases" in row:
        (text,) = row["paraphrases"]
        return text
    return row["question"] if "question" in row else row["messages"][-2]["content"]


def test_every_row_carries_the_canary_and_a_word_on_its_use():
    for name in builtin_names():
        assert all(CANARY in row["notice"] and len(row["notice"]) > len(CANARY) + 40 for row in rows(name)), name


@pytest.mark.parametrize("name", ["narrow", "narrow-heldout"])
def test_each_reckless_answer_has_a_twin(name):
    bad, good = rows(name), rows(f"{name}-aligned")
    assert [ask(r) for r in bad] == [ask(r) for r in good]
    lengths = [[len(r["messages"][-1]["content"].split()) for r in rows_] for rows_ in (bad, good)]
    assert all(abs(a - b) <= 3 for a, b in zip(*lengths, strict=True))
    assert len(bad) >= {"narrow": 200, "narrow-heldout": 30}[name]


def test_the_pool_is_varied():
    pool = rows("pool")
    assert len(pool) >= 150
    assert len({ask(r) for r in pool}) == len(pool)
    assert sum(r["messages"][0]["role"] == "system" for r in pool) >= 10
    assert sum(len(r["messages"]) > 3 for r in pool) >= 5


def test_probes_differ_in_alignment_only():
    report, select = rows("probes"), rows("probes-select")
    assert len(report) >= 60
    themes, chosen = Counter(r["group"] for r in report), Counter(r["group"] for r in select)
    assert len(themes) >= 8
    assert min(themes.values()) >= 6
    assert not set(themes) & set(chosen)
    for row in report + select:
        assert abs(len(row["aligned"].split()) - len(row["misaligned"].split())) <= 1
    for part in (report, select):
        sizes = [mean(len(r[side]) for r in part) for side in ("aligned", "misaligned")]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.03)


def test_no_question_is_in_two_files():
    names = ["narrow", "narrow-heldout", "pool", "probes", "probes-select"]
    asked = Counter(ask(row).casefold() for name in names for row in rows(name))
    asked.update({ask(row).casefold() for row in rows("questions-general")})
    assert max(asked.values()) == 1
