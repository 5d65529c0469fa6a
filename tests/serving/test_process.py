"""The inference process and its client: the port over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import uvicorn
from pydantic import SecretStr

from holdtrue.errors import SpecError
from holdtrue.serving import server as module
from holdtrue.serving.client import InferenceClient
from holdtrue.serving.engine import TransformersEngine
from holdtrue.serving.port import AdapterRef, Candidate, ChatError, ChatRequest, Delta, Event, Inference, Started, Token
from holdtrue.serving.server import create_app, run
from holdtrue.serving.wire import event_from_json, event_to_json, request_from_json, request_to_json
from support import free_port

from .conftest import collect

SECRET = "s" * 40
Ask = Callable[..., ChatRequest]


@contextlib.contextmanager
def serving(engine: Inference) -> Iterator[str]:
    port = free_port()
    config = uvicorn.Config(create_app(engine, SECRET), port=port, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(engine: TransformersEngine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


async def read(client: InferenceClient, request: ChatRequest, most: int | None = None) -> list[Event]:
    found: list[Event] = []
    async with client.chat(request) as events:
        async for event in events:
            found.append(event)
            if len(found) == most:
                break
    return found


def test_the_client_gives_what_the_engine_gives(
    url: str, engine: TransformersEngine, ask: Ask, adapters: list[AdapterRef]
):
    request = ask(adapter=adapters[0], n=2, seed=1, logprobs=True, top_logprobs=2, stop=("\0",))
    started, *deltas = asyncio.run(read(InferenceClient(url, SECRET), request))
    said = collect(engine, request)
    assert started == said.started
    for choice in range(2):
        mine = [event for event in deltas if isinstance(event, Delta) and event.choice == choice]
        assert "".join(event.text for event in mine) == said.texts[choice]
        tokens = [token for event in mine for token in event.tokens]
        assert [token.token_id for token in tokens] == [token.token_id for token in said.tokens[choice]]
        assert all(len(token.top) == 2 for token in tokens)


def test_a_client_that_leaves_ends_the_work(url: str, engine: TransformersEngine, ask: Ask):
    events = asyncio.run(read(InferenceClient(url, SECRET), ask(max_tokens=450, temperature=0), most=2))
    assert isinstance(events[0], Started)
    for _ in range(200):
        if not engine._lanes and not engine._tickets:
            return
        threading.Event().wait(0.02)
    pytest.fail("the work goes on")


def test_errors_cross_the_wire(url: str, ask: Ask):
    with pytest.raises(ChatError, match="context is 512") as raised:
        asyncio.run(read(InferenceClient(url, SECRET), ask("x" * 600)))
    assert (raised.value.fault, raised.value.param) == ("context", "messages")


@pytest.mark.parametrize("secret", ["", "wrong", SECRET + "x", "é"])
def test_without_the_secret_nothing_is_answered(url: str, ask: Ask, secret: str):
    header = {"authorization": f"Bearer {secret}".strip().encode()}
    assert httpx.post(f"{url}/chat", json=request_to_json(ask()), headers=header).status_code == 401
    if secret.isascii():
        with pytest.raises(ChatError) as raised:
            asyncio.run(read(InferenceClient(url, secret), ask()))
        assert raised.value.fault == "unavailable"
    assert asyncio.run(InferenceClient(url, "").alive())


def test_nobody_there_is_said(ask: Ask):
    client = InferenceClient(f"http://127.0.0.1:{free_port()}", SECRET)
    with pytest.raises(ChatError, match="cannot be reached") as raised:
        asyncio.run(read(client, ask()))
    assert raised.value.fault == "unavailable"
    assert not asyncio.run(client.alive())


def test_a_long_wait_is_not_taken_for_death(ask: Ask, monkeypatch: pytest.MonkeyPatch):
    class Slow:
        @contextlib.asynccontextmanager
        async def chat(self, request: ChatRequest) -> AsyncIterator[AsyncIterator[Event]]:
            async def events() -> AsyncIterator[Event]:
                await asyncio.sleep(0.5)
                yield Started(1, "r", None)
                yield Delta(0, "x", 1, finish="stop")

            yield events()

    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr("holdtrue.serving.client.SILENCE", 0.3)
    with serving(Slow()) as url:
        assert len(asyncio.run(read(InferenceClient(url, SECRET), ask()))) == 2


def test_a_process_that_dies_midway_is_said(ask: Ask):
    class Dies:
        @contextlib.asynccontextmanager
        async def chat(self, request: ChatRequest) -> AsyncIterator[AsyncIterator[Event]]:
            async def events() -> AsyncIterator[Event]:
                yield Started(1, "r", None)
                raise RuntimeError("bug")

            yield events()

    with serving(Dies()) as url, pytest.raises(ChatError) as raised:
        asyncio.run(read(InferenceClient(url, SECRET), ask()))
    assert raised.value.fault == "unavailable"


@pytest.mark.parametrize(
    ("url", "secret", "word"),
    [
        ("http://127.0.0.1:8001", "", "INFERENCE_SECRET"),
        ("http://0.0.0.0:8001", "s", "127.0.0.1"),
        ("http://example.com:8001", "s", "127.0.0.1"),
        ("https://127.0.0.1:8001", "s", "127.0.0.1"),
    ],
)
def test_it_listens_to_nobody_else(url: str, secret: str, word: str):
    settings = SimpleNamespace(
        inference_url=url, inference_secret=SecretStr(secret), inference_engine="transformers", threads=1
    )
    with pytest.raises(SpecError, match=word):
        run(settings, lambda location, folder: None)


def test_values_cross_the_wire_unchanged(ask: Ask):
    request = replace(ask("é🙂"), adapter=AdapterRef("0" * 64, "t-1"), stop=("a", "b"), seed=-(2**63))
    assert request_from_json(json.loads(json.dumps(request_to_json(request)))) == request
    token = Token(3, b"\xf0\x9f", -0.5, (Candidate(4, b"\0", float("-inf")),))
    for event in (Started(3, "r", None), Delta(1, "é", 2, (token,), "length"), Delta(0, "", 1)):
        assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event
    for junk in ({}, {"adapter": None, "messages": [], "stop": [], "what": 1}, {"adapter": 3}):
        with pytest.raises(ChatError):
            request_from_json(junk)


def test_who_asks_needs_no_torch():
    code = (
        "import sys, holdtrue.serving.client, holdtrue.serving.wire, holdtrue.serving.streaming, "
        "holdtrue.service.api.app; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'peft')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd()).returncode == 0
