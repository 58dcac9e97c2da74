"""`msbreg pretrain` from the command line: what a run leaves behind, how it resumes, and what it says of bad input."""

import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

import numpy as np
import torch
from PIL import Image
from torch._dynamo.exc import TorchDynamoException

from msbreg import trainer as training
from msbreg.checkpoint import load_checkpoint
from msbreg.cli import main, parse
from msbreg.config import Config
from msbreg.errors import MSBRegError
from msbreg.inputs import open_images
from msbreg.metrics import read_metrics
from msbreg.options import configs_first
from msbreg.processes import Processes
from msbreg.step import TrainingStep
from msbreg.trainer import Trainer

TIMES = {
    "images_per_second", "views_per_second", "data_wait_ms", "step_ms", "memory_mb", "seconds", "processes",
}  # fmt: skip


def pretrain(*options: str, capsys=None) -> int:
    return main(["pretrain", *map(str, options)])


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES}


def outcome(folder: Path) -> tuple[list[dict], dict, dict]:
    """Metrics and summary without times, and the final weights."""
    summary = json.loads((folder / "summary.json").read_text())
    weights = torch.load(folder / "backbone.pt", weights_only=True)
    return [without_times(row) for row in read_metrics(folder / "metrics.jsonl")], without_times(summary), weights


def assert_same_outcome(one: Path, other: Path) -> None:
    (metrics, summary, weights), (metrics_2, summary_2, weights_2) = outcome(one), outcome(other)
    assert metrics == metrics_2
    assert summary == summary_2
    for name, value in weights.items():
        assert torch.equal(value, weights_2[name]), name
    for name in ("backbone.safetensors", "backbone.pt"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert pretrain("--run.dir", folder, *small) == 0
    return folder


def test_a_run_leaves_what_the_readme_promises(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert {
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "checkpoint.pt",
        "backbone.pt",
        "backbone.safetensors",
    } <= names
    assert not [name for name in names if name.endswith(".partial")]
    with Image.open(undisturbed / "curves.png") as picture:
        assert picture.size[0] > 800

    summary = json.loads((undisturbed / "summary.json").read_text())
    for name in ("knn_top1", "knn_top1_untrained", "knn_top1_pixels", "linear_top1"):
        assert 0 < summary[name] <= 1, name
    assert summary["step"] == 12 and summary["seconds"] > 0 and summary["task"] == "labels"
    assert math.isclose(summary["images_per_second"], 12 * 32 / summary["seconds"], rel_tol=1e-6)

    rows = read_metrics(undisturbed / "metrics.jsonl")
    train = [row for row in rows if row["event"] == "train"]
    assert [row["step"] for row in train] == [2, 4, 6, 8, 10, 12]
    for name in (
        "loss", "centroid", "singular_value", "brownian", "lr", "images_per_second", "views_per_second", "data_wait_ms",
        "memory_mb", "embedding_std", "effective_rank", "singular_max", "singular_min", "centroid_norm",
    ):  # fmt: skip
        assert all(isinstance(row[name], float) for row in train), name
    assert [(row["step"], row["task"]) for row in rows if row["event"] == "eval"] == [(0, "labels"), (12, "labels")]


def test_a_run_begins_with_the_weights_of_another_and_goes_on_without_their_file(
    undisturbed, small, tmp_path, monkeypatch, capsys
):
    file, run = tmp_path / "first.safetensors", tmp_path / "run"
    shutil.copy(undisturbed / "backbone.safetensors", file)
    options = ("--run.dir", run, *small, "--run.keep_every", "8", "--model.weights", file)
    assert pretrain(*options) == 0
    assert "| kNN top-1, weights it began with" in capsys.readouterr().out
    before, after = outcome(undisturbed)[1], outcome(run)[1]
    assert after["knn_top1_untrained"] == before["knn_top1"] != before["knn_top1_untrained"]
    assert after["weights"] == str(file) and before["weights"] is None

    shutil.copytree(run, again := tmp_path / "again")
    (again / "checkpoint-8.pt").replace(again / "checkpoint.pt")
    file.unlink()
    monkeypatch.chdir(tmp_path)
    assert pretrain("--run.dir", again, *options[2:-1], file.name) == 0
    assert "going on from step 8 of 12" in capsys.readouterr().err
    assert_same_outcome(again, run)
    text = refusal(capsys, *options[:-1], tmp_path / "other.pt")
    assert f"--model.weights was {file} and is now {tmp_path / 'other.pt'}" in text


def test_tensorboard_has_what_the_metrics_have(tmp_path, small):
    pytest.importorskip("tensorboard", reason="this needs the tensorboard package")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert pretrain("--run.dir", tmp_path, *small, "--run.tensorboard", "true") == 0
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        for name in ("loss", "lr", "effective_rank") if row["event"] == "train" else ("knn_top1",):
            written = {event.step: event.value for event in board.Scalars(f"{row['event']}/{name}")}
            assert written[row["step"]] == pytest.approx(row[name])


def test_python_collects_garbage_only_when_it_is_asked_to_while_a_run_trains(tmp_path, small, monkeypatch):
    collecting, step = [], TrainingStep.__call__

    def observed(*arguments):
        collecting.append(gc.isenabled())
        return step(*arguments)

    monkeypatch.setattr(TrainingStep, "__call__", observed)
    assert pretrain("--run.dir", tmp_path / "whole", *small) == 0
    assert len(collecting) == 12 and not any(collecting) and gc.isenabled() and not gc.get_freeze_count()
    assert pretrain("--run.dir", tmp_path / "ruined", *small, *RUINED) == 2
    assert gc.isenabled() and not gc.get_freeze_count()


def test_without_a_compiler_nothing_is_compiled(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for dry in ([], ["--dry-run"]):
        text = refusal(capsys, *dry, "--run.dir", tmp_path / "run", *small, "--model.compile", "true")
        assert "--model.compile true needs a C++ compiler" in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [[], ["--dry-run"]])
def test_what_cannot_be_built_is_noticed_before_the_images_are_listed(tmp_path, small, monkeypatch, capsys, command):
    for module in ("trainer", "dry_run"):
        monkeypatch.setattr(
            f"msbreg.{module}.open_images", lambda *_, **__: pytest.fail("the images were listed first")
        )
    for option, value, says in (
        ("backbone", "resnet81", "there is no backbone 'resnet81'"),
        ("stem", "cifar", "the stem cifar is for ResNets"),
        ("backbone", "squeezenet1_1", "does not take images of 16 pixels"),
    ):
        assert says in refusal(capsys, *command, "--run.dir", tmp_path / "run", *small, f"--model.{option}", value)


def test_a_batch_that_cannot_be_shared_is_noticed_before_the_images_are_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "open_images", lambda *_, **__: pytest.fail("the images were listed first"))
    processes = Processes("cpu")
    processes.world = 3
    processes.agree = lambda *_: None
    with pytest.raises(MSBRegError, match="which 3 processes cannot share evenly"):
        Trainer(Config(), processes, tmp_path)


def test_missing_weights_are_noticed_before_the_images_are_listed(tmp_path, small, monkeypatch, capsys):
    monkeypatch.setattr("msbreg.trainer.open_images", lambda *_, **__: pytest.fail("the images were listed first"))
    text = refusal(capsys, "--run.dir", tmp_path / "run", *small, "--model.weights", tmp_path / "missing.pt")
    assert f"cannot read weights from {tmp_path / 'missing.pt'} (--model.weights): No such file or directory" in text


def test_the_exported_backbone_is_the_trained_one(undisturbed):
    from safetensors.torch import load_file

    from msbreg.models import build_backbone

    weights = torch.load(undisturbed / "backbone.pt", weights_only=True)
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)["method"]
    assert weights.keys() == load_file(undisturbed / "backbone.safetensors").keys()
    for name, value in weights.items():
        assert torch.equal(value, state[f"online.backbone.{name}"])
    build_backbone("convnet").load_state_dict(weights)


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, small, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir() if path.name != ".lock"}
    metrics = (undisturbed / "metrics.jsonl").read_bytes()
    assert pretrain("--run.dir", undisturbed, *small) == 0
    assert "had finished already" in capsys.readouterr().out
    assert (undisturbed / "metrics.jsonl").read_bytes() == metrics
    after = {path.name: path.stat().st_mtime_ns for path in undisturbed.iterdir() if path.name in before}
    assert {name for name in before if before[name] != after[name]} <= {"metrics.jsonl"}


