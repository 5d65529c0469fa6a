"""Where the time of one optimizer step goes: ``python -m benchmarks.profile ARM``.

Prints the shares of the processor's own time by group and the largest operators, after one step that is not counted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.arms import BUILDERS, build
from benchmarks.rounds import quiet
from benchmarks.workload import BATCH, draw

GROUPS: dict[str, tuple[str, ...]] = {
    "optimizer": ("adam", "optimizer", "clip_grad", "norm_foreach", "_foreach"),
    "attention": ("scaled_dot_product", "flash_attention", "attention"),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear"),
    "softmax": ("softmax",),
    "elementwise": (
        *("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::exp", "aten::silu", "aten::where"),
        *(
            "aten::rsqrt",
            "aten::pow",
            "aten::mean",
            "aten::sum",
            "aten::copy_",
            "aten::cat",
            "aten::fill",
            "aten::sqrt",
        ),
        *("aten::gather", "aten::scatter", "aten::index", "aten::zero", "aten::masked", "aten::sigmoid", "aten::log"),
        *("aten::addc", "aten::square", "aten::abs", "aten::lerp", "aten::embedding", "aten::isfinite"),
    ),
}


def group(operator: str) -> str:
    """Return the first group of which some part stands in the operator's name, or ``other``."""
    name = operator.lower()
    return next((key for key, parts in GROUPS.items() if any(part in name for part in parts)), "other")


def shares(times: Mapping[str, float]) -> dict[str, float]:
    """Sum the operators' times by group, the largest first, as shares of all."""
    total = sum(times.values())
    found: dict[str, float] = {}
    for name, value in times.items():
        found[group(name)] = found.get(group(name), 0.0) + value / total
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__)
    parser.add_argument("arm", choices=sorted(BUILDERS))
    parser.add_argument("--items", type=int, default=20, help="operators to list")
    options = parser.parse_args()

    from torch.profiler import ProfilerActivity, profile

    quiet()
    work = draw(BATCH, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        arm = build(options.arm, work, Path(folder))
        (rows,) = arm.batches(work.rows, 0)
        arm.run(rows)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            seconds = arm.run(rows)
    events = {event.key: event for event in seen.key_averages()}
    times = {name: event.self_cpu_time_total / 1e6 for name, event in events.items()}
    print(
        f"{options.arm}: {seconds:.2f} s, {sum(work.rows['length'])} tokens; the profiler itself slows small operators"
    )
    for name, share in shares(times).items():
        print(f"{name:20} {share:6.1%}")
    print()
    for name, value in sorted(times.items(), key=lambda item: -item[1])[: options.items]:
        print(f"{name[:60]:60} {value:8.3f} s {value / sum(times.values()):6.1%} {events[name].count:7} calls")


if __name__ == "__main__":
    main()
