"""Chat with OpenAI's own client over the API, a tiny model behind it: the wire, tenants, leaving, accounts."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from openai import OpenAI
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage, ChatCompletionTokenLogprob, chat_completion
from openai.types.chat.chat_completion_content_part_text_param import (
    ChatCompletionContentPartTextParam,
    PromptCacheBreakpoint,
)
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.chat.completion_create_params import CompletionCreateParamsBase, PromptCacheOptions
from sqlalchemy import select

from holdtrue.models import load_model, resolve
from holdtrue.service import auth, clock, ids, quotas, tenancy
from holdtrue.service.api import chat_wire
from holdtrue.service.api.app import create_app
from holdtrue.service.settings import ServiceSettings
from holdtrue.service.store import migrations
from holdtrue.service.store.blobs import Blobs
from holdtrue.service.store.database import Database
from holdtrue.service.store.schema import Model, Project
from holdtrue.serving.engine import TransformersEngine
from holdtrue.serving.port import ChatError
from serving_support import make_adapter, make_base
from support import free_port


@dataclass
class Tenant:
    key: str
    project: str
    model: str
    digest: str


@dataclass
class Place:
    """An API in this process, with the engine behind it."""

    url: str
    base: str
    db: Database
    engine: TransformersEngine
    tenants: list[Tenant]

    def client(self, tenant: int = 0, **options: Any) -> OpenAI:
        return OpenAI(base_url=self.url, api_key=self.tenants[tenant].key, **{"max_retries": 0, **options})

    def used(self, tenant: int = 0) -> int:
        with self.db.read() as session:
            found = quotas.used_today(session, self.tenants[tenant].project, now=clock.now())
        return found.get("chat_tokens", 0)

    def wait_until_idle(self) -> None:
        for _ in range(500):
            if not self.engine._tickets and not self.engine._lanes:
                return
            threading.Event().wait(0.02)
        pytest.fail("the engine still works")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, database_url: str) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("chat")
    base = str(make_base(root / "base", seed=0))
    settings = ServiceSettings(home=root / "home", database_url=database_url)
    settings.home.mkdir()
    db, blobs = Database(settings.database), Blobs(settings.blobs)
    migrations.upgrade(db)
    tenancy.bootstrap(db)
    engine = TransformersEngine(blobs.fetch_tree)
    place = Place("", base, db, engine, [_tenant(root, base, db, blobs, seed) for seed in (1, 2)])
    with db.write() as session:
        session.add(_model(base, None, "base", base))
    port = free_port()
    app = create_app(settings, db=db, blobs=blobs, inference=engine)
    server = uvicorn.Server(uvicorn.Config(app, port=port, lifespan="off", log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    place.url = f"http://127.0.0.1:{port}/v1"
    yield place
    server.should_exit = True
    thread.join()
    engine.close()
    db.close()


def _tenant(root: Path, base: str, db: Database, blobs: Blobs, seed: int) -> Tenant:
    slug, folder, now = f"tenant-{seed}", root / f"adapter-{seed}", clock.now()
    make_adapter(load_model(resolve(base), device="cpu"), folder, seed, scale=0.2)
    stored, digest = blobs.put_tree(folder)
    with db.write() as session:
        organization = tenancy.create_organization(session, slug, slug, now=now)
        project = tenancy.create_project(session, organization.id, slug, now=now)
        key = auth.create(session, project_id=project.id, name=slug, now=now).secret
        name = ids.model_name("tiny", slug, None)
        session.add(_model(name, project.id, "tuned", base, stored, digest))
    return Tenant(key, project.id, name, digest)


def _model(
    name: str, project: str | None, kind: str, base: str, adapter: str | None = None, digest: str | None = None
) -> Model:
    return Model(
        id=ids.new("model"), name=name, project_id=project, kind=kind, status="ready", base_model=base, job_id=None,
        adapter=adapter, adapter_digest=digest, created_at=clock.now(), deleted_at=None,
    )  # fmt: skip


def ask(text: str = "Hello", **values: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 20, **values}


def long(**values: Any) -> dict[str, Any]:
    return ask(max_tokens=450, stop=["\0"], **values)


def test_the_fields_are_openais():
    """Field for field as the client's types have them, but for what is not offered."""
    rest = {"metadata", "moderation", "service_tier"}
    assert set(chat_wire.ChatCompletion.model_fields) == set(ChatCompletion.model_fields) - rest
    assert set(chat_wire.Choice.model_fields) == set(chat_completion.Choice.model_fields)
    rest = {"annotations", "audio", "function_call", "tool_calls"}
    assert set(chat_wire.AnswerMessage.model_fields) == set(ChatCompletionMessage.model_fields) - rest
    assert set(chat_wire.TokenLogprob.model_fields) == set(ChatCompletionTokenLogprob.model_fields)
    assert set(chat_wire.TopLogprob.model_fields) == set(TopLogprob.model_fields)
    rest = {"completion_tokens_details", "prompt_tokens_details"}
    assert set(chat_wire.Usage.model_fields) == set(CompletionUsage.model_fields) - rest
    left_out: set[str] = set()  # what is not offered is known too, and refused by its value: see NEUTRAL
    known = set(CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert set(chat_wire.ChatBody.model_fields) == known - left_out
    assert set(chat_wire.CacheOptions.model_fields) == set(PromptCacheOptions.__annotations__)
    assert set(chat_wire.TextPart.model_fields) == set(ChatCompletionContentPartTextParam.__annotations__)
    assert set(chat_wire.CacheBreakpoint.model_fields) == set(PromptCacheBreakpoint.__annotations__)


def test_an_answer_and_who_gave_it(place: Place):
    revision = resolve(place.base).revision
    for tenant, mine in enumerate(place.tenants):
        with place.client(tenant) as client:
            raw = client.chat.completions.with_raw_response.create(model=mine.model, **ask())
        answer = raw.parse()
        assert answer.model == raw.headers["x-holdtrue-model"] == mine.model
        assert raw.headers["x-holdtrue-adapter"] == mine.digest
        assert answer.system_fingerprint == f"{revision}+adapter-sha256:{mine.digest}"
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 20
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    with place.client() as client:
        raw = client.chat.completions.with_raw_response.create(model=place.base, **ask())
        assert raw.headers["x-holdtrue-adapter"] == "none"
        assert raw.parse().system_fingerprint == revision


def test_a_stream_says_the_same(place: Place):
    values = {"model": place.tenants[0].model, **ask(n=3, temperature=1, seed=4, logprobs=True, top_logprobs=2)}
    with place.client() as client:
        whole = client.chat.completions.create(**values)
        chunks = list(client.chat.completions.create(**values, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in mine) == choice.message.content
        assert [each.finish_reason for each in mine if each.finish_reason] == [choice.finish_reason]
        tokens = [token for each in mine if each.logprobs for token in each.logprobs.content or []]
        assert choice.logprobs is not None
        assert [token.bytes for token in tokens] == [token.bytes for token in choice.logprobs.content or []]
        assert all(len(token.top_logprobs) == 2 for token in tokens)
        said = b"".join(bytes(token.bytes or []) for token in tokens).decode("utf-8", "replace")
        assert said == choice.message.content
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_an_answer_can_be_sent_back(place: Place):
    with place.client() as client:
        values = {"model": place.base, "temperature": 0, "max_completion_tokens": 5}
        first = client.chat.completions.create(messages=[{"role": "user", "content": "Hello"}], **values)
        messages: list[Any] = [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hello", "name": "someone"},
            first.choices[0].message,
            {"role": "user", "content": "And then?"},
        ]
        again = client.chat.completions.create(messages=messages, **values)
    assert first.usage is not None
    assert again.usage is not None
    assert again.usage.prompt_tokens > first.usage.prompt_tokens + 5


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"modalities": ["text", "audio"], "audio": {"voice": "ash", "format": "mp3"}}, "modalities"),
        ({"audio": {"voice": "ash", "format": "mp3"}}, "audio"),
        ({"logit_bias": {"1": 5}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": -0.5}, "frequency_penalty"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"prediction": {"type": "content", "content": "a"}}, "prediction"),
        ({"store": True}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"extra_body": {"min_p": 0.5}}, "min_p"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"extra_body": {"temperature": True}}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_completion_tokens": 5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 500}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "b", "tool_call_id": "c"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name(place: Place, values: dict[str, Any], param: str, stream: bool):
    if stream and "stream_options" in values:
        pytest.skip("with a stream these options are right")
    with place.client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": place.base, **ask(), **values}, stream=stream)
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] == param


