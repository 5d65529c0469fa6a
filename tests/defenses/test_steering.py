from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdtrue.defenses import RunContext, parse
from holdtrue.defenses.steering import Steering, ablated, added, orthonormal
from holdtrue.errors import NeedError, SpecError
from holdtrue.models import ModelSource, VectorInfo, decoder_blocks, resolve, write_vectors
from support import small_model

INFO = VectorInfo(model="m", revision="r", blocks=3, width=32, source="pairs", trait="malice")


def vectors(folder: Path, **changes: Any) -> str:
    shape = (2, 32) if changes.get("kind") == "directions" else (32,)
    generator = torch.Generator().manual_seed(0)
    tensors = {index: torch.randn(shape, generator=generator) for index in changes.pop("has", range(3))}
    path = folder / "v.safetensors"
    write_vectors(path, tensors, INFO.model_copy(update=changes))
    return str(path)


# The formulas


def test_adding_is_a_constant_and_its_gradient_the_identity() -> None:
    g = torch.Generator().manual_seed(0)
    h, e = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((2, 3, 4), (4,)))
    out = added(h.requires_grad_(), e)
    assert torch.equal(out - h, (h + e) - h)
    upstream = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out, h, upstream)
    assert torch.equal(gradient, upstream)
    assert torch.autograd.gradcheck(lambda x: added(x, e), (h,))
    assert added(h.bfloat16(), e).dtype == torch.bfloat16


