"""What is printed where nobody can read it: it ends no run, and changes no status."""

import contextlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

from msbreg.cli import main, show_each_warning_once
from msbreg.console import say
from msbreg.progress import Progress


def full():
    return open("/dev/full", "w")


def unread():
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def hung_up():
    master, slave = os.openpty()
    os.close(master)
    return os.fdopen(slave, "w")


def closed():
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    stream.close()
    return stream


def missing():
    return None


def drop(stream) -> None:
    """Closes it, which writes what is left."""
    with contextlib.suppress(OSError):
        stream.close()


@pytest.fixture(params=[full, unread, hung_up, closed, missing], ids=lambda make: make.__name__)
def gone(request):
    """A stream that takes nothing."""
    stream = request.param()
    yield stream
    if stream is not None:
        drop(stream)


def test_lines_and_bars_for_nobody(gone, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", gone)
    monkeypatch.setattr(Progress, "SECONDS_BETWEEN_LINES", 0.0)
    say("a line", gone)
    progress = Progress(3, 0, shown=True)
    for _ in range(3):
        progress.step()
        progress.show(loss=1.0)
        progress.say("a line")
    progress.close()
    assert capsys.readouterr().out == ""  # where print() puts what is for None


def test_a_bar_on_a_terminal_that_hangs_up(monkeypatch):
    master, slave = os.openpty()
    terminal = os.fdopen(slave, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(30, 0, shown=True)
    progress.say("a line")
    shown = b""
    while b"a line" not in shown:  # which a terminal may hand over in pieces
        shown += os.read(master, 4096)
    os.close(master)
    for _ in range(3):
        progress.step()
        progress.show(loss=1.0)
        progress.say("a line")
    progress.close()
    drop(terminal)


def test_warnings_for_nobody(gone, monkeypatch):
    monkeypatch.setattr(sys, "stderr", gone)
    with warnings.catch_warnings():
        show_each_warning_once()
        warnings.warn(f"nobody reads {gone}", stacklevel=1)


def test_a_run_for_nobody(tmp_path, small, gone, monkeypatch):
    if gone is not None and gone.closed and sys.version_info >= (3, 14):
        pytest.skip("argparse asks sys.stdout whether it is a terminal, which a closed file does not answer")
    monkeypatch.setattr(sys, "stdout", gone)
    monkeypatch.setattr(sys, "stderr", gone)
    assert main(["pretrain", "--run.dir", str(tmp_path), *small, "--optim.steps", "2"]) == 0
    assert (tmp_path / "summary.json").exists()
    assert main(["pretrain", "--run.dir", str(tmp_path), *small, "--optim.steps", "3"]) == 2


def test_a_command_for_its_output_says_that_there_is_none(monkeypatch, capsys):
    for stream, status, error in ((unread(), 1, ""), (full(), 2, "error: No space left on device\n")):
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["doctor"]) == status
        assert capsys.readouterr().err == error
        drop(stream)


def command_line(code: str, stdout, **environment: str) -> tuple[int, str]:
    """Exit status and errors of a process that opens and closes the console around the code."""
    script = f"import sys\nfrom msbreg.console import *\nopen_console()\n{code}\nclose_console()\nsys.exit(0)"
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | environment
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdout=stdout, stderr=subprocess.PIPE, timeout=60
    )
    return done.returncode, done.stderr.decode()


def test_what_is_left_in_a_buffer_is_no_error_at_the_end():
    for stream in (full(), unread()):
        assert command_line("print('a line')", stream) == (0, "")
        drop(stream)


def test_characters_that_an_encoding_lacks_are_escaped(tmp_path):
    with open(tmp_path / "out", "w") as file:
        assert command_line("print('n/\\xfc')", file, PYTHONIOENCODING="ascii") == (0, "")
    assert Path(tmp_path / "out").read_text() == "n/\\xfc\n"


def test_closed_descriptors_are_not_given_to_other_files(tmp_path):
    code = f"print('a line')\nopen({str(tmp_path / 'file')!r}, 'w').write(str(sys.stdout.fileno()))"
    script = f'exec {sys.executable} -c "$1" >&- 2>&-'
    whole = f"import sys\nfrom msbreg.console import *\nopen_console()\n{code}\nclose_console()"
    assert subprocess.run(["bash", "-c", script, "bash", whole], timeout=60).returncode == 0
    assert (tmp_path / "file").read_text() == "1"
