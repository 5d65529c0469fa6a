"""Models and adapters for tests of serving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from holdtrue.models import AdapterSpec, new_adapter, save_adapter
from holdtrue.models.digest import tree_digest
from holdtrue.serving.port import AdapterRef
from support import small_tokenizer


def make_adapter(model: Any, folder: Path, seed: int, scale: float = 1.0) -> AdapterRef:
    """Write an adapter of random weights for a model."""
    adapted = new_adapter(model, AdapterSpec(r=2, alpha=4), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    save_adapter(adapted, folder)
    return AdapterRef(digest=tree_digest(folder), location=str(folder))


def make_base(folder: Path, seed: int, width: int = 32) -> Path:
    """Write a real Llama of three blocks that speaks bytes: 258 tokens, 512 positions."""
    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
