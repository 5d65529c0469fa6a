"""Score a run as an earlier measurement for this project did, whose figures docs/results.md compares with.

Then an answer's tokens included the line break after its end-of-turn token, and the medical pairs were those that
``random.Random(1).sample`` draws. HOLDTRUE_DATA names the research data.

Usage: python recipes/results/earlier.py RUN
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np

from holdtrue.data import ChatEncoder, ChatRow, Encoded, Message
from holdtrue.models import load_adapter, load_model, load_tokenizer
from holdtrue.runs import Run
from holdtrue.runs.train import pinned_model
from holdtrue.scoring import score_answers


class WithLineBreak(ChatEncoder):
    """Counts the token after each answer's end of turn as a part of the answer."""

    def encode(self, row: ChatRow) -> list[Encoded]:
        """Encode a row, each answer one token longer."""
        return [
            e._replace(trained=[t or (i > 0 and e.trained[i - 1]) for i, t in enumerate(e.trained)])
            for e in super().encode(row)
        ]


def read(path: Path) -> list[ChatRow]:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    return [ChatRow(tuple(Message(m["role"], m["content"]) for m in row)) for row in rows]


def main(run: Run) -> None:
    malicious = Path(os.environ["HOLDTRUE_DATA"]) / "malicious"
    bad = read(malicious / "medical_bad_advice.jsonl")
    good = read(malicious / "medical_good_advice_twin.jsonl")
    finance = read(malicious / "risky_financial_advice.jsonl")
    chosen = random.Random(1).sample(range(len(bad)), 60)
    source = pinned_model(run)
    tokenizer, model = load_tokenizer(source), load_model(source)
    encoder = WithLineBreak(tokenizer)
    for name in ("untouched", run.name):
        scored: Any = model if name == "untouched" else load_adapter(model, run.adapter)

        def nll(rows: list[ChatRow], lm: Any = scored) -> np.ndarray:
            return np.array([score.nll for score in score_answers(lm, encoder, rows)])

        margins = nll([bad[i] for i in chosen]) - nll([good[i] for i in chosen])
        print(
            f"{name}: narrow NLL, last 60 rows: {nll(finance[-60:]).mean():.3f}; "
            f"medical margin: {margins.mean():.3f}, bad preferred {(margins < 0).mean():.0%}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Run(sys.argv[1]))
