"""How a call is timed: on a GPU as replays of a CUDA graph or between events, elsewhere by the wall clock.

Whatever the clock, a round is one pass over all copies of the inputs, and its result is seconds a call. On a GPU what a
loss reads of them is together three times larger than the L2 cache, so that inputs come from memory, as in training.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import shapes
import torch
from cost import Mode
from providers import Loss, Provider
from shapes import Shape
from torch import Tensor

from msbreg.machine import synchronize

__all__ = ["CLOCK", "Call", "Round", "batches", "calls", "copies", "device_round", "plan", "turns", "wall_round"]

K = TypeVar("K")

Call = Callable[[], object]
Round = Callable[[], float]
"""Seconds a call, of one pass over all calls."""

L2_MULTIPLE = 3
MOST_COPIES = 1000
"""The most copies of the inputs that are made; of tiny ones they fit into the cache."""
GRAPHS = 3
"""Recordings of the same calls: one may lie in memory more luckily than another."""
BACKLOG = 50e-3
"""Seconds of idling that a GPU is given at most while the host queues a round."""


class Clock:
    """Virtual time, for pytest-benchmark: it moves on by what a round says it took."""

    __name__ = "seconds_a_call"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, round: Round) -> None:
        """Runs a round."""
        self.now += round()


CLOCK = Clock()


def calls(loss: Loss, inputs: Sequence[tuple[Tensor, Tensor]], mode: Mode) -> list[Call]:
    """One call for each copy of the inputs; those of `"backward"` have their forward pass behind them."""

    def call(z: Tensor, t: Tensor) -> Call:
        if mode == "forward":
            return lambda: loss(z, t)
        if mode == "both":
            return lambda: torch.autograd.grad(loss(z, t), z)
        value = loss(z, t)
        return lambda: torch.autograd.grad(value, z, retain_graph=True)

    return [call(z, t) for z, t in inputs]


def batches(provider: Provider, shape: Shape, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Copies of z and t to rotate among; the oracle sees the first.

    They have the views that are read alone: of a larger z the backward pass would make zeros for the others. Where the
    host waits for the device there is one copy: beside that, where inputs come from is nothing.
    """
    views, targets = provider.reads(shape.views)
    number = 1 if provider.waits else copies((views + targets) * shape.batch * shape.dim * dtype.itemsize, device)
    return [shapes.inputs(shape._replace(views=views), dtype, device, seed) for seed in range(number)]


def copies(input_bytes: int, device: torch.device) -> int:
    """How many copies of the inputs to rotate among, where a call reads so many bytes of them."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MOST_COPIES, max(1, math.ceil(L2_MULTIPLE * cache / input_bytes)))


def wall_round(calls: Sequence[Call], device: torch.device) -> Round:
    """By the wall clock, from the first call to the end of the last one's work."""

    def round_() -> float:
        synchronize(device)
        began = time.perf_counter()
        for call in calls:
            call()
        synchronize(device)
        return (time.perf_counter() - began) / len(calls)

    return round_


def device_round(make: Callable[[], Sequence[Call]], device: torch.device, *, waits: bool) -> tuple[Round, str]:
    """The best clock for calls on this device, and its name.

    Args:
        make: makes the calls; run on the stream that they will run on, since a backward pass follows its forward pass.
        device: of the inputs.
        waits: whether a call waits for the device.
    """
    if device.type != "cuda":
        return wall_round(make(), device), "wall"
    return (event_round(make()), "events") if waits else (graph_round(make), "graph")


def event_round(calls: Sequence[Call]) -> Round:
    """Between two events on the GPU, which idles first, so that the host is ahead of it as far as the calls permit."""

    def work() -> None:
        for call in calls:
            call()

    backlog = _host_seconds(work)
    return lambda: _between_events(work, backlog) / len(calls)


def graph_round(make: Callable[[], Sequence[Call]]) -> Round:
    """A replay of a CUDA graph with all calls, of several graphs in turn: recorded again, it has other memory."""
    rounds = itertools.cycle([_recorded_round(make) for _ in range(GRAPHS)])
    return lambda: next(rounds)()


def _recorded_round(make: Callable[[], Sequence[Call]]) -> Round:
    """A replay of one graph. Each call keeps its results, so that none writes into warm cache lines."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        calls = make()
        for call in calls[:3]:
            call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        results = [call() for call in calls]
    alive = (calls, results)  # what the graph reads and writes
    backlog = _host_seconds(graph.replay)
    return lambda: _between_events(graph.replay, backlog) / len(alive[0])


def _host_seconds(work: Callable[[], None]) -> float:
    """What the host takes to queue some work, the second time."""
    work()
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    torch.cuda.synchronize()
    return seconds


def _between_events(work: Callable[[], None], backlog: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(min(backlog, BACKLOG) * 2e9))  # cycles of a clock of about 2 GHz
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def plan(round: Round, calls: int, seconds: float, *, least: int = 11, patience: float = 2.5) -> int:
    """How many rounds fill that time: 3 to 1000, and at least `least` that take no more than `patience` together.

    Finding out takes a quarter of the time and warms up caches and clocks. The first round, which may load and choose
    what later ones find ready, says nothing of them.
    """
    round()
    spent = shortest = calls * round()
    while spent < seconds / 4:
        last = calls * round()
        spent, shortest = spent + last, min(shortest, last)
    return min(1000, max(3, min(least, int(patience / shortest)), math.ceil(seconds / shortest)))


def turns(clocks: Mapping[K, Round], calls: int, *, seconds: float, rounds: int) -> dict[K, list[float]]:
    """Microseconds a call by each clock, a figure for each of its turns: the median of as many rounds as fill it.

    Args:
        clocks: that take turns.
        calls: of a round of theirs.
        seconds: of each clock, over all its turns.
        rounds: turns of each.
    """
    counts = {name: plan(clock, calls, seconds / rounds, least=3) for name, clock in clocks.items()}
    taken: dict[K, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            taken[name].append(1e6 * statistics.median(clock() for _ in range(counts[name])))
    return taken
