"""Rows that join and leave: the logits of each are those of its own sequence, through the model without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from holdtrue.errors import SpecError
from holdtrue.serving import rows as module
from holdtrue.serving.rows import Prompt, Rows, bytes_per_token, check_architecture

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral, window of 8": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)),
    "gemma2, window of 8": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3)),
}


def make(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[name]().eval()


def read(lm: Any, ids: list[int]) -> tuple[Prompt, torch.Tensor]:
    prompt = Prompt(lm, ids)
    while (logits := prompt.read()) is None:
        pass
    return prompt, logits


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_rows_logits_are_its_own(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CHUNK", 7)
    lm = make(name)
    check_architecture(lm)
    random = torch.Generator().manual_seed(1)
    cache, held = Rows(lm), list[list[int]]()

    def new(count: int) -> list[int]:
        return torch.randint(1, 97, (count,), generator=random).tolist()

    def join(length: int, copies: int) -> None:
        ids = new(length)
        prompt, logits = read(lm, ids)
        check([ids], logits)
        cache.join(prompt, copies)
        held.extend(list(ids) for _ in range(copies))

    def check(sequences: list[list[int]], logits: torch.Tensor) -> None:
        expected = torch.stack([lm(torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in sequences])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    def step(times: int) -> None:
        for _ in range(times):
            tokens = new(len(held))
            for ids, token in zip(held, tokens, strict=True):
                ids.append(token)
            check(held, cache.step(tokens))

    def keep(places: list[int]) -> None:
        cache.keep(places)
        held[:] = [held[place] for place in places]

    join(9, 1)
    step(3)
    join(30, 2)
    step(4)
    join(1, 1)
    step(2)
    keep([0, 3])
    step(3)
    join(14, 3)
    keep([1, 4, 2])
    step(2)
    keep([])
    join(5, 1)
    step(1)
    assert len(cache) == 1


@torch.no_grad()
def test_what_leaves_takes_its_padding_along():
    lm = make("llama")
    cache = Rows(lm)
    for length in (40, 6):
        cache.join(read(lm, list(range(1, length + 1)))[0], 1)
    cache.keep([1])
    assert cache._cache is not None
    assert cache._cache.layers[0].keys.shape[-2] == 6


@torch.no_grad()
def test_the_bytes_of_a_token():
    lm = make("llama")
    prompt, _ = read(lm, [1, 2, 3])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in prompt.cache.layers)
    assert bytes_per_token(lm) * 3 == held


def test_a_model_with_another_memory_is_refused():
    config = Mamba2Config(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8)
    with pytest.raises(SpecError, match="plain attention"):
        check_architecture(Mamba2ForCausalLM(config))