@given(k=st.integers(0, 6), rank=st.integers(0, 6), seed=st.integers(0, 99))
def test_the_projection_is_orthonormal_and_idempotent(k: int, rank: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    r = min(k, rank)
    directions = torch.randn(k, r, generator=g, dtype=torch.float64) @ torch.randn(
        r, 6, generator=g, dtype=torch.float64
    )
    q = orthonormal(directions)
    assert q.shape == (r, 6)
    torch.testing.assert_close(q @ q.T, torch.eye(r, dtype=torch.float64))
    h = torch.randn(2, 3, 6, generator=g, dtype=torch.float64)
    once = ablated(h, q)
    naive = h - torch.einsum("blw,wv->blv", h, torch.linalg.pinv(directions) @ directions) if k else h
    torch.testing.assert_close(once, naive)
    torch.testing.assert_close(ablated(once, q), once)
    torch.testing.assert_close(once @ directions.T, torch.zeros(2, 3, k, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_gradient_of_the_projection() -> None:
    g = torch.Generator().manual_seed(0)
    q = orthonormal(torch.randn(2, 5, generator=g))
    h = torch.randn(1, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ablated(x, q), (h,))
    low = h.detach().bfloat16()
    assert ablated(low, q).dtype == torch.bfloat16
    assert float((ablated(low, q).double() @ q.T).abs().max()) < 0.02


def test_the_layer_is_twenty_of_twenty_eight() -> None:
    assert [Steering().layers(n) for n in (28, 30, 3, 1)] == [(20,), (21,), (2,), (0,)]
    assert Steering(layer=4).layers(28) == (4,)
    assert Steering(layer=(9, 2, 9)).layers(28) == (2, 9)


def test_alpha_is_weight() -> None:
    assert Steering(alpha=2) == Steering(weight=2)
    assert parse([{"steering": {"alpha": 2, "layer": [1, 2]}}]) == (Steering(weight=2, layer=(1, 2)),)
    with pytest.raises(SpecError, match=r"defenses\.steering"):
        parse([{"steering": {"weight": -1}}])
    with pytest.raises(SpecError, match=r"defenses\.steering"):
        parse([{"steering": {"layer": -1}}])


# In the model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 12).unsqueeze(0)).logits


@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_the_block_after_sees_it_and_nothing_stays(tmp_path: Path, mode: str) -> None:
    defense = Steering(vector=vectors(tmp_path), mode=mode, layer=1)
    model = small_model()
    blocks = decoder_blocks(model)
    before, hooks = logits(model), hooks_of(model)
    own: list[torch.Tensor] = []
    handles = [
        blocks[1].mlp.register_forward_hook(lambda *a: own.append(a[2])),
        blocks[1].post_attention_layernorm.register_forward_pre_hook(lambda _, a: own.append(a[0])),
        blocks[2].register_forward_pre_hook(lambda _, a: own.append(a[0])),
    ]
    with defense.forward(model):
        steered = logits(model)
    residual, mlp, after = own
    for handle in handles:
        handle.remove()
    h = residual + mlp
    e = defense.changes(*file_and_shape(defense))[1]
    assert torch.equal(after, e(h))
    if mode == "ablate":
        direction = torch.nn.functional.normalize(read(defense)[1].double(), dim=0)
        torch.testing.assert_close(
            after.double() @ direction, torch.zeros(1, 11, dtype=torch.float64), atol=1e-5, rtol=0
        )
    else:
        torch.testing.assert_close(after - h, (5 * read(defense)[1]).expand_as(h), atol=1e-4, rtol=1e-4)
    assert not torch.equal(steered, before)
    assert torch.equal(logits(model), before)
    assert hooks_of(model) == hooks == 0


def test_nothing_stays_after_an_error(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(ZeroDivisionError), Steering(vector=vectors(tmp_path)).forward(model):
        raise ZeroDivisionError
    assert hooks_of(model) == 0


@pytest.mark.parametrize(
    "settings", [{"weight": 0}, {"mode": "ablate", "weight": 0}, {"mode": "ablate", "components": 0}]
)
def test_zero_strength_hangs_nothing_on_the_model_and_needs_no_vector(tmp_path: Path, settings: dict[str, Any]) -> None:
    defense, model = Steering(**settings), small_model()
    defense.preflight(RunContext(ModelSource("m", tmp_path, "r", "path"), {}, 3, tmp_path))
    with defense.forward(model):
        assert hooks_of(model) == 0


def test_empty_directions_change_no_bit(tmp_path: Path) -> None:
    path = tmp_path / "v"
    write_vectors(path, {2: torch.ones(0, 32)}, INFO.model_copy(update={"kind": "directions"}))
    model = small_model()
    with Steering(vector=str(path), mode="ablate").forward(model):
        steered = logits(model)
    assert torch.equal(steered, logits(model))


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({}, {"vector": None}, "steering needs a persona vector"),
        ({}, {"vector": "none.safetensors"}, "needs the vector file .*none.safetensors"),
        ({}, {"layer": 3}, "steering.layer is 3, and the model has 3 blocks: 0 to 2"),
        ({}, {"layer": ()}, "at least one layer"),
        ({"has": (0,)}, {}, "no vector for block 2; it has 0"),
        ({"blocks": 4}, {}, "4 blocks of width 32, and this model has 3 blocks of width 32"),
        ({"kind": "directions"}, {}, "holds 2 directions for block 2, and mode add takes one"),
    ],
)
def test_what_is_missing_stops_the_forward(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    defense = Steering(**{"vector": vectors(tmp_path, **changes), **settings})
    model = small_model()
    with pytest.raises(NeedError, match=words), defense.forward(model):
        raise AssertionError("trained without its vector")
    assert hooks_of(model) == 0


@pytest.mark.parametrize("mode", ["add", "ablate"])
def test_a_zero_vector_is_refused(tmp_path: Path, mode: str) -> None:
    write_vectors(tmp_path / "v", {2: torch.zeros(32)}, INFO)
    with (
        pytest.raises(NeedError, match="steering would do nothing"),
        Steering(vector=str(tmp_path / "v"), mode=mode).forward(small_model()),
    ):
        pass


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    model, defense = small_model(), Steering(vector=vectors(tmp_path))
    found = []
    for size in (1.0, 2.0):
        write_vectors(defense.vector, {2: torch.full((32,), size)}, INFO)  # type: ignore[arg-type]
        with defense.forward(model):
            found.append(logits(model))
    assert not torch.equal(*found)


# Before a run


def context(tiny_dir: Path, folder: Path) -> RunContext:
    return RunContext(resolve(str(tiny_dir)), {}, 3, folder)


def test_preflight_notes_the_vector(tiny_dir: Path, tmp_path: Path) -> None:
    given = context(tiny_dir, tmp_path)
    vectors(tmp_path, revision=given.model.revision)
    Steering(vector="v.safetensors").preflight(given)
    assert given.notes["layers"] == [2]
    assert given.notes["vector"]["revision"] == given.model.revision
    assert given.notes["norms"]["2"] > 0
    assert given.notes["sha256"] == hashlib.sha256((tmp_path / "v.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "settings", "words"),
    [
        ({}, {"vector": None}, "steering needs a persona vector"),
        ({}, {"vector": "none"}, "needs the vector file"),
        ({"revision": "other"}, {}, r"made on m \(other; 3 blocks.*the model here is .*sha256:"),
        ({"width": 32, "blocks": 5}, {}, "5 blocks of width 32.*3 blocks of width 32"),
        ({}, {"layer": 7}, "steering.layer is 7"),
        ({"kind": "directions"}, {}, "mode add takes one vector"),
    ],
)
def test_preflight_finds_what_is_wrong(
    tiny_dir: Path, tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    given = context(tiny_dir, tmp_path)
    vectors(tmp_path, **{"revision": given.model.revision, **changes})
    with pytest.raises(NeedError, match=words):
        Steering(**{"vector": "v.safetensors", **settings}).preflight(given)


def test_paths_start_at_the_specs_folder(tmp_path: Path) -> None:
    assert Steering(vector="v").placed(tmp_path) == Steering(vector=str(tmp_path / "v"))
    assert Steering(vector="/v").placed(tmp_path) == Steering(vector="/v")
    assert Steering().placed(tmp_path) == Steering()


def read(defense: Steering) -> dict[int, torch.Tensor]:
    return file_and_shape(defense)[0].tensors


def file_and_shape(defense: Steering) -> tuple[Any, int, int]:
    from holdtrue.models import read_vectors

    assert defense.vector is not None
    return read_vectors(defense.vector), 3, 32


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
