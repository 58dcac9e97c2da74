"""The benchmark of the loaders: all make the views of the recipe, take turns, and are compared round by round."""

import importlib.util
import json
import math
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchvision")

import loader as bench
from torchvision.transforms import v2

from msbreg.data import View, open_source
from msbreg.data.recipes import MEAN, STD
from msbreg.data.rendered import render

SCRIPT = Path(__file__).resolve().parents[1] / "bench" / "loader.py"
SIZE, BATCH = 32, 32
RECIPE = (View(size=SIZE, sigma=(0.5, 2.0)), View(size=SIZE, blur=0.0, solarize=0.5, grayscale=0.5, area=(0.3, 0.6)))
needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="DALI is not installed")
ALL = [pytest.param(name, marks=needs_dali) if name == "msbreg" else name for name in bench.LOADERS]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = render(tmp_path_factory.mktemp("images") / "rendered", images=96, test_images=0, size=SIZE)
    return bench.Case(open_source(folder / "train"), RECIPE, BATCH, 1, torch.device("cpu"))


@pytest.fixture
def opened(case):
    """Opens a loader by name, and closes it in the end."""
    found = []

    def open_(name, recipe=RECIPE):
        torch.manual_seed(0)
        found.append(bench.LOADERS[name].open(case._replace(recipe=recipe)))
        return found[-1]

    yield open_
    for loader in found:
        loader.close()


@pytest.fixture(scope="module")
def expected(case):
    """Views of each block by msbreg's loader without DALI, which other tests compare with torchvision's functions."""
    loader = bench.LOADERS["msbreg-torchvision"].open(case)
    yield views_of(loader)[0]
    loader.close()


def describe(views):
    """What views of one block look like on average: (N, 3, H, W), values 0 to 1."""
    grey = (views.amax(1) - views.amin(1)).flatten(1)
    return {
        "brightness": float(views.mean()),
        "red and blue": float((views[:, 0] - views[:, 2]).square().mean().sqrt()),
        "contrast": float(views.std((2, 3)).mean()),
        "spread of brightness": float(views.mean((1, 2, 3)).std()),
        "grey": float((grey.amax(1) < 0.01).float().mean()),
        "dark": float((views.flatten(1).amax(1) < 127.6 / 255).float().mean()),
        "edges": float(views.diff(dim=3).abs().mean()),
    }


TOLERANCE = {"brightness": 0.04, "red and blue": 0.02, "contrast": 0.02, "spread of brightness": 0.03}
TOLERANCE |= {"grey": 0.1, "dark": 0.12, "edges": 0.01}
"""Some three standard deviations of what 384 views show, and what contrast about another grey makes of them."""


