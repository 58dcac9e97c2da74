"""bench/run_gpu.sh runs what it means to, and says what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = """#!{python}
import json, os, sys
if sys.argv[1:] == ["-c", "import xdist"]:
    sys.exit("NO_XDIST" in os.environ)
elif sys.argv[1] == "-c" and "rendered" in sys.argv[2] and "NO_ROOM" in os.environ:
    sys.exit(3)
elif sys.argv[1] == "-c":
    print("pictures" if "rendered" in sys.argv[2] else "some-gpu")
else:
    with open(os.environ["CALLS"], "a") as file:
        print(json.dumps([sys.argv[1:], os.environ.get("PYTHONPATH")]), file=file)
"""
"""In the place of Python: says that there is a GPU, and notes what is to be run."""


@pytest.fixture
def planned(tmp_path):
    """A function to the commands that a part of run_gpu.sh would run."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "python").write_text(STAND_IN.format(python=sys.executable))
    (tmp_path / "python").chmod(0o755)

    def commands(part):
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls")}
        subprocess.run([tmp_path / "bench" / "run_gpu.sh", part], env=environment, capture_output=True, timeout=100)
        return [json.loads(line)[0] for line in (tmp_path / "calls").read_text().splitlines()]

    return commands


@pytest.mark.parametrize(("part", "count"), [("training", 6), ("loader", 5)])
def test_the_gpu_script_gives_msbreg_what_it_means(planned, part, count):
    pytest.importorskip("jsonargparse")
    from msbreg.cli import config_from, parse

    commands = planned(part)
    assert len(commands) == count
    for command in commands:
        if command[:2] == ["-m", "msbreg"]:
            name, arguments = command[2], command[2:]
            config = config_from(parse(arguments)[name])
            assert config.data.batch_size == 256 and (name == "bench" or "--dry-run" in arguments)
    if part == "training":
        views = [config_from(parse(command[2:])["pretrain"]).data.views for command in commands]
        assert views == [4, 4, 32, 4, 4, 4]


@pytest.mark.parametrize(("part", "scripts"), [
    ("losses", ["-m pytest tests ", "-m pytest tests/test_bench", "-m pytest bench", *["bench/report.py"] * 2]),
    ("peers", ["bench/peers.py", "bench/peers.py"]),
    ("tiles", ["bench/tiles.py"]),
    ("alternatives", ["bench/operators.py", "bench/pixels.py", "bench/operators.py", "bench/one_launch.py"]),
])  # fmt: skip
def test_the_gpu_script_runs_what_is_there(planned, part, scripts):
    commands = [" ".join(command) for command in planned(part)]
    assert len(commands) == len(scripts)
    assert all(command.startswith(script) for command, script in zip(commands, scripts, strict=True))
    for words in map(str.split, commands):
        script = (ROOT / (words[0] if words[0] != "-m" else "bench/conftest.py")).read_text()
        theirs = ("--benchmark-json", "--ignore", "--maxprocesses")  # pytest's
        options = [word for word in words if word.startswith("--") and word.split("=")[0] not in theirs]
        assert all(f'"{option}"' in script for option in options)


def test_the_gpu_script_runs_tests_one_by_one_without_xdist(planned, monkeypatch):
    assert "-n" in planned("losses")[0]
    monkeypatch.setenv("NO_XDIST", "1")
    first, *_ = planned("losses")[5:]
    assert first[:5] == ["-m", "pytest", "tests", "-m", "gpu"] and "-n" not in first


@pytest.mark.parametrize(("part", "others"), [("loader", 3), ("peers", 1), ("alternatives", 3)])
def test_a_part_without_its_photographs_says_so_and_runs_the_rest(planned, monkeypatch, tmp_path, part, others):
    monkeypatch.setenv("NO_ROOM", "1")
    assert len(planned(part)) == others
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "CALLS": str(tmp_path / "calls")}
    assert subprocess.run([tmp_path / "bench" / "run_gpu.sh", part], env=environment, capture_output=True).returncode


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("part", "said"), [("training", "torch finds none here"), ("everything", "usage:")])
def test_the_gpu_script_says_what_is_wrong(part, said):
    command, environment = [ROOT / "bench" / "run_gpu.sh", part], os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and said in done.stderr


def test_the_gpu_script_says_that_its_python_has_no_torch(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without site-packages
    python.chmod(0o755)
    command, environment = [ROOT / "bench" / "run_gpu.sh"], os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "which has no torch; PYTHON=... names one that has" in done.stderr


HIDDEN = """
import importlib.abc
import sys


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jsonargparse", "nvidia", "PIL", "safetensors", "torchvision", "tqdm", "yaml"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
"""


def test_the_tests_of_the_losses_need_no_trainer(tmp_path):
    (tmp_path / "hidden.py").write_text(HIDDEN)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "hidden",
        "tests",
        "--collect-only",
        "-q",
        "-m",
        "gpu or interpreter",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "test_kernels_losses.py" in done.stdout and "error" not in done.stdout
