"""`msbreg` and `python -m msbreg`; torchrun starts the latter: `torchrun --nproc-per-node 8 -m msbreg pretrain ...`."""

import sys

__all__ = ["run"]


def run() -> int:
    """Runs the command line. Where the packages of the `train` extra are missing, only `msbreg doctor` works."""
    try:
        from msbreg.cli import main
    except ModuleNotFoundError as error:
        if sys.argv[1:] != ["doctor"]:
            print(f"error: the command line needs {error.name}: pip install 'msbreg[train]'.", file=sys.stderr)
            return 2
        from msbreg.doctor import report

        print(report())
        return 0
    return main()


if __name__ == "__main__":
    sys.exit(run())
