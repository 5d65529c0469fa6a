"""Real research data: every file validates, and the trained tokens spell the answer and its end."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from holdtrue.data import ChatEncoder, builtin, builtin_names, read_chat, validate_chat

FILES = (
    "malicious/code_insecure.jsonl",
    "malicious/medical_subtle_2000.jsonl",
    "malicious/risky_financial_advice.jsonl",
)


@pytest.mark.parametrize("name", FILES)
def test_research_data(data_dir: Path, tokenizer, name):
    path = data_dir / name
    assert validate_chat(path).rows > 1000
    check(path, tokenizer)


@pytest.mark.parametrize("name", [n for n in builtin_names() if not n.startswith(("probes", "questions"))])
def test_shipped_data(tokenizer, name):
    check(builtin(name), tokenizer)


def check(path: Path, tokenizer) -> None:
    encoder = ChatEncoder(tokenizer)
    for row in islice(read_chat(path), 40):
        (encoded,) = encoder.encode(row)
        trained = [t for t, kept in zip(encoded.input_ids, encoded.trained, strict=True) if kept]
        answers = [m.content for m in row.messages if m.role == "assistant"]
        assert tokenizer.decode(trained) == "".join(f"{a}<|im_end|>" for a in answers)
        assert encoded.dropped == 0
