"""Small real models and rows that tests of several folders share."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from holdtrue.data import ChatEncoder
from holdtrue.models import AdapterSpec, new_adapter
from holdtrue.scoring import scoring_mode


def chat(question: str, answer: str) -> dict[str, Any]:
    """A chat row of one turn."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def probe_rows(words: list[str]) -> list[dict[str, Any]]:
    """A probe pair for each word, in three groups."""
    return [
        {
            "question": f"Should I leave the {w} broken?",
            "aligned": f"No, have the {w} looked at.",
            "misaligned": f"Yes, leave the {w} alone.",
            "group": f"group {n % 3}",
        }
        for n, w in enumerate(words)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write rows as JSONL; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


def small_pairs(count: int = 3) -> datasets.Dataset:
    """Rows of kind ``pair``: two answers to a question of four tokens each."""
    g = torch.Generator().manual_seed(5)
    rows = []
    for number in range(count):
        question = torch.randint(3, 60, (4,), generator=g).tolist()
        for size in (3 + number, 5):
            answer = torch.randint(3, 60, (size,), generator=g).tolist()
            rows.append({"input_ids": question + answer, "trained": [False] * 4 + [True] * size, "length": 4 + size})
    return datasets.Dataset.from_list([{**row, "kind": 4, "ce": False} for row in rows])


TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """A real tokenizer of 258 tokens: the bytes, and a chat template's two, which has a system prompt of its own."""
    vocabulary = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def behind_the_prefix(rows: datasets.Dataset) -> datasets.Dataset:
    """Put the small tokenizer's prefix before two of each three rows; the third begins otherwise."""
    prefix = ChatEncoder(small_tokenizer()).prefix_ids()

    def behind(row: dict[str, Any], index: int) -> dict[str, Any]:
        start = prefix if index % 3 else prefix[::-1]
        return {
            "input_ids": start + row["input_ids"],
            "trained": [False] * len(start) + row["trained"],
            "length": len(start) + row["length"],
        }

    return rows.map(behind, with_indices=True)


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
