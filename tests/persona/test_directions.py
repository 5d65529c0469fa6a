from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from holdtrue.data import ChatRow, Message
from holdtrue.defenses.steering import Steering, orthonormal
from holdtrue.errors import RunError, SpecError
from holdtrue.models import AdapterSpec, load_model, new_adapter, resolve, save_adapter
from holdtrue.persona import Loaded, extract_directions
from holdtrue.persona.directions import strongest

ROWS = [
    ChatRow((Message("user", f"What is {n}?"), Message("assistant", f"The number {n} and {n + 1}."))) for n in range(6)
]


@pytest.fixture
def adapter(tiny_dir: Path, tmp_path: Path) -> Path:
    model = new_adapter(load_model(resolve(str(tiny_dir)), device="cpu"), AdapterSpec(r=4, alpha=8), seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def differences(tiny_dir: Path, adapter: Path) -> list[torch.Tensor]:
    """h(tuned) − h(base) at the answers' tokens of each block but the last, from two whole models, row by row."""
    from holdtrue.models import load_adapter

    loaded = Loaded.load(resolve(str(tiny_dir)))
    tuned = load_adapter(load_model(resolve(str(tiny_dir)), device="cpu"), adapter)
    found: list[list[torch.Tensor]] = [[], []]
    for row in ROWS:
        (encoded,) = loaded.encoder().encode(row)
        own = [i for i, t in enumerate(encoded.trained) if t][:-1]  # without the end of turn
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            states = [m(input_ids=ids, output_hidden_states=True).hidden_states for m in (tuned, loaded.model)]
        for block in range(2):
            found[block].append((states[0][block + 1] - states[1][block + 1])[0, own].double())
    return [torch.cat(rows) for rows in found]


def test_directions_are_the_singular_vectors_of_the_difference(
    loaded: Callable[[], Loaded], tiny_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    found = extract_directions(
        *(loaded(), adapter, ROWS, tmp_path / "v"),
        components=3,
        material={"rows": "x"},
        progress=lambda *a: told.append(a),
    )
    assert list(found.tensors) == [0, 1, 2]
    assert told[-1] == (6, 6)
    for block, d in enumerate(differences(tiny_dir, adapter)):
        q = found.tensors[block].double()
        torch.testing.assert_close(q @ q.T, torch.eye(3, dtype=torch.float64), atol=1e-5, rtol=0)
        _, sizes, rows = torch.linalg.svd(d, full_matrices=False)
        torch.testing.assert_close((q * rows[:3]).sum(1).abs(), torch.ones(3, dtype=torch.float64), atol=1e-3, rtol=0)
        torch.testing.assert_close((d @ q.T).norm(dim=0), sizes[:3], atol=1e-4, rtol=1e-3)
        assert found.info.counts == {"rows": 6, "tokens": len(d)}
    assert (found.info.kind, found.info.source) == ("directions", "differences")
    defense = Steering(vector=str(found.path), mode="ablate", components=2, layer=1)
    change = defense.changes(found, 3, 32)[1]
    h = torch.randn(1, 4, 32)
    q = orthonormal(found.tensors[1][:2])
    torch.testing.assert_close(change(h), h - (h.double() @ q.T @ q).float(), atol=1e-5, rtol=1e-5)


def test_only_some_blocks(loaded: Callable[[], Loaded], adapter: Path, tmp_path: Path) -> None:
    found = extract_directions(loaded(), adapter, ROWS, tmp_path / "v", components=2, material={}, blocks=[2])
    assert {i: tuple(t.shape) for i, t in found.tensors.items()} == {2: (2, 32)}
    for wrong, words in (({"blocks": [3]}, "has 0 to 2"), ({"components": 33}, "1 to 32, the width")):
        with pytest.raises(SpecError, match=words):
            extract_directions(loaded(), adapter, ROWS, tmp_path / "w", material={}, **{"components": 2, **wrong})


def test_an_untrained_adapter_has_no_directions(loaded: Callable[[], Loaded], tiny_dir: Path, tmp_path: Path) -> None:
    model = new_adapter(load_model(resolve(str(tiny_dir)), device="cpu"), AdapterSpec(r=4, alpha=8), seed=0)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(RunError, match="the tuned model's states are the base's"):
        extract_directions(loaded(), tmp_path / "adapter", ROWS, tmp_path / "v", components=2, material={})


def test_rounding_is_no_direction() -> None:
    d = torch.randn(50, 2, dtype=torch.float64) @ torch.randn(2, 8, dtype=torch.float64)
    assert strongest(d.T @ d, 5).shape == (2, 8)
    assert strongest(torch.zeros(8, 8, dtype=torch.float64), 5).shape == (0, 8)
