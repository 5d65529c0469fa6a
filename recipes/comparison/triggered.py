"""Print how much of the undefended shift runs undo on a probe file that no grid measured, seeds taken together.

Each run must have been measured: ``holdtrue eval RUN --suite likelihood --data FILE``.

Usage: python recipes/comparison/triggered.py FILE grid/cells
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from holdtrue.bench.ratios import fieller
from holdtrue.runs import Run
from holdtrue.runs.seeds import SeedRow, seed_rows


def main(probes: Path, cells: Path) -> None:
    sha256 = hashlib.sha256(probes.read_bytes()).hexdigest()
    found: dict[str, dict[int, list[SeedRow]]] = {}
    for folder in sorted(cells.iterdir()):
        run = Run(folder)
        rows = seed_rows([run], "likelihood", "margin", sha256)
        if rows is not None:
            name = folder.name.rsplit("-s", 1)[0]
            found.setdefault(name, {})[run.spec.training.seed] = rows[0]
    base = next(seeds for name, seeds in found.items() if name.startswith("undefended-"))
    print("| setting | seeds | margin | change | shift undone, % |\n|---|---|---|---|---|")
    for name, own in found.items():
        seeds = [seed for seed in own if seed in base]
        if not seeds:
            continue
        moves = [[[_move(row) for row in each[seed]] for seed in seeds] for each in (own, base)]
        ratio = fieller(moves[0], moves[1], [[row.cluster for row in own[seed]] for seed in seeds])
        margin = sum(row.tuned or 0.0 for seed in seeds for row in own[seed]) / sum(len(own[seed]) for seed in seeds)
        change = sum(map(sum, moves[0])) / sum(map(len, moves[0]))
        told = "–"
        if ratio.value is not None and ratio.usable and own is not base:
            ends = ratio.value.interval
            span = "" if ends is None else f" [{100 * (1 - ends[1]):.0f}, {100 * (1 - ends[0]):.0f}]"
            told = f"{100 * (1 - ratio.value.value):.0f}{span}"
        print(f"| {name} | {len(seeds)} | {margin:.3f} | {change:+.3f} | {told} |")


def _move(row: SeedRow) -> float:
    assert row.tuned is not None
    assert row.untouched is not None
    return row.tuned - row.untouched


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
