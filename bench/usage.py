"""What a call uses of a GPU beside time: memory and launches."""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Call
from torch.profiler import ProfilerActivity, profile

__all__ = ["launches", "launches_in", "peak_memory"]


def peak_memory(make: Callable[[], Call]) -> int:
    """Bytes allocated at the most above what was there before, while a call is made ready and runs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make()()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Call) -> int:
    """Kernels, copies and fills that a call has the GPU do."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return launches_in(json.loads(path.read_text()))


def launches_in(trace: dict) -> int:
    """Those in a profiler's trace; annotations of its are on the GPU's track too, and are not counted."""
    return sum(event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") for event in trace["traceEvents"])
