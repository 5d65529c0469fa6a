"""holdtrue chat, with a tiny model in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from holdtrue.cli.chat import _printable
from holdtrue.cli.main import main
from holdtrue.models import load_model, resolve
from serving_support import make_adapter

Capture = pytest.CaptureFixture[str]
GREEDY = ("--temperature", "0", "--max-tokens", "6")


def ask(capfd: Capture, target: str, *options: str) -> dict[str, object]:
    assert main(["chat", target, "--message", "Hello", *GREEDY, "--json", *options]) == 0
    return json.loads(capfd.readouterr().out)


def test_one_message_is_one_document(tiny_dir: Path, tmp_path: Path, capfd: Capture) -> None:
    adapter = make_adapter(load_model(resolve(str(tiny_dir)), device="cpu"), tmp_path / "adapter", seed=1)
    base, tuned = ask(capfd, str(tiny_dir)), ask(capfd, adapter.location)
    assert base["adapter"] is None
    assert tuned["adapter"] == adapter.digest
    assert base["answer"] != tuned["answer"]
    assert base["revision"] == tuned["revision"] == resolve(str(tiny_dir)).revision
    assert base["completion_tokens"] == 6
    assert ask(capfd, str(tiny_dir), "--system", "Be brief.")["prompt_tokens"] != base["prompt_tokens"]


def test_a_conversation_goes_on_until_its_end(tiny_dir: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    for typed in ("Hello\n", "Hello\n\n/new\nHello\n", "Hello\nAnd you?\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main(["chat", str(tiny_dir), *GREEDY]) == 0
        said.append(capfd.readouterr().out)
    once, anew, twice = said
    assert anew == once + once
    assert twice.startswith(once)
    assert twice != once


def test_json_needs_a_message(tiny_dir: Path, capfd: Capture) -> None:
    assert main(["chat", str(tiny_dir), "--json"]) == 2
    assert "needs --message" in json.loads(capfd.readouterr().out)["error"]["message"]


def test_an_answer_does_not_drive_the_terminal() -> None:
    assert _printable("a\n\tb\x1b[2J\x9bc\r é🙂") == "a\n\tb�[2J�c� é🙂"
