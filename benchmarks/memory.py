"""Peak memory of one process that takes two optimizer steps of 1,024 tokens on SmolLM2-135M.

Run as ``python -m benchmarks.memory WAY FOLDER``; prints the bytes of the model's parameters and the peak resident
memory in bytes. ``naive-kl`` is the usual way to write the KL: a second model as the reference, and both models' logits
of all positions at once, in float32. ``kl-vocab-doubled`` is the KL on the same body with a head twice as wide, beside
``kl-vocab`` with the head as it is; both hold their weights in memory of their own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROWS, LENGTH, STEPS = 8, 128, 2
WAYS = ("plain", "kl", "kl-all", "kl-ldifs", "naive-kl", "kl-vocab", "kl-vocab-doubled")
DEFENSES: dict[str, list[Any]] = {
    "plain": [],
    "kl": [{"kl": {"weight": 1.0, "tokens": "response"}}],
    "kl-all": [{"kl": {"weight": 1.0, "tokens": "all"}}],
    "kl-vocab": [{"kl": {"weight": 1.0, "tokens": "response"}}],
    "kl-vocab-doubled": [{"kl": {"weight": 1.0, "tokens": "response"}}],
    "kl-ldifs": [{"kl": {"weight": 1.0, "tokens": "response"}}, {"ldifs": {"weight": 1.0}}],
}


def rows() -> Any:
    import datasets
    import numpy as np

    random = np.random.default_rng(0)
    trained = [False] * (LENGTH // 2) + [True] * (LENGTH // 2)
    return datasets.Dataset.from_list(
        [
            {"input_ids": random.integers(10, 40_000, LENGTH).tolist(), "trained": trained, "length": LENGTH}
            for _ in range(ROWS * STEPS)
        ]
    )


def naive(model: Any, reference: Any) -> None:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    data = rows()
    for step in range(STEPS):
        batch = data[step * ROWS : (step + 1) * ROWS]
        ids, trained = torch.tensor(batch["input_ids"]), torch.tensor(batch["trained"])[:, 1:]
        logits = model(input_ids=ids).logits.float()[:, :-1]
        with torch.no_grad():
            other = reference(input_ids=ids).logits.float()[:, :-1]
        p, q = logits.log_softmax(-1), other.log_softmax(-1)
        ce = -p.gather(-1, ids[:, 1:, None]).squeeze(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        ((ce * trained).sum() / trained.sum() + (kl * trained).sum() / trained.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(ways: Sequence[str], runs: int, say: Callable[[str], None]) -> dict[str, list[tuple[int, int]]]:
    """Measure each way in processes of its own, in turns; return (bytes of parameters, peak bytes) by way."""
    found: dict[str, list[tuple[int, int]]] = {way: [] for way in ways}
    for run in range(runs):
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", way, folder]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            parameters, peak = map(int, done.stdout.split()[-2:])
            found[way].append((parameters, peak))
            say(
                f"memory {run + 1} of {runs}: {way} {peak / 2**20:.0f} MiB, {parameters / 2**20:.0f} of them parameters"
            )
    return found


def main(way: str, folder: Path) -> None:
    import torch

    from holdtrue.defenses import parse
    from holdtrue.models import AdapterSpec, load_model, new_adapter, resolve
    from holdtrue.training import TrainingSpec, fit
    from holdtrue.training.fitting import peak_memory

    source = resolve("smollm2-135m-instruct")
    base = load_model(source)
    if way == "kl-vocab-doubled":
        base.resize_token_embeddings(2 * base.config.vocab_size, mean_resizing=False)
        base.requires_grad_(False)
    if way.startswith("kl-vocab"):
        # The weights' file stays mapped as long as one tensor of it lives, the replaced head's pages with it.
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()
    model = new_adapter(base, AdapterSpec(), seed=0)
    if way == "naive-kl":
        naive(model.train(), load_model(source))
    else:
        spec = TrainingSpec(batch_size=ROWS, micro_batch_size=ROWS, kl_every=0, save_every=1000)
        fit(
            model=model,
            tokenizer=None,
            rows=rows(),
            validation=None,
            spec=spec,
            defenses=parse(DEFENSES[way]),
            folder=folder,
            resume=False,
        )
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    print(parameters, peak_memory(torch.device("cpu")))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
