"""What is installed, and from what."""

import ast
import re
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools")

ROOT = Path(__file__).resolve().parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what packaging reads, so that building leaves nothing behind in the real one."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("msbreg", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*PIP, "wheel", *OFFLINE, "--wheel-dir", folder, checkout], check=True, timeout=120)
    return zipfile.ZipFile(next(folder.glob("msbreg-*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel) -> str:
    return wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()


def test_the_wheel_holds_the_package_the_kernels_and_the_recipes(wheel):
    package = [path.relative_to(ROOT).as_posix() for path in (ROOT / "msbreg").rglob("*.py")]
    kernels = [f"msbreg/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")]
    recipes = [path.relative_to(ROOT).as_posix() for path in (ROOT / "msbreg" / "configs").glob("*.yaml")]
    assert recipes
    typed = ["msbreg/py.typed"]  # without which type checkers pass over the annotations
    assert set(package + kernels + recipes + typed) == {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_the_wheel_has_the_version_the_command_and_torch_alone_as_requirement(wheel, metadata):
    import msbreg

    assert f"Version: {msbreg.__version__}\n" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.9"]
    commands = wheel.read(next(name for name in wheel.namelist() if name.endswith("/entry_points.txt"))).decode()
    assert "msbreg = msbreg.__main__:run" in commands


def test_an_editable_install_finds_the_kernels(checkout, tmp_path):
    subprocess.run([*PIP, "install", *OFFLINE, "--target", tmp_path, "--editable", checkout], check=True, timeout=120)
    # Without site, other installations of msbreg in this environment do not answer.
    script = f"""
import site, sys
site.addsitedir({str(tmp_path)!r})
sys.path += {site.getsitepackages()!r}
import msbreg, msbreg.kernels
print(msbreg.__file__, msbreg.kernels.__file__, "triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"{checkout}/msbreg/__init__.py", f"{checkout}/kernels/__init__.py", "False"]


def test_importing_msbreg_needs_torch_alone():
    others = [
        "triton",
        "nvidia.dali",
        "torchvision",
        "yaml",
        "matplotlib",
        "jsonargparse",
        "PIL",
        "tqdm",
        "safetensors",
    ]
    script = f"""
import sys
import torch
sys.modules |= dict.fromkeys({others!r})  # None makes an import fail
import msbreg, msbreg.evaluation, msbreg.kernels, msbreg.models, msbreg.optim
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_kernels_know_torch_and_triton_alone():
    known = set(sys.stdlib_module_names) | {"torch", "triton"}
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module] if node.level == 0 else []
            else:
                continue
            roots = {name.partition(".")[0] for name in modules if not name.startswith("msbreg.kernels.")}
            assert roots <= known, f"{path.name} line {node.lineno} imports {roots - known}"


def test_kernels_use_nothing_that_interpreter_or_compilers_lack():
    """See CONTRIBUTING.md."""
    banned = re.compile(r"make_block_ptr|tl\.advance|autotune|libdevice|inline_asm|tl\.atomic_(?!add\()")
    for path in (ROOT / "kernels").glob("*.py"):
        assert not banned.findall(path.read_text()), path.name


def test_ruff_is_pinned_alike_wherever_it_is_named():
    hook = re.search(r"ruff-pre-commit\n\s+rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text()).group(1)
    extra = re.search(r"ruff==([\d.]+)", (ROOT / "setup.py").read_text()).group(1)
    assert hook == extra
