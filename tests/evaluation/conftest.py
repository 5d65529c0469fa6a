from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import ProxyHandler, build_opener

import pytest

from evaluation.naive import Naive
from holdtrue.models import ModelSource, load_model, resolve
from support import free_port

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = "Hi"


@pytest.fixture(scope="session")
def talker(tiny_dir: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """The tiny model, with an end token of its own, to which its greedy answer to ``QUESTION`` soon comes."""
    folder = tmp_path_factory.mktemp("models") / "talker"
    shutil.copytree(tiny_dir, folder)
    first = Naive(load_model(resolve(str(folder)), device="cpu"), tokenizer, frozenset())
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], add_generation_prompt=True)
    written = first.go_on(prompt["input_ids"], 12)
    end = next(token for place, token in enumerate(written) if place >= 3 and token not in written[:place])
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, end]}))
    return resolve(str(folder))


@pytest.fixture(scope="session")
def served(talker: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that is not ours, ``transformers serve``, with the talker behind it."""
    pytest.importorskip("fastapi", reason="transformers serve needs its extra: transformers[serving]")
    command = Path(sys.executable).with_name("transformers")
    port = free_port()
    log = tmp_path_factory.mktemp("served") / "log.txt"
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("wb") as out:
        server = subprocess.Popen(
            [command, "serve", talker.path, *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        address = f"http://127.0.0.1:{port}"
        opener, deadline = build_opener(ProxyHandler({})), time.monotonic() + 240
        while True:
            try:
                with opener.open(f"{address}/health", timeout=5):
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"transformers serve did not start:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.2)
        yield f"{address}/v1"
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
