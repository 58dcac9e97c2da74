"""Checkpoints that survive a kill, a full disk and a damaged file.

A checkpoint is written to a temporary name, synced to the disk and renamed, so that `checkpoint.pt` is at every
moment whole or not there; the one before it stays as `checkpoint.previous.pt`.
"""

import contextlib
import errno
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from msbreg.errors import MSBRegError, is_of_memory
from msbreg.files import reason, sync_folder, whole_file

__all__ = [
    "FORMAT", "holds_one", "keep_checkpoint", "kept_in", "load_checkpoint", "load_run", "read_run", "save_checkpoint",
]  # fmt: skip

FORMAT = 3
NAME, PREVIOUS, DAMAGED = "checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged.pt"
PARTS = {
    "step": int, "images": int, "fingerprint": str, "processes": int, "config": dict, "method": dict, "optimizer": dict,
    "unreadable": dict,
    "seconds": float, "waited": float, "results": dict,
}  # fmt: skip
"""What every checkpoint holds, and of which type it is."""


class DamagedError(MSBRegError):
    """A checkpoint that is not there, or not with the bytes that were written."""


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Writes `state` as the run's newest checkpoint.

    Args:
        folder: the run folder.
        state: PARTS and more: tensors, numbers, strings and containers of them, as `torch.load(weights_only=True)`
            takes them.

    Raises:
        MSBRegError: where it cannot be written; the checkpoints that were there are untouched.
    """
    newest, previous = folder / NAME, folder / PREVIOUS
    try:
        with whole_file(newest) as temporary:
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            if newest.exists():
                os.replace(newest, previous)
        sync_folder(folder)
    except (MSBRegError, OSError) as error:
        kept = (
            f"the checkpoint of an earlier step is intact in {folder}" if holds_one(folder) else "there was none before"
        )
        raise MSBRegError(
            f"cannot save the checkpoint {newest}: {reason(error)}; {kept}. "
            "Once it can be written, run the same command again to go on from there."
        ) from error


def keep_checkpoint(folder: Path, step: int, *, anew: bool = True) -> None:
    """Keeps a copy of the newest checkpoint, which is of that step, under a name of its own.

    Args:
        folder: the run folder.
        step: of the checkpoint.
        anew: whether it takes the place of one that was kept before; else that is left, and none is made of nothing.

    Raises:
        MSBRegError: where that is impossible.
    """
    kept = folder / f"checkpoint-{step}.pt"
    if not anew and (kept.exists() or not (folder / NAME).exists()):
        return
    # No link: whoever copies an earlier one to checkpoint.pt, to go back, would change what is kept here too.
    with whole_file(kept) as temporary, open(folder / NAME, "rb") as newest, open(temporary, "wb") as file:
        shutil.copyfileobj(newest, file)
        file.flush()
        os.fsync(file.fileno())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads one checkpoint to the CPU, without running any code that it may carry.

    Raises:
        MSBRegError: where the file is missing, damaged, unreadable, too large for the memory, or none of msbreg's.
    """
    try:
        with zipfile.ZipFile(path) as file:  # by its checksums, which torch.load does not look at
            if file.testzip() is not None:
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DamagedError(f"there is no checkpoint {path}.") from error
    except Exception as error:  # damaged names, sizes and pickles make zipfile and torch raise nearly anything
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_of_memory(error)):
            raise MSBRegError(f"cannot read the checkpoint {path}: this machine's memory does not suffice.") from error
        # EINVAL is zipfile going to where a damaged directory points.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise MSBRegError(f"cannot read the checkpoint {path}: {error.strerror}.") from error
        raise DamagedError(f"{path} cannot be read as a checkpoint: it is cut short or damaged.") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise MSBRegError(f"{path} is not a checkpoint of msbreg, or of a version with another format than {FORMAT}.")
    for name, kind in PARTS.items():
        if not isinstance(state.get(name), kind):
            raise MSBRegError(f"{path} is not a checkpoint of msbreg: its {name!r} is missing or no {kind.__name__}.")
    return state


def holds_one(folder: Path) -> bool:
    """Whether a run folder has a checkpoint, whole or not."""
    return (folder / NAME).exists() or (folder / PREVIOUS).exists()


def kept_in(folder: Path) -> list[Path]:
    """The checkpoints that `keep_checkpoint` has kept in a run folder, by step."""
    steps = {path: path.stem.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*.pt")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def load_run(folder: Path, *, to_go_on: bool = False) -> dict[str, Any] | None:
    """The newest whole checkpoint of a run folder, or None where it holds none.

    Falls back to the previous checkpoint, with a warning, where the newest is damaged.

    Args:
        folder: the run folder.
        to_go_on: whether the run will save here: then a damaged newest one is moved aside, since the next save would
            put it in the place of the previous one, which is good.

    Raises:
        MSBRegError: where there are checkpoints and none can be read, or reading the newest fails.
    """
    newest, previous = folder / NAME, folder / PREVIOUS
    if not holds_one(folder):
        return None
    try:
        return load_checkpoint(newest)
    except DamagedError as error:
        if not previous.exists():
            raise MSBRegError(
                f"{error} There is no earlier one in {folder}; delete it to start from the beginning."
            ) from error
        state = load_checkpoint(previous)
        warnings.warn(f"{error} Going on from the one before it, step {state['step']}.", stacklevel=2)
        if to_go_on:
            with contextlib.suppress(FileNotFoundError):
                os.replace(newest, folder / DAMAGED)
        return state


def read_run(path: Path) -> dict[str, Any]:
    """The checkpoint of a run folder, as `load_run` has it, or the one that a file holds.

    Raises:
        MSBRegError: there is none, or it cannot be read.
    """
    if not path.exists():
        raise MSBRegError(f"there is no run folder or checkpoint {path}.")
    state = load_run(path) if path.is_dir() else load_checkpoint(path)
    if state is None:
        raise MSBRegError(f"the folder {path} holds no checkpoint; a run writes checkpoint.pt there.")
    return state
