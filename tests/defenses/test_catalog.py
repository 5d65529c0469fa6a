from __future__ import annotations

import subprocess
import sys

import pytest

from holdtrue.defenses import available, parse
from holdtrue.defenses.kl import KL
from holdtrue.errors import SpecError


def test_the_papers_four_are_there():
    assert {"kl", "ldifs", "safelora", "interleave"} <= set(available())


def test_the_papers_defaults():
    (kl,) = parse(["kl"])
    paper = {"weight": 0.1, "direction": "policy||reference", "tokens": "all", "on": "task", "sample": 1.0}
    assert paper.items() <= kl.model_dump().items()


def test_order_is_canonical():
    assert parse(["safelora", {"kl": {"weight": 2}}, "interleave"]) == parse(
        ["interleave", KL(weight=2), {"safelora": {}}]
    )


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["lk"], "did you mean 'kl'"),
        ([{"kl": {"wieght": 1}}], "did you mean 'weight'"),
        ([{"kl": {"weight": -1}}], "defenses.kl.weight: Input should be greater than or equal to 0, got -1"),
        ([{"kl": {"weight": float("nan")}}], "defenses.kl.weight"),
        ([{"kl": {"direction": "sideways"}}], "defenses.kl.direction"),
        (["kl", {"kl": {}}], "twice"),
        ([{"kl": {"pool": "x.jsonl"}}], "no effect with on: task"),
        ([{"kl": {}, "ldifs": {}}], "neither a name nor"),
        ([{"kl": 3}], "expected parameters"),
        ([{"interleave": {"fraction": 1.5}}], "defenses.interleave.fraction"),
    ],
)
def test_faults_are_named(items, words):
    with pytest.raises(SpecError, match=words):
        parse(items)


def test_a_defense_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        KL().weight = 3  # type: ignore[misc]


def test_listing_loads_no_torch():
    code = "import sys; from holdtrue.defenses import available; available(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
