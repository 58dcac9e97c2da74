"""What several test files share."""

import contextlib
import os
import resource
import socket
from pathlib import Path

import pytest

# Tests compute little each: threads would only wait for each other. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def free_port() -> int:
    """A TCP port on this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def file_size_limit():
    """A context manager in which the kernel refuses to let a file grow beyond a size: a full disk without a disk."""

    @contextlib.contextmanager
    def limited(size: int):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def swatches(tmp_path_factory) -> Path:
    """A small set of the rendered images: 240 to train on, 120 held out."""
    from msbreg.data.rendered import render

    return render(tmp_path_factory.mktemp("images") / "swatches", images=240, test_images=120, size=16)


@pytest.fixture(scope="session")
def small(swatches) -> list[str]:
    """Options of a run on them that takes seconds."""
    return [
        "--data.path", str(swatches), "--data.size", "16", "--data.batch_size", "32", "--optim.steps", "12",
        "--run.checkpoint_every", "4",
        "--run.log_every", "2", "--eval.every", "0", "--eval.bank", "100", "--eval.queries", "60", "--eval.k", "5",
        "--model.hidden", "32", "--model.dim", "16", "--run.threads", "1", "--data.threads", "1", "--run.device", "cpu",
    ]  # fmt: skip
