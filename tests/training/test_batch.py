from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdtrue.defenses import Needs
from holdtrue.training.batch import COUNTS, Batch, draw_lots


def batch() -> Batch:
    return Batch.of(
        {
            "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]),
            "labels": torch.tensor([[-100, 2, 3, -100, 5, 6], [-100, -100, 9, -100, -100, -100]]),
            "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]]),
            "kind": torch.tensor([0, 1]),
            "ce": torch.tensor([True, False]),
        }
    )


def test_positions_predict_the_next_token():
    response = batch().positions(batch().response)
    assert response.row.tolist() == [0, 0, 0, 0, 1]
    assert response.column.tolist() == [0, 1, 3, 4, 1]
    assert response.targets.tolist() == [2, 3, 5, 6, 9]
    assert response.trained.tolist() == [True, True, True, True, False]
    assert response.place.tolist() == [0, 1, 0, 1, 0]
    assert response.kind.tolist() == [0, 0, 0, 0, 1]


def test_every_token_that_is_not_padding():
    everything = batch().positions(batch().mask)
    assert everything.column.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert everything.targets.tolist() == [2, 3, 4, 5, 6, -1, 8, 9, -1]
    assert everything.place.tolist() == [0, 1, -1, 0, 1, -1, -1, 0, -1]


def test_counts():
    assert dict(zip(COUNTS, batch().counts().tolist(), strict=True)) == {
        "tokens": 9,
        "trained": 4,
        "trained_task": 4,
        "response": 5,
        "examples": 2,
        "slots": 12,
    }


def test_what_a_term_covers():
    covered = batch().covered(Needs(tokens="response", kinds=("safe",)))
    assert covered.nonzero().tolist() == [[1, 1]]
    assert batch().covered(Needs(tokens="all")).sum() == 9
    half = dataclasses.replace(batch(), lot=torch.tensor([0.6, 0.2], dtype=torch.float64))
    assert half.covered(Needs(tokens="response", sample=0.5)).nonzero().tolist() == [[1, 1]]
    assert half.covered(Needs(tokens="response", sample=0.5), sampled=False).sum() == 5


def window(rows: int, sizes: list[int], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 99, (rows, 6), generator=g)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(sizes)]


def lots(batches: list[dict[str, torch.Tensor]], seed: int, step: int) -> torch.Tensor:
    draw_lots(batches, seed, step)
    return torch.cat([b["lot"] for b in batches])


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20), share=st.floats(0.01, 0.99), seed=st.integers(0, 99), step=st.integers(0, 99))
def test_lots_do_not_depend_on_the_cut_and_hold_the_share(rows, share, seed, step):
    whole = lots(window(rows, [rows]), seed, step)
    assert torch.equal(whole, lots(window(rows, [1] * rows), seed, step))
    assert abs(int((whole < share).sum()) - share * rows) < 1
    assert bool(((whole >= 0) & (whole < 1)).all())


def test_every_row_is_drawn_as_often_as_its_share():
    share, draws = 0.3, 4000
    drawn = sum((lots(window(7, [4, 3]), 0, step) < share).double() for step in range(draws))
    error = (drawn / draws - share).abs().max()
    assert error < 4 * (share * (1 - share) / draws) ** 0.5


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "padded on the right"),
        ({"position_ids": torch.tensor([[0, 1, 0]])}, "packed"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(extra, words):
    with pytest.raises(ValueError, match=words):
        Batch.of({"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.ones(1, 3)} | extra)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 20), cut=st.integers(0, 20), again=st.booleans(), step=st.integers(0, 99))
def test_processes_draw_the_lots_of_one(rows, cut, again, step):
    (whole,) = window(rows, [rows])
    if again:  # the same row twice, one for each process
        whole = {name: torch.cat([column, column]) for name, column in whole.items()}
    cut = min(cut, len(whole["input_ids"]))
    ghost = {name: torch.zeros(1, 6, dtype=torch.int64) for name in whole}
    shares = [[{n: c[:cut] for n, c in whole.items()}, dict(ghost)], [{n: c[cut:] for n, c in whole.items()}]]
    heard: list[list[bytes]] = []

    def told(names: list[list[bytes]]) -> list[list[bytes]]:
        heard.extend(names)
        return names

    for share in shares:
        draw_lots([dict(batch) for batch in share], 0, step, gather=told)
    for process, share in enumerate(shares):
        draw_lots(share, 0, step, gather=lambda _: heard, process=process)
    both = torch.cat([shares[0][0]["lot"], shares[1][0]["lot"]])
    alone = lots([whole], 0, step)
    assert torch.equal(both.sort().values, alone.sort().values)
    if not again:
        assert torch.equal(both, alone)
    assert shares[0][1]["lot"].shape == (1,)
