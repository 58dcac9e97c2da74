"""How far a run is, where there is no terminal."""

from types import SimpleNamespace

import pytest

pytest.importorskip("tqdm", reason="this needs the extra [train]")

from msbreg.progress import Progress


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that moves on by hand."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("msbreg.progress.time", clock)
    return clock


def test_the_time_left_is_of_the_steps_since_the_resume(clock, capsys):
    progress = Progress(100, 50, shown=True)
    for _ in range(10):
        progress.step()
    clock.now += 9
    progress.show(loss=0.5)
    assert capsys.readouterr().err == ""
    clock.now += 11
    progress.show(loss=0.5)
    assert capsys.readouterr().err == "step 60/100  loss 0.5  80 s left\n"


def test_ranks_other_than_the_first_say_nothing(clock, capsys):
    progress = Progress(100, 0, shown=False)
    progress.say("going on")
    clock.now += 60
    progress.show(loss=0.5)
    assert capsys.readouterr().err == ""
