"""The calls that the port makes of vLLM. The library is a stand-in: nothing here has run on a GPU."""

from __future__ import annotations

import asyncio
import enum
import random
import sys
import types
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from holdtrue.errors import SpecError
from holdtrue.models import load_adapter, load_model, resolve
from holdtrue.serving import vllm_engine as module
from holdtrue.serving.engine import TransformersEngine
from holdtrue.serving.port import AdapterRef, ChatError, ChatRequest, Delta, Started
from holdtrue.serving.vllm_engine import Turnstile, VllmEngine

from .conftest import Said, collect

Ask = Callable[..., ChatRequest]


class Kind(enum.Enum):
    DELTA = 1


class StandIn:
    """Answers greedily with transformers, some tokens at a time, and remembers what was asked."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.model_config = types.SimpleNamespace(max_model_len=512)
        self.inside: set[Any] = set()
        self.mixed: list[set[Any]] = []
        self.settings: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.ended: set[str] = set()
        self.removed: list[int] = []
        self.down = False

    async def generate(self, prompt: Any, settings: Any, name: str, *, lora_request: Any) -> AsyncIterator[Any]:
        self.settings.append(vars(settings))
        who = (lora_request, name)
        self.inside.add(who)
        self.mixed.append({lora for lora, _ in self.inside})
        try:
            model = load_model(resolve(self.options.model), device="cpu")
            if lora_request is not None:
                model = load_adapter(model, lora_request.path)
            ids, count = list(prompt["prompt_token_ids"]), 0
            while True:
                part, finish = [], None
                for _ in range(random.Random(count).randint(1, 3)):
                    with torch.no_grad():
                        logp = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
                    best = logp.topk(max(1, settings.logprobs or 1))
                    found = {
                        id: types.SimpleNamespace(logprob=value)
                        for id, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                    }
                    token = int(best.indices[0])
                    ids.append(token)
                    part.append((token, found))
                    count += 1
                    if token in settings.stop_token_ids:
                        finish = "stop"
                    elif count >= settings.max_tokens:
                        finish = "length"
                    if finish:
                        break
                logprobs = [found for _, found in part] if settings.logprobs is not None else None
                out = types.SimpleNamespace(token_ids=[id for id, _ in part], logprobs=logprobs, finish_reason=finish)
                await asyncio.sleep(0)
                yield types.SimpleNamespace(outputs=[out])
                if finish:
                    self.ended.add(name)
                    return
        finally:
            self.inside.discard(who)

    async def abort(self, name: str) -> None:
        if name not in self.ended:
            self.aborted.append(name)

    async def remove_lora(self, number: int) -> None:
        self.removed.append(number)

    def shutdown(self) -> None:
        self.down = True


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """The engines that were made of the stand-in."""
    made: list[StandIn] = []

    class Engine:
        @staticmethod
        def from_engine_args(options: Any) -> StandIn:
            made.append(StandIn(options))
            return made[-1]

    names: dict[str, dict[str, Any]] = {
        "vllm": {
            "AsyncLLMEngine": Engine,
            "AsyncEngineArgs": types.SimpleNamespace,
            "SamplingParams": types.SimpleNamespace,
        },
        "vllm.sampling_params": {"RequestOutputKind": Kind},
        "vllm.lora": {},
        "vllm.lora.request": {
            "LoRARequest": lambda name, number, path: Lora(name, number, path),
        },
    }
    for name, values in names.items():
        library = types.ModuleType(name)
        library.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, library)
    return made


class Lora:
    def __init__(self, name: str, number: int, path: str) -> None:
        self.name, self.lora_int_id, self.path = name, number, path


@pytest.fixture
def vllm(engines: list[StandIn], tmp_path: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(place=tmp_path)
    yield engine
    engine.close()


async def read(engine: VllmEngine, request: ChatRequest, most: int | None = None) -> Said:
    said: Said | None = None
    async with engine.chat(request) as events:
        async for event in events:
            if isinstance(event, Started):
                said = Said(event, *([value] * request.n for value in ("", None, 0)), [[] for _ in range(request.n)])
                continue
            assert isinstance(event, Delta)
            assert said is not None
            said.texts[event.choice] += event.text
            said.generated[event.choice] = event.generated
            said.tokens[event.choice] += event.tokens
            said.finishes[event.choice] = event.finish
            if most is not None and event.generated >= most:
                break
    assert said is not None
    return said


def test_it_says_what_the_other_engine_says(
    vllm: VllmEngine, engine: TransformersEngine, adapters: list[AdapterRef], ask: Ask
):
    whole = collect(engine, ask(temperature=0)).texts[0]
    for request in (
        ask(temperature=0),
        ask(temperature=0, adapter=adapters[0], logprobs=True, top_logprobs=2),
        ask(temperature=0, stop=(whole[5:8],), max_tokens=60),
        ask(top_p=0.0, max_tokens=3),
    ):
        expected, said = collect(engine, request), asyncio.run(read(vllm, request))
        assert (said.started, said.texts, said.finishes) == (expected.started, expected.texts, expected.finishes)
        assert said.generated == expected.generated
        for mine, theirs in zip(said.tokens[0], expected.tokens[0], strict=True):
            assert (mine.token_id, mine.bytes) == (theirs.token_id, theirs.bytes)
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [each.token_id for each in mine.top] == [each.token_id for each in theirs.top]


def test_what_the_library_is_asked(vllm: VllmEngine, engines: list[StandIn], base_dir: Path, ask: Ask):
    asyncio.run(read(vllm, ask(n=2, seed=7, temperature=0.7, top_p=0.9, max_tokens=3)))
    (found,) = engines
    options = vars(found.options)
    assert options["model"] == str(resolve(str(base_dir)).path)
    assert (options["trust_remote_code"], options["enable_prefix_caching"], options["max_loras"]) == (False, False, 1)
    assert options["enable_log_requests"] is False
    assert [each["temperature"] for each in found.settings] == [0.7, 0.7]
    assert sorted(each["seed"] for each in found.settings)[0] == 7
    assert len({each["seed"] for each in found.settings}) == 2
    assert all(each["detokenize"] is False and each["output_kind"] is Kind.DELTA for each in found.settings)


def test_one_lane_at_a_time(vllm: VllmEngine, engines: list[StandIn], adapters: list[AdapterRef], ask: Ask):
    async def all_of_them() -> None:
        requests = [
            ask(str(number), temperature=0, tenant=tenant, adapter=adapter, max_tokens=5)
            for number in range(3)
            for tenant in "ab"
            for adapter in (None, adapters[0], adapters[1])
        ]
        await asyncio.gather(*(read(vllm, request) for request in requests))

    asyncio.run(all_of_them())
    (found,) = engines
    assert all(len(loras) == 1 for loras in found.mixed)
    assert len(found.mixed) == 18


def test_a_reader_who_leaves_and_a_stop_string_end_the_work(
    vllm: VllmEngine, engines: list[StandIn], engine: TransformersEngine, ask: Ask
):
    asyncio.run(read(vllm, ask(temperature=0, max_tokens=300, stop=("\0",), n=2), most=3))
    (found,) = engines
    assert len(found.aborted) == 2
    assert not found.inside
    assert not vllm._open.total()
    whole = collect(engine, ask(temperature=0)).texts[0]
    asyncio.run(read(vllm, ask(temperature=0, stop=(whole[3:5],), max_tokens=300)))
    assert len(found.aborted) == 3


def test_adapters_are_checked_and_let_go(
    vllm: VllmEngine,
    engines: list[StandIn],
    adapters: list[AdapterRef],
    ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    with pytest.raises(ChatError, match="is not what was stored"):
        asyncio.run(read(vllm, ask(adapter=AdapterRef("0" * 64, adapters[0].location))))
    monkeypatch.setattr(module, "KEPT", 1)
    for ref in adapters[:2]:
        asyncio.run(read(vllm, ask(adapter=ref, max_tokens=1)))
    assert engines[0].removed == [2]
    assert list(vllm._loras) == [adapters[1].digest]
    assert [len(list(folder.iterdir())) for folder in tmp_path.iterdir()] == [1]
    monkeypatch.setattr(module, "MOST_RANK", 1)
    with pytest.raises(ChatError, match="rank"):
        asyncio.run(read(vllm, ask(adapter=adapters[2])))


def test_faults_are_the_ports(vllm: VllmEngine, engines: list[StandIn], ask: Ask, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ChatError) as raised:
        asyncio.run(read(vllm, ask("x" * 600)))
    assert raised.value.fault == "context"
    with pytest.raises(ChatError, match="one model only"):
        asyncio.run(read(vllm, ask(base="another")))
    monkeypatch.setattr("holdtrue.serving.port.WAITING_OF_TENANT", 0)
    with pytest.raises(ChatError) as raised:
        asyncio.run(read(vllm, ask()))
    assert raised.value.fault == "busy"
    monkeypatch.setattr("holdtrue.serving.port.WAITING_OF_TENANT", 1)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret text")

    engines[0].generate = broken  # type: ignore[method-assign]
    with pytest.raises(ChatError, match="RuntimeError") as raised:
        asyncio.run(read(vllm, ask()))
    assert "secret" not in str(raised.value)
    vllm.close()
    assert engines[0].down


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SpecError, match=r"holdtrue\[vllm\]"):
        VllmEngine()


def test_the_turnstile_lets_everybody_in_and_no_two_lanes_at_once():
    async def trial(seed: int) -> None:
        draw, gate = random.Random(seed), Turnstile()
        inside: list[int] = []
        done: list[int] = []

        async def one(number: int, lane: int) -> None:
            for _ in range(draw.randint(0, 5)):
                await asyncio.sleep(0)
            async with gate.of(lane):
                inside.append(lane)
                try:
                    assert set(inside) == {lane}
                    for _ in range(draw.randint(0, 5)):
                        await asyncio.sleep(0)
                finally:
                    inside.remove(lane)
                done.append(number)

        tasks = [asyncio.create_task(one(number, draw.randint(0, 3))) for number in range(20)]
        for task in draw.sample(tasks, 6):
            await asyncio.sleep(0)
            task.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
        lost = [number for number, task in enumerate(tasks) if not task.cancelled() and number not in done]
        assert not [task.exception() for task in tasks if not task.cancelled() and task.exception()]
        assert not lost
        assert (gate._inside, len(gate._queue)) == (0, 0)

    for seed in range(200):
        asyncio.run(trial(seed))
