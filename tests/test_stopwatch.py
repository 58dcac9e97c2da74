"""Seconds of training alone."""

from types import SimpleNamespace

import torch

from msbreg.stopwatch import Stopwatch


def test_seconds_of_training_leave_out_what_is_between_and_go_on_after_a_resume(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("msbreg.stopwatch.time", clock)
    watch = Stopwatch(torch.device("cpu"), 50.0, 1.0)
    for _ in range(2):
        watch.start()
        clock.now += 2
        watch.stop()
        clock.now += 7
    assert watch.seconds == 54
    watch.start()
    with watch.waiting():
        clock.now += 1
    assert watch.lap() == (5, 1)
    clock.now += 3
    assert watch.lap() == (3, 0)