@pytest.mark.parametrize("content", [b"", b'{"finished": true, "step"', b'{"finished": true, "step": 12}'])
def test_a_finished_run_mends_its_summary(tmp_path, undisturbed, small, content):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").write_bytes(content)
    assert pretrain("--run.dir", tmp_path, *small) == 0
    assert_same_outcome(tmp_path, undisturbed)


def test_a_kill_behind_the_last_evaluation_leaves_one_line_of_it_and_all_seconds(tmp_path, undisturbed, small):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["results"]["finished"]
    state["results"]["evaluated"], state["seconds"], state["waited"] = 0, 1000.0, 100.0
    torch.save(state, tmp_path / "checkpoint.pt")
    assert pretrain("--run.dir", tmp_path, *small) == 0
    assert_same_outcome(tmp_path, undisturbed)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 1000 <= summary["seconds"] < 1100 and summary["data_wait_ms"] == pytest.approx(100_000 / 12)


def test_an_option_that_the_checkpoint_lacks_had_its_default(tmp_path, undisturbed, small, capsys):
    state = torch.load(undisturbed / "checkpoint.pt", weights_only=True)
    del state["config"]["method"]["leave_one_out"]
    torch.save(state, tmp_path / "checkpoint.pt")
    assert pretrain("--run.dir", tmp_path, *small) == 0
    text = refusal(capsys, "--run.dir", tmp_path, *small, "--method.leave_one_out", "true")
    assert "--method.leave_one_out was False and is now True" in text


