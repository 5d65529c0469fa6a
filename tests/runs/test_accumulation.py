"""Through the command line: how a batch is split over micro-batches changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdtrue.cli.main import main
from holdtrue.runs import Run

DEFENSES = "[{kl: {weight: 1.0}}, {ldifs: {weight: 1.0, layers: 3}}, {interleave: {pool: valid.jsonl, fraction: 0.2}}]"


def test_one_by_four_equals_four_by_one(folder: Path) -> None:
    sets = ["training.batch_size=4", "training.epochs=1", "training.learning_rate=1e-4", f"defenses={DEFENSES}"]
    found = []
    for micro in (4, 1):
        out = folder / f"micro-{micro}"
        options = [x for s in (*sets, f"training.micro_batch_size={micro}") for x in ("--set", s)]
        assert main(["train", str(folder / "spec.yaml"), "--out", str(out), *options]) == 0
        found.append([m for m in Run(out).metrics() if "loss" in m])
    assert len(found[0]) == 3
    for four, one in zip(*found, strict=True):
        for term in ("ce", "kl", "kl_term", "ldifs_term"):
            assert one[term] == pytest.approx(four[term], abs=1e-5), term
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-4)
