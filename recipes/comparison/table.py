"""Print the table of docs/results.md from a grid's tables, with training times from a quiet run of the same settings.

Usage: python recipes/comparison/table.py grid/tables/results.csv cost/tables/results.csv [SETTING...]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

COLUMNS = (
    ("shift undone", "finance", "margin_undone", ""),
    ("narrow kept", "finance", "nll_kept", ""),
    ("OpSwap kept, NLL", "opswap", "nll_kept", ""),
    ("OpSwap kept, right", "opswap", "accuracy_kept", "opswap:1"),
)
TIMES = ("finance", "opswap")


def read(path: str) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return {(r["setting"], r["data"], r["metric"], r["task"]): r for r in csv.DictReader(file)}


def percent(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    ends = f" [{100 * float(row['low']):.0f}, {100 * float(row['high']):.0f}]" if row["low"] else ""
    return f"{100 * float(row['value']):.0f}{ends}"


def times(row: dict[str, str] | None) -> str:
    return "–" if row is None else f"{float(row['value']):.2f}"


def main(grid: str, cost: str, chosen: list[str]) -> None:
    found, timed = read(grid), read(cost)
    settings = list(dict.fromkeys(setting for setting, _, metric, _ in found if metric.endswith(("_undone", "_kept"))))
    print("| setting | " + " | ".join([c[0] for c in COLUMNS] + [f"time, {d}" for d in TIMES]) + " |")
    print("|---|" + "---|" * (len(COLUMNS) + len(TIMES)))
    for setting in (s for s in settings if not chosen or s in chosen):
        cells = [percent(found.get((setting, data, metric, task))) for _, data, metric, task in COLUMNS]
        cells += [times(timed.get((setting, data, "time_ratio", ""))) for data in TIMES]
        print(f"| {setting} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
