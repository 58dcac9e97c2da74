"""`msbreg pretrain --dry-run`: two steps, and what they say of a whole run."""

import pytest

from msbreg.cli import main
from msbreg.config import Config, packaged_configs
from msbreg.dry_run import PIXELS_ON_A_CPU, dry_run
from msbreg.errors import MSBRegError

TINY = ["--model.backbone", "convnet", "--model.hidden", "32", "--model.dim", "16", "--run.device", "cpu"]


def table(text: str) -> dict[str, str]:
    rows = [line.strip("|").split("|") for line in text.strip().splitlines()]
    return {name.strip(): value.strip() for name, value in rows}


def test_the_default_runs_with_its_whole_batch(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "--dry-run", "--run.device", "cpu"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["images a step, of all processes"] == "128"
    assert rows["steps of the run, 5,000 images"] == "312"
    assert float(rows["second step, s"]) > 0 and float(rows["peak memory a process, MB"].replace(",", "")) > 100
    assert list(tmp_path.iterdir()) == []  # no run folder


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


def test_hours_are_those_of_the_whole_batch(swatches):
    config = Config()
    config.data.path, config.data.size, config.data.batch_size = str(swatches), 64, 200
    config.model.hidden, config.model.dim, config.run.device = 32, 16, "cpu"
    config.optim.epochs, config.data.views = 5000.0, 4
    rows = table(dry_run(config))
    with_images = PIXELS_ON_A_CPU // (4 * 64**2)
    assert rows["images a step, of all processes"] == f"200, measured with {with_images}"
    hours = 5000 * float(rows["second step, s"]) * 200 / with_images / 3600
    assert float(rows["hours of the run, projected"].replace(",", "")) == pytest.approx(hours, rel=0.02, abs=0.1)
    assert config.data.batch_size == 200


def test_it_says_what_is_wrong():
    config = Config()
    config.data.path = "/nowhere/at/all"
    with pytest.raises(MSBRegError, match="/nowhere/at/all"):
        dry_run(config)
