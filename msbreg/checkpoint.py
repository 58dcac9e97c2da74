"""Checkpoints that survive a kill, a full disk and a cut file.

A checkpoint is written to a temporary name, synced to the disk and renamed, so that `checkpoint.pt` is whole at every
moment; the one before it stays as `checkpoint.previous.pt`.
"""

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from msbreg.errors import MSBRegError

__all__ = ["FORMAT", "holds_one", "load_checkpoint", "load_run", "save_checkpoint"]

FORMAT = 2
NAME, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Writes `state` as the run's newest checkpoint.

    Args:
        folder: the run folder.
        state: tensors, numbers, strings and containers of them: what `torch.load(weights_only=True)` takes.

    Raises:
        MSBRegError: where it cannot be written; the checkpoints that were there are untouched.
    """
    newest, previous, temporary = folder / NAME, folder / PREVIOUS, folder / (NAME + ".partial")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if newest.exists():
            os.replace(newest, previous)
        os.replace(temporary, newest)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        kept = (
            f"the checkpoint of an earlier step is intact in {folder}" if newest.exists() else "there was none before"
        )
        raise MSBRegError(
            f"cannot save the checkpoint {newest}: {reason(error)}; {kept}. "
            "Make room and run the same command again to go on from there."
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one checkpoint to the CPU, without running any code that it may carry.

    Raises:
        MSBRegError: where the file is missing, damaged, or none of msbreg's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MSBRegError(f"there is no checkpoint {path}.") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        size = path.stat().st_size if path.is_file() else 0
        raise MSBRegError(
            f"{path} ({size:,} bytes) cannot be read as a checkpoint: it is cut short or damaged."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise MSBRegError(f"{path} is not a checkpoint of msbreg (format {FORMAT}).")
    return state


def holds_one(folder: Path) -> bool:
    """Whether a run folder has a checkpoint, whole or not."""
    return (folder / NAME).exists() or (folder / PREVIOUS).exists()


def load_run(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run folder, or None where it holds none.

    Falls back to the previous checkpoint, with a warning, where the newest is damaged.

    Raises:
        MSBRegError: where there are checkpoints and none can be read.
    """
    newest, previous = folder / NAME, folder / PREVIOUS
    if not holds_one(folder):
        return None
    try:
        return load_checkpoint(newest)
    except MSBRegError as error:
        if not previous.exists():
            raise MSBRegError(
                f"{error} There is no earlier one in {folder}; delete it to start from the beginning."
            ) from error
        state = load_checkpoint(previous)
        warnings.warn(f"{error} Going on from the one before it, step {state['step']}.", stacklevel=2)
        return state


def sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """The operating system's words where an error carries them."""
    while error is not None:
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        last, error = error, error.__cause__ or error.__context__
    return str(last).splitlines()[0]
