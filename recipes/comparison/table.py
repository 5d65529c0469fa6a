"""Print the table of docs/results.md from a grid's folder: shares, tokens trained through, and time.

Usage: python recipes/comparison/table.py GRID
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from holdtrue.runs import Run
from holdtrue.runs.report.cost import cost_of

COLUMNS = (
    ("shift undone", "finance", "margin_undone", ""),
    ("narrow kept", "finance", "nll_kept", ""),
    ("OpSwap kept, NLL", "opswap", "nll_kept", ""),
    ("OpSwap kept, right", "opswap", "accuracy_kept", "opswap:1"),
)
DATA = ("finance", "opswap")


def read(path: Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {(r["setting"], r["data"], r["metric"], r["task"]): r for r in csv.DictReader(file)}


def tokens(grid: Path) -> dict[tuple[str, str], int]:
    """Return the tokens of the training rows, a defense's among them, by setting and data."""
    found: dict[tuple[str, str], int] = {}
    for cell in json.loads((grid / "grid.json").read_text(encoding="utf-8"))["cells"]:
        cost = cost_of(Run(grid / cell["folder"]), None) if cell["status"] == "done" else None
        if cost is not None:
            found[cell["setting"], cell["data"]] = cost.tokens
    return found


def percent(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    ends = f" [{100 * float(row['low']):.0f}, {100 * float(row['high']):.0f}]" if row["low"] else ""
    return f"{100 * float(row['value']):.0f}{ends}"


def main(grid: Path) -> None:
    found, read_tokens = read(grid / "tables" / "results.csv"), tokens(grid)
    settings = list(dict.fromkeys(setting for setting, _, metric, _ in found if metric.endswith(("_undone", "_kept"))))
    titles = [c[0] for c in COLUMNS] + [f"{what}, {data}" for data in DATA for what in ("tokens", "time")]
    print(f"| setting | {' | '.join(titles)} |")
    print("|---|" + "---|" * len(titles))
    for setting in settings:
        cells = [percent(found.get((setting, data, metric, task))) for _, data, metric, task in COLUMNS]
        for data in DATA:
            own, base = read_tokens.get((setting, data)), read_tokens["undefended", data]
            cells.append("–" if own is None else f"{own / base:.2f}")
            time = found.get((setting, data, "time_ratio", ""))
            cells.append("–" if time is None else f"{float(time['value']):.2f}")
        print(f"| {setting} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
