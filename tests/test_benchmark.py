"""`msbreg bench`: its figures are of one step each, on a clock that moves on by hand."""

from types import SimpleNamespace

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

from msbreg.benchmark import milliseconds
from msbreg.cli import main
from msbreg.data import ViewLoader
from msbreg.step import TrainingStep


def test_figures_are_of_one_step(monkeypatch, small, capsys):
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
    assert main(["bench", "--steps", "3", *small]) == 0
    said = capsys.readouterr()
    rows = [line.strip("| ").split("|") for line in said.out.splitlines()]
    found = {name.strip(): value.strip() for name, value in rows}
    assert found["loader alone"] == "250.0 ms  128 images/s  256 views/s"
    assert found["step alone"] == "500.0 ms  64 images/s  128 views/s"
    assert found["both"] == "750.0 ms  43 images/s  85 views/s"
    assert found["loss, forward and backward alone"] == "125.0 ms  25.0% of the step"
    assert said.err.startswith("loader alone: 250.0 ms\nstep alone: 500.0 ms\nboth: 750.0 ms\nloss, ")


def test_small_times_have_two_digits():
    assert [milliseconds(1e-3 * time) for time in (1234.56, 1.26, 0.34, 0.034)] == [
        "1234.6 ms", "1.3 ms", "0.34 ms", "0.034 ms"
    ]  # fmt: skip


def test_no_steps_are_none_to_time(small, capsys):
    assert main(["bench", "--steps", "0", *small]) == 2
    assert "--steps is 0, but must be at least 1" in capsys.readouterr().err