def views_of(loader, batches=12):
    """Those of each block, (N, 3, H, W), values 0 to 1, and the tensors of one batch."""
    with loader.running() as stream:
        taken = [next(stream) for _ in range(batches)]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    blocks = [torch.cat(batch).chunk(len(RECIPE)) for batch in taken]
    return [torch.cat(block) * std + mean for block in zip(*blocks, strict=True)], taken[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_views_are_those_of_the_recipe(opened, expected, name):
    blocks, batch = views_of(opened(name))
    shapes = [(BATCH, 3, SIZE, SIZE)] * 2 if name in bench.BASES else [(2 * BATCH, 3, SIZE, SIZE)]
    assert [tuple(views.shape) for views in batch] == shapes
    assert all(views.dtype == torch.float32 for views in batch)
    for block, other in zip(blocks, expected, strict=True):
        looks, should = describe(block), describe(other)
        assert [key for key in looks if abs(looks[key] - should[key]) > TOLERANCE[key]] == [], (looks, should)
    assert describe(blocks[1])["dark"] - describe(blocks[0])["dark"] > 0.2  # half of them are solarized


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_a_loader_works_in_its_turn_and_rests_in_others(opened, case, name):
    others = set(multiprocessing.active_children())
    loader = opened(name, (View(size=128),) * 2)  # large enough that work left over would show
    first, second = (bench.turn(loader, case, seconds=0.2) for _ in range(2))
    before = loader.cpu_seconds()
    time.sleep(0.3)
    assert loader.cpu_seconds() - before < 0.1
    for one in (first, second):
        assert one.batches >= 1 and one.seconds >= 0.2
        assert 0.05 < 1e3 * one.cpu_seconds / (one.batches * BATCH * len(RECIPE)) < 100
    assert len(set(multiprocessing.active_children()) - others) == (case.threads if name in bench.BASES else 0)


def test_cpu_time_of_another_process():
    spin = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", spin], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert 0.48 < bench.cpu_seconds_of(process.pid) < 0.7
        process.stdin.close()


def parameters(chain):
    """Those of each transform that something random goes into, with its probability."""
    found = {}
    for step in chain.transforms[:-4]:  # the last ones make a normalised tensor
        inner = step.transforms[0] if isinstance(step, v2.RandomApply) else step
        name, values = type(inner).__name__, vars(inner)
        found[name] = {key: tuple(values[key]) if key == "sigma" else values[key] for key in NAMES[name]}
        found[name] |= {"p": step.p} if hasattr(step, "p") else {}
    return found


NAMES = {
    "RandomResizedCrop": ("size", "scale", "ratio", "interpolation", "antialias"),
    "ColorJitter": ("brightness", "contrast", "saturation", "hue"),
    "RandomGrayscale": (),
    "GaussianBlur": ("kernel_size", "sigma"),
    "PillowBlur": ("sigma",),
    "RandomSolarize": ("threshold",),
    "RandomHorizontalFlip": (),
}
OTHER = View(
    size=16, area=(0.3, 0.6), ratio=(0.5, 2.5), interpolation="linear", jitter=0.7, brightness=0.3, contrast=0.15,
    saturation=0.25, hue=0.05, grayscale=0.45, blur=0.35, sigma=(0.2, 1.1), solarize=0.55, flip=0.65,
)  # fmt: skip


def test_the_baseline_has_the_recipes_parameters_and_the_smallest_window():
    cubic, linear = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
    byol = {
        "RandomResizedCrop": {
            "size": (224, 224), "scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "interpolation": cubic, "antialias": True
        },
        "ColorJitter": {
            "brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1), "p": 0.8
        },
        "RandomGrayscale": {"p": 0.2},
        "GaussianBlur": {"kernel_size": (13, 13), "sigma": (0.1, 2.0), "p": 1.0},
        "RandomHorizontalFlip": {"p": 0.5},
    }  # fmt: skip
    assert parameters(bench.transform(View(), pillow_blur=False)) == byol
    blurred = parameters(bench.transform(View(), pillow_blur=True))
    assert blurred.pop("PillowBlur") == {"sigma": (0.1, 2.0), "p": 1.0}
    assert blurred == {name: step for name, step in byol.items() if name != "GaussianBlur"}
    assert parameters(bench.transform(OTHER, pillow_blur=False)) == {
        "RandomResizedCrop": {
            "size": (16, 16), "scale": (0.3, 0.6), "ratio": (0.5, 2.5), "interpolation": linear, "antialias": True
        },
        "ColorJitter": {
            "brightness": (0.7, 1.3), "contrast": (0.85, 1.15), "saturation": (0.75, 1.25), "hue": (-0.05, 0.05),
            "p": 0.7,
        },
        "RandomGrayscale": {"p": 0.45},
        "GaussianBlur": {"kernel_size": (9, 9), "sigma": (0.2, 1.1), "p": 0.35},
        "RandomSolarize": {"threshold": 128, "p": 0.55},
        "RandomHorizontalFlip": {"p": 0.65},
    }  # fmt: skip


def test_only_what_a_recipe_asks_for_is_applied():
    plain = View(size=8, jitter=0, grayscale=0, blur=0, solarize=0, flip=0)
    names = [type(step).__name__ for step in bench.transform(plain, pillow_blur=False).transforms]
    assert names == ["RandomResizedCrop", "ToImage", "Lambda", "ToDtype", "Normalize"]
    assert bench.loaders((plain,)) == ["torchvision", "msbreg", "msbreg-torchvision"]
    assert bench.loaders(RECIPE) == list(bench.LOADERS)


def test_figures_are_medians_and_ratios_within_a_round(case):
    turns = {
        "torchvision": [bench.Turn(1, 1.0, 2.0), bench.Turn(1, 2.0, 2.0), bench.Turn(2, 2.0, 8.0)],
        "msbreg": [bench.Turn(3, 1.0, 1.0), bench.Turn(2, 1.0, 1.0), bench.Turn(10, 1.0, 1.0)],
    }
    torchvision, ours = bench.rows(case, turns)
    assert ours["images_per_second"] == {"median": 3 * BATCH, "min": 2 * BATCH, "max": 10 * BATCH}
    assert ours["views_per_second"]["median"] == 6 * BATCH
    assert ours["speed_over"] == {"torchvision": {"median": 4, "min": 3, "max": 10}}
    assert math.isclose(torchvision["cpu_ms_per_view"]["median"], 1e3 * 2.0 / (2 * BATCH))
    assert ours["cpu_time_over"]["torchvision"]["median"] == pytest.approx(1 / 6)
    assert torchvision["speed_over"]["torchvision"] == {"median": 1, "min": 1, "max": 1}


def test_workers_that_would_have_no_room_for_their_batches_are_left_out(swatches, monkeypatch, capsys):
    bench.require_shared_memory(1, 1000)
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: SimpleNamespace(free=3e9))
    bench.require_shared_memory(2, 10**9 // 2)
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)
    command = ["loader.py", "--data", swatches, "--size", "224", "--batch", "64", "--views", "4", "--threads", "16"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--device", "cpu", "--loaders", "torchvision"])
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    bench.main()
    said = capsys.readouterr().out
    assert "Left out: torchvision with 4 views: the batches of 16 workers need 4.9 GB of shared memory, but" in said


def test_what_was_measured_is_shown_where_it_is_interrupted(swatches, monkeypatch, capsys):
    turns = iter([{"torchvision": [bench.Turn(10, 1.0, 2.0)]}])
    monkeypatch.setattr(bench, "measure", lambda *_, **__: next(turns))
    monkeypatch.setattr(bench.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["loader.py", "--data", str(swatches), "--device", "cpu", "--threads", "1"])
    with pytest.raises(StopIteration):
        bench.main()
    assert "| 2 | torchvision | 2,560 " in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@needs_dali
def test_the_command_writes_what_it_measured(swatches, tmp_path):
    path = tmp_path / "results" / "loader.json"
    command = [
        sys.executable, SCRIPT, "--data", swatches, "--size", "16", "--batch", "16", "--images", "48",
        "--views", "2", "3", "--threads", "1", "--device", "cpu", "--rounds", "2", "--seconds", "0.01", "--json", path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    named = [(row["views"], row["loader"]) for row in result["rows"]]
    assert named == [(k, name) for k in (2, 3) for name in ("torchvision", "msbreg", "msbreg-torchvision")]
    assert all(len(row["turns"]) == 2 and row["cpu_ms_per_view"]["min"] > 0 for row in result["rows"])
    assert result["images"]["count"] == 48 and result["versions"]["torch"] == torch.__version__
    assert "--data IMAGES --size 16" in result["command"] and "--json loader.json" in result["command"]
    assert str(swatches) not in path.read_text() and str(tmp_path) not in path.read_text()
    assert result["left_out"] == {}
    assert done.stdout.strip() == bench.table(result)
    assert "| 3 | msbreg |" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_without_dali_the_others_that_are_asked_for_are_measured(swatches, tmp_path):
    path = tmp_path / "loader.json"
    hidden = "import runpy, sys; sys.modules['nvidia.dali'] = None; sys.path.insert(0, sys.argv[1]); del sys.argv[:2]"
    command = [
        sys.executable, "-c", f"{hidden}; runpy.run_path(sys.argv[0], run_name='__main__')", SCRIPT.parent, SCRIPT,
        "--data", swatches, "--size", "16", "--batch", "16", "--images", "48", "--views", "2", "--threads", "1",
        "--device", "cpu", "--rounds", "1", "--seconds", "0.01", "--json", path, "--loaders", "msbreg", "torchvision",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert [row["loader"] for row in result["rows"]] == ["torchvision"]
    assert "DALI cannot be imported" in result["left_out"]["msbreg"]
    assert "Left out: msbreg: DALI cannot be imported" in done.stdout and "msbreg is left out" in done.stderr


@pytest.mark.slow
def test_the_command_says_what_is_wrong():
    done = subprocess.run([sys.executable, SCRIPT, "--data", "/nowhere"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.strip() == "no such folder or file: /nowhere"
