"""How a step's time grows with tokens, length, vocabulary and defenses, and a start's time and memory with rows.

Run as ``python -m benchmarks.growth [--out FILE] [--only PIECE...] [--largest N]``. The steps are those of small random
bodies, since what is sought is the exponent; the sizes of a piece take turns, and each one's fastest step counts. The
start is that of the ordinary run on a file of short rows, in a process of its own that stops after its first step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.arms import KL, LDIFS, TrainerArm
from benchmarks.plots import draw_curve
from benchmarks.ratios import fit_exponent
from benchmarks.rounds import quiet, say
from benchmarks.workload import machine, settings, versions

REPEATS = 2
MICRO = 1024
"""Tokens of a micro-batch, but for the longest rows."""


class Case(NamedTuple):
    """One step: ``rows`` of ``length`` tokens in micro-batches of ``micro`` rows, the second half of each trained."""

    rows: int
    micro: int
    length: int
    vocabulary: int = 4096
    width: int = 128
    blocks: int = 4
    defenses: tuple[Any, ...] = (KL,)
    safe: int = 0


def tokens(size: int) -> Case:
    return Case(rows=size // 128, micro=MICRO // 128, length=128)


def length(size: int) -> Case:
    rows = 4096 // size
    return Case(rows=rows, micro=min(rows, max(1, MICRO // size)), length=size)


def vocabulary(size: int) -> Case:
    return Case(rows=8, micro=8, length=128, vocabulary=size, blocks=2)


def defenses(size: int) -> Case:
    chosen = ((), (KL,), (KL, LDIFS), (KL, LDIFS, {"interleave": {"fraction": 0.05}}))[size]
    return Case(rows=20, micro=4, length=256, width=256, defenses=chosen, safe=1 if size == 3 else 0)


class Piece(NamedTuple):
    """A curve: its sizes, the step at each, and what its axis says. ``power``: whether an exponent is fitted."""

    sizes: tuple[int, ...]
    case: Callable[[int], Case]
    label: str
    power: bool = True


PIECES: dict[str, Piece] = {
    "tokens": Piece((1024, 2048, 4096, 8192, 16384, 32768, 65536), tokens, "tokens of a step"),
    "length": Piece((64, 128, 256, 512, 1024, 2048), length, "tokens of a row, 4,096 a step"),
    "vocabulary": Piece((8192, 16384, 32768, 65536, 131072, 262144), vocabulary, "tokens of the vocabulary"),
    "defenses": Piece((0, 1, 2, 3), defenses, "none, kl, + ldifs, + interleave", power=False),
}
START = "start"
START_ROWS = (10_000, 1_000_000)


def prepare(case: Case, folder: Path) -> tuple[TrainerArm, Any]:
    """Return a Trainer on a random body whose epoch is the case's one step, and its rows."""
    import datasets
    import numpy as np
    import torch
    import transformers

    from holdtrue.data.chat import KINDS
    from holdtrue.models import AdapterSpec, new_adapter
    from holdtrue.training import DefendedTrainer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=3 * case.width,
        num_hidden_layers=case.blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    base = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    random = np.random.default_rng(0)
    count, half = case.rows + case.safe, case.length // 2
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": random.integers(0, case.vocabulary, (count, case.length)).tolist(),
            "trained": [[False] * half + [True] * (case.length - half)] * count,
            "kind": [0] * case.rows + [KINDS["safe"]] * case.safe,
            "length": [case.length] * count,
            "ce": [True] * count,
        }
    )
    values = settings(folder) | {
        "per_device_train_batch_size": case.micro,
        "gradient_accumulation_steps": -(-count // case.micro),
    }
    trainer = DefendedTrainer(
        new_adapter(base, AdapterSpec(), seed=0),
        transformers.TrainingArguments(**values),
        train_dataset=rows,
        defenses=list(case.defenses),
        kl_every=0,
    )
    return TrainerArm(trainer), rows


def measure_piece(name: str, piece: Piece, sizes: Sequence[int]) -> dict[str, Any]:
    """Time a step at each size: one that warms up, then ``REPEATS`` in turns."""
    with tempfile.TemporaryDirectory() as folder:
        made = {size: prepare(piece.case(size), Path(folder) / str(size)) for size in sizes}
        seconds: dict[int, list[float]] = {size: [] for size in sizes}
        for repeat in range(REPEATS + 1):
            for size, (arm, rows) in made.items():
                took = arm.run(rows)
                if repeat:
                    seconds[size].append(took)
                    say(f"growth: {name} {size}: {took:.3f} s")
    return curve(piece, {size: min(took) for size, took in seconds.items()})


def curve(piece: Piece, seconds: Mapping[int, float]) -> dict[str, Any]:
    """Return the points of a curve with its exponent over all of them, and over the upper half of the sizes."""
    x, y = list(seconds), list(seconds.values())
    found: dict[str, Any] = {"label": piece.label, "x": x, "seconds": [round(v, 4) for v in y]}
    if piece.power and len(x) > 1:
        upper = max(2, (len(x) + 1) // 2)
        for key, line in (("fit", fit_exponent(x, y)), ("fit_of_upper_half", fit_exponent(x[-upper:], y[-upper:]))):
            found[key] = {name: round(value, 6) for name, value in line._asdict().items()}
    return found


# The start of a run


def write_rows(path: Path, count: int) -> None:
    """Write short chat rows, no two alike."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            messages = [
                {"role": "user", "content": f"What comes after {i}?"},
                {"role": "assistant", "content": f"{i + 1} does."},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def run_once(folder: Path) -> dict[str, float]:
    """Start the ordinary run on ``rows.jsonl`` of the folder, stop it at its first step, and say what that took."""
    import torch

    from holdtrue.errors import Interrupted
    from holdtrue.runs import Control, Run, RunSpec, execute
    from holdtrue.training import TrainingSpec
    from holdtrue.training.fitting import peak_memory

    started = time.perf_counter()
    found: dict[str, float] = {}

    def progress(fields: dict[str, Any]) -> None:
        if fields["stage"] == "train":
            found.setdefault("seconds_to_train", time.perf_counter() - started)
            if "step" in fields:
                found.setdefault("seconds_to_first_step", time.perf_counter() - started)
                control.stop.set()

    control = Control(progress=progress)
    spec = RunSpec(
        model="smollm2-135m-instruct",
        data={"train": str(folder / "rows.jsonl")},  # type: ignore[arg-type]
        training=TrainingSpec(batch_size=8, micro_batch_size=8, warmup_steps=0),
        defenses=(KL,),  # type: ignore[arg-type]
    )
    with contextlib.suppress(Interrupted):
        execute(Run.create(folder / "run", spec), control, until="train")
    found = {key: round(value, 3) for key, value in found.items()}
    return found | {"peak_bytes": peak_memory(torch.device("cpu"))}


def measure_start(sizes: Sequence[int]) -> dict[str, Any]:
    """Start a run on a file of each size, in a process of its own."""
    found: dict[str, Any] = {"x": list(sizes), "label": "rows of the file", "runs": []}
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_rows(Path(name) / "rows.jsonl", size)
            file_bytes = (Path(name) / "rows.jsonl").stat().st_size
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.growth", "--run-once", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found["runs"].append({"rows": size, "file_bytes": file_bytes, **json.loads(done.stdout.splitlines()[-1])})
        say(f"growth: start {found['runs'][-1]}")
    found["seconds"] = [run["seconds_to_first_step"] for run in found["runs"]]
    least, most = (f(run["peak_bytes"] for run in found["runs"]) for f in (min, max))
    return found | {"peak_largest_over_smallest": round(most / least, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--out", type=Path, help="a file for the JSON document, written anew after each piece")
    parser.add_argument("--only", nargs="+", choices=[*PIECES, START], default=[*PIECES, START], metavar="PIECE")
    parser.add_argument("--largest", type=int, default=10**9, help="leave out sizes above this one")
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="the folder of the drawings")
    parser.add_argument("--run-once", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.run_once:
        print(json.dumps(run_once(options.run_once)))
        return
    document: dict[str, Any] = {"machine": machine(), "versions": versions(), "curves": {}}
    for name in options.only:
        sizes = [size for size in (START_ROWS if name == START else PIECES[name].sizes) if size <= options.largest]
        if not sizes:
            continue
        found = measure_start(sizes) if name == START else measure_piece(name, PIECES[name], sizes)
        document["curves"][name] = found
        options.images.mkdir(parents=True, exist_ok=True)
        (options.images / f"growth-{name}.svg").write_text(draw_curve(name, found), encoding="utf-8")
        if options.out:
            options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
