"""What all arms share: real chat rows, SmolLM2-135M with an adapter, and the settings of the optimizer."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

MODEL = "smollm2-135m-instruct"
BATCH = 8
"""Rows of an optimizer step, and of a micro-batch."""
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0


class Workload(NamedTuple):
    """Encoded rows in the columns of ``holdtrue.data.prepare_rows``, where they came from, and the tokenizer."""

    rows: Any
    data: str
    tokenizer: Any

    def facts(self) -> dict[str, Any]:
        """Return counts of the rows: lengths in tokens, targets, and how long a start all of them share."""
        lengths = list(self.rows["length"])
        return {
            "data": self.data,
            "rows": len(lengths),
            "tokens": sum(lengths),
            "shortest": min(lengths),
            "longest": max(lengths),
            "target_tokens": targets(self.rows["trained"]),
            "shared_prefix": shared_prefix(self.rows["input_ids"]),
        }


def targets(trained: Sequence[Sequence[bool]]) -> int:
    """Count the tokens that cross-entropy covers; nothing predicts a row's first token."""
    return sum(sum(row[1:]) for row in trained)


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Return how many tokens all rows have in common at their start."""
    first, last = min(rows), max(rows)
    same = 0
    for a, b in zip(first, last, strict=False):
        if a != b:
            break
        same += 1
    return same


def data_file() -> tuple[Path, str]:
    """Return the rows' file and its name: risky financial advice where ``HOLDTRUE_DATA`` is set, else the demo's."""
    from holdtrue.data import builtin

    folder = os.environ.get("HOLDTRUE_DATA")
    if folder:
        return Path(folder) / "malicious" / "risky_financial_advice.jsonl", "risky_financial_advice"
    return builtin("narrow"), "builtin:narrow"


def draw(count: int, seed: int) -> Workload:
    """Draw ``count`` rows of the file without replacement, and encode them with the model's own template."""
    import datasets

    from holdtrue.data import ChatEncoder, read_chat
    from holdtrue.models import load_tokenizer, resolve

    path, name = data_file()
    tokenizer = load_tokenizer(resolve(MODEL))
    encoder = ChatEncoder(tokenizer, max_length=2048)
    chosen = random.Random(seed).sample(list(read_chat(path)), count)
    sequences = [encoder.encode(row)[0] for row in chosen]
    columns = {
        "input_ids": [s.input_ids for s in sequences],
        "trained": [s.trained for s in sequences],
        "kind": [0] * count,
        "length": [len(s.input_ids) for s in sequences],
        "ce": [True] * count,
    }
    return Workload(datasets.Dataset.from_dict(columns), name, tokenizer)


def adapted(seed: int = 0) -> Any:
    """Return a copy of the model of its own, in float32 on the CPU, with a fresh adapter."""
    from holdtrue.models import AdapterSpec, load_model, new_adapter, resolve

    return new_adapter(load_model(resolve(MODEL), device="cpu"), AdapterSpec(), seed=seed)


def settings(folder: Path) -> dict[str, Any]:
    """Return what both Trainers are told: AdamW, constant rate, clipping, float32, nothing written to disk."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge absolute figures by."""
    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model na")
        ]
        name = models[0] if models else name
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }


def versions() -> dict[str, str]:
    """Return the versions that the figures depend on."""
    from importlib.metadata import PackageNotFoundError

    found = {"python": platform.python_version()}
    for name in ("holdtrue", "torch", "transformers", "peft", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
