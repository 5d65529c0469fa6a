from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from holdtrue.data import ChatEncoder, ChatRow, Message
from holdtrue.errors import RunError
from holdtrue.models import AdapterSpec, new_adapter
from holdtrue.scoring import AnswerScore, output_head, score_answers, score_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TinyModel = Callable[[], "PreTrainedModel"]


def chat(*turns: str) -> ChatRow:
    roles = ("user", "assistant")
    return ChatRow(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)))


ROWS = [
    chat("What is rain?", "Water that falls from clouds."),
    chat("Name a color.", "Green."),
    chat("Tell me about the sea.", "It is wide and salty, " * 12 + "and full of fish."),
    chat("Hi", "Hello!", "How are you?", "Quite well, thank you; and you, my friend?"),
]


@pytest.fixture
def encoder(tokenizer: PreTrainedTokenizerBase) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def naive_turns(model: PreTrainedModel, encoder: ChatEncoder, row: ChatRow) -> list[list[float]]:
    """Per answer, the NLL of each token, from the full logits of one sequence at a time, in float64."""
    turns: list[list[float]] = []
    for sequence in encoder.encode(row):
        logits = model(input_ids=torch.tensor([sequence.input_ids])).logits[0].detach().double()
        logp = torch.log_softmax(logits, -1)
        before = False
        for i, trained in enumerate(sequence.trained):
            if trained:
                if not before:
                    turns.append([])
                turns[-1].append(-float(logp[i - 1, sequence.input_ids[i]]))
            before = trained
    return turns


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def test_equals_the_full_log_softmax_in_float64(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    model = tiny_model().double()
    for row, found in zip(ROWS, score_turns(model, encoder, ROWS), strict=True):
        expected = naive_turns(model, encoder, row)
        assert [a.tokens for a in found.answers] == [len(turn) for turn in expected]
        assert [a.nll for a in found.answers] == pytest.approx([mean(turn) for turn in expected], abs=1e-10)
        assert found.dropped == 0


def test_float32_is_within_1e_5(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    model = tiny_model()
    exact = [mean([mean(t) for t in naive_turns(tiny_model().double(), encoder, row)]) for row in ROWS]
    assert [s.nll for s in score_answers(model, encoder, ROWS)] == pytest.approx(exact, abs=1e-5)


def test_an_answer_counts_its_end_of_turn_and_nothing_else(
    tiny_model: TinyModel, encoder: ChatEncoder, tokenizer: PreTrainedTokenizerBase
) -> None:
    words = len(tokenizer("Green.", add_special_tokens=False)["input_ids"])
    assert score_answers(tiny_model(), encoder, [ROWS[1]])[0].tokens == words + 1


def test_a_row_of_two_answers_is_the_mean_of_its_answers(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    model = tiny_model()
    (turns,) = score_turns(model, encoder, [ROWS[3]])
    (row,) = score_answers(model, encoder, [ROWS[3]])
    assert len(turns.answers) == 2
    assert row.nll == pytest.approx(mean([a.nll for a in turns.answers]))
    assert row.tokens == sum(a.tokens for a in turns.answers)


def test_turns_of_weight_zero_are_not_scored(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    model = tiny_model()
    muted = ChatRow((ROWS[3].messages[0], Message("assistant", "Hello!", 0), *ROWS[3].messages[2:]))
    (found,) = score_turns(model, encoder, [muted])
    assert found.answers == (pytest.approx(score_turns(model, encoder, [ROWS[3]])[0].answers[1], abs=1e-5),)


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 333, 4096])
def test_batches_and_padding_change_nothing(
    tiny_model: TinyModel, encoder: ChatEncoder, tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdtrue import scoring

    model = tiny_model()
    alone = [score_answers(model, encoder, [row])[0] for row in ROWS]
    monkeypatch.setattr(scoring, "ROWS_PER_WINDOW", 3)
    monkeypatch.setattr(scoring, "LOGITS_PER_CHUNK", 49152 * 5)
    mixed = score_answers(model, encoder, ROWS[::-1], tokens_per_batch=tokens_per_batch)[::-1]
    assert [s.tokens for s in mixed] == [s.tokens for s in alone]
    assert [s.nll for s in mixed] == pytest.approx([s.nll for s in alone], abs=1e-5)


def test_the_adapter_is_scored_and_the_model_left_as_it_was(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    plain = score_answers(tiny_model(), encoder, ROWS)
    model = new_adapter(tiny_model(), AdapterSpec(r=4, dropout=0.5), seed=0)
    assert [s.nll for s in score_answers(model, encoder, ROWS)] == pytest.approx([s.nll for s in plain], abs=1e-5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.train()
    next(m for n, m in model.named_modules() if n.endswith("layers.1")).eval()
    modes = [m.training for m in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    tuned = score_answers(model, encoder, ROWS)
    assert tuned == score_answers(model, encoder, ROWS)  # dropout is off
    assert tuned[0].nll != pytest.approx(plain[0].nll, abs=1e-3)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    model = tiny_model().train()

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_answers(model, encoder, ROWS, progress=stop)
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()


def test_an_answer_that_is_cut_is_said_so(tiny_model: TinyModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model, whole = tiny_model(), ChatEncoder(tokenizer)
    length = len(whole.encode(ROWS[2])[0].input_ids)
    answer = score_answers(model, whole, [ROWS[2]])[0].tokens
    cut = ChatEncoder(tokenizer, max_length=length - 10)
    found = score_turns(model, cut, [ROWS[2]])[0]
    assert found.dropped == 10
    assert answer - 10 <= found.answers[0].tokens < answer
    gone = ChatEncoder(tokenizer, max_length=8)
    assert score_turns(model, gone, [ROWS[2]])[0].answers == ()
    score = score_answers(model, gone, [ROWS[2]])[0]
    assert math.isnan(score.nll)
    assert score.tokens == 0


def test_progress_counts_rows(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    seen: list[tuple[int, int]] = []
    score_answers(tiny_model(), encoder, iter(ROWS), tokens_per_batch=1, progress=lambda *at: seen.append(at))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_rows_no_scores(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    assert score_answers(tiny_model(), encoder, []) == []
    with pytest.raises(ValueError, match="tokens_per_batch"):
        score_answers(tiny_model(), encoder, ROWS, tokens_per_batch=0)


def test_no_batch_holds_the_logits_of_all_its_positions(tiny_model: TinyModel, encoder: ChatEncoder) -> None:
    model = tiny_model()
    widest = 0

    def watch(_module: object, _inputs: object, output: torch.Tensor) -> None:
        nonlocal widest
        widest = max(widest, output.numel())

    model.get_output_embeddings().register_forward_hook(watch)
    score_answers(model, encoder, ROWS)
    assert 0 < widest <= 2**22


def test_capped_and_scaled_logits_are_followed_and_unknown_ones_refused(tiny_model: TinyModel) -> None:
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.5,
    }
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=0.5)).eval()
    output_head(capped)
    output_head(CohereForCausalLM(CohereConfig(**sizes, logit_scale=0.1)).eval())

    odd = tiny_model()
    plain = odd.forward

    def doubled(*args: object, **kwargs: object) -> object:
        output = plain(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    odd.forward = doubled
    with pytest.raises(RunError, match="logits"):
        output_head(odd)


def test_a_score_is_a_named_pair() -> None:
    assert AnswerScore(1.0, 2)._fields == ("nll", "tokens")
