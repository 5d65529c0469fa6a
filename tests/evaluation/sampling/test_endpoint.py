"""The endpoint sampler against a server of ours that fails in the ways that servers do."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from holdtrue.data import Message
from holdtrue.errors import RunError, SpecError
from holdtrue.evaluation.sampling import Answer, Decoding, EndpointSampler, Request, endpoint

KEY = "sk-very-secret"
SETTINGS = Decoding(0.5, 7)
REQUESTS = [Request((Message("system", "Be brief."), Message("user", f"number {i}")), 100 + i) for i in range(6)]

Reply = tuple[int, str, str]
"""Status, content type, body."""


def completion(content: Any = "fine", finish: Any = "stop", **more: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    return 200, "application/json", json.dumps({"object": "chat.completion", "choices": [choice], **more})


class Server:
    """An endpoint on loopback: what it is told to reply to (how many were asked before, body)."""

    def __init__(self) -> None:
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda _, __: completion()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.delay = 0.0
        self.under_way = self.most_under_way = 0
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request (ASGI)."""
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        self.asked.append(json.loads(body))
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        status, kind, text = self.reply(len(self.asked) - 1, self.asked[-1])
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await asyncio.sleep(self.delay)
        finally:
            self.under_way -= 1
        headers = [(b"content-type", kind.encode()), (b"retry-after-ms", b"10")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    import uvicorn

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    app = Server()
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    app.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/v1"
    yield app
    running.should_exit = running.force_exit = True
    thread.join(timeout=10)


def ask(server: Server, requests: list[Request] = REQUESTS, **options: Any) -> list[Answer]:
    sampler = EndpointSampler("some-model", server.url, KEY, **options)
    found = [answer for batch in sampler.sample(requests, SETTINGS) for answer in batch]
    return sorted(found, key=lambda answer: answer.index)


def fault(server: Server, **options: Any) -> tuple[list[Answer], str]:
    """Return what was yielded, and all that a user could see of the error."""
    sampler = EndpointSampler("some-model", server.url, KEY, **options)
    found: list[Answer] = []
    with pytest.raises(RunError) as caught:
        found.extend(answer for batch in sampler.sample(REQUESTS, SETTINGS) for answer in batch)
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert KEY not in repr(vars(caught.value))
    text = str(caught.value)
    assert server.url in text
    assert "Answers so far are kept" in text
    return sorted(found, key=lambda answer: answer.index), text


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"].split()[-1])


def test_what_is_sent_and_what_comes_back(server: Server) -> None:
    server.delay = 0.05
    server.reply = lambda _, body: completion(
        f" answer {number(body)}\ud800 ", "length" if number(body) == 2 else "stop", usage={"completion_tokens": 3}
    )
    found = ask(server, concurrency=2)
    assert found == [Answer(i, f"answer {i}�", 3, "length" if i == 2 else "stop") for i in range(6)]
    assert server.most_under_way == 2
    assert sorted(server.asked, key=number) == [
        {
            "model": "some-model",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"number {i}"}],
            "temperature": 0.5,
            "max_tokens": 7,
            "seed": 100 + i,
        }
        for i in range(6)
    ]
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


def test_text_is_sent_as_it_is(server: Server) -> None:
    text = "<|im_end|>\n<|im_start|>system\n\x00 \u2028 🌌"
    ask(server, [Request((Message("user", text),), 0)])
    assert server.asked[0]["messages"] == [{"role": "user", "content": text}]


def test_answers_come_as_they_are_done(server: Server) -> None:
    gate = threading.Event()

    def reply(_: int, body: dict[str, Any]) -> Reply:
        if number(body) == 1:
            assert gate.wait(20)
        return completion()

    server.reply = reply
    sampler = EndpointSampler("m", server.url, concurrency=1)
    under_way = sampler.sample(REQUESTS[:2], SETTINGS)
    assert [answer.index for answer in next(under_way)] == [0]
    gate.set()
    assert [answer.index for answer in next(under_way)] == [1]
    assert list(under_way) == []


def test_a_sampler_that_is_stopped_asks_no_more(server: Server) -> None:
    server.delay = 0.1
    under_way = EndpointSampler("m", server.url, concurrency=1).sample(REQUESTS, SETTINGS)
    next(under_way)
    began = time.monotonic()
    under_way.close()
    assert time.monotonic() - began < 5
    time.sleep(0.3)
    assert len(server.asked) <= 3


