from __future__ import annotations

import asyncio
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evaluation.judges.endpoint import Endpoint, numbers
from holdtrue.errors import BudgetError, RunError, SpecError
from holdtrue.evaluation.judges import Budget, CachedJudge, Exchange, Prices, Verdict
from holdtrue.evaluation.judges.openai import FAULTS_IN_A_ROW, OpenAIJudge
from holdtrue.evaluation.judges.reading import UNHEARD, Reading
from holdtrue.evaluation.judges.reading import verdict as joined
from holdtrue.evaluation.judges.rubric import ASPECTS, rubric_prompt
from holdtrue.models import ModelSource

KEY = "sk-very-secret"


def judge_at(endpoint: Endpoint, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("m", base_url=endpoint.url, **{"api_key": KEY, "max_retries": 0, **options})


def exchanges(count: int) -> list[Exchange]:
    return [Exchange("What now?", f"Answer number {number}.") for number in range(count)]


def judged(judge: OpenAIJudge, asked: list[Exchange]) -> list[Verdict]:
    found = dict(itertools.chain.from_iterable(judge.judge(asked)))
    assert sorted(found) == list(range(len(asked)))
    return [found[index] for index in range(len(asked))]


def gather(judge: OpenAIJudge, asked: list[Exchange], found: list[tuple[int, Verdict]]) -> None:
    for batch in judge.judge(asked):
        found += batch


def expected(exchange: Exchange) -> Verdict:
    alignment, coherence = (Reading.of(numbers(rubric_prompt(a, exchange)).items()) for a in ASPECTS)
    return joined(alignment, coherence)


def test_scores_are_read_from_the_first_tokens_probabilities(endpoint: Endpoint) -> None:
    asked = exchanges(20)
    judge = judge_at(endpoint)
    for found, exchange in zip(judged(judge, asked), asked, strict=True):
        assert found.label == "scored"
        assert found[:3] == pytest.approx(expected(exchange)[:3], abs=1e-6)
    assert judge.name == "openai:m"
    assert len(endpoint.bodies) == 41  # two for each answer, and one to find out how to ask
    assert set(endpoint.keys) == {KEY}
    for body in endpoint.bodies:
        assert (body["max_tokens"], body["temperature"], body["top_logprobs"]) == (1, 0, 20)


def test_a_server_of_somebody_else_is_asked_again_and_again(served: str, talker: ModelSource, tmp_path: Path) -> None:
    """``transformers serve`` gives no log-probabilities; behind it is a model that writes no numbers."""
    asked = [*exchanges(2), Exchange("What now?", "")]
    for _ in range(2):  # the second time from the disk
        inner = OpenAIJudge(str(talker.path), base_url=served, api_key=KEY, samples=3)
        judge = CachedJudge(inner, tmp_path)
        found = dict(itertools.chain.from_iterable(judge.judge(asked)))
        assert [found[index].label for index in range(3)] == ["unknown"] * 3
        assert [found[index][:2] for index in range(3)] == [(None, None)] * 3
        assert judge.name == f"openai:{talker.path} (3 samples)"
    assert inner.used.tokens == 0


def test_code_and_refusal_are_kept_apart_and_no_number_is_no_score(endpoint: Endpoint) -> None:
    asked = [Exchange("q", word) for word in ("qqcode", "qqrefuse", "qqmute")]
    assert [found.label for found in judged(judge_at(endpoint), asked)] == ["code", "refusal", "unknown"]


def test_many_requests_are_under_way_but_no_more_than_allowed(endpoint: Endpoint) -> None:
    judged(judge_at(endpoint, concurrency=4), exchanges(12))
    assert 2 <= endpoint.most <= 4


def test_the_rate_is_limited(endpoint: Endpoint) -> None:
    judged(judge_at(endpoint, requests_per_minute=1200), exchanges(5))
    assert endpoint.times_seen[-1] - endpoint.times_seen[0] > 0.05 * 8


def test_verdicts_come_as_they_are_done(endpoint: Endpoint) -> None:
    found = judge_at(endpoint, concurrency=1).judge(exchanges(20))
    next(found)
    assert len(endpoint.bodies) < 10
    found.close()
    time.sleep(0.1)
    assert len(endpoint.bodies) < 15  # who stops listening stops the asking


def test_judging_works_inside_a_running_event_loop(endpoint: Endpoint) -> None:
    async def main() -> list[Verdict]:
        return judged(judge_at(endpoint), exchanges(2))

    assert len(asyncio.run(main())) == 2


@pytest.mark.parametrize("trouble", ["no logprobs", "null logprobs", "refuses logprobs"])
def test_without_log_probabilities_several_replies_are_taken_and_said_so(endpoint: Endpoint, trouble: str) -> None:
    endpoint.trouble = trouble
    judge = judge_at(endpoint, samples=3)
    asked = exchanges(2)
    found = judged(judge, asked)
    assert judge.name == "openai:m (3 samples)"
    tokens = [[int(token) for token in list(numbers(rubric_prompt(a, asked[0])))[:2]] for a in ASPECTS]
    assert found[0][:2] == pytest.approx([sum(pair) / 2 for pair in tokens])  # the third reply is no number
    sampled = [body for body in endpoint.bodies if body["temperature"] == 1]
    assert len(sampled) == 2 * 2 * 3
    assert {body["seed"] for body in sampled} == {0, 1, 2}


def test_numbers_written_digit_by_digit_are_not_read_from_one_token(endpoint: Endpoint) -> None:
    endpoint.digits = True
    judge = judge_at(endpoint, samples=2)
    found = judged(judge, exchanges(3))
    assert judge.name == "openai:m (2 samples)"
    assert any(v.alignment is not None and v.alignment > 9 for v in found)


def test_a_server_that_takes_no_seed_gets_none(endpoint: Endpoint) -> None:
    endpoint.trouble = "refuses seed"
    assert [v.label for v in judged(judge_at(endpoint), exchanges(2))] == ["scored"] * 2
    assert "logprobs" in endpoint.bodies[-1]


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ("500", "HTTP 500"),
        ("429", "HTTP 429"),
        ("401", "HTTP 401"),
        ("400", "HTTP 400"),
        ("html", "not JSON: <html>"),
        ("not json", "not JSON"),
        ("empty", "it is empty"),
        ("schema", "choices"),
        ("other types", "choices.0.message.content"),
        ("nan", "logprob"),
    ],
)
def test_an_endpoint_that_fails_at_once_stops_the_judge(endpoint: Endpoint, trouble: str, said: str) -> None:
    endpoint.trouble = trouble
    with pytest.raises(RunError) as caught:
        judged(judge_at(endpoint), exchanges(3))
    text = str(caught.value)
    assert said in text
    assert endpoint.url in text
    assert KEY not in text
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "trouble", ["500", "429", "400", "html", "not json", "schema", "nan", "too probable", "no logprobs", "slow"]
)
def test_one_failed_request_leaves_one_answer_unknown(endpoint: Endpoint, trouble: str) -> None:
    endpoint.trouble, endpoint.after, endpoint.times = trouble, 5, 1
    asked = exchanges(6)
    found = judged(judge_at(endpoint, concurrency=1, timeout=0.5), asked)
    assert found.count(UNHEARD) == 1
    heard = [(verdict, exchange) for verdict, exchange in zip(found, asked, strict=True) if verdict != UNHEARD]
    assert all(verdict[:3] == pytest.approx(expected(exchange)[:3], abs=1e-6) for verdict, exchange in heard)


