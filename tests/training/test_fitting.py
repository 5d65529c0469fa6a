"""What a run says of its memory is its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

PEAK = """
import torch
from holdtrue.training.fitting import peak_memory
print(peak_memory(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own figure is all there is elsewhere")
def test_peak_memory_is_not_that_of_the_parent():
    def peak() -> int:
        return int(subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True).stdout)

    alone = peak()
    held = np.ones(3 * alone // 8)  # the parent holds three times as much
    assert abs(peak() - alone) < 0.2 * alone
    assert held.sum() == held.size
