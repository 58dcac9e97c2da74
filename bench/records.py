"""What results files hold beside their figures: where these are from, and their spread."""

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import msbreg
from msbreg.machine import usable_cores

__all__ = [
    "cell",
    "commit",
    "gpu_state",
    "keep",
    "percent",
    "processor",
    "provenance",
    "quartiles",
    "spread",
    "versions",
    "without_folder",
]

ROOT = Path(__file__).resolve().parents[1]
STATE = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "temperature.gpu")


def provenance(script: str, data: object, device: torch.device, packages: Sequence[str]) -> dict[str, Any]:
    """Where the figures of this process are from, for a results file; nothing of this machine's folders.

    Args:
        script: which one it is.
        data: what the command line calls the images.
        device: that was measured.
        packages: whose versions matter, see `versions`.
    """
    return {
        "command": shlex.join(["python", script, *(without_folder(word, str(data)) for word in sys.argv[1:])]),
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": versions(*packages),
        "processor": processor(),
        "cores": usable_cores(),
        "load_before": os.getloadavg(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "gpu": gpu_state(device),
    }


def without_folder(word: str, data: str | None = None) -> str:
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


def versions(*packages: str) -> dict[str, str | None]:
    """Of what makes the figures, and of these packages: None for one that is not installed."""
    installed = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    always = {"msbreg": msbreg.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**always, **{name: installed.get(name) for name in packages}}


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def gpu_state(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of the GPU now; empty where it says nothing."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return {}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = [f"--query-gpu={','.join(STATE)}", "--format=csv,noheader", f"--id={uuid}"]
    done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=30)
    values = done.stdout.strip().split(", ")
    return dict(zip(STATE, values, strict=True)) if len(values) == len(STATE) else {}


def percent(shares: Sequence[float]) -> str:
    """Mean of some shares and, of two and more, their standard deviation, in percent."""
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.1f}{spread}" if shares else ""


def spread(values: list[float]) -> dict[str, float]:
    """What `cell` shows."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """What is kept of the rounds of a clock: median, quartiles, and how many there were."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(values)}


def cell(values: dict[str, float] | None, digits: int) -> str:
    """Median, smallest and largest."""
    return "" if values is None else "{:,.{d}f} ({:,.{d}f} to {:,.{d}f})".format(*values.values(), d=digits)


def keep(result: dict[str, Any], file: Path | None) -> None:
    """Writes a result as JSON, in a folder that is made for it; None for nowhere."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
