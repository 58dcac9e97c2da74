"""`bench/one_launch.py`: both ways to the inverse root, compared and timed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import one_launch

from msbreg import kernels
from msbreg.kernels.inverse_root import inverse_root

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.mark.skipif(not kernels.INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton kernels without a GPU")
@pytest.mark.interpreter
def test_the_harness_measures_what_it_has_compared(monkeypatch):
    monkeypatch.setattr(one_launch, "REPEATS", 1)
    monkeypatch.setattr(one_launch, "CALLS", 1)
    monkeypatch.setattr(one_launch, "SMOOTHING", 3.0)  # takes few steps, each of which takes long here
    device = torch.device("cpu")
    row = one_launch.measure(1, 16, device, seconds=0, rounds=2)
    assert (row["views"], row["side"]) == (1, 16) and row["steps"] > 2
    for clock in ("gpu_microseconds", "host_microseconds"):
        assert all(len(times) == 2 and min(times) > 0 for times in row[clock].values())
    head, rule, line = one_launch.table([row]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")

    def broken(*call, at_once):
        root, sums = inverse_root(*call, at_once=at_once)
        return root * (1 + 1e-6 * at_once), sums

    monkeypatch.setattr(one_launch, "inverse_root", broken)
    with pytest.raises(SystemExit, match="other bits"):
        one_launch.measure(1, 16, device, seconds=0, rounds=1)


@pytest.mark.skipif(torch.cuda.is_available() or kernels.INTERPRETED, reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, BENCH / "one_launch.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "measures a GPU, and torch finds none here" in done.stderr
