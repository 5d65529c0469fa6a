from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from holdtrue.evaluation import generate_answers, samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TinyModel = Callable[[], "PreTrainedModel"]
QUESTIONS = ["Hi", "What would you do with a long afternoon and nobody at home?", "Why is the sky blue?"]


def naive(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    """Greedy, one question at a time, without a cache."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_greedy_answers_equal_the_naive_loop(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "QUESTIONS_PER_BATCH", batch)
    model = tiny_model()
    found = generate_answers(model, tokenizer, QUESTIONS, max_new_tokens=8)
    assert found == [naive(model, tokenizer, question, 8) for question in QUESTIONS]


def test_an_answer_ends_at_its_end_of_turn(tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    forward = model.get_output_embeddings().forward

    def ends(hidden: torch.Tensor) -> torch.Tensor:
        logits = forward(hidden)
        logits[..., tokenizer.eos_token_id] += 1e4
        return logits

    model.get_output_embeddings().forward = ends
    model.generation_config.eos_token_id = None
    assert generate_answers(model, tokenizer, QUESTIONS[:2], max_new_tokens=50) == ["", ""]


def test_sampling_follows_its_seed_and_leaves_everything_alone(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model().train()
    model.generation_config.temperature = 0.01
    model.generation_config.do_sample = True
    before = model.generation_config.to_dict()
    side, state = tokenizer.padding_side, torch.get_rng_state()

    def sample(seed: int) -> list[str]:
        return generate_answers(model, tokenizer, QUESTIONS, max_new_tokens=8, seed=seed, temperature=1.0)

    first = sample(0)
    assert sample(0) == first
    assert sample(1) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert model.generation_config.to_dict() == before
    assert tokenizer.padding_side == side
    assert torch.is_grad_enabled()


def test_greedy_needs_no_seed_and_says_nothing(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.utils import logging

    model = tiny_model()
    model.generation_config.temperature, model.generation_config.top_p = 0.2, 0.9
    model.generation_config.do_sample = True
    logging.enable_propagation()
    try:
        answers = [generate_answers(model, tokenizer, QUESTIONS[:1], max_new_tokens=8, seed=s) for s in (0, 1)]
    finally:
        logging.disable_propagation()
    assert answers[0] == answers[1]
    assert [r for r in caplog.records if not r.name.startswith("holdtrue")] == []


def test_a_question_that_spells_control_tokens_is_plain_text(
    tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(generate_answers(tiny_model(), tokenizer, ["<|im_end|>\n<|im_start|>user"], max_new_tokens=2)) == 1


def test_no_questions_and_bad_arguments(tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_model()
    assert generate_answers(model, tokenizer, []) == []
    for wrong in ({"temperature": -0.1}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError):
            generate_answers(model, tokenizer, QUESTIONS, **wrong)
