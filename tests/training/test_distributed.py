"""Two gloo processes train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import free_port

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from support import behind_the_prefix, small_model, small_rows, small_tokenizer
from holdtrue.defenses import parse
from holdtrue.training import TrainingSpec, fit
torch.set_num_threads(1)
folder = Path(sys.argv[2])
model = small_model()
fit(
    model=model, tokenizer=small_tokenizer(), rows=behind_the_prefix(small_rows()), validation=small_rows(7, seed=5),
    folder=folder, resume=False,
    spec=TrainingSpec(batch_size=4, micro_batch_size=int(sys.argv[3]), learning_rate=1e-3, warmup_steps=2),
    defenses=parse([{"kl": {"weight": 1.0}}, {"ldifs": {"weight": 1.0}}, "treft"]),
)
rank = __import__("os").environ.get("RANK", "0")
torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, folder / f"adapter-{rank}.pt")
"""


ASIDE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from datasets import concatenate_datasets
from support import small_model, small_pairs, small_rows
from holdtrue.defenses import parse
from holdtrue.training import TrainingSpec, fit
torch.set_num_threads(1)
rank = __import__("os").environ.get("RANK", "0")
aside = small_rows(5, seed=9).map(lambda row: {"kind": 3, "ce": False})
rows = concatenate_datasets([small_rows(), aside, small_pairs()])
for dropout in (0.0, 0.2):
    folder = Path(sys.argv[2]) / str(dropout)
    folder.mkdir(exist_ok=True)
    model = small_model(dropout)
    fit(
        model=model, tokenizer=None, rows=rows, validation=None, folder=folder, resume=False,
        spec=TrainingSpec(batch_size=4, micro_batch_size=int(sys.argv[3]), learning_rate=3e-3, warmup_steps=2),
        defenses=parse([
            "gradient_projection",
            {"kl": {"weight": 1.0, "tokens": "response", "sample": 0.5}},
            {"preference": {"slack": 0.5, "count": 2}},
        ]),
    )
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, folder / f"adapter-{rank}.pt")
"""


def start(folder: Path, micro: int, rank: int, world: int, port: int, worker: str = WORKER) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", worker, str(Path(__file__).parents[1]), str(folder), str(micro)]
    return subprocess.Popen(command, env=environment)


@pytest.mark.parametrize("micro", [2, 1])
def test_two_processes_equal_one(tmp_path, micro):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    port = free_port()
    workers = [start(one, 4, 0, 1, port), *(start(two, micro, rank, 2, port) for rank in range(2))]
    assert [w.wait(timeout=240) for w in workers] == [0, 0, 0]
    alone, both = torch.load(one / "adapter-0.pt"), [torch.load(two / f"adapter-{r}.pt") for r in range(2)]
    for name, tensor in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], tensor, atol=2e-5, rtol=1e-4)
    lines = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(lines[0]) == len(lines[1])
    for a, b in zip(*lines, strict=True):
        for key in set(a) & {"loss", "ce", "kl_term", "ldifs_term", "treft_term", "tokens", "eval_loss", "eval_kl"}:
            assert a[key] == pytest.approx(b[key], abs=1e-4), key


def test_rows_aside_and_a_sample_are_the_same_on_each_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    port = free_port()
    workers = [start(one, 4, 0, 1, port, ASIDE), *(start(two, 1, rank, 2, port, ASIDE) for rank in range(2))]
    assert [w.wait(timeout=240) for w in workers] == [0, 0, 0]
    for dropout in ("0.0", "0.2"):
        both = [torch.load(two / dropout / f"adapter-{r}.pt") for r in range(2)]
        assert all(torch.equal(both[0][name], both[1][name]) for name in both[0]), f"they drift with dropout {dropout}"
    for name, tensor in torch.load(one / "0.0" / "adapter-0.pt").items():
        torch.testing.assert_close(torch.load(two / "0.0" / "adapter-0.pt")[name], tensor, atol=2e-5, rtol=1e-4)
    with_dropout = [json.loads(line) for line in (two / "0.2" / "metrics.jsonl").read_text().splitlines()]
    for key in ("gradient_projection_acted", "preference_short"):
        assert any(line.get(key) for line in with_dropout), key
    lines = [[json.loads(x) for x in (f / "0.0" / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    for a, b in zip(*lines, strict=True):
        for key in set(a) & {
            "loss",
            "kl_term",
            "gradient_projection_cosine",
            "gradient_projection_acted",
            "preference_short",
        }:
            assert a[key] == pytest.approx(b[key], abs=1e-3), (a["step"], key)
