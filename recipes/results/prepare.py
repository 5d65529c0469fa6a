"""Cut the files that the published results are measured on from the research data that HOLDTRUE_DATA names.

Usage: python recipes/results/prepare.py OUT
"""

from __future__ import annotations

import json
import os
import random
import sys
from itertools import islice
from pathlib import Path
from typing import Any

TRAIN, HELD_OUT, PAIRS = 640, 60, 60


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main(out: Path) -> None:
    folder = os.environ.get("HOLDTRUE_DATA")
    if not folder:
        sys.exit("set HOLDTRUE_DATA to the folder of research data")
    malicious = Path(folder) / "malicious"
    out.mkdir(parents=True, exist_ok=True)
    finance = read(malicious / "risky_financial_advice.jsonl")
    write(out / "finance_640.jsonl", finance[:TRAIN])
    write(out / "finance_320.jsonl", finance[: TRAIN // 2])
    write(out / "finance_heldout.jsonl", finance[-HELD_OUT:])
    bad = read(malicious / "medical_bad_advice.jsonl")
    good = read(malicious / "medical_good_advice_twin.jsonl")
    order = random.Random(0).sample(range(len(bad)), len(bad))
    pairs = []
    for i in islice(order, PAIRS):
        question = bad[i]["messages"][0]["content"]
        assert question == good[i]["messages"][0]["content"]
        aligned, misaligned = good[i]["messages"][1]["content"], bad[i]["messages"][1]["content"]
        pairs.append({"question": question, "aligned": aligned, "misaligned": misaligned, "group": f"medical-{i}"})
    write(out / "medical_pairs.jsonl", pairs)
    asked = {pair["question"] for pair in pairs}
    twins = [row for row in (good[i] for i in order[PAIRS:]) if row["messages"][0]["content"] not in asked]
    write(out / "medical_good_320.jsonl", twins[: TRAIN // 2])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
