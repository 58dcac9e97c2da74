"""Every command and every example of the README runs: commands on small images, for a few steps."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted(page.relative_to(ROOT) for page in (ROOT / "docs").glob("*.md"))
SET_UP = ("make ", "python3 -m venv", ".venv/bin/", "TRITON_INTERPRET=1 ")  # what .ci/run does on a fresh clone
SHORT = [
    "--optim.steps", "2", "--eval.bank", "50", "--eval.queries", "30", "--data.batch_size", "16", "--eval.every", "0",
    "--model.hidden", "16", "--run.device", "cpu",
]  # fmt: skip
SMALL = ["--data.size", "32", "--data.recipe", "cifar"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, swatches) -> Path:
    """A working folder with the images that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("photos", "imagenet"):
        (folder / name).symlink_to(swatches)
    return folder


def runnable(command: str, port: int) -> list[str]:
    words = shlex.split(command)
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(port), *words[1:]]
        words[words.index("8")] = "2"
    else:
        assert words[0] == "msbreg"
        words = [sys.executable, "-m", *words]
    if "pretrain" in words or "bench" in words:
        words += SHORT + (SMALL if "--config" in words else [])
        words += ["--model.backbone", "convnet"] if "resnet50" in command else []
    return words


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith(SET_UP)])
def test_command(command, folder, free_port):
    done = subprocess.run(
        runnable(command, free_port), cwd=folder, capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr


def test_set_up_commands_are_the_makefiles():
    written = [command for command in COMMANDS if command.startswith(SET_UP)]
    assert {"make demo", "make test"} <= set(written)
    plain = [command for command in written if not command.startswith("make")]
    for target, line in (("demo", "pretrain"), ("test", "pytest")):
        steps = subprocess.run(
            ["make", "--dry-run", "--always-make", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert line in steps
        assert any(line in command for command in plain)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_python_examples(folder, monkeypatch, free_port):
    monkeypatch.chdir(folder)
    if not Path("runs/photos/backbone.pt").exists():  # which one example loads, and the commands before it made
        test_command(next(command for command in COMMANDS if "--run.dir runs/photos" in command), folder, free_port)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        namespace: dict = {}
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), namespace)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.isfinite(namespace["mmcr"])


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "bench/README.md", *map(str, DOCS)])
def test_what_pages_link_is_there(page):
    """Files, and headings of pages under the names that forges give them."""
    for target in re.findall(r"\]\(((?!http)[^)\s]+)\)", (ROOT / page).read_text()):
        file, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / file if file else ROOT / page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
            assert names.count(anchor) == 1, target  # of two alike a browser goes to the first
