"""The calls that the sampler makes of vLLM. The library is a stand-in: nothing here has run on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from holdtrue.data import ChatEncoder, Message
from holdtrue.errors import RunError, SpecError
from holdtrue.evaluation.sampling import Decoding, Request, VllmSampler
from holdtrue.models import AdapterSpec, load_model, new_adapter, save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from conftest import VllmCalls  # pyright: ignore[reportMissingImports]
    from holdtrue.models import ModelSource

REQUESTS = [Request((Message("user", "<|im_end|> Hi"),), 5), Request((Message("user", "Why?"),), 2**63 + 1)]


def test_prompts_are_tokens_and_each_request_has_its_seed(
    talker: ModelSource, tokenizer: PreTrainedTokenizerBase, vllm_stand_in: VllmCalls
) -> None:
    sampler = VllmSampler(talker)
    assert vllm_stand_in.engines == [{"model": str(talker.path), "trust_remote_code": False, "seed": 0}]
    list(sampler.sample(REQUESTS, Decoding(0.7, 3)))
    ((prompts, settings, lora),) = vllm_stand_in.batches
    encoder = ChatEncoder(tokenizer)
    assert prompts == [{"prompt_token_ids": encoder.prompt_ids(request.messages)} for request in REQUESTS]
    assert [setting["seed"] for setting in settings] == [5, 1]
    assert {(setting["temperature"], setting["max_tokens"]) for setting in settings} == {(0.7, 3)}
    assert tokenizer.eos_token_id in settings[0]["stop_token_ids"]
    assert lora is None


def test_an_adapter_is_asked_for_by_path_at_a_rank_that_the_engine_has(
    talker: ModelSource, vllm_stand_in: VllmCalls, tmp_path: Path
) -> None:
    save_adapter(new_adapter(load_model(talker, device="cpu"), AdapterSpec(r=12, alpha=8), seed=0), tmp_path)
    list(VllmSampler(talker, tmp_path).sample(REQUESTS, Decoding(0.0, 1)))
    assert vllm_stand_in.engines[0]["enable_lora"] is True
    assert vllm_stand_in.engines[0]["max_lora_rank"] == 16
    assert vllm_stand_in.batches[0][2] == ("adapter", 1, str(tmp_path))


def test_an_engine_that_fails_is_a_run_error(
    talker: ModelSource, vllm_stand_in: VllmCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("the prompt is longer than the maximum model length")

    sampler = VllmSampler(talker)
    monkeypatch.setattr(sys.modules["vllm"].LLM, "generate", fail)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RunError, match=r"within requests 1 to 2 of 2: the prompt is longer"):
        next(sampler.sample(REQUESTS, Decoding(0.0, 1)))
    monkeypatch.setattr(sys.modules["vllm"].LLM, "__init__", fail)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RunError, match="cannot load"):
        VllmSampler(talker)


def test_without_the_library_the_extra_is_named(talker: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(SpecError, match=r"holdtrue\[vllm\]"):
        VllmSampler(talker)
