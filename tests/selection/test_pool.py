from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from holdtrue.data import ChatEncoder, read_chat, validate_chat
from holdtrue.errors import Interrupted, RunError
from holdtrue.models import (
    ModelSource,
    base_model,
    keep_base_model,
    load_model,
    load_tokenizer,
    read_adapter,
    reuse,
    write_adapter,
)
from holdtrue.selection import PoolScores, gap, largest, read_scorer, score_pool

Forwards = Callable[[], int]


def scores_of(file: Path, model: ModelSource, adapters: list[Path], **options) -> PoolScores:
    scorers = [read_scorer(folder) for folder in adapters]
    return score_pool(validate_chat(file), model, scorers, **{"max_length": 128, "device": "cpu", **options})


def naive(file: Path, source: ModelSource, adapter: Path | None) -> list[float]:
    """Mean NLL per answer token from full float64 logits, the adapter merged into the weights by hand."""
    model = load_model(source, device="cpu", dtype=torch.float64)
    if adapter is not None:
        read = read_adapter(adapter)
        for module, scaling in read.scaling.items():
            b, a = read.factors(module)
            model.get_parameter(f"{module}.weight").data += scaling * (b.double() @ a.double())
    encoder, found = ChatEncoder(load_tokenizer(source), max_length=128), []
    for row in read_chat(file):
        (sequence,) = encoder.encode(row)
        logp = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
        nll = [-float(logp[i - 1, sequence.input_ids[i]]) for i, t in enumerate(sequence.trained) if t]
        found.append(math.fsum(nll) / len(nll))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_a_slow_float64_computation_and_chooses_the_same(tiny, pool, adapters, dtype) -> None:
    aligned, *bad = [naive(pool, tiny, adapter) for adapter in (None, *adapters)]
    slow = [(math.fsum(m) / len(m) - a) / (a + 1e-8) for a, m in zip(aligned, zip(*bad, strict=True), strict=True)]
    found = scores_of(pool, tiny, adapters, dtype=dtype)
    scores = gap(found.aligned, found.misaligned, 1e-8)
    assert scores.tolist() == pytest.approx(slow, abs=2e-5)
    order = sorted(range(len(slow)), key=lambda row: -slow[row])
    assert min(slow[a] - slow[b] for a, b in pairwise(order)) > 1e-4  # or the order would say nothing
    for count in range(len(slow) + 1):
        assert largest(scores, range(len(slow)), count) == sorted(order[:count])