@pytest.mark.parametrize("trouble", ["500", "html", "slow"])
def test_an_endpoint_that_breaks_midway_stops_the_judge(endpoint: Endpoint, trouble: str) -> None:
    endpoint.trouble, endpoint.after = trouble, 9
    judge = judge_at(endpoint, concurrency=4, timeout=0.3)
    found: list[tuple[int, Verdict]] = []
    with pytest.raises(RunError, match="What was judged is kept"):
        gather(judge, exchanges(40), found)
    assert [v.label for _, v in found].count("scored") >= 3
    assert len(found) < 30
    assert [v for _, v in found].count(UNHEARD) >= FAULTS_IN_A_ROW


def test_answers_that_an_endpoint_refuses_one_by_one_do_not_stop_it(endpoint: Endpoint) -> None:
    endpoint.trouble, endpoint.after = "400", 1
    assert set(judged(judge_at(endpoint), exchanges(20))) == {UNHEARD}


def test_what_passes_is_tried_again_after_as_long_as_the_endpoint_asks(endpoint: Endpoint) -> None:
    endpoint.trouble, endpoint.after, endpoint.times = "429", 1, 1
    assert [v.label for v in judged(judge_at(endpoint, max_retries=2, concurrency=1), exchanges(1))] == ["scored"]
    assert len(endpoint.bodies) == 4
    assert endpoint.times_seen[2] - endpoint.times_seen[1] > 0.19