PART = {"type": "image_url", "image_url": {"url": "a"}}
NAMED: list[tuple[dict[str, Any], str, str]] = [
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "List should have at most 4 items after validation, not 5"),
    ({"stop": ["a", 3]}, "stop", "Input should be a valid string"),
    ({"stop": 3}, "stop", "Input should be a valid string or a valid list"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, PART]}]},
        "messages.content.type",
        "Input should be 'text', and not 'image_url'",
    ),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages.content", "Input should be an object"),
    (
        {"messages": [{"role": "tool", "content": "a"}]},
        "messages.role",
        "Input should be 'system', 'developer', 'user' or 'assistant', and not 'tool'",
    ),
]


def test_what_is_wrong_is_said_of_the_kind_that_was_given(place: Place):
    with place.client() as client:
        for values, param, message in NAMED:
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**{"model": place.base, **ask(), **values})
            assert caught.value.body["message"] == f"Invalid value for '{param}': {message}"  # type: ignore[index]
            assert caught.value.param == param


@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_of_tokens_is_named_as_it_was_given(place: Place, stream: bool):
    asked: dict[str, Any] = {"model": place.base, "messages": [{"role": "user", "content": "a"}], "stream": stream}
    with place.client() as client:
        for name in ("max_completion_tokens", "max_tokens"):
            with pytest.raises(openai.BadRequestError) as caught:
                client.chat.completions.create(**asked, **{name: 10**6})
            assert (caught.value.param, caught.value.code) == (name, "context_length_exceeded")


