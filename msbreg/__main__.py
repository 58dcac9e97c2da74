"""`msbreg` and `python -m msbreg`; torchrun starts the latter: `torchrun --nproc-per-node 8 -m msbreg pretrain ...`.

Little is imported before `run`: `msbreg pretrain` must hear signals before it loads torch, which takes seconds, and
on a busy file system many.
"""

import sys

from msbreg.console import close_console, open_console, say
from msbreg.signals import StopSignals

__all__ = ["run"]


def run() -> int:
    """Runs the command line of this process, with its signals and its output."""
    open_console()
    signals = StopSignals() if sys.argv[1:2] == ["pretrain"] else None
    try:
        return load_and_run(signals)
    finally:
        if signals is not None:
            signals.ignore()
        close_console()


def load_and_run(signals: StopSignals | None) -> int:
    """Runs the command line. Where the packages of the `train` extra are missing, only `msbreg doctor` works."""
    try:
        from msbreg.cli import main
    except ModuleNotFoundError as error:
        if sys.argv[1:] != ["doctor"]:
            say(f"error: the command line needs {error.name}: pip install 'msbreg[train]'.", sys.stderr)
            return 2
        from msbreg.doctor import report

        print(report())
        return 0
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130
    return main(signals=signals)


if __name__ == "__main__":
    sys.exit(run())
