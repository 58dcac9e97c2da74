"""A run that was stopped on one number of processes goes on with another, as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

import torch

from msbreg.cli import main
from msbreg.metrics import read_metrics

STEPS = 30
# Checkpoints at signals alone, and steps too small to blow the rounding of a sum up to the size of the loss.
OPTIONS = [
    "--optim.steps", str(STEPS), "--run.checkpoint_every", "1000", "--optim.name", "sgd", "--optim.lr", "0.002",
    "--eval.linear", "false",
]  # fmt: skip


def train_rows(folder: Path) -> list[dict]:
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "train"]


class Run:
    """The processes of a run, each with the variables that a launcher gives it, and a log in the folder `logs`."""

    def __init__(self, world: int, port: int, folder: Path, logs: Path, options: list[str]) -> None:
        self.folder, self.logs = folder, [logs / f"{world}-{rank}.txt" for rank in range(world)]
        command = [sys.executable, "-m", "msbreg", "pretrain", "--run.dir", str(folder), *options]
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in shared.items()}
        self.processes = []
        for place, path in zip(places, self.logs, strict=True):
            with path.open("w") as log:
                self.processes.append(subprocess.Popen(command, env=environment | place, stdout=log, stderr=log))

    def text(self) -> str:
        return "\n".join(path.read_text() for path in self.logs)

    def stop_after(self, step: int) -> int:
        """Signals every process once that step is in the metrics, as SLURM does; returns the step it was saved at."""
        deadline = time.monotonic() + 120
        while not any(row["step"] >= step for row in train_rows(self.folder)):
            if time.monotonic() > deadline or any(process.poll() is not None for process in self.processes):
                pytest.fail(f"the run never reached step {step}: {self.text()}")
            time.sleep(0.005)
        for process in self.processes:
            process.send_signal(signal.SIGUSR1)
        self.wait()
        assert "stopped by a signal at step" in self.text()
        return torch.load(self.folder / "checkpoint.pt", weights_only=True)["step"]

    def wait(self) -> None:
        assert [process.wait(timeout=120) for process in self.processes] == [0] * len(self.processes), self.text()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def start(tmp_path, small, free_port):
    runs = []

    def start(world: int) -> Run:
        runs.append(Run(world, free_port, tmp_path / "run", tmp_path, [*small, *OPTIONS]))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


@pytest.mark.slow
def test_two_processes_go_on_as_one_and_one_as_two(tmp_path, small, start):
    first = start(2).stop_after(6)
    run = start(1)
    second = run.stop_after(first + 6)
    assert f"going on from step {first} of {STEPS}" in run.text() and "with 1 process instead of 2; " in run.text()
    run = start(2)
    run.wait()
    assert f"going on from step {second} of {STEPS}" in run.text() and "with 2 processes instead of 1; " in run.text()
    assert 6 <= first < second < STEPS
    assert main(["pretrain", "--run.dir", str(tmp_path / "undisturbed"), *small, *OPTIONS]) == 0

    folders = tmp_path / "run", tmp_path / "undisturbed"
    assert [json.loads((folder / "summary.json").read_text())["processes"] for folder in folders] == [2, 1]
    rows, undisturbed = map(train_rows, folders)
    assert [row["step"] for row in rows] == list(range(2, STEPS + 1, 2))
    for mine, theirs in zip(rows, undisturbed, strict=True):
        assert (mine["step"], mine["epoch"], mine["lr"]) == (theirs["step"], theirs["epoch"], theirs["lr"])
        for name in ("loss", "centroid", "singular_value", "brownian"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=5e-4), (mine["step"], name)
    weights, expected = (torch.load(folder / "backbone.pt", weights_only=True) for folder in folders)
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-3)
