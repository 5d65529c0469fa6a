from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from evaluation.naive import Naive
from holdtrue.models import ModelSource, load_model, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@pytest.fixture
def talker_model(talker: ModelSource) -> PreTrainedModel:
    return load_model(talker, device="cpu")


@pytest.fixture
def naive(talker_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Naive:
    ends = talker_model.generation_config.eos_token_id
    assert isinstance(ends, list)
    return Naive(talker_model, tokenizer, frozenset(ends))


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
