"""`msbreg bench`: its figures are of one step each, on a clock that moves on by hand."""

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

import torch

from msbreg.benchmark import milliseconds
from msbreg.cli import main
from msbreg.data import ViewLoader
from msbreg.step import TrainingStep


def test_figures_are_of_one_step(monkeypatch, tmp_path, small, capsys):
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("msbreg.benchmark.time", clock)

    def passes(seconds: float) -> None:
        clock.now += seconds

    def batches(loader: ViewLoader):
        while True:
            passes(0.25)
            yield None

    monkeypatch.setattr(ViewLoader, "batches", batches)
    monkeypatch.setattr(TrainingStep, "__call__", lambda step, batch, number: passes(0.5))
    monkeypatch.setattr(TrainingStep, "loss_alone", lambda step, batch: lambda: passes(0.125))
    file = tmp_path / "new" / "figures.json"
    monkeypatch.setattr(sys, "argv", ["/bin/msbreg", "bench", f"--json={file}", "--data.path", "~/me/swatches"])
    assert main(["bench", "--steps", "3", *small, "--json", str(file)]) == 0
    said = capsys.readouterr()
    rows = [line.strip("| ").split("|") for line in said.out.splitlines()]
    found = {name.strip(): value.strip() for name, value in rows}
    assert found["loader alone"] == "250.0 ms  128 images/s  256 views/s"
    assert found["step alone"] == "500.0 ms  64 images/s  128 views/s"
    assert found["both"] == "750.0 ms  43 images/s  85 views/s"
    assert found["loss, forward and backward alone"] == "125.0 ms  25.0% of the step"
    kept = json.loads(file.read_text())
    assert (
        kept["figures"] | {"steps": 3, "loader_alone_s": 0.25, "step_alone_s": 0.5, "both_s": 0.75} == kept["figures"]
    )
    assert kept["command"] == "msbreg bench --json=figures.json --data.path swatches"
    assert kept["options"]["data.batch_size"] == 32 and kept["options"]["data.path"] == "swatches"
    assert kept["versions"]["torch"] == torch.__version__ and kept["device_name"] == "cpu"
    assert said.err.startswith("loader alone: 250.0 ms\nstep alone: 500.0 ms\nboth: 750.0 ms\nloss, ")


def test_small_times_have_two_digits():
    assert [milliseconds(1e-3 * time) for time in (1234.56, 1.26, 0.34, 0.034)] == [
        "1234.6 ms", "1.3 ms", "0.34 ms", "0.034 ms"
    ]  # fmt: skip


def test_no_steps_are_none_to_time(small, capsys):
    assert main(["bench", "--steps", "0", *small]) == 2
    assert "--steps is 0, but must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["bench", "--json", "."], "--json . is a folder or a device; name a file"),
        (["bench", "--json", "/dev/null"], "--json /dev/null is a folder or a device; name a file"),
        (["bench", "--json="], "--json is empty"),
        (["pretrain", "--json", "a.json"], "--json is for --dry-run; a run leaves its figures in metrics.jsonl"),
        (["bench", "--json", "file/a.json"], "--json file/a.json cannot be written: File exists"),
        (["bench", "--json", "file/b/c.json"], "--json file/b/c.json cannot be written: Not a directory"),
        (["bench", "--json", "/proc/a.json"], "--json /proc/a.json cannot be written: "),
    ],
)
def test_where_figures_cannot_go_is_said_before_they_are_made(command, words, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*command, *small]) == 2
    assert words in capsys.readouterr().err
