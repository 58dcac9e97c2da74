"""Memory over a long run."""

import contextlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

import torch
from torch import nn

from msbreg import models
from msbreg.cli import main
from msbreg.metrics import read_metrics


def run_tiny(arguments: list[str], log: Path) -> None:
    """A run with the smallest of networks, so that its 10,000 steps take little."""

    class Tiny(nn.Module):
        num_features = 8

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3 * 8 * 8, 8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(images.flatten(1))

    models.ConvNet = Tiny
    with open(log, "w") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_flat_over_10_000_steps(tmp_path, small):
    run, log = tmp_path / "run", tmp_path / "log"
    options = ["--data.size", "8", "--data.batch_size", "2", "--optim.steps", "10000", "--optim.name", "sgd"]
    options += ["--run.log_every", "500", "--run.checkpoint_every", "2500", "--model.hidden", "4", "--model.dim", "4"]
    options += ["--model.predictor", "false", "--eval.linear", "false"]
    process = multiprocessing.get_context("spawn").Process(
        target=run_tiny, args=(["pretrain", "--run.dir", str(run), *small, *options], log)
    )
    process.start()
    resident = []  # step, MB
    while process.is_alive():
        time.sleep(0.1)
        steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
        with contextlib.suppress(OSError, IndexError):  # nothing to be seen before the first row and after the end
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            resident.append((steps[-1], pages * os.sysconf("SC_PAGESIZE") / 2**20))
    assert process.exitcode == 0, log.read_text()
    steps, megabytes = np.array([row for row in resident if 5000 <= row[0] < 10_000]).T
    assert len(steps) >= 20
    growth = 1000 * np.polyfit(steps, megabytes, 1)[0]
    assert growth < 0.5, f"{growth:.2f} MB in 1000 steps"
