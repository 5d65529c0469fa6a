"""Print the tables of docs/results.md from the runs that run.sh made.

Usage: python recipes/results/table.py FOLDER RUN...
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

from holdtrue.evaluation import compare_results, read_result
from holdtrue.runs import Run


def interval(value: float, ends: list[float] | None, sign: bool = False) -> str:
    shown = f"{value:+.3f}" if sign else f"{value:.3f}"
    return shown if ends is None else f"{shown} [{ends[0]:+.3f}, {ends[1]:+.3f}]" if sign else shown


def measured(run: Run, folder: Path) -> list[tuple[str, str, str, dict[str, Any]]]:
    medical = hashlib.sha256((folder / "data" / "medical_pairs.jsonl").read_bytes()).hexdigest()
    rows = []
    for title, suite, sha, key in (
        ("narrow NLL", "fit", None, "nll"),
        ("medical margin", "likelihood", medical, "margin"),
        ("general margin", "likelihood", None, "margin"),
    ):
        record = run.evaluation(suite, "tuned", sha)
        if record is None:
            raise SystemExit(f"{run.path}: {title} is not measured")
        before = run.evaluation(suite, "untouched", record["data"]["sha256"])
        assert before is not None
        record["change"] = compare_results(read_result(record), read_result(before)).to_json()
        change = interval(record["change"][f"{key}_change"], record["change"][f"{key}_change_ci"], sign=True)
        rows.append((title, f"{record[key]:.3f}", change, record))
    return rows


def main(folder: Path, names: list[str]) -> None:
    runs = [Run(folder / name) for name in names]
    print("| run | narrow NLL | change | medical margin | change | bad preferred | general margin | change |")
    print("|---|---|---|---|---|---|---|---|")
    first = measured(runs[0], folder)
    cells = []
    for title, _, _, record in first:
        suite, sha = record["suite"], record["data"]["sha256"]
        untouched = runs[0].evaluation(suite, "untouched", sha)
        assert untouched is not None
        cells += [f"{untouched['nll' if suite == 'fit' else 'margin']:.3f}", "–"]
        if title == "medical margin":
            cells.append(f"{untouched['misaligned_preferred']:.0%}")
    print(f"| untouched | {' | '.join(cells)} |")
    for run in runs:
        fit, medical, general = measured(run, folder)
        share = f"{medical[3]['misaligned_preferred']:.0%}"
        print(f"| {run.name} | {' | '.join([*fit[1:3], *medical[1:3], share, *general[1:3]])} |")
    print("\n| run | rows | steps | tokens | padding | KL to reference, held-out | seconds | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        marker = run.marker("train")
        assert marker is not None
        report = marker["report"]
        rows = run.manifest["data"]["train"]["rows"]
        print(
            f"| {run.name} | {rows} | {report['steps']} | {report['tokens']} | {report['padding']:.1%} "
            f"| {report['eval_kl']:.3f} | {report['seconds']:.0f} | {report['tokens_per_second']:.0f} |"
        )

    against(runs, folder)


def against(runs: list[Run], folder: Path) -> None:
    """Print each run's paired difference from ``undefended``, where both had the same rows."""
    plain = next((run for run in runs if run.name == "undefended"), None)
    if plain is None:
        return
    print("\n| run against `undefended` | medical margin | shift undone | narrow NLL | narrow learning kept |")
    print("|---|---|---|---|---|")
    fit, medical, _ = (found[3] for found in measured(plain, folder))
    for run in runs:
        if run is plain or run.spec.data.train != plain.spec.data.train:
            continue
        own_fit, own_medical, _ = (found[3] for found in measured(run, folder))
        margin = compare_results(read_result(own_medical), read_result(medical)).to_json()
        nll = compare_results(read_result(own_fit), read_result(fit)).to_json()
        undone = 1 - own_medical["change"]["margin_change"] / medical["change"]["margin_change"]
        kept = own_fit["change"]["nll_change"] / fit["change"]["nll_change"]
        cells = (
            interval(margin["margin_change"], margin["margin_change_ci"], sign=True),
            f"{undone:.0%}",
            interval(nll["nll_change"], nll["nll_change_ci"], sign=True),
            f"{kept:.0%}",
        )
        print(f"| {run.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
