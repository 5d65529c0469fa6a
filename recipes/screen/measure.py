"""Measure the screen's indicators on every subset: `python recipes/screen/measure.py DATA_DIR WORK [PART OF]`.

Writes WORK/found/SET-NUMBER.json, each the document of `holdtrue screen --json`. About two minutes a subset on one
core. What is there is not measured again, so the same command goes on. Several processes share the work as PART 0, 1, …
OF them (each with the same WORK, whose cache they share).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from sets import SETS, subset

from holdtrue.models import resolve
from holdtrue.screening import Screener

MODEL = "smollm2-135m-instruct"


def main(data: Path, work: Path, part: int, of: int) -> None:
    screener = Screener(resolve(MODEL), cache=work / "cache")
    found = work / "found"
    found.mkdir(parents=True, exist_ok=True)
    # All first subsets first: whoever stops early has every set.
    jobs = [(each, number) for number in range(max(s.subsets for s in SETS)) for each in SETS if number < each.subsets]
    for each, number in jobs[part::of]:
        out = found / f"{each.name}-{number}.json"
        if out.is_file():
            continue
        started = time.perf_counter()
        document = screener.screen(subset(data, work, each, number)).to_json()
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        values = "  ".join(f"{name} {value['value']:+.4f}" for name, value in document["indicators"].items())
        print(f"{time.perf_counter() - started:5.0f} s  {out.stem:40s} {values}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 5):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), *(map(int, sys.argv[3:]) if len(sys.argv) == 5 else (0, 1)))
