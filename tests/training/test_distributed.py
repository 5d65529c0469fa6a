"""Two gloo processes train as one does."""

from __future__ import annotations

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


def start(folder: Path, micro: int, rank: int, world: int, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if world > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", WORKER, str(Path(__file__).parents[1]), str(folder), str(micro)]
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
    import json

    lines = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(lines[0]) == len(lines[1])
    for a, b in zip(*lines, strict=True):
        for key in set(a) & {"loss", "ce", "kl_term", "ldifs_term", "treft_term", "tokens", "eval_loss", "eval_kl"}:
            assert a[key] == pytest.approx(b[key], abs=1e-4), key
