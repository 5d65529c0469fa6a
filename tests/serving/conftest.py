from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from holdtrue.data import Message
from holdtrue.models import load_model, resolve
from holdtrue.serving.engine import TransformersEngine
from holdtrue.serving.port import AdapterRef, ChatRequest, Delta, Started, Token
from serving_support import make_adapter, make_base


@dataclass
class Said:
    """All that came for a request."""

    started: Started
    texts: list[str]
    finishes: list[str | None]
    generated: list[int]
    tokens: list[list[Token]]


def collect(engine: TransformersEngine, request: ChatRequest) -> Said:
    with engine.answer(request) as events:
        started = next(events)
        assert isinstance(started, Started)
        said = Said(started, *([value] * request.n for value in ("", None, 0)), [[] for _ in range(request.n)])
        for event in events:
            assert isinstance(event, Delta)
            said.texts[event.choice] += event.text
            said.generated[event.choice] = event.generated
            said.tokens[event.choice] += event.tokens
            said.finishes[event.choice] = event.finish
    return said


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Llama of three blocks that speaks bytes: 258 tokens, 512 positions."""
    return make_base(tmp_path_factory.mktemp("base") / "bytes", seed=0)


@pytest.fixture(scope="session")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("adapters")
    source = resolve(str(base_dir))
    return [make_adapter(load_model(source, device="cpu"), root / str(seed), seed, scale=0.2) for seed in (1, 2, 3)]


@pytest.fixture(scope="session")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine()
    yield engine
    engine.close()


@pytest.fixture
def ask(base_dir: Path) -> Callable[..., ChatRequest]:
    """Returns a function that makes a request to the base model."""

    def make(text: str = "Hello", **changes: object) -> ChatRequest:
        request = ChatRequest(str(base_dir), None, (Message("user", text),), max_tokens=24)
        return replace(request, **changes)  # type: ignore[arg-type]

    return make
