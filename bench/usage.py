"""What a call uses of a GPU beside time: memory and launches."""

import gc
import json
import statistics
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


def device_work(call: Call, calls: int) -> tuple[int, float]:
    """How many kernels, copies and fills a call has the GPU do, and the sum of their seconds: no host time is in it."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return work_in(json.loads(path.read_text()), calls)


def work_in(trace: dict, calls: int) -> tuple[int, float]:
    """Those of a call in a profiler's trace of some that are alike, and the median of their seconds.

    The profiler's own annotations, on the GPU's track as well, are not counted.
    """
    work = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    work.sort(key=lambda event: event["ts"])
    share = len(work) / calls
    parts = [work[round(number * share) : round((number + 1) * share)] for number in range(calls)]
    return round(share), 1e-6 * statistics.median(sum(event["dur"] for event in part) for part in parts)
