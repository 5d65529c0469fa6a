from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from holdtrue.data import ChatEncoder, ChatRow, read_chat
from holdtrue.errors import NeedError
from holdtrue.models import ModelSource, VectorFile, VectorInfo, load_model, load_tokenizer, write_vectors
from holdtrue.persona import Loaded
from holdtrue.screening import Screener, ScreenSpec
from holdtrue.screening.projection import direction, own_answers, projections, shape_of
from holdtrue.screening.sample import WindowEncoder

TOKENS = 6


def vector_file(path: Path, source: ModelSource, **changed: object) -> VectorFile:
    """Hand-made vectors of the tiny model: at block l three times the unit vector of coordinate l + 4, and a bit."""
    vectors = torch.zeros(3, 32)
    for block in range(3):
        vectors[block, block + 4] = 3.0
        vectors[block, 9] = -4.0
    values: dict[str, object] = {
        "model": source.name,
        "revision": source.revision,
        "blocks": 3,
        "width": 32,
        "source": "pairs",
        "trait": "by hand",
        "version": version("holdtrue"),
        **changed,
    }
    return write_vectors(path, dict(enumerate(vectors)), VectorInfo.model_validate(values))


def naive(loaded: Loaded, row: ChatRow, layer: int) -> float:
    """The projection by the formula: 0.6 and -0.8 are the hand-made vector's coordinates, normalized."""
    (ids, trained, _), *_ = ChatEncoder(loaded.tokenizer).encode(row)
    start = trained.index(True)
    states = loaded.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    read = states[start : min(start + TOKENS, len(ids) - 1)]  # without the token that ends the turn
    return float((0.6 * read[:, layer + 4] - 0.8 * read[:, 9]).mean())


@pytest.fixture
def exact(source: ModelSource) -> Loaded:
    return Loaded(load_model(source, device="cpu").double(), load_tokenizer(source), source)


@torch.no_grad()
def test_projections_are_the_formula_in_float64(exact: Loaded, source: ModelSource, data: Path, tmp_path: Path) -> None:
    along = direction(vector_file(tmp_path / "v", source), source, shape_of(source), 1)
    assert along.unit.norm() == pytest.approx(1)
    rows = list(read_chat(data))[:9]
    found = projections(exact.model, WindowEncoder(exact.tokenizer, TOKENS), rows, along)
    assert found == pytest.approx([naive(exact, row, 1) for row in rows], rel=1e-9)
    assert max(found) - min(found) > 1e-3, "a test that cannot tell rows apart shows nothing"


@torch.no_grad()
def test_the_difference_is_the_mean_over_rows_of_data_minus_own(
    source: ModelSource, data: Path, tmp_path: Path, cache: Path
) -> None:
    path = vector_file(tmp_path / "v", source).path
    spec = ScreenSpec(rows=40, tokens=TOKENS, indicators=("projection",), vector=str(path), layer=1)
    found = Screener(source, spec, cache=cache).screen(data).indicators["projection"]
    loaded = Loaded.load(source)
    rows = list(read_chat(data))
    own = own_answers(loaded.model, loaded.tokenizer, rows, TOKENS, seed=0)
    differences = [naive(loaded, row, 1) - naive(loaded, o, 1) for row, o in zip(rows, own, strict=True) if o]
    assert found.n == len(differences) >= 35
    assert found.value == pytest.approx(np.mean(differences), rel=1e-4)
    half = 2.0227 * np.std(differences, ddof=1) / len(differences) ** 0.5  # Student, about 39 degrees of freedom
    assert found.interval.high == pytest.approx(found.value + half, abs=0.02 * half)


def test_data_that_is_the_models_own_answers_has_no_difference(source: ModelSource, data: Path, tmp_path: Path) -> None:
    loaded = Loaded.load(source)
    own = [row for row in own_answers(loaded.model, loaded.tokenizer, list(read_chat(data)), TOKENS, seed=0) if row]
    along = direction(vector_file(tmp_path / "v", source), source, shape_of(source), None)
    assert along.layer == 2, "20/28 of three blocks"
    encoder = WindowEncoder(loaded.tokenizer, TOKENS)
    again = projections(loaded.model, encoder, own, along)
    assert again == pytest.approx(projections(loaded.model, encoder, list(reversed(own)), along)[::-1], rel=1e-4)


def test_own_answers_do_not_depend_on_their_batch(source: ModelSource, data: Path) -> None:
    loaded, rows = Loaded.load(source), list(read_chat(data))[:12]
    together = own_answers(loaded.model, loaded.tokenizer, rows, TOKENS, seed=3)
    apart = [own_answers(loaded.model, loaded.tokenizer, [row], TOKENS, seed=3)[0] for row in rows]
    assert together == apart
    assert together != own_answers(loaded.model, loaded.tokenizer, rows, TOKENS, seed=4)


@pytest.mark.parametrize(
    ("changed", "layer", "text"),
    [
        ({"revision": "another"}, None, "another"),
        ({"blocks": 4}, None, "blocks"),
        ({}, 3, "no vector for block 3"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(
    source: ModelSource, tmp_path: Path, changed: dict[str, object], layer: int | None, text: str
) -> None:
    with pytest.raises(NeedError, match=text):
        direction(vector_file(tmp_path / "v", source, **changed), source, shape_of(source), layer)


def test_a_vector_of_zeros_is_refused(source: ModelSource, tmp_path: Path) -> None:
    info = vector_file(tmp_path / "v", source).info
    file = write_vectors(tmp_path / "zero", {2: torch.zeros(32)}, info)
    with pytest.raises(NeedError, match="zero"):
        direction(file, source, shape_of(source), None)
