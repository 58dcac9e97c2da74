"""`bench/pixels.py` times what it has checked."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

import pixels  # bench/pixels.py
import torch

from msbreg import kernels

BENCH = Path(__file__).resolve().parents[1] / "bench"
pytestmark = pytest.mark.skipif(kernels.INTERPRETED, reason="what is timed is compiled")


@pytest.mark.slow
def test_the_harness_measures_what_it_has_checked(monkeypatch):
    crops, drawn = pixels.random_views(6, 37, torch.device("cpu"))
    rows = pixels.measure(crops, drawn, torch.bfloat16, seconds=0, rounds=2)
    assert [row["way"] for row in rows] == ["kernel", "torch", "torch compiled", "joining and cast alone"]
    assert all(0 < row["microseconds_a_view"]["min"] <= row["microseconds_a_view"]["max"] for row in rows)
    monkeypatch.setattr(pixels, "joined_views", lambda *arguments: -pixels.plain(*arguments))
    with pytest.raises(SystemExit, match=r"kernel: .* are off by more"):
        pixels.measure(crops, drawn, torch.bfloat16, seconds=0, rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, BENCH / "pixels.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "measures a GPU, and torch finds none here" in done.stderr