def test_another_recipe_under_the_same_name_is_noticed(tmp_path, small, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- {blur: 0.0}\n")
    options = ["--run.dir", tmp_path / "run", *small, "--optim.steps", "2", "--data.recipe", recipe]
    assert pretrain(*options) == 0
    recipe.write_text("- {blur: 0.5}\n")
    assert f"--data.recipe {recipe} makes other views than when the run in" in refusal(capsys, *options)
    recipe.write_text("# the same\n- {blur: 0}\n")
    assert pretrain(*options) == 0


@pytest.mark.parametrize(
    ("option", "value", "task"),
    [("--eval.k", "3", "labels"), ("--data.eval_path", "more", "labels"), ("--data.eval_path", "none", "instances")],
)
def test_figures_of_another_evaluation_are_left_out(tmp_path, small, swatches, option, value, task, capsys):
    """A run that goes on with other held-out images or rules: nothing is compared with what they were before."""
    for name, images in (("train", 40), ("test", 40), ("more", 60)):
        in_classes(tmp_path / "images" / name, swatches, "abcd", images)
    options = ["--run.dir", tmp_path / "run", *small, "--data.path", tmp_path / "images", "--run.keep_every", "4"]
    assert pretrain(*options) == 0
    run = tmp_path / "run"
    os.replace(run / "checkpoint-8.pt", run / "checkpoint.pt")
    capsys.readouterr()
    before = json.loads((run / "summary.json").read_text())
    assert pretrain(*options, option, tmp_path / "images" / value if value == "more" else value) == 0
    said = capsys.readouterr()
    assert "other images are evaluated than before, or with other options" in said.err
    assert "raw pixels" in said.out and "untrained network" not in said.out
    summary = json.loads((run / "summary.json").read_text())
    last = [row for row in read_metrics(run / "metrics.jsonl") if row["event"] == "eval"][-1]
    assert "knn_top1_untrained" not in summary and summary["knn_top1_pixels"] == last["knn_top1_pixels"]
    assert summary.get("online_linear_top1") == last.get("online_linear_top1")
    assert summary["task"] == last["task"] == task
    if task == "instances":  # a view's pixels do not tell which image it is of as well as an image's own do
        assert summary["knn_top1_pixels"] < before["knn_top1_pixels"] == 1


def test_a_finished_run_is_described_by_the_task_that_it_had(tmp_path, small, swatches):
    for split in ("train", "test"):
        in_classes(tmp_path / "images" / split, swatches, "ab", 40)
    options = ["--run.dir", tmp_path / "run", *small, "--data.path", tmp_path / "images", "--optim.steps", "1"]
    assert pretrain(*options) == 0
    before = (tmp_path / "run" / "summary.json").read_text()
    (tmp_path / "run" / "summary.json").unlink()
    assert pretrain(*options, "--data.eval_path", "none") == 0
    after = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert after["task"] == "labels" and after["knn_top1"] == json.loads(before)["knn_top1"]


def test_a_checkpoint_that_a_kill_left_unkept_is_kept_when_the_run_goes_on(tmp_path, undisturbed, small):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    assert pretrain("--run.dir", tmp_path, *small, "--run.keep_every", "6") == 0
    assert (tmp_path / "checkpoint-12.pt").read_bytes() == (undisturbed / "checkpoint.pt").read_bytes()


def test_a_compiler_that_a_signal_ended_is_one_sentence(tmp_path, small, monkeypatch, capsys):
    """A terminal's Ctrl-C goes to it, too."""
    step = TrainingStep.__call__

    def interrupted(self, batch, number):
        if number < 5:
            return step(self, batch, number)
        os.kill(os.getpid(), signal.SIGINT)
        raise TorchDynamoException("the compiler failed\nand said much")

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", interrupted)
        text = refusal(capsys, "--run.dir", tmp_path, *small)
    assert "step 6 was not compiled, since a signal came (the compiler failed); the same command goes on from" in text
    assert pretrain("--run.dir", tmp_path, *small) == 0


def test_a_run_is_evaluated_on_its_images_from_any_folder(tmp_path, small, swatches, monkeypatch, capsys):
    for name, classes in (("one/images", "abcd"), ("two/images", "ab")):
        in_classes(tmp_path / name, swatches, classes, 40)
    monkeypatch.chdir(tmp_path / "one")
    assert pretrain("--run.dir", tmp_path / "run", *small, "--data.path", "images", "--optim.steps", "1") == 0
    monkeypatch.chdir(tmp_path / "two")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--run.device", "cpu"]) == 0
    console = capsys.readouterr()
    assert "warning" not in console.err and f"4 of the 40 images of {tmp_path / 'one/images'}" in console.err
    (tmp_path / "one/images/a/0.jpg").rename(tmp_path / "one/images/a/other.jpg")
    assert main(["eval", str(tmp_path / "run"), "--run.device", "cpu"]) == 0
    assert "are not those that the run was trained on" in capsys.readouterr().err


def test_the_folder_of_the_images_is_no_run_folder(tmp_path, small, swatches, capsys):
    images = in_classes(tmp_path / "images", swatches, "ab", 8)
    text = refusal(capsys, "--run.dir", f"{images}/../images", *small, "--data.path", images)
    assert "is the folder of the images" in text and not (images / ".lock").exists()


def test_lines_that_are_no_metrics_are_passed_over(tmp_path):
    good = b'{"event": "train", "step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(
        good + b'\xff\xfe\n[3]\n7\n{}\n{"event": "eval"}\n' + good + b'{"event": "tr'
    )
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 2]


def start(folder: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "msbreg", "pretrain", "--run.dir", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["event"] == "train" and row["step"] >= step for row in read_metrics(folder / "metrics.jsonl")):
            return
        time.sleep(0.005)
    pytest.fail(f"the run never reached step {step}: {process.communicate()}")


LONG = ["--optim.steps", "40", "--eval.every", "1"]


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory, small) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "long"
    assert pretrain("--run.dir", folder, *small, *LONG) == 0
    return folder


