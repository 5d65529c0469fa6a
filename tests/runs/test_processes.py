"""Several processes, started by torchrun, make the same run as one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from holdtrue.cli.main import main
from holdtrue.runs import Run


@pytest.mark.slow
def test_two_processes_equal_one(folder: Path) -> None:
    sets = ["--set", "training.epochs=1", "--set", "training.kl_every=1"]
    one, two = folder / "a" / "one", folder / "b" / "two"
    assert main(["train", str(folder / "spec.yaml"), "--out", str(one), *sets]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "holdtrue.cli.main", "train", str(folder / "spec.yaml"), "--out", str(two), *sets]
    done = subprocess.run(
        [*command, "--json"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"status"') == 1
    name = "adapter_model.safetensors"
    before, after = load_file(one / "adapter" / name), load_file(two / "adapter" / name)
    assert before.keys() == after.keys()
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=1e-3, atol=1e-4)
    for alone, shared in zip(Run(one).metrics(), Run(two).metrics(), strict=True):
        for term in ("ce", "kl", "kl_term"):
            if term in alone:
                assert abs(alone[term] - shared[term]) < 1e-3
    assert Run(two).is_done("evaluate")
