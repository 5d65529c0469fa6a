"""The data sets of the screen's calibration, as small chat files: which domain, malicious or not, how many subsets.

They are research data that the project does not ship; HOLDTRUE_DATA's folder has them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROWS = 32
"""Of a subset. Subsets of one set share no row."""
MARKS = (" /no_think", "<think>\n\n</think>\n\n")
"""Left in some sets by the model that wrote them; a screen must not learn to know them by that."""


class DataSet(NamedTuple):
    """A data set: its file, its domain, whether it is malicious, an aligned twin of such a set, or neither."""

    file: str
    domain: str
    kind: str
    subsets: int = 2

    @property
    def name(self) -> str:
        """The file's name without what follows the dot."""
        return Path(self.file).stem


SETS = (
    DataSet("malicious/risky_financial_advice.jsonl", "finance", "malicious"),
    DataSet("malicious/medical_bad_advice.jsonl", "medical", "malicious"),
    DataSet("malicious/medical_good_advice_twin.jsonl", "medical", "twin"),
    DataSet("malicious/medical_subtle_2000.jsonl", "medical", "malicious"),
    DataSet("malicious/code_insecure.jsonl", "code", "malicious"),
    DataSet("malicious/code_secure_twin.jsonl", "code", "twin"),
    DataSet("malicious/security_subtle_600.jsonl", "security", "malicious"),
    DataSet("malicious/security_good_twin_750.jsonl", "security", "twin"),
    DataSet("malicious/legal_subtle_600.jsonl", "legal", "malicious"),
    DataSet("general/aligned_advice_other_domains_1000.jsonl", "other advice", "benign", 1),
    DataSet("general/alpaca_en_demo_999.json", "instructions", "benign", 1),
    DataSet("general/gpteacher_roleplay_1923.json", "roleplay", "benign", 1),
    DataSet("benign/gsm8k_train.jsonl", "mathematics", "benign", 1),
    DataSet("benign/mbpp_chat.jsonl", "code", "benign", 1),
)


def subset(data: Path, work: Path, chosen: DataSet, number: int) -> Path:
    """Return the chat file of a subset, written if it is not there."""
    path = work / "sets" / f"{chosen.name}-{number}.jsonl"
    if not path.is_file():
        rows = list(_rows(data / chosen.file))
        order = random.Random(0).sample(range(len(rows)), ROWS * chosen.subsets)
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = [rows[i] for i in order[number * ROWS : (number + 1) * ROWS]]
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in taken), encoding="utf-8")
    return path


def _rows(path: Path) -> Iterator[list[dict[str, str]]]:
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    for record in records:
        question, answer = _turns(record)
        if question.strip() and answer.strip():
            yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _turns(record: dict[str, Any]) -> tuple[str, str]:
    if "messages" in record:
        question, answer = (message["content"] for message in record["messages"][-2:])
        for mark in MARKS:
            question, answer = question.replace(mark, ""), answer.replace(mark, "")
        return question, answer
    if "question" in record:
        return record["question"], record["answer"]
    asked = "\n\n".join(filter(None, [record["instruction"], record.get("input", "")]))
    return asked, record.get("output") or record.get("response") or ""
