"""Faults in the middle of a run, in real processes: it ends with a sentence or goes on, on every rank alike."""

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

import torch

from msbreg.cli import main
from msbreg.data import ImageFolder, TarShards, ViewLoader
from msbreg.data.draws import permutation
from msbreg.data.recipes import evaluation
from msbreg.errors import DataError, MSBRegError
from msbreg.metrics import read_metrics
from msbreg.processes import Processes

BOUND = 120.0
"""Seconds after which a process that has not ended hangs; the machine may be busy."""
LONG = ["--optim.steps", "4000"]
FORKS = multiprocessing.get_context("forkserver")  # processes that need not import torch again


class Ranks:
    """The two processes of a run, without torchrun: nothing ends one where the other has ended."""

    def __init__(self, folder: Path, options: list[str], *, file_size_limit: int | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder, self.logs = folder, [folder.with_suffix(f".rank{rank}") for rank in (0, 1)]
        arguments = ["pretrain", "--run.dir", str(folder), *options]
        self.processes: list[BaseProcess] = [
            FORKS.Process(target=run_rank, args=(rank, port, arguments, log, file_size_limit))
            for rank, log in enumerate(self.logs)
        ]
        for process in self.processes:
            process.start()

    def reach(self, step: int) -> None:
        """Returns once a step is in the metrics."""
        wait_for_step(self.folder, step, lambda: all(process.is_alive() for process in self.processes), self.text)

    def end(self, *ranks: int) -> list[int]:
        """The exit statuses of processes, which must end."""
        deadline = time.monotonic() + BOUND
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
            assert self.processes[rank].exitcode is not None, f"rank {rank} hangs: {self.text()}"
        return [self.processes[rank].exitcode for rank in ranks]

    def error(self, rank: int) -> str:
        """The one sentence with which a process ended."""
        text = self.logs[rank].read_text()
        assert "Traceback" not in text, text
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        return line

    def text(self) -> str:
        return "\n".join(log.read_text() for log in self.logs if log.exists())

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def run_rank(rank: int, port: int, arguments: list[str], log: Path, file_size_limit: int | None) -> None:
    """One process of two, with its output in a file; the limit is for rank 0's files, but not for this one."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    limited = file_size_limit is not None and rank == 0
    with open(log, "w") as file:
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file) if limited else None
        output = file if writer is None else writer.stdin
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if writer is None:
        sys.exit(main(arguments))
    writer.stdin.close()
    importlib.import_module("torch._dynamo")  # torch 2.9 writes files as it loads this
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, file_size_limit))
    try:
        sys.exit(main(arguments))
    finally:
        sys.stdout.flush()
        os.close(1)
        os.close(2)
        writer.wait(BOUND)


def wait_for_step(folder: Path, step: int, alive: Callable[[], bool], text: Callable[[], str]) -> None:
    deadline = time.monotonic() + BOUND
    while time.monotonic() < deadline and alive():
        if any(row["event"] == "train" and row["step"] >= step for row in read_metrics(folder / "metrics.jsonl")):
            return
        time.sleep(0.005)
    pytest.fail(f"the run never reached step {step}: {text()}")


@pytest.fixture(scope="module")
def start_ranks(small) -> Iterator[Callable[..., Ranks]]:
    """Starts the two processes of a run with the small options and others."""
    FORKS.set_forkserver_preload(["pytest", "msbreg.cli", "msbreg.trainer", "torch._dynamo", "nvidia.dali.fn"])
    with contextlib.ExitStack() as started:

        def start(folder: Path, *options: object, file_size_limit: int | None = None) -> Ranks:
            ranks = Ranks(folder, [*small, *map(str, options)], file_size_limit=file_size_limit)
            started.callback(ranks.close)
            return ranks

        yield start


def shards(folder: Path, images: Path, count: int = 4) -> Path:
    """The images of a folder in tar shards."""
    folder.mkdir()
    files = sorted(images.rglob("*.jpg"))
    for number in range(count):
        with tarfile.open(folder / f"{number:02}.tar", "w") as tar:
            for index, file in enumerate(files[number::count]):
                tar.add(file, arcname=f"{number}_{index:03}.jpg")
    return folder


def stall(path: Path) -> None:
    """Puts a pipe that nobody writes to in the place of a file."""
    path.unlink()
    os.mkfifo(path)


# A disk that fails.


def test_a_shard_that_vanishes_ends_every_rank(tmp_path, swatches, start_ranks):
    data = shards(tmp_path / "shards", swatches / "train")
    ranks = start_ranks(tmp_path / "run", "--data.path", data, *LONG)
    ranks.reach(4)
    (data / "02.tar").unlink()
    assert ranks.end(0, 1) == [2, 2]
    errors = [ranks.error(0), ranks.error(1)]
    assert any("more than the 16 that are tolerated" in error and "02.tar" in error for error in errors), errors
    assert all("tolerated" in error or "another one is gone" in error for error in errors), errors


def test_a_folder_that_vanishes_ends_every_rank(tmp_path, swatches, start_ranks):
    data = tmp_path / "images"
    shutil.copytree(swatches, data)
    ranks = start_ranks(tmp_path / "run", "--data.path", data, *LONG)
    ranks.reach(4)
    data.rename(tmp_path / "unmounted")
    assert ranks.end(0, 1) == [2, 2]
    errors = [ranks.error(0), ranks.error(1)]
    assert any("No such file or directory" in error for error in errors), errors
    assert all("tolerated" in error or "another one is gone" in error for error in errors), errors


def test_the_images_of_a_shard_that_is_cut_short_are_left_out(tmp_path, swatches):
    source = TarShards(shards(tmp_path / "shards", swatches / "train", count=24))  # of ten images
    loader = ViewLoader(source, evaluation(16), 24, shuffle=False, threads=1)
    assert len(list(loader.batches())) == 10 and not loader.unreadable
    os.truncate(source.shards[3], source.place[34, 1] + 100)
    with pytest.warns(UserWarning, match=r"03\.tar:.*the shard has become shorter"):
        images = torch.cat([batch.index for batch in loader.batches()])
    assert loader.unreadable == dict.fromkeys(range(34, 40), "it cannot be read: the shard has become shorter")
    assert images[:34].tolist() == [*range(34)] and images[40:].tolist() == [*range(40, 240)]
    assert len({*range(34, 40)} | set(images[34:40].tolist())) > 10  # several others in the place of six
    loader.close()


def test_images_that_can_be_read_again_count_again_on_resume(tmp_path, swatches):
    images = tmp_path / "images"
    shutil.copytree(swatches / "train", images)
    source = ImageFolder(images)
    Path(source.name(3)).unlink()
    loader = ViewLoader(source, evaluation(16), 8, shuffle=False, threads=1)
    loader.recall({2: "it cannot be read: Input/output error", 3: "it cannot be read: No such file or directory"})
    assert sorted(loader.unreadable) == [3]
    batch = next(loader.batches()).index.tolist()
    assert batch[:3] == [0, 1, 2] and batch[3] not in range(8) and batch[4:] == [4, 5, 6, 7]
    loader.close()


def test_a_read_that_stalls_ends_every_rank(tmp_path, swatches, start_ranks):
    data = tmp_path / "images"
    shutil.copytree(swatches, data)
    stalled = sorted((data / "train").rglob("*.jpg"))[77]
    ranks = start_ranks(tmp_path / "run", "--data.path", data, "--data.timeout", 8, *LONG)
    ranks.reach(4)
    stall(stalled)
    assert ranks.end(0, 1) == [2, 2]
    errors = [ranks.error(0), ranks.error(1)]
    said = f"{stalled} is still being read after 8 s (timeout=, on the command line --data.timeout)"
    assert any(said in error for error in errors), errors
    assert all("still being read" in error or "another one is gone" in error for error in errors), errors


@pytest.mark.slow
def test_a_shard_that_stalls_does_not_keep_the_command_from_ending(tmp_path, swatches, small):
    data, run = shards(tmp_path / "shards", swatches / "train"), tmp_path / "run"
    options = ["--data.path", str(data), "--data.timeout", "8", *LONG]
    command = [sys.executable, "-m", "msbreg", "pretrain", "--run.dir", str(run), *small, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(run, 4, lambda: process.poll() is None, lambda: process.communicate()[1])
        stall(data / "02.tar")
        _, errors = process.communicate(timeout=BOUND)
    finally:
        process.kill()
    assert process.returncode == 2, errors
    assert "02.tar:" in errors and "is still being read after 8 s" in errors and "Traceback" not in errors


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_a_read_that_takes_long_but_ends_changes_nothing(tmp_path, swatches, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    images = tmp_path / "images"
    shutil.copytree(swatches / "train", images)
    loader = ViewLoader(ImageFolder(images), evaluation(16), 8, shuffle=False, backend=backend, threads=1)
    expected = next(loader.batches())
    slow = Path(loader.source.name(5))
    data = slow.read_bytes()
    stall(slow)
    writer = threading.Timer(0.5, slow.write_bytes, [data])
    writer.start()
    batch = next(loader.batches(stop=1))
    writer.join()
    assert batch.index.tolist() == expected.index.tolist() and torch.equal(batch.views[0], expected.views[0])
    loader.close()


def test_no_thread_outlives_the_loader_but_the_stalled_one(tmp_path, swatches):
    images = tmp_path / "images"
    shutil.copytree(swatches / "train", images)
    before = set(threading.enumerate())
    loader = ViewLoader(ImageFolder(images), evaluation(16), 8, shuffle=False, threads=1, timeout=0.5)
    stall(Path(loader.source.name(5)))
    with pytest.raises(DataError, match=f"{Path(loader.source.name(5)).name} is still being read after 0.5 s"):
        next(loader.batches())
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.batches())
    deadline = time.monotonic() + BOUND
    while len(left := set(threading.enumerate()) - before) > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert {thread.name.split("_")[0] for thread in left} == {"read", "draw"} and all(thread.daemon for thread in left)
    Path(loader.source.name(5)).write_bytes(b"")  # the stalled read ends, and its thread with it
    for thread in left:
        thread.join(BOUND)
        assert not thread.is_alive()


# A process that fails.


@pytest.fixture(scope="module")
def killed(tmp_path_factory, start_ranks) -> Ranks:
    """A run of which rank 1 was killed after the checkpoint of step 4."""
    ranks = start_ranks(tmp_path_factory.mktemp("killed") / "run", "--optim.steps", 40)
    ranks.reach(6)
    ranks.processes[1].kill()
    ranks.end(0, 1)
    return ranks


def test_a_rank_that_is_killed_ends_the_other(killed):
    assert killed.end(0, 1) == [2, -signal.SIGKILL]
    error = killed.error(0)
    assert "rank 0 of 2 gave up: " in error and "another one is gone" in error
    assert ".py, line " in error  # which collective it was
    assert torch.load(killed.folder / "checkpoint.pt", weights_only=True)["step"] >= 4


def test_after_a_kill_the_same_command_goes_on(tmp_path, killed, start_ranks):
    folder = tmp_path / "run"
    shutil.copytree(killed.folder, folder)
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    ranks = start_ranks(folder, "--optim.steps", 40)
    assert ranks.end(0, 1) == [0, 0], ranks.text()
    assert f"going on from step {step} of 40" in ranks.text()
    rows = [row["step"] for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "train"]
    assert rows == list(range(2, 41, 2))


@pytest.mark.slow
def test_a_rank_that_is_killed_under_torchrun_ends_the_run(tmp_path, small, free_port):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port),
        "-m", "msbreg", "pretrain", "--run.dir", str(tmp_path), *small, *LONG,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(tmp_path, 4, lambda: process.poll() is None, lambda: process.communicate()[1])
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (rank_1,) = [int(pid) for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(rank_1, signal.SIGKILL)
        _, errors = process.communicate(timeout=BOUND)
    finally:
        process.terminate()
    assert process.returncode != 0
    assert "error: rank 0 of 2 gave up: " in errors and "Signal 9 (SIGKILL)" in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "status", "why"),
    [
        ([], -signal.SIGUSR1, "as torchrun is gone"),  # which it does not pass on unless it is told to
        (["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1"], 1, "by a signal"),
    ],
)
def test_a_signal_to_torchrun_lets_all_ranks_save(tmp_path, small, free_port, options, status, why):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port),
        *options, "-m", "msbreg", "pretrain", "--run.dir", str(tmp_path), *small, *LONG,
        "--run.checkpoint_every", "100000",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(tmp_path, 4, lambda: process.poll() is None, lambda: process.communicate()[1])
        process.send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=BOUND)  # which the ranks hold open
    finally:
        process.kill()
    assert process.returncode == status and f"stopped {why} at step" in errors
    assert 4 <= load_step(tmp_path) < 4000


@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_other_after_the_timeout(tmp_path, start_ranks):
    ranks = start_ranks(tmp_path / "run", "--run.timeout", 30, *LONG)
    ranks.reach(4)
    os.kill(ranks.processes[1].pid, signal.SIGSTOP)
    assert ranks.end(0) == [2]
    assert "another one did not answer in 30 s (--run.timeout)" in ranks.error(0)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_never_come_together(monkeypatch, free_port, rank):
    for name, value in {
        "RANK": rank,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(MSBRegError, match=f"rank {rank} could not join the 2 processes of the run: .*imed out"),
        Processes("cpu", timeout=1),
    ):
        pass


@pytest.mark.parametrize(("option", "value"), [("--run.timeout", "0"), ("--data.timeout", "-1")])
def test_timeouts_that_cannot_be(capsys, option, value):
    assert main(["pretrain", option, value]) == 2
    assert f"error: {option} is " in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_said():
    words = "the memory of this machine does not suffice for another 1125899906842624 bytes: lower --data.batch_size"
    with pytest.raises(MSBRegError, match=words), Processes("cpu"):
        torch.empty(2**50, dtype=torch.uint8)


# A full disk, on the rank that writes.


@pytest.mark.parametrize("file", ["checkpoint.pt", "metrics.jsonl"])
def test_a_disk_that_fills_on_rank_0_ends_both_and_harms_no_checkpoint(tmp_path, killed, start_ranks, file):
    folder = tmp_path / "run"
    shutil.copytree(killed.folder, folder)
    before = (folder / "checkpoint.pt").read_bytes()
    limit, options = len(before) // 2, []
    if file == "metrics.jsonl":
        rows = [row for row in read_metrics(folder / file) if row["step"] <= load_step(folder)]
        limit, options = sum(len(json.dumps(row)) + 1 for row in rows) + 100, ["--run.checkpoint_every", 1000]
    ranks = start_ranks(folder, "--optim.steps", 40, *options, file_size_limit=limit)
    assert ranks.end(0, 1) == [2, 2]
    assert file in ranks.error(0) and "File too large" in ranks.error(0)
    assert "rank 0 could not save" in ranks.error(1) or "another one is gone" in ranks.error(1)
    assert (folder / "checkpoint.pt").read_bytes() == before


def load_step(folder: Path) -> int:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["step"]


# An image that one rank alone comes across.


def test_an_unreadable_image_on_one_rank_changes_nothing_else(tmp_path, swatches, small, start_ranks):
    data = tmp_path / "images"
    shutil.copytree(swatches, data)
    position = 16 + 3  # of the first step's 32 images, rank 1 has the last 16
    bad = Path(ImageFolder(data / "train").name(int(permutation(240, seed=0, epoch=0)[position])))
    bad.write_bytes(bad.read_bytes()[:-100])
    options = ["--data.path", str(data), "--optim.steps", "6"]
    assert main(["pretrain", "--run.dir", str(tmp_path / "one"), *small, *options]) == 0
    ranks = start_ranks(tmp_path / "two", *options)
    assert ranks.end(0, 1) == [0, 0], ranks.text()
    assert bad.name in ranks.logs[1].read_text()

    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert one["unreadable_images"] == two["unreadable_images"] == 1
    one, two = (
        [row for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["event"] == "train"]
        for name in ("one", "two")
    )
    for mine, theirs in zip(two, one, strict=True):
        for name in ("loss", "centroid", "singular_value", "brownian"):
            assert mine[name] == pytest.approx(theirs[name], rel=5e-3, abs=2e-3), (mine["step"], name)