CACHED = {"type": "text", "text": "Hello", "prompt_cache_breakpoint": {"mode": "explicit", "ttl": "12h"}}


@pytest.mark.parametrize(
    "values",
    [
        {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "presence_penalty": 0.0},
        {"logit_bias": {}, "modalities": ["text"], "store": False, "service_tier": "auto", "parallel_tool_calls": True},
        {"user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "prompt_cache_key": "k", "stop": None},
        {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}, "prompt_cache_retention": "24h"},
        {"messages": [{"role": "user", "content": [CACHED]}]},
    ],
)
def test_what_asks_for_nothing_is_taken(place: Place, values: dict[str, Any]):
    with place.client() as client:
        plain = client.chat.completions.create(model=place.base, **ask())
        assert client.chat.completions.create(model=place.base, **ask(**values)).choices == plain.choices


def test_only_released_models_of_the_project_are_there(place: Place):
    (mine, theirs), names = place.tenants, ["gpt-4o", "ft:a:b::c", "../x", "x" * 300, "a\u202eb"]
    with place.client(0) as client:
        for name in (theirs.model, *names):
            for stream in (False, True):
                with pytest.raises(openai.NotFoundError) as caught:
                    client.chat.completions.create(model=name, **ask(), stream=stream)
                assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        for status in ("blocked", "held", "deleted"):
            with place.db.write() as session:
                row = session.scalars(select(Model).where(Model.name == mine.model)).one()
                row.status = status
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model=mine.model, **ask())
        with place.db.write() as session:
            session.scalars(select(Model).where(Model.name == mine.model)).one().status = "ready"
        assert client.chat.completions.create(model=mine.model, **ask()).model == mine.model


def test_twenty_chats_at_once_over_two_tenants_adapters(place: Place):
    asked = [
        (tenant, model, ask(f"Question {number}", temperature=number % 2, seed=number))
        for number in range(5)
        for tenant in (0, 1)
        for model in (place.base, place.tenants[tenant].model)
    ]

    def one(what: tuple[int, str, dict[str, Any]]) -> tuple[str | None, str, str]:
        with place.client(what[0]) as client:
            raw = client.chat.completions.with_raw_response.create(model=what[1], **what[2])
        answer = raw.parse()
        return answer.choices[0].message.content, raw.headers["x-holdtrue-adapter"], str(answer.system_fingerprint)

    alone = [one(what) for what in asked]
    assert 10 < len({text for text, _, _ in alone}) < 16  # the base model says the same to both tenants
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, asked)) == alone


@pytest.mark.parametrize("stream", [False, True])
def test_a_reader_who_leaves_ends_the_work_and_pays_for_it(place: Place, stream: bool):
    place.wait_until_idle()
    before = place.used()
    body = {"model": place.base, **long(stream=stream)}
    _leave(place, body, stream)
    place.wait_until_idle()
    for _ in range(200):
        if place.used() > before:
            break
        threading.Event().wait(0.02)
    assert before < place.used() < before + 500


