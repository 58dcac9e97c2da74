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


def run_tiny(arguments: list[str], log: Path, rank: int, world: int, port: int) -> None:
    """A process of a run with the smallest of networks, so that its 10,000 steps take little."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world}", "LOCAL_RANK": f"{rank}", "LOCAL_WORLD_SIZE": f"{world}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}

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
@pytest.mark.parametrize("world", [1, 2])
def test_memory_is_flat_over_10_000_steps(tmp_path, small, free_port, world):
    run = tmp_path / "run"
    options = ["--data.size", "8", "--data.batch_size", "2", "--optim.steps", "10000", "--optim.name", "sgd"]
    options += ["--run.log_every", "500", "--run.checkpoint_every", "2500", "--model.hidden", "4", "--model.dim", "4"]
    options += ["--model.predictor", "false", "--eval.linear", "false"]
    logs = [tmp_path / f"log-{rank}" for rank in range(world)]
    arguments = ["pretrain", "--run.dir", str(run), *small, *options]
    processes = [
        multiprocessing.get_context("spawn").Process(target=run_tiny, args=(arguments, log, rank, world, free_port))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    resident = []  # step, MB of each process
    while all(process.is_alive() for process in processes):
        time.sleep(0.1)
        steps = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
        with contextlib.suppress(OSError, IndexError):  # nothing to be seen before the first row and after the end
            pages = [int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) for process in processes]
            resident.append((steps[-1], *(number * os.sysconf("SC_PAGESIZE") / 2**20 for number in pages)))
    for process, log in zip(processes, logs, strict=True):
        process.join()
        assert process.exitcode == 0, log.read_text()
    steps, *megabytes = np.array([row for row in resident if 5000 <= row[0] < 10_000]).T
    assert len(steps) >= 20
    for of_process in megabytes:
        growth = 1000 * np.polyfit(steps, of_process, 1)[0]
        assert growth < 0.5, f"{growth:.2f} MB in 1000 steps"
