"""Standard output and error: what a run says there is for whoever listens, and nobody has to."""

import contextlib
import os
import sys
from typing import TextIO

__all__ = ["GONE", "close_console", "is_terminal", "open_console", "say"]

GONE = (OSError, ValueError)
"""What it raises to write to a pipe that nobody reads, a terminal that is gone, a full disk or a closed file."""


def say(text: str, stream: TextIO | None) -> None:
    """Prints a line, or nothing where that is impossible: it must not end a run."""
    if stream is not None:
        with contextlib.suppress(*GONE):
            print(text, file=stream, flush=True)


def open_console() -> None:
    """Lets this process print any text: what was closed drops it, and characters that an encoding lacks are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        else:
            stream.reconfigure(errors="backslashreplace")


def close_console() -> None:
    """Drops what cannot be written any more, of which Python would make an error, and another status, at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sees it; False where it is closed."""
    return stream is not None and not stream.closed and stream.isatty()
