"""What several test files share."""

import contextlib
import os
import resource
import socket
from importlib.util import find_spec
from pathlib import Path

import pytest

# Tests compute little each: threads would only wait for each other. Subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def patch_once_a_launch() -> None:
    """Halves what Triton's interpreter takes, which at every call of a function in a kernel looks through its language.

    What it finds the first time it has replaced already; a launch puts all back at its end.
    """
    from triton.runtime import interpreter

    launch, patch, patched = interpreter.GridExecutor.__call__, interpreter._patch_lang, set()

    def launch_and_forget(*args, **kwargs):
        patched.clear()
        try:
            return launch(*args, **kwargs)
        finally:
            patched.clear()

    def patch_unless_done(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_and_forget, patch_unless_done


if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    patch_once_a_launch()


def pytest_configure(config: pytest.Config) -> None:
    """Under TRITON_INTERPRET=1 only the tests of kernels run, unless -m says otherwise: others have torch's bounds."""
    if os.environ.get("TRITON_INTERPRET") == "1" and config.option.markexpr == "not slow":  # pyproject.toml's
        config.option.markexpr = "interpreter and not slow"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need a GPU where there is none; kernels run in Triton's interpreter, too."""
    if item.get_closest_marker("gpu") and not item.get_closest_marker("interpreter"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no NVIDIA GPU")


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
