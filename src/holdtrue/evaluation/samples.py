"""Answers sampled from a model, to be read side by side; nothing here judges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdtrue.scoring import scoring_mode

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig, PreTrainedTokenizerBase

QUESTIONS_PER_BATCH = 16


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    *,
    max_new_tokens: int = 60,
    seed: int = 0,
    temperature: float = 0.0,
) -> list[str]:
    """Return the model's answer to each question, asked in the model's own chat template.

    Args:
        model: a causal language model, with or without an adapter; left as it was found, as is the global random
            state.
        tokenizer: the model's own; its padding side is neither read nor changed.
        questions: one user turn each.
        max_new_tokens: an answer that is longer is cut there.
        seed: of the sampling; unused where ``temperature`` is 0.
        temperature: 0 takes the likeliest token each time; above 0, samples from the whole distribution.
    """
    import torch

    from holdtrue.data import ChatEncoder, Message

    if temperature < 0 or max_new_tokens < 1:
        raise ValueError("temperature must be at least 0 and max_new_tokens at least 1")
    encoder = ChatEncoder(tokenizer)
    prompts = [encoder.prompt_ids([Message("user", question)]) for question in questions]
    answers: list[str] = []
    with scoring_mode(model) as lm:
        device = lm.get_input_embeddings().weight.device
        config = _generation_config(lm, tokenizer, max_new_tokens, temperature)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), QUESTIONS_PER_BATCH):
                batch = prompts[start : start + QUESTIONS_PER_BATCH]
                width = max(map(len, batch))
                pad = config.pad_token_id
                ids = torch.tensor([[pad] * (width - len(p)) + p for p in batch], device=device)
                mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=device)
                output = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                answers += tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _generation_config(
    lm: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    from transformers import GenerationConfig

    own = lm.generation_config.eos_token_id
    named = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    ends = sorted({token for token in named if isinstance(token, int)})
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # What is not set here, generate() would take from the model's own generation configuration.
    return GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0 if temperature else 50,
        top_p=1.0,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=0 if pad is None else pad,
        use_cache=True,
    )
