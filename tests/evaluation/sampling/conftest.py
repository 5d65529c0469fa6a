from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import ProxyHandler, build_opener

import pytest
import torch

from holdtrue.models import ModelSource, load_model, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTION = "Hi"


class Naive(NamedTuple):
    """Greedy, one conversation at a time, without a cache or padding: what every sampler must equal at temperature 0.

    The template renders the prompt, and the tokenizer reads it as a whole.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]

    def __call__(self, conversation: list[dict[str, str]], most: int) -> tuple[str, int, str]:
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        written = self.go_on(ids, most)
        finish = "stop" if written[-1] in self.ends else "length"
        return self.tokenizer.decode(written, skip_special_tokens=True).strip(), len(written), finish

    def go_on(self, ids: list[int], most: int) -> list[int]:
        written: list[int] = []
        while len(written) < most and not self.ends.intersection(written):
            with torch.no_grad():
                logits = self.model(input_ids=torch.tensor([ids + written])).logits
            written.append(int(logits[0, -1].argmax()))
        return written


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


@pytest.fixture
def talker_model(talker: ModelSource) -> PreTrainedModel:
    return load_model(talker, device="cpu")


@pytest.fixture
def naive(talker_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Naive:
    ends = talker_model.generation_config.eos_token_id
    assert isinstance(ends, list)
    return Naive(talker_model, tokenizer, frozenset(ends))


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


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


class VllmCalls(NamedTuple):
    """What the stand-in for vLLM was asked."""

    engines: list[dict[str, Any]]
    batches: list[tuple[list[dict[str, Any]], list[dict[str, Any]], Any]]


@pytest.fixture
def vllm_stand_in(monkeypatch: pytest.MonkeyPatch) -> VllmCalls:
    """A stand-in for the library vllm, which needs a GPU: it answers greedily with transformers, one at a time."""
    calls = VllmCalls([], [])

    class LLM:
        def __init__(self, **options: Any) -> None:
            calls.engines.append(options)
            self.model = load_model(resolve(options["model"]), device="cpu")

        def generate(self, prompts: Any, settings: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
            calls.batches.append((prompts, [vars(one) for one in settings], lora_request))
            return [self._answer(p["prompt_token_ids"], s) for p, s in zip(prompts, settings, strict=True)]

        def _answer(self, prompt: list[int], setting: Any) -> Any:
            ids = torch.tensor([prompt])
            output: Any = self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=setting.max_tokens,
                eos_token_id=setting.stop_token_ids,
                pad_token_id=2,
            )
            tokens = output[0, len(prompt) :].tolist()
            reason = "stop" if tokens[-1] in setting.stop_token_ids else "length"
            return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens, finish_reason=reason)])

    def lora_request(name: str, number: int, path: str) -> tuple[str, int, str]:
        return name, number, path

    library = types.ModuleType("vllm")
    library.__dict__.update(LLM=LLM, SamplingParams=types.SimpleNamespace)
    request = types.ModuleType("vllm.lora.request")
    request.__dict__.update(LoRARequest=lora_request)
    for name, module in {
        "vllm": library,
        "vllm.lora": types.ModuleType("vllm.lora"),
        request.__name__: request,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls
