"""`msbreg pretrain --dry-run`: two steps, and what they say of a whole run."""

import contextlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

import torch

from msbreg.cli import main
from msbreg.config import Config, packaged_configs
from msbreg.data import ImageFolder, ViewLoader
from msbreg.dry_run import PIXELS_ON_A_CPU, dry_run
from msbreg.errors import MSBRegError
from msbreg.files import read_yaml
from msbreg.methods import build_method
from msbreg.preflight import require_processes
from msbreg.step import TrainingStep

TINY = ["--model.backbone", "convnet", "--model.hidden", "32", "--model.dim", "16", "--run.device", "cpu"]


def table(text: str) -> dict[str, str]:
    rows = [line.strip("|").split("|") for line in text.strip().splitlines()]
    return {name.strip(): value.strip() for name, value in rows}


def test_the_default_runs_with_its_whole_batch(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--dry-run", "--run.device", "cpu", "--json", str(tmp_path / "figures.json")]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["images a step, of all processes"] == "128"
    assert rows["steps of the run, 5,000 images"] == "312"
    trained = sum(weight.numel() for weight in build_method(Config()).parameters() if weight.requires_grad)
    assert rows["parameters trained"] == f"{trained / 1e6:.1f} M"
    assert float(rows["step 2, s"]) > 0 and float(rows["loading a batch of 32-pixel images, s"]) > 0
    assert float(rows["peak memory of a process, MB"].replace(",", "")) > 100
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert f"{kept['figures']['steps_s'][1]:.3f}" == rows["step 2, s"] and kept["figures"]["steps_of_the_run"] == 312
    assert kept["options"] == {"run.device": "cpu"}
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]  # no run folder


def test_the_networks_have_as_many_threads_as_in_the_run():
    config = Config()
    config.run.threads, config.run.device = torch.get_num_threads() + 1, "cpu"
    config.data.batch_size = config.model.hidden = config.model.dim = 8
    try:
        dry_run(config)
        assert torch.get_num_threads() == config.run.threads
    finally:
        torch.set_num_threads(config.run.threads - 1)


@pytest.mark.parametrize("file", packaged_configs().values(), ids=packaged_configs())
def test_every_number_of_a_config_has_its_source(file):
    numbers = re.findall(r"^ +\w+: [\d.].*$", file.read_text(), re.MULTILINE)
    assert len(numbers) > 15 and [line for line in numbers if not re.search(r"# \S+", line)] == []


@pytest.mark.parametrize("name", [name for name in packaged_configs() if name.startswith("imagenet-")])
def test_the_moving_average_remembers_as_many_images_as_byols(name):
    """Whose tau of .99 is for batches of 4096."""
    options = read_yaml(packaged_configs()[name])
    assert options["method"]["tau"] == pytest.approx(0.99 ** (options["data"]["batch_size"] / 4096), abs=5e-5)


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_recipe(name, capsys):
    """With a network that a CPU has time for; everything else is the recipe's."""
    stem = ["--model.stem", "imagenet"]
    assert main(["pretrain", "--dry-run", "--config", name, *TINY, *stem, "--model.precision", "fp32"]) == 0
    rows = table(capsys.readouterr().out)
    steps = {
        "imagenet-resnet50-100ep": ("1,281,167", 100 * (1281167 // 1024)),
        "imagenet-resnet50-300ep": ("1,281,167", 300 * (1281167 // 1024)),
        "imagenet100-resnet18": ("126,689", 400 * (126689 // 256)),
        "cifar10-resnet18": ("50,000", 200 * (50000 // 256)),
    }
    images, total = steps[name]
    assert rows[f"steps of the run, {images} images"] == f"{total:,}"
    assert ", measured with " in rows["images a step, of all processes"]


def test_hours_are_those_of_the_whole_batch(swatches, monkeypatch):
    """On a clock that moves on by hand: steps that take 4, 3, ... seconds, and batches that take a quarter."""
    clock, step, batches = SimpleNamespace(now=0.0), TrainingStep.__call__, ViewLoader.batches
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("msbreg.dry_run.time", clock)

    def stepping(*arguments):
        clock.now += 4 - arguments[-1]
        return step(*arguments)

    def loading(*arguments):
        for batch in batches(*arguments):
            clock.now += 0.25
            yield batch

    monkeypatch.setattr(TrainingStep, "__call__", stepping)
    monkeypatch.setattr(ViewLoader, "batches", loading)
    config = Config()
    config.data.path, config.data.size, config.data.batch_size = str(swatches), 64, 200
    config.model.hidden, config.model.dim, config.run.device = 32, 16, "cpu"
    config.optim.epochs, config.data.views = 5000.0, 4
    rows = table(dry_run(config))
    with_images = PIXELS_ON_A_CPU // (4 * 64**2)
    assert rows["images a step, of all processes"] == f"200, measured with {with_images}"
    part = f", measured with {with_images}"
    assert (rows[f"first step{part}, s"], rows[f"step 2{part}, s"]) == ("4.0", "3.000")
    assert rows[f"loading a batch of its images{part}, s"] == "0.250"
    projected = rows["hours of the run, projected from the sum of step and loading"].replace(",", "")
    assert float(projected) == pytest.approx(5000 * 3.25 * 200 / with_images / 3600, abs=0.05)
    assert config.data.batch_size == 200


def test_the_loader_is_timed_on_images_of_the_run_where_there_are_any(swatches, monkeypatch, capsys):
    names, read = [], ImageFolder.read

    def noting(source: ImageFolder, index: int) -> bytes:
        names.append(source.name(index))
        return read(source, index)

    monkeypatch.setattr(ImageFolder, "read", noting)
    for path, said in (([], "32-pixel images"), (["--data.path", str(swatches)], "its images")):
        names.clear()
        assert main(["pretrain", "--dry-run", *TINY, *path]) == 0
        assert f"loading a batch of {said}" in capsys.readouterr().out
        assert names and all(name.startswith(str(swatches / "train")) == bool(path) for name in names)


def test_images_that_the_run_sets_aside_do_not_count(swatches, capsys):
    """A tenth of a labelled folder without held-out images beside it is kept for evaluation."""
    path = str(swatches / "train")
    options = ["--data.path", path, "--data.batch_size", "36", "--optim.epochs", "10"]
    assert main(["pretrain", "--dry-run", *TINY, *options]) == 0
    assert table(capsys.readouterr().out)["steps of the run, 216 images"] == "60"


TWO_SIZES = "- {size: 16}\n- {size: 12}\n"


@pytest.mark.parametrize("command", [["pretrain"], ["pretrain", "--dry-run"], ["bench", "--steps", "1"]], ids=" ".join)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.path", "/nowhere/at/all"], "no such folder or file: /nowhere/at/all"),
        (["--data.batch_size", "1000"], "a batch of 1,000 images cannot be filled from the 240 of "),
        (["--data.recipe", "multi_crop", "--data.views", "4", "--method.leave_one_out", "true"], "several sizes"),
        (["--data.recipe", "TWO_SIZES", "--method.name", "byol"], "several sizes"),
        (["--model.backbone", "squeezenet1_1"], "squeezenet1_1 does not take images of 16 pixels"),
        (["--model.cuda_graph", "true", "--data.path", "nowhere"], "cuda_graph needs a GPU"),  # said first
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_stops_the_run_stops_a_dry_run_too(command, options, words, tmp_path, small, capsys):
    (tmp_path / "sizes.yaml").write_text(TWO_SIZES)
    options = [str(tmp_path / "sizes.yaml") if option == "TWO_SIZES" else option for option in options]
    assert main([*command, *small, "--run.dir", str(tmp_path / "run"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


def test_an_epoch_of_too_few_images():
    config = Config()
    config.data.images, config.run.device = 100, "cpu"
    with pytest.raises(MSBRegError, match=r"a batch of 128 images cannot be filled from the 100 of --data\.images"):
        dry_run(config)


@pytest.mark.slow
def test_the_first_process_alone_tells(small, free_port):
    shared = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "msbreg", "pretrain", "--dry-run", *small],
            env=os.environ | {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    rows = table(first)
    assert rows["processes"] == "2" and rows["images a step, of all processes"] == "32"
    assert second == ""


@pytest.mark.gpu
def test_a_graph_is_recorded_before_the_last_step(small, capsys):
    assert main(["pretrain", "--dry-run", *small, "--run.device", "cuda", "--model.cuda_graph", "true"]) == 0
    rows = table(capsys.readouterr().out)
    assert float(rows["step 5, s"]) < float(rows["first step, s"])
    in_use = float(rows["memory in use on its GPU, DALI and others included, MB"].replace(",", ""))
    assert in_use > float(rows["peak memory of torch in a process, MB"].replace(",", ""))


@pytest.mark.parametrize(("device", "world", "refused"), [("cpu", 1, True), ("cuda", 2, True), ("cuda", 1, False)])
def test_a_graph_is_for_one_process_on_a_gpu(device, world, refused):
    config = Config()
    config.model.cuda_graph = True
    processes = SimpleNamespace(device=torch.device(device), world=world)
    with pytest.raises(MSBRegError, match="cuda_graph needs a GPU") if refused else contextlib.nullcontext():
        require_processes(config, processes)
