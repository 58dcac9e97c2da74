"""The inverse root in one launch, against the sequence of launches: on the GPU, and for the host.

    python bench/one_launch.py --json bench/results/GPU/DATE/one_launch.json

`kernels/inverse_root.py` has both, which give the same bits; that is checked first, in many calls on two inputs in
turn: it would not hold if a program of the one launch did not wait long enough for the others. GPU times are of
replayed CUDA graphs of ten calls, both ways in turn, with the Gram matrices in the cache, as in training. Host times
are of queuing a call while the GPU is busy. Needs a GPU.
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from options import above_zero, positive, the_gpu
from records import cell, keep, provenance, spread
from timing import device_round, turns
from torch import Tensor

from msbreg.functional import SMOOTHING
from msbreg.kernels.inverse_root import inverse_root
from msbreg.kernels.totals import spectral_sums
from msbreg.linalg import newton_schulz_plan
from msbreg.machine import synchronize
from msbreg.tables import markdown_table

__all__ = ["measure", "table"]

SHAPES = ((2, 128), (8, 128), (2, 256), (4, 256), (8, 256), (16, 256), (4, 512))
"""K and p."""
WAYS = {"sequence": False, "one launch": True}
REPEATS = 50
"""Calls on each input whose results are compared."""
CALLS = 10
"""Of a graph, so that its own beginning and end count little."""
BUSY = 100_000_000
"""Cycles in which the GPU is busy while the host queues calls: no call waits for one before."""


def measure(views: int, side: int, device: torch.device, *, seconds: float, rounds: int) -> dict[str, Any]:
    """Both ways at one shape, on unit rows twice as many as dimensions."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(2, views, 2 * side, side, device=device, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=-1)
    grams = tuple(rows.mT @ rows)
    squares = [spectral_sums(gram, identity=0.0, scale=1.0) for gram in grams]
    shift = SMOOTHING**2 * 2  # c = side / rows
    floor, steps = newton_schulz_plan(shift / (2 * side), torch.float32)

    def root(number: int, at_once: bool) -> Tensor:
        return inverse_root(grams[number], squares[number], shift, floor, steps, at_once=at_once)[0]

    expected = [root(number, False) for number in (0, 1)]
    if not all(torch.equal(root(number, True), expected[number]) for number in (0, 1) * REPEATS):
        sys.exit(f"K = {views}, p = {side}: one launch gives other bits than the sequence of launches")
    calls = {name: functools.partial(root, 0, at_once) for name, at_once in WAYS.items()}
    clocks = {
        name: device_round(lambda call=call: [call] * CALLS, device, waits=False)[0] for name, call in calls.items()
    }
    gpu = turns(clocks, CALLS, seconds=seconds, rounds=rounds)
    host: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, call in calls.items():
            host[name].append(1e6 * queuing(call, device))
    return {"views": views, "side": side, "steps": len(steps), "gpu_microseconds": gpu, "host_microseconds": host}


def queuing(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that the host takes for a call."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda._sleep(BUSY)
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - began) / CALLS


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the median of the rounds, the smallest and largest in brackets."""
    cells = [
        [row["views"], row["side"], row["steps"]]
        + [
            cell(spread(times), 1)
            for clock in ("gpu_microseconds", "host_microseconds")
            for times in row[clock].values()
        ]
        for row in rows
    ]
    head = [f"{where}: {way}, µs" for where in ("GPU", "host") for way in WAYS]
    return markdown_table(["K", "p", "steps", *head], cells, text=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each way; default: %(default)s")
    parser.add_argument("--seconds", type=above_zero, default=0.2, help="timed for each way; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    device = the_gpu("bench/one_launch.py")
    result = provenance("bench/one_launch.py", None, device, ("triton",)) | {"rows": []}
    for views, side in SHAPES:
        result["rows"].append(measure(views, side, device, seconds=options.seconds, rounds=options.rounds))
        keep(result, options.json)
        print(table(result["rows"][-1:]), flush=True)  # now: programs of the next that wait in vain end it all


if __name__ == "__main__":
    main()