def test_a_run_that_goes_on_from_before_its_end_is_not_taken_for_finished(
    tmp_path, small, undisturbed_long, monkeypatch
):
    assert pretrain("--run.dir", tmp_path, *small, *LONG, "--run.keep_every", "20") == 0
    (tmp_path / "checkpoint-20.pt").rename(tmp_path / "checkpoint.pt")

    def dies(trainer: Trainer, stop: list[int]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train", dies)
        assert pretrain("--run.dir", tmp_path, *small, *LONG) == 130
    assert not (tmp_path / "summary.json").exists()
    assert pretrain("--run.dir", tmp_path, *small, *LONG) == 0
    assert_same_outcome(tmp_path, undisturbed_long)


def test_killed_three_times_it_ends_as_if_never_disturbed_bit_for_bit(tmp_path, small, undisturbed_long):
    for step in (6, 18, 30):
        process = start(tmp_path, *small, *LONG)
        wait_for_step(tmp_path, step, process)
        process.kill()
        process.communicate()
        assert not (tmp_path / "summary.json").exists()
    assert pretrain("--run.dir", tmp_path, *small, *LONG) == 0
    assert_same_outcome(tmp_path, undisturbed_long)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_preemption_signal_saves_and_exits_cleanly(tmp_path, small, undisturbed_long, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup would have the process ignore SIGHUP
    process = start(tmp_path, *small, *LONG, "--run.checkpoint_every", "1000")
    signal.signal(number, before)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by a signal at step" in errors
    step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 2 <= step < 40
    assert pretrain("--run.dir", tmp_path, *small, *LONG) == 0
    assert_same_outcome(tmp_path, undisturbed_long)


def test_killed_during_an_evaluation_it_loses_no_step(tmp_path, small, undisturbed_long, monkeypatch):
    measure = Trainer._measure

    def dies(trainer: Trainer, *arguments, **options):
        if trainer.done:
            raise KeyboardInterrupt
        return measure(trainer, *arguments, **options)

    options = [*small, *LONG, "--run.checkpoint_every", "1000"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_measure", dies)
        assert pretrain("--run.dir", tmp_path, *options) == 130
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 == state["results"]["evaluated"] < state["step"]
    assert pretrain("--run.dir", tmp_path, *options) == 0
    assert_same_outcome(tmp_path, undisturbed_long)


def test_a_signal_while_the_run_is_set_up_ends_it_before_its_first_step(tmp_path, small):
    process = start(tmp_path, *small, *LONG)
    while not (tmp_path / ".lock").exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "stopped by a signal before the first step; the same command begins anew" in errors
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("step", [0, 7, 40])
def test_an_evaluation_is_given_up_for_a_signal_and_made_again(
    tmp_path, small, undisturbed_long, monkeypatch, capsys, step
):
    measure = Trainer._measure

    def meets_a_signal(trainer: Trainer, *arguments, **options):
        if trainer.done == step:
            signal.raise_signal(signal.SIGUSR1)
        return measure(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_measure", meets_a_signal)
        assert pretrain("--run.dir", tmp_path, *small, *LONG) == 0
    said = f"at step {step} of 40; the same command goes on from there" if step else "before the first step; the same"
    assert f"stopped by a signal {said}" in capsys.readouterr().err and not (tmp_path / "summary.json").exists()
    if step:
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert state["results"]["evaluated"] < state["step"] == step
    assert pretrain("--run.dir", tmp_path, *small, *LONG) == 0
    assert_same_outcome(tmp_path, undisturbed_long)


BACKBONE = ("backbone.safetensors", "backbone.pt")


def test_a_run_that_begins_in_the_folder_of_another_is_not_taken_for_finished(
    tmp_path, small, undisturbed, monkeypatch
):
    """Whoever looks for summary.json, as docs/slurm.sbatch does, must not take the new run for finished."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for file in tmp_path.glob("checkpoint*.pt"):
        file.unlink()

    def dies(trainer: Trainer, stop: list[int]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train", dies)
    assert pretrain("--run.dir", tmp_path, *small, "--optim.steps", "40") == 130
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "metrics.jsonl", *BACKBONE}  # which is worth keeping


def test_checkpoints_that_an_earlier_run_kept_are_neither_deleted_nor_mixed_with_others(
    tmp_path, small, undisturbed, capsys
):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "checkpoint-12.pt")
    (tmp_path / "checkpoint.previous.pt").rename(tmp_path / "checkpoint-6.pt")
    before = {path.name for path in tmp_path.iterdir()}
    for resume in ("true", "false"):
        text = refusal(capsys, "--run.dir", tmp_path, *small, "--run.resume", resume)
        assert "holds no checkpoint.pt to go on from, but checkpoint-12.pt, which an earlier run has kept" in text
    assert {path.name for path in tmp_path.iterdir()} == before


def test_another_seed_is_another_run(tmp_path, small, undisturbed):
    assert pretrain("--run.dir", tmp_path, *small, "--run.seed", "1") == 0
    assert outcome(tmp_path)[0] != outcome(undisturbed)[0]


@pytest.mark.parametrize(
    "options",
    [
        ["--method.name", "byol"],
        ["--method.name", "simsiam"],
        ["--data.views", "4", "--model.view_chunk", "2", "--method.leave_one_out", "true"],
        ["--method.spectrum", "whitening", "--method.disperse", "predictor", "--optim.name", "sgd"],
        ["--method.spectrum", "coding_rate", "--model.predictor", "false", "--optim.name", "lars"],
        ["--data.recipe", "multi_crop", "--data.views", "4", "--model.precision", "bf16"],
        ["--data.backend", "torchvision"],
    ],
)
def test_options_train(tmp_path, small, options):
    assert pretrain("--run.dir", tmp_path, *small, "--optim.steps", "3", *options) == 0
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["event"] == "train"]
    assert len(rows) == 2 and all(math.isfinite(row["loss"]) for row in rows)


def test_images_without_labels_are_recognised_again(tmp_path, small, swatches):
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, image in enumerate(sorted((swatches / "train").rglob("*.jpg"))[:40]):
        (flat / f"{index}.jpg").symlink_to(image)
    assert pretrain("--run.dir", tmp_path / "run", *small, "--data.path", flat, "--optim.steps", "2") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == "instances" and 0 < summary["knn_top1"] <= 1 and "linear_top1" not in summary


def in_classes(folder: Path, swatches: Path, classes: str, images: int) -> Path:
    """A folder of so many images, spread over classes with names of one letter."""
    for index, image in enumerate(sorted((swatches / "train").rglob("*.jpg"))[:images]):
        (folder / classes[index % len(classes)]).mkdir(parents=True, exist_ok=True)
        (folder / classes[index % len(classes)] / f"{index}.jpg").symlink_to(image)
    return folder


def test_a_tenth_of_labelled_images_is_classified_however_few_a_class_it_has(tmp_path, small, swatches):
    images = in_classes(tmp_path / "images", swatches, "abcd", 40)
    assert pretrain("--run.dir", tmp_path / "run", *small, "--data.path", images, "--optim.steps", "1") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"] == "labels" and summary["images"] == 36


def test_a_run_keeps_its_images_when_more_are_to_be_evaluated(tmp_path, small, swatches, capsys):
    images, run = in_classes(tmp_path / "images", swatches, "abcd", 40), tmp_path / "run"
    options = ["--run.dir", run, *small, "--data.path", images, "--run.keep_every", "4", "--eval.queries"]
    assert pretrain(*options, "2") == 0
    assert json.loads((run / "summary.json").read_text())["images"] == 38
    os.replace(run / "checkpoint-8.pt", run / "checkpoint.pt")
    assert pretrain(*options, "60") == 0
    assert json.loads((run / "summary.json").read_text())["images"] == 38
    capsys.readouterr()
    assert main(["eval", str(run), "--eval.queries", "3", "--run.device", "cpu"]) == 0
    assert "not those that the run was trained on" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classes", "held_out", "words"),
    [
        ("ab", "a", "the 5 held-out images have labels of fewer than two classes."),
        ("abcdefghijkl", "ab", "the 40 training images have labels .* of fewer than 4 images a class."),
    ],
)
def test_labels_that_cannot_be_used_are_said(tmp_path, small, swatches, capsys, classes, held_out, words):
    images = in_classes(tmp_path / "images", swatches, classes, 40)
    others = tmp_path / "others.tsv"
    found = sorted(in_classes(tmp_path / "others", swatches, held_out, 5).rglob("*.jpg"))
    others.write_text("".join(f"{image}\t{image.parent.name}\n" for image in found))
    options = ["--data.path", images, "--data.eval_path", others, "--optim.steps", "1"]
    assert pretrain("--run.dir", tmp_path / "run", *small, *options) == 0
    assert re.search(f"recognised again instead of classified: {words}", capsys.readouterr().err)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["task"] == "instances"


def test_a_recipe_of_another_size_judges_images_without_labels_and_may_be_gone_afterwards(
    tmp_path, small, swatches, capsys, monkeypatch
):
    for image in sorted((swatches / "train").rglob("*.jpg"))[:40]:
        shutil.copy(image, tmp_path / image.name)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("- {size: 24}\n- {size: 24, flip: 0}\n")
    monkeypatch.chdir(tmp_path)
    options = ["--data.path", tmp_path, "--data.recipe", "mine.yaml", "--optim.steps", "1"]
    assert pretrain("--run.dir", tmp_path / "run", *small, *options) == 0
    trained = json.loads((tmp_path / "run" / "summary.json").read_text())
    monkeypatch.chdir("/")
    options[3] = recipe
    assert pretrain("--run.dir", tmp_path / "run", *small, *options) == 0  # the same file by another name
    recipe.unlink()
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    (score,) = re.search(r"recognised again +\| +([\d.]+)%", capsys.readouterr().out).groups()
    assert float(score) == pytest.approx(100 * trained["knn_top1"], abs=0.06)


def test_processes_of_torchrun_train_as_one_does(tmp_path, small, undisturbed, free_port):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port),
        "-m", "msbreg", "pretrain", "--run.dir", str(tmp_path), *small,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["processes"] == 2
    two, one = (
        [row for row in read_metrics(folder / "metrics.jsonl") if row["event"] == "train"]
        for folder in (tmp_path, undisturbed)
    )
    assert [row["step"] for row in two] == [row["step"] for row in one] == [2, 4, 6, 8, 10, 12]
    for mine, theirs in zip(two[:2], one[:2], strict=True):  # then LARS blows rounding up; by how much, the CPU says
        for name in (
            "loss",
            "centroid",
            "singular_value",
            "brownian",
            "effective_rank",
            "singular_max",
            "embedding_std",
        ):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (mine["step"], name)


LEAVES = """
import os, sys
from msbreg.cli import main
assert main(["pretrain", *sys.argv[1:]]) == 0
names = [open(f"/proc/self/task/{number}/comm").read() for number in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in names), names
"""


def test_a_run_leaves_no_threads_of_its_processes(tmp_path, small, free_port):
    """One that has a tensor to release as the interpreter ends would abort a process that is done."""
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port),
        str(tmp_path / "leaves.py"), "--run.dir", str(tmp_path / "run"), *small, "--optim.steps", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_signal_to_torchrun_lets_all_ranks_save(tmp_path, small, free_port):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port),
        "-m", "msbreg", "pretrain", "--run.dir", str(tmp_path), *small, "--optim.steps", "4000",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 4, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert "stopped by a signal at step" in errors
    assert 4 <= torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] < 4000


def test_ranks_ask_about_signals_more_often_than_they_log(tmp_path, small, free_port):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port),
        "-m", "msbreg", "pretrain", "--run.dir", str(tmp_path), *small, "--optim.steps", "400000",
        "--run.log_every", "100000",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.previous.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert "stopped by a signal at step" in errors


def test_eval_and_export(undisturbed, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["eval", str(undisturbed), "--run.device", "cpu", "--json", str(file)]) == 0
    kept, summary = json.loads(file.read_text()), json.loads((undisturbed / "summary.json").read_text())
    for name in ("knn_top1", "linear_top1", "knn_top1_pixels"):
        assert kept["figures"][name] == pytest.approx(summary[name], abs=1e-9), name
    printed = capsys.readouterr().out
    assert f"{summary['knn_top1']:.1%}" in printed and f"{summary['linear_top1']:.1%}" in printed
    assert main(["export", str(undisturbed), "--out", str(tmp_path)]) == 0
    for name, value in torch.load(undisturbed / "backbone.pt", weights_only=True).items():
        assert torch.equal(value, torch.load(tmp_path / "backbone.pt", weights_only=True)[name])


def test_eval_takes_options_that_the_run_did_not_have(undisturbed, monkeypatch, capsys):
    """As on a machine that lacks what the run was trained with."""
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert main(["eval", str(undisturbed), "--data.backend", "dali"]) == 2
    assert "torchvision" in capsys.readouterr().err
    assert main(["eval", str(undisturbed), "--data.backend", "torchvision", "--eval.queries", "7"]) == 0
    (knn,) = re.search(r"kNN top-1 +\| +([\d.]+)%", capsys.readouterr().out).groups()
    assert (7 * float(knn) / 100) % 1 == pytest.approx(0, abs=0.01) or float(knn) > 99


def test_a_tilde_is_the_home_folder(monkeypatch, swatches):
    monkeypatch.setenv("HOME", str(swatches.parent))
    config = Config()
    config.data.path, config.data.eval_path = "~/swatches/train", "~/swatches/test"
    train, held_out = open_images(config, Processes("cpu"))
    assert (len(train), len(held_out)) == (240, 120)


def test_a_folder_does_not_hide_the_recipe_of_its_name(monkeypatch, tmp_path):
    (tmp_path / "cifar10-resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    assert configs_first(["pretrain", "--config", "cifar10-resnet18"])[1].endswith("cifar10-resnet18.yaml")


@pytest.mark.parametrize("option", ["--conf", "--data.view", "--data.batch=4"])
def test_parts_of_names_are_no_options(capsys, option):
    """`--conf` would be a file that wins over options, `--data.view` another way to write --data.views."""
    assert main(["pretrain", *option.split("="), "3"]) == 2
    assert f"there is no option {option.partition('=')[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "written", "meant"),
    [
        ("pretrain", "--batch_size", "--data.batch_size"), ("pretrain", "--data.batch-size=3", "--data.batch_size"),
        ("pretrain", "--lr", "--optim.lr"), ("pretrain", "--dry_run", "--dry-run"), ("bench", "--stps", "--steps"),
        ("bench", "--views", "--data.views"), ("eval", "--bank", "--eval.bank"),
    ],
)  # fmt: skip
def test_an_option_that_there_is_not_is_taken_for_one_that_there_is(capsys, command, written, meant):
    assert main([command, written, "3"]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"), [("pretrain", "--dry"), ("eval", "--method.lambda_s"), ("doctor", "--lr")]
)
def test_what_is_like_no_option_is_left_to_the_parser(capsys, command, option):
    with pytest.raises(SystemExit) as ended:
        main([command, option, "3"])
    assert ended.value.code == 2 and option in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", [["--config", "FILE"], ["--config=FILE"], ["--config", "cifar10-resnet18", "--config", "FILE"]]
)
def test_options_win_over_config_files_wherever_they_stand(tmp_path, config):
    (tmp_path / "config.yaml").write_text("data:\n  batch_size: 1024\n  views: 3\n")
    config = [word.replace("FILE", str(tmp_path / "config.yaml")) for word in config]
    options = parse(["pretrain", "--dry-run", "--data.batch_size", "256", *config, "--data.size", "64"])["pretrain"]
    assert options.dry_run and (options.data.batch_size, options.data.views, options.data.size) == (256, 3, 64)


@pytest.mark.parametrize("command", ["pretrain", "bench"])
def test_what_one_command_prints_is_a_config_of_the_others(tmp_path, capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--data.views", "5", "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    for other in ("pretrain", "bench"):
        assert parse([other, "--config", str(tmp_path / "printed.yaml")])[other].data.views == 5


def test_a_file_may_say_that_a_run_is_none_to_try(tmp_path, small, capsys):
    """As one that an earlier version has printed."""
    (tmp_path / "printed.yaml").write_text("dry_run: false\n")
    assert pretrain("--config", tmp_path / "printed.yaml", "--run.dir", tmp_path / "run", *small) == 0
    assert (tmp_path / "run" / "summary.json").exists()


def test_an_option_that_a_file_has_twice(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data:\n  views: 4\noptim: {lr: 0.1}\ndata:\n  views: 6\n")
    assert f"{tmp_path}/config.yaml has data twice, again in line 4" in refusal(
        capsys, "--config", tmp_path / "config.yaml"
    )


def test_an_option_of_a_file_that_there_is_not_is_taken_for_one_that_there_is(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("data:\n  vews: 4\n")
    text = refusal(capsys, "--config", tmp_path / "config.yaml")
    assert f"{tmp_path}/config.yaml has data.vews, which is no option; did you mean data.views?" in text


def test_a_config_that_is_not_there(capsys):
    for options in (["--config", "nope"], ["--config=nope", "--data.views", "2"]):
        assert "there is no file 'nope' for --config" in refusal(capsys, *options)


# Bad input: one clear sentence, exit status 2, nothing lost.


def refusal(capsys, *options: str) -> str:
    status = pretrain(*options)
    captured = capsys.readouterr()
    assert status == 2
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_no_such_folder(tmp_path, small, capsys):
    missing = tmp_path / "missing"
    assert str(missing) in refusal(capsys, "--run.dir", tmp_path / "run", *small, "--data.path", missing)


def test_empty_folder_and_folder_without_images(tmp_path, small, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in refusal(capsys, "--run.dir", tmp_path / "run", *small, "--data.path", empty)
    (empty / "notes.txt").write_text("no image")
    assert ".jpg" in refusal(capsys, "--run.dir", tmp_path / "run", *small, "--data.path", empty)


def test_a_batch_larger_than_the_data_set(tmp_path, small, capsys):
    text = refusal(capsys, "--run.dir", tmp_path, *small, "--data.batch_size", "1000")
    assert "1,000" in text and "240" in text


def test_one_view_where_two_are_needed(tmp_path, small, capsys):
    text = refusal(capsys, "--run.dir", tmp_path, *small, "--data.views", "1")
    assert "--data.views is 1, but must lie between 2 and 1000" in text


def test_views_of_two_sizes_without_the_own_one(tmp_path, small, capsys):
    options = ["--data.recipe", "multi_crop", "--data.views", "4", "--method.leave_one_out", "true"]
    assert "several sizes" in refusal(capsys, "--run.dir", tmp_path, *small, *options)


def test_three_views_for_byol(tmp_path, small, capsys):
    assert "exactly 2" in refusal(capsys, "--run.dir", tmp_path, *small, "--data.views", "3", "--method.name", "byol")


def test_an_option_that_a_method_does_not_have(tmp_path, small, capsys):
    options = ["--method.name", "byol", "--method.lambda_s", "9"]
    assert "--method.lambda_s is for --method.name msbreg" in refusal(capsys, "--run.dir", tmp_path, *small, *options)


def test_a_config_of_a_data_set_without_it(tmp_path, capsys):
    assert "50,000 images" in refusal(capsys, "--run.dir", tmp_path, "--config", "cifar10-resnet18")
    assert not any(tmp_path.iterdir())


def test_an_unknown_backbone(tmp_path, small, capsys):
    assert "resnet18" in refusal(capsys, "--run.dir", tmp_path, *small, "--model.backbone", "resnet81")


def test_an_unknown_option_and_a_value_of_the_wrong_type(capsys):
    for options, word in ((["--zz", "2"], "--zz"), (["--data.views", "two"], "data.views")):
        with pytest.raises(SystemExit) as exit_:
            pretrain(*options)
        assert exit_.value.code == 2
        assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optim.epochs", "1e308"), ("eval.every", "1e308"), ("run.timeout", "1e300"), ("data.timeout", "1e10"),
        ("optim.steps", "9" * 400), ("optim.lr", "1e300"), ("optim.weight_decay", "1e300"), ("model.dim", "1000000000"),
        ("model.view_chunk", "1" + "0" * 18), ("run.threads", "1000000"), ("data.threads", "-1"), ("eval.k", "0"),
    ],
)  # fmt: skip
def test_numbers_beyond_all_use(capsys, option, value):
    assert f"--{option} is " in refusal(capsys, f"--{option}", value)


@pytest.mark.parametrize(
    ("option", "value"), [("--eval.k", "-1"), ("--data.threads", "-1"), ("--data.threads", "100000")]
)
def test_numbers_that_eval_does_not_take(undisturbed, capsys, option, value):
    assert main(["eval", str(undisturbed), option, value]) == 2
    assert f"error: {option} is {value}, but must lie between " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "export"])
def test_commands_that_are_for_one_process(undisturbed, monkeypatch, capsys, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([command, str(undisturbed)]) == 2
    assert f"error: {command} is for one process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"data: null", "data is None"), (b"data: 3", "data is 3"), (b"\xff\xfe", "is not text"),
        (b"run:\n#  dir: x", "run is None"), (b"", "holds no options"), (b"# run:", "holds no options"),
        (b"- 3", "holds something else"),
    ],
)  # fmt: skip
def test_a_config_file_that_is_none(tmp_path, capsys, content, words):
    (tmp_path / "config.yaml").write_bytes(content)
    assert words in refusal(capsys, "--config", tmp_path / "config.yaml")
    assert words in refusal(capsys, "--config", tmp_path / "config.yaml", "--data.views", "4")


def test_a_group_is_no_option(tmp_path, capsys):
    (tmp_path / "optim.yaml").write_text("lr: 0.1")
    for options in (["--optim", tmp_path / "optim.yaml"], [f"--optim={tmp_path / 'optim.yaml'}"], ["--optim"]):
        assert "--optim is a group of options; give --optim.OPTION VALUE" in refusal(capsys, *options)
    with pytest.raises(SystemExit):
        pretrain("--help")
    printed = capsys.readouterr().out
    assert "--optim.lr" in printed and not re.search("--(run|data|model|method|optim|eval) ", printed)


@pytest.mark.parametrize("option", ["run.dir", "data.path", "data.cache", "model.backbone", "run.device"])
def test_empty_text_is_no_value(monkeypatch, tmp_path, capsys, option):
    monkeypatch.chdir(tmp_path)
    assert f"--{option} is empty; give it a value, or leave it out." in refusal(capsys, f"--{option}", "")
    assert not any(tmp_path.iterdir())


def test_a_package_that_is_missing_is_said_before_anything_is_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = ["--run.dir", tmp_path / "run", "--run.tensorboard", "true"]
    for more in ([], ["--dry-run"]):
        assert "--run.tensorboard needs the tensorboard package" in refusal(capsys, *options, *more)
    assert not any(tmp_path.iterdir())


def test_a_number_of_processes_that_is_none(undisturbed, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "x")
    words = "error: WORLD_SIZE is 'x' in the environment, but must be a whole number"
    for command in (["pretrain"], ["eval", str(undisturbed)]):
        assert main(command) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_command_without_its_run(capsys, command):
    assert main([command]) == 2
    assert f"error: {command} needs a run folder or a checkpoint file" in capsys.readouterr().err


def test_values_that_eval_and_export_do_not_take(undisturbed, capsys):
    with pytest.raises(SystemExit):
        main(["eval", str(undisturbed), "--eval.bank", "abc"])
    printed = capsys.readouterr().err
    assert "eval.bank" in printed and "Union" not in printed
    assert main(["export", str(undisturbed), "--out", ""]) == 2
    assert "--out is empty" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_written(tmp_path, small, capsys):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert "choose another --run.dir" in refusal(capsys, "--run.dir", in_the_way, *small)
    assert "choose another --run.dir" in refusal(capsys, "--run.dir", in_the_way / "run", *small)
    assert "choose another --run.dir" in refusal(capsys, "--run.dir", "/proc/msbreg", *small)


def test_other_images_of_the_same_number(tmp_path, small, swatches, capsys):
    """Their names are others, or their labels; the folder may move."""
    images = {"as before": tmp_path / "a/images", "renamed": tmp_path / "b/images", "relabelled": tmp_path / "c/images"}
    for folder in images.values():
        shutil.copytree(swatches, folder)
    classes = sorted(path.name for path in (swatches / "train").iterdir())
    first = next((images["renamed"] / "train" / classes[0]).iterdir())
    first.rename(first.with_name("another.jpg"))
    moved = next((images["relabelled"] / "train" / classes[0]).iterdir())
    moved.rename(images["relabelled"] / "train" / classes[1] / f"00000-{moved.name}")
    run = ["--run.dir", tmp_path / "run", *small, "--optim.steps", "4"]
    assert pretrain(*run) == 0
    for change in ("renamed", "relabelled"):
        assert "images of other names or labels" in refusal(capsys, *run, "--data.path", images[change])
    assert pretrain(*run, "--data.path", images["as before"], "--model.compile", "true") == 0


def test_checkpoints_are_kept_for_good(tmp_path, small, capsys):
    options = ["--run.dir", tmp_path, *small, "--optim.steps", "7", "--run.checkpoint_every", "1000"]
    assert pretrain(*options, "--run.keep_every", "3") == 0
    names = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert names == ["checkpoint-3.pt", "checkpoint-6.pt", "checkpoint.previous.pt", "checkpoint.pt"]
    assert [load_checkpoint(tmp_path / f"checkpoint-{step}.pt")["step"] for step in (3, 6)] == [3, 6]
    assert main(["eval", str(tmp_path / "checkpoint-3.pt"), "--run.device", "cpu"]) == 0
    assert "step 3" in capsys.readouterr().out


def test_a_warm_up_that_takes_the_whole_run_is_said(tmp_path, small, capsys):
    assert pretrain("--run.dir", tmp_path, *small, "--optim.steps", "4") == 0
    assert "the warm-up, --optim.warmup_epochs 1, takes the whole run" in capsys.readouterr().err


def test_a_thread_may_train(tmp_path, swatches):
    config = Config()
    config.run.dir, config.data.path, config.data.size = str(tmp_path), str(swatches), 16
    config.run.device, config.run.threads, config.data.threads, config.data.batch_size = "cpu", 1, 1, 32
    config.model.hidden, config.model.dim, config.optim.steps, config.eval.linear = 16, 8, 2, False
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(training.pretrain, config).result()["finished"]


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("method.name", "foo", "one of msbreg, byol, simsiam"), ("model.precision", "fp16", "one of auto, fp32"),
        ("data.batch_size", "64", "a whole number"), ("optim.lr", "fast", "a number"), ("data.views", 2.5, "a whole"),
        ("optim.lr", np.float64(0.1), "a number"), ("method.name", np.str_("msbreg"), "one of msbreg"),
        ("data.views", True, "a whole number"), ("model.cuda_graph", 1, "true or false"), ("data.path", 3, "text"),
        ("model.compile", 1, "true or false, or auto"), ("model.compile", "gpu", "true or false, or auto"),
    ],
)  # fmt: skip
def test_a_config_made_in_python_is_checked_as_the_command_line_is(option, value, words):
    config = Config()
    group, name = option.split(".")
    setattr(getattr(config, group), name, value)
    with pytest.raises(MSBRegError, match=f"--{option} is .*, but must be .*{words}"):
        config.validate()


def test_two_runs_in_one_folder(tmp_path, small, capsys):
    process = start(tmp_path, *small, *LONG)
    wait_for_step(tmp_path, 2, process)
    try:
        assert "another process" in refusal(capsys, "--run.dir", tmp_path, *small, *LONG)
    finally:
        process.kill()
        process.communicate()


def test_a_checkpoint_of_another_architecture(undisturbed, small, capsys):
    text = refusal(capsys, "--run.dir", undisturbed, *small, "--model.backbone", "resnet18", "--model.stem", "cifar")
    assert "--model.backbone was convnet and is now resnet18" in text


def test_a_checkpoint_cut_short(tmp_path, small, undisturbed, capsys):
    whole = (undisturbed / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut short or damaged" in refusal(capsys, "--run.dir", tmp_path, *small)
    assert (tmp_path / "checkpoint.pt").stat().st_size == len(whole) // 2
    assert main(["export", str(tmp_path)]) == 2
    assert "cut short or damaged" in capsys.readouterr().err


def test_a_run_folder_that_holds_a_run_when_told_not_to_resume(undisturbed, small, capsys):
    assert "holds a run already" in refusal(capsys, "--run.dir", undisturbed, *small, "--run.resume", "false")


def test_a_disk_that_fills_while_saving(tmp_path, small, undisturbed, capsys, file_size_limit):
    checkpoint_bytes = (undisturbed / "checkpoint.pt").stat().st_size
    assert pretrain("--run.dir", tmp_path, *small, "--data.cache", tmp_path) == 0  # imports write their caches before
    run = tmp_path / "run"
    with file_size_limit(checkpoint_bytes // 2):
        text = refusal(capsys, "--run.dir", run, *small)
    assert "cannot save the checkpoint" in text and "there was none before" in text
    assert pretrain("--run.dir", run, *small) == 0
    assert_same_outcome(run, undisturbed)


def test_a_disk_that_fills_while_exporting(tmp_path, undisturbed, capsys, file_size_limit):
    with file_size_limit(10_000):
        assert main(["export", str(undisturbed), "--out", str(tmp_path)]) == 2
    assert f"cannot write the backbone to {tmp_path}: File too large" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_while_metrics_are_written(tmp_path, small, capsys, file_size_limit):
    with file_size_limit(800):
        text = refusal(capsys, "--run.dir", tmp_path, *small)
    assert "metrics.jsonl" in text and "run the same command again" in text


RUINED = ["--optim.name", "sgd", "--optim.lr", "1e15", "--optim.warmup_epochs", "1"]
"""The first step of a warm-up changes nothing, the second ruins the weights."""


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, small, capsys):
    text = refusal(capsys, "--run.dir", tmp_path, *small, *RUINED, "--run.checkpoint_every", "1")
    assert "not finite in 3 steps in a row" in text and "last good checkpoint is kept" in text
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] in (1, 2)
    assert all(value.isfinite().all() for value in saved["method"].values())


@pytest.mark.parametrize(("bad", "said"), [((3, 4, 6, 7, 9), ""), ((3, 4, 5), "not finite in 3 steps in a row")])
def test_three_losses_in_a_row_end_a_run_and_two_do_not(tmp_path, small, monkeypatch, capsys, bad, said):
    step = TrainingStep.__call__

    def spoilt(own: TrainingStep, batch: object, number: int):
        out = step(own, batch, number)
        return out._replace(loss=out.loss * math.nan) if number in bad else out

    monkeypatch.setattr(TrainingStep, "__call__", spoilt)
    assert pretrain("--run.dir", tmp_path, *small) == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_a_run_that_ends_with_ruined_weights_exports_nothing(tmp_path, small, capsys):
    assert "not finite" in refusal(capsys, "--run.dir", tmp_path, *small, *RUINED, "--optim.steps", "3")
    assert not (tmp_path / "backbone.pt").exists()


def test_bad_images_among_good_ones_are_named_left_out_and_counted(tmp_path, small, swatches, capsys):
    images = tmp_path / "images"
    good = sorted((swatches / "train").rglob("*.jpg"))[:60]
    images.mkdir()
    for index, path in enumerate(good):
        (images / f"good_{index:02}.jpg").symlink_to(path)
    (images / "truncated.jpg").write_bytes(good[0].read_bytes()[:-200])  # its header is whole
    (images / "text.jpg").write_text("this is no image")
    (images / "empty.jpg").write_bytes(b"")
    with Image.open(good[1]) as image:
        image.convert("L").save(images / "gray.jpg")
        image.convert("CMYK").save(images / "cmyk.jpg")
        image.convert("RGBA").save(images / "alpha.png")
    run = tmp_path / "run"
    assert pretrain("--run.dir", run, *small, "--data.path", images) == 0
    captured = capsys.readouterr()
    for name in ("truncated.jpg", "text.jpg", "empty.jpg"):
        assert captured.err.count(name) == 1, captured.err
    for name in ("gray.jpg", "cmyk.jpg", "alpha.png", "/good_"):
        assert name not in captured.err
    assert json.loads((run / "summary.json").read_text())["unreadable_images"] == 3
    assert "unreadable images left out" in captured.out


def test_nothing_but_unreadable_images_ends_with_an_error(tmp_path, small, capsys):
    for index in range(64):
        (tmp_path / f"{index}.jpg").write_text("no image")
    refusal(capsys, "--run.dir", tmp_path / "run", *small, "--data.path", tmp_path)
