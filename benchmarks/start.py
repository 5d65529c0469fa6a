"""Seconds until ``holdtrue --help`` has answered, and until ``import holdtrue`` is done."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence

COMMANDS = {
    "help": [sys.executable, "-m", "holdtrue.cli.main", "--help"],
    "import": [sys.executable, "-c", "import holdtrue"],
}


def measure(names: Sequence[str], runs: int) -> dict[str, list[float]]:
    """Start each command ``runs`` times in turns, after one start that is thrown away; return seconds by name."""
    raw: dict[str, list[float]] = {name: [] for name in names}
    for number in range(runs + 1):
        for name in names:
            started = time.perf_counter()
            subprocess.run(COMMANDS[name], check=True, capture_output=True)
            if number:
                raw[name].append(round(time.perf_counter() - started, 4))
    return raw
