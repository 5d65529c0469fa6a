from __future__ import annotations

import pytest
import torch

from holdtrue.training.batch import COUNTS, Batch


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
    response = batch().positions("response")
    assert response.flat.tolist() == [0, 1, 3, 4, 7]
    assert response.targets.tolist() == [2, 3, 5, 6, 9]
    assert response.trained.tolist() == [True, True, True, True, False]
    assert response.place.tolist() == [0, 1, 0, 1, 0]
    assert response.kind.tolist() == [0, 0, 0, 0, 1]


def test_all_covers_every_token_that_is_not_padding():
    everything = batch().positions("all")
    assert everything.flat.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
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
