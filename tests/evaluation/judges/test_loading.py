from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from holdtrue.errors import SpecError
from holdtrue.evaluation.judges import KINDS, Budget, Prices, load_judge


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ofline", "did you mean 'offline'"),
        ("openai", "openai:MODEL"),
        ("local:", "local:MODEL"),
        ("offline:x", "known: offline"),
        ("", "known: offline"),
        ("gpt-4o", "known: offline"),
    ],
)
def test_an_unknown_judge_is_refused(name: str, said: str) -> None:
    with pytest.raises(SpecError, match="unknown judge") as caught:
        load_judge(name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("offline", {"budget": Budget(tokens=5), "base_url": "http://x"}, "base_url, budget"),
        ("local:smollm2-135m-instruct", {"prices": Prices(1, 1)}, "prices"),
        ("openai:m", {"device": "cpu"}, "device"),
    ],
)
def test_an_argument_of_no_use_is_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=f"has no use for {said}"):
        load_judge(name, **options)


def test_a_judge_comes_with_a_cache(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDTRUE_CACHE", str(tmp_path))
    judge = load_judge(f"local:{tiny_dir}")
    assert judge.folder == tmp_path / "judgements"
    assert judge.name == f"local:{tiny_dir}"
    endpoint = load_judge("openai:a:b", base_url="http://host/v1", cache=tmp_path / "other")
    assert endpoint.folder == tmp_path / "other"
    assert endpoint.name == "openai:a:b"
    assert endpoint.key != judge.key


def test_naming_judges_imports_nothing_heavy() -> None:
    code = (
        "import sys; from holdtrue.evaluation.judges import load_judge, KINDS; "
        "print([name for name in ('torch', 'transformers', 'openai', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(KINDS) == ["offline", "local:MODEL", "openai:MODEL"]