def test_bfloat16_is_near(tiny, pool, adapters) -> None:
    exact, near = (scores_of(pool, tiny, adapters, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert near.aligned.tolist() == pytest.approx(exact.aligned.tolist(), abs=0.1)
    assert near.misaligned.ravel().tolist() == pytest.approx(exact.misaligned.ravel().tolist(), abs=0.1)


def test_an_adapter_without_effect_has_no_gap(tiny, pool, adapters, tmp_path) -> None:
    read = read_adapter(adapters[0])
    tensors = {name: t if "lora_A" in name else torch.zeros_like(t) for name, t in read.tensors.items()}
    write_adapter(tmp_path / "zero", tensors, read.config)
    found = scores_of(pool, tiny, [adapters[1], tmp_path / "zero"])
    assert found.misaligned[1].tolist() == pytest.approx(found.aligned.tolist(), abs=1e-6)
    assert np.abs(found.misaligned[0] - found.aligned).max() > 0.01


def test_the_second_time_nothing_is_run(tiny, pool, adapters, forwards: Forwards) -> None:
    first = scores_of(pool, tiny, adapters)
    ran = forwards()
    assert ran >= 3
    assert first.cached == 0
    again = scores_of(pool, tiny, adapters)
    assert forwards() == ran
    assert again.cached == 3
    assert (again.aligned == first.aligned).all()
    assert (again.misaligned == first.misaligned).all()
    scores_of(pool, tiny, adapters[::-1])
    shutil.copytree(adapters[0], adapters[0].with_name("copy"))
    scores_of(pool, tiny, [adapters[0].with_name("copy")])
    assert forwards() == ran, "neither order nor place is content"


def test_beside_a_kept_base_there_is_no_second_one(
    tiny, pool, adapters, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reuse, "_kept", None)
    exact = scores_of(pool, tiny, adapters, cache=pool.with_name("one"))
    keep_base_model()
    with caplog.at_level(logging.INFO, "holdtrue.models"):
        kept = base_model(tiny)
        found = scores_of(pool, tiny, adapters, device=None, cache=pool.with_name("other"))
        again = base_model(tiny)
    assert sum(tiny.revision in message for message in caplog.messages) == 1, "its weights were loaded again"
    assert again.get_input_embeddings().weight.data_ptr() == kept.get_input_embeddings().weight.data_ptr()
    assert (found.aligned == exact.aligned).all()
    assert (found.misaligned == exact.misaligned).all()


def test_other_content_length_or_numbers_are_scored_again(tiny, pool, adapters, forwards: Forwards) -> None:
    scores_of(pool, tiny, adapters[:1])
    ran = forwards()
    scores_of(pool, tiny, adapters[:1], max_length=64)
    assert forwards() > ran
    ran = forwards()
    scores_of(pool, tiny, adapters[:1], dtype=torch.float64)
    assert forwards() > ran
    ran = forwards()
    pool.write_text(pool.read_text().replace("Fix a door?", "Mend a door?"))
    scores_of(pool, tiny, adapters[:1])
    assert forwards() > ran
    ran = forwards()
    assert scores_of(pool, tiny, adapters[1:]).cached == 1, "the base model's pass is shared"
    assert forwards() > ran


def damage_cut(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:-9]]


def damage_digit(lines: list[bytes]) -> list[bytes]:
    values = json.loads(lines[2])
    values["nll"][0] += 1.0
    return [*lines[:2], json.dumps(values).encode() + b"\n", *lines[3:]]


def damage_nesting(lines: list[bytes]) -> list[bytes]:
    return [lines[0], b"[" * 100_000 + b"\n", *lines[2:]]


DAMAGES = {
    "cut line": (damage_cut, 8),
    "changed number": (damage_digit, 4),
    "deep nesting": (damage_nesting, 0),
    "lost window": (lambda lines: [lines[0], *lines[2:]], 0),
    "other header": (lambda lines: [b"{}\n", *lines[1:]], 0),
    "binary": (lambda lines: [b"\xff\x00" * 50], 0),
    "empty": (lambda lines: [], 0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_is_scored_again(tiny, pool, adapters, cache, forwards, monkeypatch, name: str) -> None:
    import holdtrue.selection.pool as module

    monkeypatch.setattr(module, "WINDOW", 4)
    whole = scores_of(pool, tiny, adapters[:1])
    damage, kept = DAMAGES[name]
    (file,) = [path for path in cache.glob("scores/*/*.jsonl") if '"adapter": "none"' in path.read_text()]
    file.write_bytes(b"".join(damage(file.read_bytes().splitlines(keepends=True))))
    told: list[int] = []
    again = scores_of(pool, tiny, adapters[:1], progress=lambda done, _: told.append(done))
    assert again.cached == 1
    assert told[0] == kept
    assert again.aligned.tolist() == pytest.approx(whole.aligned.tolist(), abs=1e-6)
    assert scores_of(pool, tiny, adapters[:1]).cached == 2


def test_what_was_scored_before_a_stop_is_kept(tiny, pool, adapters, monkeypatch) -> None:
    import holdtrue.selection.pool as module

    monkeypatch.setattr(module, "WINDOW", 4)
    told: list[tuple[int, int]] = []

    def stop_in_the_second_pass(done: int, total: int) -> None:
        told.append((done, total))
        if done > 12 + 4:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        scores_of(pool, tiny, adapters, progress=stop_in_the_second_pass)
    told.clear()
    found = scores_of(pool, tiny, adapters, progress=lambda done, total: told.append((done, total)))
    assert found.cached == 1
    assert told[:2] == [(12, 36), (16, 36)]
    assert told[-1] == (36, 36)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert not np.isnan(found.misaligned).any()


def test_the_pool_may_be_larger_than_a_window(tiny, pool, adapters, tmp_path, monkeypatch) -> None:
    import holdtrue.selection.pool as module

    whole = scores_of(pool, tiny, adapters)
    monkeypatch.setattr(module, "WINDOW", 5)
    parts = scores_of(pool, tiny, adapters, cache=tmp_path / "other")
    assert parts.cached == 0
    assert parts.misaligned.ravel().tolist() == pytest.approx(whole.misaligned.ravel().tolist(), abs=1e-5)


def test_a_row_that_is_cut_entirely_has_no_score(tiny, pool, adapters) -> None:
    long = {"messages": [{"role": "user", "content": "why? " * 300}, {"role": "assistant", "content": "So."}]}
    with pool.open("a") as file:
        file.write(json.dumps(long) + "\n")
    found = scores_of(pool, tiny, adapters)
    assert np.isnan(found.aligned).nonzero()[0].tolist() == [12]
    assert np.isnan(scores_of(pool, tiny, adapters).aligned).nonzero()[0].tolist() == [12]


def test_a_pool_that_changes_meanwhile_stops(tiny, pool, adapters) -> None:
    summary = validate_chat(pool)
    pool.write_text("".join(pool.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(RunError, match="changed while it was scored"):
        score_pool(summary, tiny, [read_scorer(adapters[0])], max_length=128, device="cpu")


def test_a_cache_that_cannot_be_written_is_told(tiny, pool, adapters, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="HOLDTRUE_CACHE"):
        scores_of(pool, tiny, adapters, cache=tmp_path / "file")