@pytest.mark.parametrize(
    "reply",
    [
        completion(None),
        completion(""),
        completion(" \n"),
        (200, "application/json", json.dumps({"choices": []})),
        (200, "application/json", json.dumps({"choices": [], "usage": None})),
    ],
)
def test_a_reply_without_text_is_an_empty_answer(server: Server, reply: Reply) -> None:
    server.reply = lambda _, __: reply
    assert ask(server, REQUESTS[:1]) == [Answer(0, "", None, "stop")]


@pytest.mark.parametrize("finish", ["content_filter", "tool_calls", None, "something new"])
def test_other_ends_count_as_a_stop(server: Server, finish: str | None) -> None:
    server.reply = lambda _, __: completion("so", finish)
    assert ask(server, REQUESTS[:1])[0].finish == "stop"


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.reply = lambda asked, _: (503, "text/plain", "busy") if asked % 2 == 0 else completion()
    assert len(ask(server, concurrency=1)) == 6
    assert len(server.asked) == 12


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ((200, "text/html", "<html><h1>Welcome to nginx!</h1></html>"), "not JSON: <html><h1>Welcome to nginx!"),
        ((200, "application/json", '{"choices": ['), "not JSON"),
        ((200, "application/json", ""), "it is empty"),
        ((200, "application/json", "[" * 100_000), "not JSON"),
        ((200, "application/json", '{"result": "fine"}'), "no chat completion (choices: Field required)"),
        ((200, "application/json", '{"choices": [{"text": "old"}]}'), "(choices.0.message: Field required)"),
        (completion([{"type": "text", "text": "a"}]), "choices.0.message.content"),
        ((401, "application/json", json.dumps({"error": {"message": f"bad key {KEY}"}})), "HTTP 401"),
        ((404, "text/html", "<h1>not here</h1>"), "check the model's name"),
        ((400, "application/json", '{"error": {"message": "too long"}}'), "too long"),
    ],
)
def test_rubbish_and_refusals_end_it_after_what_was_done(server: Server, reply: Reply, expected: str) -> None:
    server.reply = lambda _, body: reply if number(body) == 3 else completion()
    found, text = fault(server, concurrency=1)
    assert [answer.index for answer in found] == [0, 1, 2]
    assert expected in text
    assert "request 4 of 6" in text
    assert len(text) < 900
    assert len(server.asked) == 4


@pytest.mark.parametrize(("status", "advice"), [(429, "lower the concurrency"), (500, "server's log")])
def test_limits_and_failures_that_do_not_pass(
    server: Server, status: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "RETRIES", 2)
    server.reply = lambda _, body: (
        (status, "application/json", '{"error": {"message": "no"}}') if number(body) else completion()
    )
    found, text = fault(server, concurrency=1)
    assert [answer.index for answer in found] == [0]
    assert f"HTTP {status}" in text
    assert advice in text
    assert len(server.asked) == 1 + 3


@pytest.mark.parametrize("filler", [*range(160, 220, 7), *range(270, 310, 7)])
def test_no_part_of_the_key_is_left_where_a_text_is_cut(server: Server, filler: int) -> None:
    server.reply = lambda _, __: (200, "text/html", f"{'x' * filler}{KEY}")
    _, text = fault(server, concurrency=1)
    assert KEY[:5] not in text


def test_an_endpoint_that_is_slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    server.delay = 5
    found, text = fault(server, timeout=0.2)
    assert found == []
    assert "no reply in 0.2 s" in text


def test_an_endpoint_that_is_down(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "RETRIES", 0)
    server.url = "http://127.0.0.1:9/v1"
    found, text = fault(server)
    assert found == []
    assert "cannot connect" in text


def test_it_works_where_an_event_loop_is_running(server: Server) -> None:
    async def notebook() -> int:
        return len(ask(server))

    assert asyncio.run(notebook()) == 6


def test_no_key_is_needed_and_the_environments_is_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, expected in ((None, "Bearer none"), ("sk-env", "Bearer sk-env")):
        if key:
            monkeypatch.setenv("OPENAI_API_KEY", key)
        list(EndpointSampler("m", server.url).sample(REQUESTS[:1], SETTINGS))
        assert server.headers[-1]["authorization"] == expected


def test_bad_arguments_and_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("", "localhost:8000", "ftp://x/v1", "http://[bad"):
        with pytest.raises(SpecError, match="address"):
            EndpointSampler("m", url)
    for wrong in ({"concurrency": 0}, {"timeout": 0.0}):
        with pytest.raises(SpecError, match="above 0"):
            EndpointSampler("m", "http://x/v1", **wrong)
    shown = EndpointSampler("m", "https://me:secret@example.org:8000/v1/?key=secret", KEY)
    assert shown.name == "endpoint https://example.org:8000/v1"
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SpecError, match=r"holdtrue\[endpoint\]"):
        EndpointSampler("m", "http://x/v1")
