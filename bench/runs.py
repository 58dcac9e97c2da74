"""Runs of `msbreg pretrain` that a comparison is made of: each in a folder of its own, stopped by the clock, resumed.

Also what results files say of where they are from, and their tables.

What ran to its end is not run again, and what was stopped goes on from its checkpoint. A finished run keeps its
summary, metrics and curves; its weights, half a gigabyte for a ResNet-18 with its checkpoints, are deleted.
"""

import ctypes
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from usage import gpu_state

import msbreg
from msbreg.machine import usable_cores

__all__ = [
    "RunError",
    "commit",
    "end_with_parent",
    "failed",
    "finished",
    "markdown",
    "percent",
    "processor",
    "provenance",
    "train",
    "versions",
]

ROOT = Path(__file__).resolve().parents[1]
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
        "machine": {"processor": processor(), "cores": os.cpu_count()}
        | ({"gpu": gpu_state(torch.device("cuda"))} if gpu else {}),
        "summary": summary,
    }
    temporary = place / f"{RECORD}.partial"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, place / RECORD)
    for weights in (*place.glob("checkpoint*"), *place.glob("backbone.*")):
        weights.unlink()
    return record


def provenance(script: str, data: object, device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Where the figures of this process are from, for a results file; nothing of this machine's folders.

    Args:
        script: which one it is.
        data: what the command line calls the images.
        device: that was measured.
        packages: whose versions matter, beside `versions`; None in the record for one that is not installed.
    """
    installed = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    return {
        "command": shlex.join(["python", script, *(without_folder(word, str(data)) for word in sys.argv[1:])]),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": versions() | {name: installed.get(name) for name in packages},
        "processor": processor(),
        "cores": usable_cores(),
        "load_before": os.getloadavg(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def without_folder(word: str, data: str) -> str:
    """A word of a command line, of an absolute path only the name; where it is the images, IMAGES."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    if value == data:
        value = "IMAGES"
    elif os.path.isabs(value):
        value = Path(value).name
    return f"{option}{equals}{value}"


def commit() -> str:
    """The checkout's commit, with a plus where files differ from it; empty where git does not say."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Of what makes the figures."""
    return {"msbreg": msbreg.__version__, "torch": torch.__version__, "python": platform.python_version()}


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def percent(shares: Sequence[float]) -> str:
    """Mean of some shares and, of two and more, their standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}" if shares else ""


def markdown(header: list[str], rows: Iterable[list[str]], *, text: int = 1) -> str:
    """A Markdown table whose columns after the first `text` ones are numbers, and stand to the right."""
    rule = ["---" if column < text else "---:" for column in range(len(header))]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|" for cells in (header, rule, *rows))
