"""What a call uses of a GPU beside time: memory and launches."""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Call
from torch.profiler import ProfilerActivity, profile

__all__ = ["device_work", "peak_memory", "work_in"]


def peak_memory(make: Callable[[], Call]) -> int:
    """Bytes allocated at the most above what was there before, while a call is made ready and runs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    make()()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def device_work(call: Call) -> tuple[int, float]:
    """How many kernels, copies and fills a call has the GPU do, and the sum of their seconds: no host time is in it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return work_in(json.loads(path.read_text()))


def work_in(trace: dict) -> tuple[int, float]:
    """Those in a profiler's trace. Its own annotations, on the GPU's track as well, are not counted."""
    work = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return len(work), 1e-6 * sum(event["dur"] for event in work)