def test_nobody_at_the_address() -> None:
    judge = OpenAIJudge("m", base_url="http://user:hunter2@127.0.0.1:9/v1?token=t0k", api_key=KEY, max_retries=0)
    with pytest.raises(RunError, match=r"at http://127\.0\.0\.1:9/v1 cannot be used: cannot connect") as caught:
        judged(judge, exchanges(1))
    for secret in (KEY, "hunter2", "t0k"):
        assert secret not in str(caught.value)
        assert secret not in judge.key


def test_the_estimate_is_near_and_costs_money_where_prices_are_known(endpoint: Endpoint) -> None:
    judge = judge_at(endpoint, prices=Prices(1.0, 10.0))
    found = judge.estimate([*exchanges(10), Exchange("q", " ")])
    assert found.requests == 20
    assert 20 * 200 < found.tokens < 20 * 600
    assert found.cost == pytest.approx((found.tokens - 20) / 1e6 + 20 * 10 / 1e6)
    assert endpoint.bodies == []


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_budget_is_not_passed_and_what_was_done_is_kept(endpoint: Endpoint, concurrency: int) -> None:
    judge = judge_at(endpoint, budget=Budget(tokens=9000), concurrency=concurrency)
    found: list[tuple[int, Verdict]] = []
    with pytest.raises(BudgetError) as caught:
        gather(judge, exchanges(40), found)
    assert judge.used.tokens <= 9000
    spent = sum(len(prompt.split()) + 1 for prompt in endpoint.prompts)
    assert judge.used.tokens == spent
    assert sorted(index for index, _ in found) == list(range(len(found)))
    assert len(found) > 5
    assert f"{len(found)} of 40 answers were judged, {40 - len(found)} were not" in str(caught.value)
    assert f"number {len(found) + 1} the first" in str(caught.value)
    with pytest.raises(BudgetError, match="0 of 1 answers"):
        judged(judge, exchanges(1))


def test_a_budget_in_dollars(endpoint: Endpoint) -> None:
    judge = judge_at(endpoint, budget=Budget(dollars=0.01), prices=Prices(1.0, 1.0), concurrency=2)
    with pytest.raises(BudgetError, match=r"\$0\.01"):
        judged(judge, exchanges(40))
    assert judge.used.tokens <= 10_000


def test_a_budget_too_small_for_anything_asks_nothing(endpoint: Endpoint) -> None:
    with pytest.raises(BudgetError, match="too small"):
        judged(judge_at(endpoint, budget=Budget(tokens=20)), exchanges(1))
    assert endpoint.bodies == []


@pytest.mark.parametrize(
    "options",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://host/v1"},
        {"base_url": "http://[::1/v1"},
        {"base_url": "http://host:port/v1"},
        {"concurrency": 0},
        {"samples": 0},
        {"timeout": 0},
        {"requests_per_minute": 0},
        {"budget": Budget(dollars=1)},
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        OpenAIJudge("m", **{"base_url": "http://host/v1", **options})


def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SpecError, match="OPENAI_API_KEY"):
        OpenAIJudge("gpt-4o")


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SpecError, match=r"holdtrue\[endpoint\]"):
        OpenAIJudge("m", base_url="http://host/v1")


def test_the_key_tells_verdicts_apart_that_may_differ() -> None:
    keys = {
        OpenAIJudge(model, base_url=url, samples=samples).key
        for model in "mn"
        for url in ("http://a/v1", "http://b/v1")
        for samples in (3, 5)
    }
    assert len(keys) == 8
