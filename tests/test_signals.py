"""Signals that ask a run to end, from the first moment of its process to the last."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")


from msbreg import __main__ as command_line
from msbreg import cli, dry_run
from msbreg.signals import StopSignals


@pytest.fixture
def heard(monkeypatch):
    """The signals that come to handlers which were there before."""
    numbers: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: numbers.append(number))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    }
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_noted_and_given_back(heard):
    with StopSignals() as signals:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
            signal.raise_signal(number)
    assert signals.received == [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM] and not heard
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]


def test_a_closed_terminal_is_not_heard_under_nohup(heard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert not signals.received
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_ctrl_c_is_acknowledged_by_the_first_rank_alone(heard, capfd, monkeypatch):
    for rank, said in (("1", ""), ("0", "\nCtrl-C: a run saves itself")):
        monkeypatch.setenv("RANK", rank)
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
            assert not capfd.readouterr().err
        with StopSignals():
            signal.raise_signal(signal.SIGINT)
            assert capfd.readouterr().err[: len("\nCtrl-C: a run saves itself")] == said


def test_a_second_ctrl_c_interrupts(heard):
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_nothing_is_heard_once_the_status_is_settled(heard):
    signals = StopSignals()
    signals.ignore()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
        signal.raise_signal(number)
    assert not heard and not signals.received


def test_whoever_has_interrupted_may_do_so_again(heard):
    signals = StopSignals()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signals.ignore()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL and signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_a_thread_notes_none(heard):
    noted: list[StopSignals] = []
    thread = threading.Thread(target=lambda: noted.append(StopSignals()))
    thread.start()
    thread.join()
    noted[0].ignore()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM] and not noted[0].received


def test_what_has_nothing_to_save_gets_the_signals_that_came_before(heard, monkeypatch):
    monkeypatch.setattr(dry_run, "dry_run", lambda config, file: None)
    signals = StopSignals()
    signal.raise_signal(signal.SIGUSR1)
    assert not heard
    assert cli.main(["pretrain", "--dry-run"], signals) == 0
    assert heard == [signal.SIGUSR1]
    signals.ignore()
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGUSR1, signal.SIGTERM]


@pytest.mark.parametrize("command", ["pretrain", "eval", "export", "bench", "doctor", "--help"])
def test_the_command_line_hears_them_for_a_run_alone(heard, monkeypatch, command):
    def main(signals: StopSignals | None) -> int:
        assert (signals is None) == (command != "pretrain")
        signal.raise_signal(signal.SIGTERM)
        return 3

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(sys, "argv", ["msbreg", command])
    assert command_line.run() == 3
    signal.raise_signal(signal.SIGTERM)  # on the way out
    assert heard == ([] if command == "pretrain" else [signal.SIGTERM, signal.SIGTERM])


def test_the_command_line_hears_them_before_it_loads_torch():
    script = "import msbreg.__main__, sys; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def caught(process: subprocess.Popen) -> int:
    """The signals that a process has handlers for, a bit each."""
    (line,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line]
    return int(line.split()[1], 16)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="this system does not tell who handles what")
def test_signals_while_it_imports_and_while_it_leaves_change_no_status(tmp_path, small):
    """As a scheduler's, which may come at any moment and again at the end of a grace time."""
    command = [sys.executable, "-m", "msbreg", "pretrain", "--run.dir", str(tmp_path), *small]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not caught(process) >> (signal.SIGUSR1 - 1) & 1:
            time.sleep(0.001)
        process.send_signal(signal.SIGUSR1)
        said = iter(process.stderr.readline, "")
        assert any("stopped by a signal before the first step" in line for line in said)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0
    assert not (tmp_path / "checkpoint.pt").exists()
