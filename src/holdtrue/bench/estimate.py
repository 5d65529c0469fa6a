"""What a grid will take, before it is run: a simple model of size, tokens, memory and time, without loading weights.

Stated with its assumptions in ``MODEL``; right within a factor of two or three, which is what it is for.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from holdtrue.bench.cells import Cell
from holdtrue.defenses.base import Size, WorkContext
from holdtrue.runs.spec import RunSpec

V = TypeVar("V")

CHARACTERS_A_TOKEN = 4.0
TOKENS_A_TURN = 8
FLOPS = {"train": 4.0, "recompute": 2.0, "reference": 2.0, "score": 2.0}
"""Operations for each parameter and token: forward and the half of backward that frozen weights need, and so on."""
CPU_FLOPS, GPU_FLOPS = 2.0e10, 1.5e14
"""Operations a second that are reached: of a CPU core in fp32 (measured: 75 training tokens/s of 135M parameters on
two), of a large data-center GPU in bf16."""
GPU_SAMPLING, CPU_SAMPLING = 0.1, 0.5
"""What sampling reaches of that: it waits for memory, on a GPU above all."""
MODEL = (
    "parameters P from the weights' headers where the model is a folder here, else from its name (7B); "
    f"tokens = characters / {CHARACTERS_A_TOKEN:g} + {TOKENS_A_TURN} a turn, cut at max_length, those of rows and "
    "pairs that defenses add among them; time = tokens x P x 4 (+2 with gradient checkpointing) operations, and 2 for "
    "each token that the reference or a scorer reads or that drift is measured on, and for each sampled one at a tenth "
    "of the speed on a GPU and half on a CPU, max_new_tokens an answer, tuned model only; "
    f"speed {GPU_FLOPS:.1e} operations/s on a GPU, {CPU_FLOPS:.0e} on a CPU core; "
    "memory = P x 2 bytes on a GPU (4 on a CPU) + 34 x width x layers bytes for each token of a micro-batch at "
    "max_length (2 x with gradient checkpointing), where P = 12 x layers x width^2 and width = 128 x layers"
)


class Hardware(NamedTuple):
    """What a cell runs on: ``gpu`` or CPU cores, and operations a second."""

    gpu: bool
    flops: float


class Estimate(NamedTuple):
    """What a cell takes.

    Attributes:
        tokens: that are trained through, those of rows and pairs that defenses add among them.
        sampled: tokens sampled at most, in evaluation.
        parameters: of the model; ``None`` where neither its files nor its name say, and then neither of the next two.
        memory: bytes.
        seconds: on one GPU, or on this machine's CPU.
    """

    tokens: int
    sampled: int
    parameters: float | None
    memory: float | None
    seconds: float | None


GPU = Hardware(True, GPU_FLOPS)
"""One large data-center GPU."""
LIBRARIES = 2**30
"""Bytes of a worker's process beside its cell's: Python, torch and what they load."""


def hardware() -> Hardware:
    """Return what cells would run on here; asks the driver, and loads no torch."""
    gpu = any(Path("/proc/driver/nvidia/gpus").glob("*")) if Path("/proc").is_dir() else False
    return GPU if gpu else processor()


def processor() -> Hardware:
    """Return this machine's processor, as far as this process may use it."""
    return Hardware(False, CPU_FLOPS * _cores())


class Known:
    """What was read of data files: given to the next estimate, none is read again."""

    def __init__(self) -> None:
        self.lengths: dict[Path, list[int]] = {}
        self.pairs: dict[Path, list[int]] = {}
        self.prompts: dict[tuple[str, str, str], int] = {}


def estimate_cells(cells: Sequence[Cell], where: Hardware | None = None, known: Known | None = None) -> list[Estimate]:
    """Return an estimate for each cell; files are read once.

    Args:
        cells: of a grid.
        where: what they run on; by default this machine.
        known: of an earlier estimate.

    Raises:
        DataError: a training file has faults.
    """
    chosen = where or hardware()
    known = known or Known()
    return [_estimate(cell.spec, chosen, known) for cell in cells]


