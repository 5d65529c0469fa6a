"""Small real models and rows that tests of several folders share."""

from __future__ import annotations

import socket

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from holdtrue.models import AdapterSpec, new_adapter
from holdtrue.scoring import scoring_mode


def small_model(dropout: float = 0.0) -> PeftModel:
    """A real Llama of three blocks with a vocabulary of 500, and an adapter whose B is not zero."""
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = LlamaForCausalLM(config).requires_grad_(False)
        model = new_adapter(base, AdapterSpec(r=4, alpha=8, dropout=dropout), seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02)
    return model


def small_rows(count: int = 45, seed: int = 0) -> datasets.Dataset:
    """Random rows of 5 to 19 tokens; every ninth is a safe row; row 4 has no target."""
    random = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        n = int(random.integers(5, 20))
        ids = random.integers(1, 500, n).tolist()
        trained = [False] * n if i == 4 else [False] * 3 + [True] * (n - 3)
        rows.append({"input_ids": ids, "trained": trained, "kind": int(i % 9 == 0), "length": n, "ce": True})
    return datasets.Dataset.from_list(rows)


class LikelierThanRows:
    """A probe: how much likelier a model finds some random texts than the first of ``small_rows``; training lowers it.

    With ``draws`` it takes random numbers, as no probe should; ``offset`` is added to what it finds.
    """

    def __init__(self, *, draws: bool = False, offset: float = 0.0) -> None:
        self._draws, self._offset = draws, offset
        self._rows = [torch.tensor([row["input_ids"]]) for row in small_rows().select(range(5, 13))]
        shuffled = np.random.default_rng(9).integers(1, 500, (8, 12))
        self._texts = [torch.tensor([ids]) for ids in shuffled.tolist()]

    def __call__(self, model: torch.nn.Module) -> float:
        if self._draws:
            torch.rand(3)
        with scoring_mode(model) as lm:
            losses = [[float(lm(ids, labels=ids).loss) for ids in group] for group in (self._rows, self._texts)]
        return float(np.mean(losses[0]) - np.mean(losses[1])) + self._offset


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
