"""What this machine gives to this process."""

import math
import os
import resource
import sys
from pathlib import Path

import torch

from msbreg.errors import MSBRegError

__all__ = ["allowed_cores", "gpu_megabytes_in_use", "memory_megabytes", "number_from", "synchronize", "usable_cores"]

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def allowed_cores() -> set[int]:
    """The numbers of the cores that this process may run on: a scheduler may have bound it to some."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """How many cores this process may use: those that it may run on, and no more than its container's quota."""
    cores = len(allowed_cores())
    try:
        quota, period = QUOTA.read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def number_from(variable: str, default: int) -> int:
    """A whole number from the environment.

    Raises:
        MSBRegError: it is none.
    """
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise MSBRegError(
            f"{variable} is {text!r} in the environment, but must be a whole number, as torchrun sets it."
        ) from error


def memory_megabytes(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else 1024 * peak) / 1e6


def gpu_megabytes_in_use(device: torch.device) -> float:
    """MB of a GPU's memory that all programs have taken from it together, or 0; torch gives back nothing it took."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e6


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, where it is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
