from __future__ import annotations

from collections.abc import Iterator

import pytest

from evaluation.judges.endpoint import Endpoint, running


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A chat server of its own, on loopback."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with running() as server:
        yield server
