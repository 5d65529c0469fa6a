"""Chat with OpenAI's own client, through the API and the inference process, on the shipped base model.

The wire itself is tried in test_chat_wire.py, over a tiny model.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from holdtrue.models import load_model, resolve
from holdtrue.service import clock, ids
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.schema import Model, Project
from serving_support import make_adapter

from .conftest import BASE, start, stop

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": BASE, "messages": ASKED, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def chatting(tmp_path_factory, database_url):
    home = tmp_path_factory.mktemp("chat") / "home"
    found = start(home, role="all", HOLDTRUE_THREADS="1", HOLDTRUE_DATABASE_URL=database_url)
    yield found
    stop(found)


@pytest.fixture(scope="module")
def asking(chatting) -> OpenAI:
    with chatting.client(max_retries=30, timeout=120) as client:
        client.chat.completions.create(**GREEDY)  # waits for the inference process
        yield client


@pytest.fixture(scope="module")
def tuned(chatting, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Two tenants' models: name -> key, adapter digest."""
    base = resolve(BASE)
    blobs = Blobs(ServiceSettings(home=chatting.home).blobs)
    found = {}
    for seed, slug in enumerate(("left", "right")):
        key = chatting.tenant(slug)
        folder = tmp_path_factory.mktemp(slug) / "adapter"
        adapter = make_adapter(load_model(base, device="cpu"), folder, seed, scale=0.02)
        stored, digest = blobs.put_tree(folder)
        name = ids.model_name(BASE, slug, None)
        with chatting.db.write() as session:
            project = session.query(Project).filter(Project.name == slug).one()
            session.add(
                Model(
                    id=ids.new("model"), name=name, project_id=project.id, kind="tuned", status="ready",
                    base_model=BASE, job_id=None,
                    adapter=stored, adapter_digest=digest, created_at=clock.now(), deleted_at=None,
                )
            )  # fmt: skip
        assert digest == adapter.digest
        found[name] = (key, digest)
    return found


def test_an_answer(asking):
    answer = asking.chat.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert choice.message.content == "The capital of France is Paris."
    assert choice.finish_reason == "stop"
    assert answer.model == BASE
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.system_fingerprint == resolve(BASE).revision


def test_a_stream_says_the_same(asking):
    chunks = list(asking.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The capital of France is Paris."
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 8


def test_choices_seeds_stops_and_log_probabilities(asking):
    more = {"model": BASE, "messages": ASKED, "max_tokens": 6, "n": 2, "seed": 4}
    first, second = (asking.chat.completions.create(**more) for _ in range(2))
    assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]
    stopped = asking.chat.completions.create(**GREEDY, stop=[" France"])
    assert stopped.choices[0].message.content == "The capital of"
    told = asking.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(each.token for each in told) == "The capital of France is Paris."
    assert all(len(each.top_logprobs) == 3 and each.logprob == each.top_logprobs[0].logprob for each in told)


def test_twenty_chats_at_once_get_their_own_adapters_answers(chatting, asking, tuned):
    texts = ["Name a color.", "Name a fruit.", "Name a tool.", "Name a city.", "Name a bird."]
    asked = [(name, text) for name in (*tuned, BASE) for text in texts]

    def ask(pair: tuple[str, str]) -> tuple[str | None, str | None]:
        name, text = pair
        key, _ = tuned.get(name, (chatting.key, None))
        with chatting.client(key, timeout=120) as client:
            raw = client.chat.completions.with_raw_response.create(
                model=name, messages=[{"role": "user", "content": text}], temperature=0, max_tokens=8
            )
            return raw.parse().choices[0].message.content, raw.headers["x-holdtrue-adapter"]

    alone = [ask(pair) for pair in asked]
    with ThreadPoolExecutor(len(asked) + 5) as pool:
        together = list(pool.map(ask, asked + asked[:5]))
    assert together == alone + alone[:5]
    digests = {name: digest for name, (_, digest) in tuned.items()}
    assert [adapter for _, adapter in alone] == [digests.get(name, "none") for name, _ in asked]
    assert len({text for text, _ in alone}) > len(texts)


def test_changed_weights_are_not_served(chatting, asking, tuned):
    name, (key, digest) = list(tuned.items())[1]
    with chatting.db.write() as session:
        session.execute(update(Model).where(Model.name == name).values(adapter_digest="0" * 64))
    with chatting.client(key) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{**GREEDY, "model": name})
    assert caught.value.status_code == 503
    with chatting.db.write() as session:
        session.execute(update(Model).where(Model.name == name).values(adapter_digest=digest))


def test_no_content_is_logged_and_tokens_are_counted(chatting, asking):
    secret = "the-word-that-nobody-logs"
    asking.chat.completions.create(**{**GREEDY, "messages": [{"role": "user", "content": secret}]})
    for log in Path(chatting.home.parent).glob("*.log"):
        assert secret not in log.read_text()
    usage = httpx.get(f"{chatting.url}/holdtrue/usage", headers={"authorization": f"Bearer {chatting.key}"}).json()
    assert "chat_tokens" in json.dumps(usage)