def fitting_workers(estimates: Sequence[Estimate], *, gpu: bool | None = None, free: float | None = None) -> int:
    """Return how many cells to run at a time here: one for each core, as far as memory reaches for the largest of them.

    One on a GPU, which cells would have to share, and where a cell's memory is not known. Cells with a thread each
    wait for nobody; the threads of one cell wait for each other, long where something else runs beside them.

    Args:
        estimates: of the cells that are left.
        gpu: whether they run on one; by default whether there is one here.
        free: bytes of memory; by default what is free here.
    """
    on_gpu = hardware().gpu if gpu is None else gpu
    room = _free_memory() if free is None else free
    if on_gpu or room is None or not estimates or any(each.memory is None for each in estimates):
        return 1
    largest = max(each.memory or 0.0 for each in estimates) + LIBRARIES
    return max(1, min(_cores(), len(estimates), int(room / largest)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_memory() -> float | None:
    """Return bytes that new processes may take, a container's limit minded; ``None`` where the system does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found = float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found = min(found, float(limit) - float((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no limit is told
    return found


def parameters(model: str) -> float | None:
    """Return a model's number of parameters: from the headers of a folder's weights, else from its name."""
    from holdtrue.models.files import read_header, weight_files

    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        shapes = [tensor["shape"] for file in weight_files(folder) for tensor in read_header(file).values()]
        return float(sum(math.prod(shape) for shape in shapes)) or None
    found = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", Path(model).name.lower())
    return float(found[-1][0]) * (1e9 if found[-1][1] == "b" else 1e6) if found else None


def memory(count: float, spec: RunSpec, gpu: bool) -> float:
    """Return the peak of training in bytes, for a model of so many parameters."""
    layers = (count / (12 * 128**2)) ** (1 / 3)
    width = 128 * layers
    states = (2 if spec.training.gradient_checkpointing else 34) * width * layers
    wide = 1 if gpu else 2  # fp32 on a CPU
    return count * 2 * wide + states * wide * spec.training.micro_batch_size * spec.training.max_length


def _estimate(spec: RunSpec, where: Hardware, known: Known) -> Estimate:
    from holdtrue.data import resolve_data

    path = resolve_data(spec.data.train, spec.folder)
    rows = _once(known.lengths, path, lambda: _lengths(path))
    kept = rows[: max(0, len(rows) - spec.data.holdout)]
    training = spec.training
    context = _work_context(spec, len(kept), known)
    work = [defense.work(context) for defense in spec.defenses]
    task = sum(min(n, training.max_length) for n in kept) * training.epochs
    tokens = task + round(sum(each.trained for each in work))
    sampled = _sampled(spec, known.prompts)
    count = parameters(spec.model)
    if count is None:
        return Estimate(tokens, sampled, None, None, None)
    operations = tokens * (FLOPS["train"] + FLOPS["recompute"] * training.gradient_checkpointing)
    operations += FLOPS["reference"] * (task * _reads_the_task(spec) + sum(each.read for each in work))
    operations += FLOPS["score"] * sampled / (GPU_SAMPLING if where.gpu else CPU_SAMPLING)
    return Estimate(tokens, sampled, count, memory(count, spec, where.gpu), operations * count / where.flops)


def _reads_the_task(spec: RunSpec) -> bool:
    """Whether the reference reads the task's rows."""
    needs = [defense.needs() for defense in spec.defenses]
    return any(need.live and (need.features or need.kinds is None or "task" in need.kinds) for need in needs)


def _work_context(spec: RunSpec, rows: int, known: Known) -> WorkContext:
    from holdtrue.data import resolve_data

    longest = spec.training.max_length

    def size(file: str, lengths: dict[Path, list[int]], read: Callable[[Path], list[int]]) -> Size:
        path = resolve_data(file, spec.folder)
        if not path.is_file():
            return Size()  # its cell says so when it is run
        found = _once(lengths, path, lambda: read(path))
        return Size(len(found), sum(min(n, longest) for n in found) / len(found))

    return WorkContext(
        task_rows=rows,
        epochs=spec.training.epochs,
        steps=math.ceil(rows / spec.training.batch_size) * spec.training.epochs,
        chat=lambda file: size(file, known.lengths, _lengths),
        pairs=lambda file: size(file, known.pairs, _pair_lengths),
        text=_tokens,
    )


def _tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_A_TOKEN) + TOKENS_A_TURN


def _lengths(path: Path) -> list[int]:
    from holdtrue.data import read_chat

    return [sum(_tokens(message.content) for message in row.messages) for row in read_chat(path)]


def _pair_lengths(path: Path) -> list[int]:
    from holdtrue.data import read_probes

    return [
        2 * _tokens(probe.question) + _tokens(probe.aligned) + _tokens(probe.misaligned)
        for probe in read_probes(path).rows
    ]


def _sampled(spec: RunSpec, prompts: dict[tuple[str, str, str], int]) -> int:
    from holdtrue.data import resolve_data
    from holdtrue.evaluation import SUITES, Material
    from holdtrue.evaluation.benign import benign_prompts, parse_benign
    from holdtrue.runs.tasks import suite_sources, trained_under

    train = resolve_data(spec.data.train, spec.folder)
    sampling, answers = spec.evaluate.sampling, 0
    for suite in spec.evaluate.suites:
        ask = SUITES[suite].prompts
        if suite == "benign":
            for task in spec.evaluate.benign:
                if parse_benign(task).kind != "lm_eval":
                    answers += _once(prompts, (suite, task, ""), lambda task=task: len(benign_prompts(task)))
        elif ask is not None:
            held_out = suite == "in_domain" and suite not in spec.evaluate.data and spec.data.validation is None
            source = str(train if held_out else suite_sources(spec, suite)[0])
            under = trained_under(spec) if suite == "conditional" else {}
            material = Material(source, train if suite == "conditional" else None, under)
            key = (suite, source, f"{train} {sorted(under)}")
            answers += sampling.samples * _once(prompts, key, lambda ask=ask, material=material: len(ask(material)))
    return answers * sampling.max_new_tokens


def _once(known: dict[Any, V], key: Any, make: Callable[[], V]) -> V:
    if key not in known:
        known[key] = make()
    return known[key]
