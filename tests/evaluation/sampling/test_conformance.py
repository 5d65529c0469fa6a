"""What every sampler must do, at temperature 0 where all can be compared with one naive loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from holdtrue.data import Message
from holdtrue.evaluation.sampling import (
    Answer,
    Decoding,
    EndpointSampler,
    Request,
    Sampler,
    TransformersSampler,
    VllmSampler,
    vllm,
)

if TYPE_CHECKING:
    from holdtrue.models import ModelSource

GREEDY = Decoding(temperature=0.0, max_new_tokens=8)
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "What would you do with a long afternoon and nobody at home?"}],
    [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Why is the sky blue?"},
        {"role": "assistant", "content": "Because air scatters blue light most."},
        {"role": "user", "content": "Grüße – and at night? 🌌"},
    ],
]


def request(conversation: Sequence[dict[str, str]], seed: int = 0) -> Request:
    return Request(tuple(Message(turn["role"], turn["content"]) for turn in conversation), seed)


def answers(sampler: Sampler, requests: Sequence[Request], decoding: Decoding = GREEDY) -> list[Answer]:
    found = [answer for batch in sampler.sample(requests, decoding) for answer in batch]
    assert sorted(answer.index for answer in found) == list(range(len(requests)))
    return sorted(found, key=lambda answer: answer.index)


@pytest.fixture(params=["transformers", "endpoint", "vllm"])
def sampler(request: pytest.FixtureRequest, talker: ModelSource, monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """Each sampler of the same model; of vLLM, a stand-in for the library."""
    if request.param == "transformers":
        return TransformersSampler(
            request.getfixturevalue("talker_model"), request.getfixturevalue("tokenizer"), batch_size=3
        )
    if request.param == "endpoint":
        return EndpointSampler(str(talker.path), request.getfixturevalue("served"), concurrency=2)
    request.getfixturevalue("vllm_stand_in")
    monkeypatch.setattr(vllm, "ANSWERS_PER_CALL", 3)
    return VllmSampler(talker)


def test_greedy_answers_equal_the_naive_loop(sampler: Sampler, naive) -> None:
    requests = [request(conversation, seed=i) for i, conversation in enumerate(CONVERSATIONS)]
    expected = [naive(conversation, GREEDY.max_new_tokens) for conversation in CONVERSATIONS]
    assert {finish for _, _, finish in expected} == {"stop", "length"}
    assert [(a.text, a.tokens, a.finish) for a in answers(sampler, requests)] == expected
    assert expected[0] != expected[2], "the system turn makes no difference, so the test shows nothing"


def test_order_and_company_do_not_matter(sampler: Sampler) -> None:
    requests = [request(conversation) for conversation in CONVERSATIONS]
    together = answers(sampler, requests)
    backward = answers(sampler, requests[::-1] + requests[:1])
    assert [a.text for a in backward] == [a.text for a in [*together[::-1], together[0]]]
    assert [answers(sampler, [one])[0].text for one in requests] == [a.text for a in together]


def test_the_longest_answer_is_as_told(sampler: Sampler, naive) -> None:
    conversation = CONVERSATIONS[1]
    for most in (1, 2, 5):
        found = answers(sampler, [request(conversation)], Decoding(0.0, most))
        assert [(a.text, a.tokens, a.finish) for a in found] == [naive(conversation, most)]


def test_no_requests_no_answers(sampler: Sampler) -> None:
    assert list(sampler.sample([], GREEDY)) == []


def test_what_was_yielded_before_a_stop_is_good(sampler: Sampler) -> None:
    requests = [request(conversation) for conversation in CONVERSATIONS]
    whole = answers(sampler, requests)
    under_way = sampler.sample(requests, GREEDY)
    first = next(under_way)
    under_way.close()
    done = {answer.index: answer.text for answer in first}
    left = [i for i in range(len(requests)) if i not in done]
    assert 0 < len(left) < len(requests)
    rest = answers(sampler, [requests[i] for i in left])
    done |= {i: answer.text for i, answer in zip(left, rest, strict=True)}
    assert [done[i] for i in range(len(requests))] == [a.text for a in whole]


def test_it_has_a_name_for_records(sampler: Sampler) -> None:
    assert sampler.name.split()[0] in ("transformers", "endpoint", "vllm")