def _leave(place: Place, body: dict[str, Any], stream: bool) -> None:
    """Send a request over a socket of one's own, wait until it is worked on, and hang up."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {place.tenants[0].key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    port = int(place.url.rsplit(":", 1)[1].split("/")[0])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + content)
        if stream:
            assert connection.recv(2000).startswith(b"HTTP/1.1 200")
        while not any(row.generated > 3 for lane in list(place.engine._lanes.values()) for row in lane._rows):
            threading.Event().wait(0.005)


def test_tokens_are_on_the_projects_account_and_end_with_its_quota(place: Place):
    before = place.used(1)
    with place.client(1) as client:
        answer = client.chat.completions.create(model=place.base, **ask(n=2))
        list(client.chat.completions.create(model=place.base, **ask(n=2), stream=True))
        assert answer.usage is not None
        assert place.used(1) == before + 2 * answer.usage.total_tokens
        with place.db.write() as session:
            session.get_one(Project, place.tenants[1].project).limits = {"tokens_per_day": 1}
        try:
            for stream in (False, True):
                with pytest.raises(openai.RateLimitError) as caught:
                    client.chat.completions.create(model=place.base, **ask(), stream=stream)
                assert caught.value.code == "tokens_per_day"
        finally:
            with place.db.write() as session:
                session.get_one(Project, place.tenants[1].project).limits = {}


def test_a_key_without_the_scope_is_refused(place: Place):
    with place.db.write() as session:
        key = auth.create(
            session, project_id=place.tenants[0].project, name="k", now=clock.now(), scopes=["files.read"]
        ).secret
    with OpenAI(base_url=place.url, api_key=key) as client, pytest.raises(openai.PermissionDeniedError):
        client.chat.completions.create(model=place.base, **ask())


def test_a_full_engine_is_429_and_a_failing_one_tells_nothing(place: Place, monkeypatch: pytest.MonkeyPatch):
    with place.client() as client:
        monkeypatch.setattr("holdtrue.serving.port.WAITING_OF_TENANT", 0)
        with pytest.raises(openai.RateLimitError) as busy:
            client.chat.completions.create(model=place.base, **ask())
        assert busy.value.code == "engine_overloaded"
        assert busy.value.response.headers["retry-after"]
        monkeypatch.undo()

        def fail(*_: object) -> None:
            raise ChatError("failed", "/a/secret/path")

        monkeypatch.setattr(place.engine, "submit", fail)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as failed:
                client.chat.completions.create(model=place.base, **ask(), stream=stream)
            assert failed.value.status_code == 503
            assert "secret" not in failed.value.message


def test_a_failure_midway_breaks_the_stream_with_an_error(place: Place):
    place.wait_until_idle()
    with place.client() as client:
        chunks = iter(client.chat.completions.create(model=place.base, **long(), stream=True))
        for _ in range(5):
            next(chunks)
        (lane,) = place.engine._lanes.values()
        lane._table = None  # type: ignore[assignment]
        with pytest.raises(openai.APIError, match="cannot answer at the moment"):
            list(chunks)


TEMPLATES = [
    "{{ 7*7 }}",
    "{% for x in range(99) %}y{% endfor %}",
    "{% raw %}",
    "{% endfor %}{{ messages }}",
    "{%- set messages = [] -%}",
    "{# nothing #}",
    "{% include '/etc/passwd' %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "${7*7} <%= 7*7 %> #{7*7}",
]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_template_in_a_message_is_text(place: Place, tmp_path: Path, role: str):
    """The model reads a byte for each that was sent: nothing was rendered away, and nothing was run."""

    def prompt_tokens(text: str) -> int:
        messages: list[Any] = [{"role": role, "content": text}, {"role": "user", "content": text}]
        answer = client.chat.completions.create(model=place.base, messages=messages, temperature=0, max_tokens=1)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    mark = tmp_path / "mark"
    with place.client() as client:
        for template in TEMPLATES:
            text = template.replace("MARK", str(mark))
            assert prompt_tokens(text) == prompt_tokens("x" * len(text)), text
    assert not mark.exists()
