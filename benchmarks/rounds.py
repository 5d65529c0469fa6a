"""Times the arms in turns, one optimizer step each, in one process: what slows the machine for a while meets all."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import FILLS_FIRST, MissingError, build
from benchmarks.floor import Shape, Work, achieved, sgemm_rates, step
from benchmarks.workload import BATCH, MODEL, Workload, draw

Save = Callable[[dict[str, Any]], None]
LEAST_ROUNDS = 3


def say(text: str) -> None:
    """Tell whoever watches; results alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def measure(
    names: Sequence[str], *, runs: int, steps: int, seed: int, save: Save, minutes: float = math.inf
) -> dict[str, Any]:
    """Time each arm for ``runs`` rounds of ``steps`` optimizer steps, in turns of one step, another arm first in each.

    Some steps are thrown away before: one of each arm, and those of a whole epoch of an arm that reads what an earlier
    epoch left. All arms train the same rows in a round, and but for those of an order of their own in
    each turn, so a ratio of seconds is one of seconds per target token.

    Args:
        names: arms, in the order in which they take turns.
        runs, steps: rounds, and optimizer steps of each arm in a round.
        seed: of the rows that are drawn.
        save: called with what is known so far after each round.
        minutes: no round after the third begins that would end later than so long after the first began.

    Returns:
        ``raw``: arm -> seconds by round; ``steps``: arm -> seconds by turn; ``missing``: arm -> why; ``workload``;
        ``floor``.
    """
    import torch

    quiet()
    work = draw(BATCH * steps, seed)
    found: dict[str, Any] = {
        "raw": {},
        "steps": {},
        "missing": {},
        "workload": work.facts() | {"batch": BATCH, "steps": steps},
    }
    say(f"{work.facts()}")
    arms = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            try:
                arms[name] = build(name, work, Path(folder) / name)
            except MissingError as error:
                found["missing"][name] = str(error)
                say(f"missing: {name} ({error})")
        for name, arm in arms.items():
            batches = arm.batches(work.rows, 0)
            for rows in batches if name in FILLS_FIRST else batches[:1]:
                say(f"warm-up: {name} {arm.run(rows):.2f} s")
        began = time.monotonic()
        for number in range(1, runs + 1):
            elapsed = time.monotonic() - began
            if number > LEAST_ROUNDS and elapsed * number / (number - 1) > 60 * minutes:
                say(f"no round {number}: it would end after the {minutes:.0f} minutes that --minutes leaves")
                break
            batches = {name: arm.batches(work.rows, number) for name, arm in arms.items()}
            for turn in range(steps):
                for name in rotated(list(arms), (number - 1) * steps + turn):
                    gc.collect()
                    torch.manual_seed(number)
                    seconds = arms[name].run(batches[name][turn])
                    found["steps"].setdefault(name, []).append(round(seconds, 4))
                    say(f"round {number} of {runs}, step {turn + 1}: {name} {seconds:.2f} s")
            for name in arms:
                found["raw"].setdefault(name, []).append(round(sum(found["steps"][name][-steps:]), 4))
            save(found)
        found["workload"]["cache"] = {
            name: arm.cache.stats()._asdict() for name, arm in arms.items() if getattr(arm, "cache", None) is not None
        }
    found["floor"] = floors(found["raw"], work, steps)
    save(found)
    return found


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Return the names with another one first in each turn."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def floors(raw: dict[str, list[float]], work: Workload, steps: int) -> dict[str, Any]:
    """Return each arm's floor in seconds per step with the share of the measured median, and the rates behind it."""
    from transformers import AutoConfig

    from holdtrue.models import AdapterSpec, resolve

    facts = work.facts()
    shape = Shape.of(AutoConfig.from_pretrained(resolve(MODEL).path), AdapterSpec().r)
    total = Work(list(work.rows["length"]), facts["target_tokens"])
    rates = sgemm_rates(shape, round(facts["tokens"] / steps))
    arms = {}
    for name, seconds in raw.items():
        parts = step(shape, total, name, prefix=facts["shared_prefix"])
        arms[name] = achieved(round(parts["total"] / steps), rates, statistics.median(seconds) / steps)
        arms[name] |= {"gflop": {part: round(count / steps / 1e9, 2) for part, count in parts.items()}}
    return {"gflops_per_second": {name: round(rate / 1e9, 1) for name, rate in rates.items()}, "arms": arms}


def quiet() -> None:
    """Keep the libraries from writing between the results."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
