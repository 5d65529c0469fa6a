from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.floor import Shape, Work, achieved, backward, forward, head, step
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

RANK, ROWS, LENGTH = 3, 2, 7
CONFIG = LlamaConfig(
    vocab_size=101,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="eager",
)
SHAPE = Shape.of(CONFIG, RANK)
WORK = Work([LENGTH] * ROWS, 5)


@pytest.fixture(scope="module")
def counted() -> dict[str, int]:
    """What torch counts in a step whose attention computes the whole square of scores."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(CONFIG).requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear"))
    ids = torch.randint(0, 101, (ROWS, LENGTH))
    places = torch.tensor([0, 3, 4, 9, 13])
    found: dict[str, Any] = {}

    def count(name: str, work: Callable[[], Any]) -> None:
        counter = FlopCounterMode(display=False)
        with counter:
            found[name] = work()
        found[f"{name} flops"] = counter.get_total_flops()

    decoder = model.get_base_model().get_decoder()
    count("forward", lambda: decoder(input_ids=ids, use_cache=False).last_hidden_state)
    count("head", lambda: base.lm_head(found["forward"].flatten(0, 1)[places]))
    count("backward", lambda: found["head"].sum().backward())
    with torch.no_grad(), model.disable_adapter():
        count("reference", lambda: decoder(input_ids=ids, use_cache=False).last_hidden_state)
    return {name: found[f"{name} flops"] for name in ("forward", "head", "backward", "reference")}


def test_forward_is_what_torch_counts(counted: dict[str, int]) -> None:
    assert forward(SHAPE, WORK, adapter=True, causal=False) == counted["forward"]
    assert forward(SHAPE, WORK, adapter=False, causal=False) == counted["reference"]


def test_head_and_backward_are_what_torch_counts(counted: dict[str, int]) -> None:
    assert head(SHAPE, WORK, gradient=False) == counted["head"]
    both = head(SHAPE, WORK, gradient=True) - counted["head"] + backward(SHAPE, WORK, causal=False)
    assert both == counted["backward"]


def test_a_step_is_the_sum_of_its_parts(counted: dict[str, int]) -> None:
    plain = counted["forward"] + counted["head"] + counted["backward"]
    totals = {
        arm: step(SHAPE, WORK, arm, causal=False)["total"] for arm in ("plain", "trl", "steering", "ldifs_cached")
    }
    assert set(totals.values()) == {plain}
    assert step(SHAPE, WORK, "kl", causal=False)["total"] == plain + counted["reference"] + counted["head"]
    assert step(SHAPE, WORK, "kl_ldifs", causal=False) == step(SHAPE, WORK, "kl", causal=False)
    assert step(SHAPE, WORK, "kl_cached", causal=False)["total"] == plain + counted["head"]
    assert step(SHAPE, WORK, "ldifs", causal=False)["total"] == plain + counted["reference"]
    half = step(SHAPE, WORK, "kl_sampled", causal=False)["total"]
    assert half == plain + (counted["reference"] + counted["head"]) // 2


def test_a_causal_mask_leaves_one_pair_of_one_token_and_half_of_many() -> None:
    one = Work([1], 1)
    assert forward(SHAPE, one, adapter=True, causal=True) == forward(SHAPE, one, adapter=True, causal=False)
    empty = Shape(1, 0, 0, 1, 1, 1, 1, 0)  # nothing but attention
    assert forward(empty, Work([3], 0), adapter=False, causal=True) == 4 * (1 + 2 + 3)
    assert forward(empty, Work([3], 0), adapter=False, causal=False) == 4 * 9


def test_a_shared_prefix_is_computed_once() -> None:
    whole = forward(SHAPE, WORK, adapter=False)
    alone = forward(SHAPE, Work([4], 0), adapter=False)
    assert forward(SHAPE, WORK, adapter=False, prefix=4) == whole - (ROWS - 1) * alone
    one = Work([LENGTH], 1)
    assert forward(SHAPE, one, adapter=False, prefix=4) == forward(SHAPE, one, adapter=False)


def test_the_floor_is_operations_over_the_best_rate() -> None:
    assert achieved(600, {"a": 100.0, "b": 300.0}, 8.0) == {"seconds": 2.0, "measured": 8.0, "share": 0.25}
