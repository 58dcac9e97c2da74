"""Runs of `msbreg pretrain` that a comparison is made of: each in a folder of its own, stopped by the clock, resumed.

What ran to its end is not run again, and what was stopped goes on from its checkpoint. A finished run keeps its
summary, metrics and curves; its weights, half a gigabyte for a ResNet-18 with its checkpoints, are deleted.
"""

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from records import commit, gpu_state, processor, versions

from msbreg.machine import usable_cores

__all__ = ["RunError", "end_with_parent", "failed", "finished", "train"]

RECORD = "run.json"
FAILED = "failed.txt"
CLOCK = time.monotonic
GRACE = 20.0
"""Seconds that a run has to save itself once it is told to stop."""
LIBC = ctypes.CDLL(None)  # loaded here, since between fork and exec a process should do little
PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


class RunError(Exception):
    """A run that failed, or a folder that holds another run."""


def finished(place: Path) -> dict[str, Any] | None:
    """The record of the run in a folder: its options, where it ran, its summary; None where none has finished."""
    record = place / RECORD
    return json.loads(record.read_text()) if record.exists() else None


def failed(place: Path) -> str | None:
    """How the last try at the run in a folder failed; None where it did not, or was stopped."""
    reason = place / FAILED
    return reason.read_text() if reason.exists() and finished(place) is None else None


def train(
    place: Path, options: list[str], *, data: str | None = None, deadline: float = math.inf, **about: Any
) -> dict[str, Any] | None:
    """Runs `msbreg pretrain`, or goes on with it, until it ends or time is up.

    Args:
        place: its run folder.
        options: those that make the run what it is.
        data: its images; apart from the options, since a later call may find them elsewhere. None: rendered ones.
        deadline: when it has to stop and save itself, by `CLOCK`.
        **about: goes into the record as it is.

    Returns:
        What `finished` returns; None where time was up.

    Raises:
        RunError: the run failed, or the folder holds one with other options.
    """
    record = finished(place)
    if record is None and launch(place, options, data, deadline):
        record = keep_record(place, options, about)
    if record is not None and record["options"] != options:
        raise RunError(f"{place} holds a run with other options; choose another folder")
    return record


def launch(place: Path, options: list[str], data: str | None, deadline: float) -> bool:
    """Starts a process that trains; whether it came to the end. Its words go to log.txt, a failure to `FAILED`."""
    place.mkdir(parents=True, exist_ok=True)
    (place / FAILED).unlink(missing_ok=True)
    command = [sys.executable, "-m", "msbreg", "pretrain", "--run.dir", str(place), *options]
    command += ["--data.path", data] if data else []
    with open(place / "log.txt", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent)
        try:
            while process.poll() is None and deadline > CLOCK():
                time.sleep(0.1)
        finally:
            stopped = process.poll() is None
            if stopped:
                stop(process)
    if process.returncode == 0 and (place / "summary.json").exists():
        return True
    if not stopped:
        said = (place / "log.txt").read_text(errors="replace").strip().splitlines()
        reason = said[-1] if said and process.returncode >= 0 else f"its process ended with status {process.returncode}"
        hidden = reason.replace(str(place), place.name)  # results say nothing of this machine's folders
        (place / FAILED).write_text(hidden.replace(data, "IMAGES") if data else hidden)
        raise RunError(f"{place} has not come to its end: {reason}")
    return False


def end_with_parent(_worker: int = 0) -> None:
    """Has this process killed when the thread that started it ends, in whatever way.

    A run would go on by itself, beside the next one, and a worker that is stopped could not see that nobody needs it.
    """
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: subprocess.Popen) -> None:
    """Lets a run save itself, and kills it where that takes too long: then it goes on from an earlier checkpoint."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def keep_record(place: Path, options: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """Writes the record of a run that has ended, and deletes its weights."""
    summary = json.loads((place / "summary.json").read_text())
    gpu = summary["device"] != "cpu" and torch.cuda.is_available()
    record = {
        **about,
        "options": options,
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "machine": {"processor": processor(), "cores": usable_cores()}
        | ({"gpu": gpu_state(torch.device("cuda"))} if gpu else {}),
        "summary": summary,
    }
    temporary = place / f"{RECORD}.partial"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, place / RECORD)
    for weights in (*place.glob("checkpoint*"), *place.glob("backbone.*")):
        weights.unlink()
    return record
