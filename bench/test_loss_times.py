"""Times every loss of `providers` that agrees with the oracle, at each shape, dtype and mode that is asked for.

    python -m pytest bench/ --bench-shapes targets --benchmark-json losses.json
    python bench/report.py losses.json

Options are in `conftest`, and README.md says what is measured and how.
"""

import functools
import textwrap
import time

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark: pip install '.[bench]'")

import ceilings
import records
import shapes
import timing
import torch
import usage
from cost import bytes_moved, spectral_flops
from gate import Reference, Verdict, reference, verdict
from providers import Loss, Provider, Terms
from timing import CLOCK, Call, calls, device_round, plan, wall_round
from torch import Tensor

PROFILED = 5
"""Calls, of which a median is taken."""
EAGER_CALLS = 3
EAGER_ROUNDS = 31
"""At least, where these take no more than half a second: what the host does scatters."""
LONG = 10e-3
"""Seconds from which on one call makes a round: there the GPU sets the pace, not the host."""


@pytest.mark.benchmark(timer=CLOCK)
def test_loss(benchmark, wanted, shape: str, dtype: str, provider: str, mode: str) -> None:
    if time.monotonic() > wanted.deadline:
        pytest.skip("the time of --bench-minutes is over")
    device, spectrum, what = wanted.device, wanted.spectrum, wanted.providers[provider]
    size, number_type = shapes.parse(shape)[0], getattr(torch, dtype)
    if reason := shapes.left_out(size, what, device):
        pytest.skip(reason)
    loss, errors, fault = checked(what, size, number_type, device, spectrum)
    if fault:
        pytest.fail(f"{provider} is not timed at {shape} in {dtype}: {fault}", pytrace=False)

    batches = inputs(what, size, number_type, device)
    round_, clock = device_round(lambda: calls(loss, batches, mode), device, waits=what.waits)
    rounds = plan(round_, len(batches), wanted.seconds)

    benchmark.group = f"K={size.views} B={size.batch} D={size.dim} {dtype} {mode}"
    benchmark.extra_info.update(
        shape=list(size),
        dtype=dtype,
        mode=mode,
        provider=provider,
        about=what.about,
        clock=clock,
        copies=len(batches),
        value_error=errors and errors.value,
        gradient_error=errors and errors.gradient,
        **counted(what, size, number_type, spectrum, mode),
    )
    gpu = device.type == "cuda"
    beside = gpu and what is not wanted.fused
    fused = fused_call(wanted.fused, size, number_type, device, spectrum, mode) if beside else None
    benchmark.pedantic(CLOCK.tick, args=(round_,), rounds=rounds)
    if gpu:
        info = benchmark.extra_info
        info["sm_clock"] = records.gpu_state(device).get("clocks.sm")  # straight after the timed rounds
        own = calls(loss, batches[:1], mode)[0]
        info.update(eager(own, fused, device, wanted.seconds / 2))
        info.update(on_gpu(loss, batches[:1], mode, info["bytes"]))
        # A decomposition has thousands of launches, whose trace takes the profiler seconds.
        launches, busy = usage.device_work(own, 1 if what.decomposition else PROFILED)
        info.update(launches=launches or None, busy_seconds=busy or None)  # 0: profiling is barred


def fused_call(
    provider: Provider, shape: shapes.Shape, dtype: torch.dtype, device: torch.device, spectrum: str, mode: str
) -> Call | None:
    """A call of the fused loss, for others to take turns with; None where it may not be timed."""
    if shapes.left_out(shape, provider, device):
        return None
    loss, _, fault = checked(provider, shape, dtype, device, spectrum)
    return None if fault else calls(loss, [shapes.inputs(shape, dtype, device)], mode)[0]


def eager(call: Call, fused: Call | None, device: torch.device, seconds: float) -> dict[str, dict[str, float]]:
    """Wall time of a call without a graph, and over the fused loss's in the same rounds, with quartiles.

    There is one copy of the inputs, and a round is of few calls: the host sets the pace.
    """
    timed = [each for each in (call, fused) if each]
    once = sum(wall_round([each], device)() for each in timed)
    number = EAGER_CALLS if once < LONG else 1
    clocks = [wall_round([each] * number, device) for each in timed]
    rounds = plan(lambda: sum(clock() for clock in clocks), number, seconds, least=EAGER_ROUNDS, patience=0.5)
    own, *fuseds = zip(*([clock() for clock in clocks] for _ in range(rounds)), strict=True)
    found = {"eager": records.quartiles(own)}
    for its in fuseds:
        ratios = [mine / beside for mine, beside in zip(own, its, strict=True)]
        found["eager_over_fused"] = records.quartiles(ratios)
    return found


def on_gpu(loss: Loss, batch: list[tuple[Tensor, Tensor]], mode: str, moved: int) -> dict[str, float]:
    """The memory that a call takes, and the ceilings to compare with, where it moves so many bytes."""
    device = batch[0][0].device
    return {
        "memory": usage.peak_memory(lambda: calls(loss, batch, mode)[0]),
        "copy_rate": ceilings.copy_rate(moved, device),
        "half_product_rate": ceilings.product_rate(device),
    }


def counted(provider: Provider, shape: shapes.Shape, dtype: torch.dtype, spectrum: str, mode: str) -> dict[str, float]:
    """Bytes, and for the singular value loss alone floating-point operations."""
    views, targets = provider.reads(shape.views)
    counts = {"bytes": bytes_moved(views, targets, shape.batch, shape.dim, dtype.itemsize, mode)}
    if provider.terms == "spectral":
        counts["flops"] = spectral_flops(*shape, spectrum, mode)
    return counts


@functools.lru_cache(maxsize=2)  # the loss that is timed, and the fused one beside it
def checked(
    provider: Provider, shape: shapes.Shape, dtype: torch.dtype, device: torch.device, spectrum: str
) -> Verdict:
    """A loss, compiled where it is, and what the oracle says of it."""
    if provider.compiled:
        torch.compiler.reset()  # one shape each: after some, torch.compile would silently stop compiling
    try:
        expected = provider.terms and truth(shape, dtype, device, provider.terms, spectrum)
    except torch.OutOfMemoryError as error:  # the others' oracles may need less
        return Verdict(None, None, textwrap.shorten(f"its oracle raises {type(error).__name__}: {error}", 300))
    first = shapes.inputs(shape._replace(views=provider.reads(shape.views)[0]), dtype, device)
    return verdict(provider, *first, expected)


@functools.lru_cache(maxsize=3)
def truth(shape: shapes.Shape, dtype: torch.dtype, device: torch.device, terms: Terms, spectrum: str) -> Reference:
    """What the oracle says at the first of the inputs."""
    z, t = shapes.inputs(shape, dtype, device)
    return reference(z, t, terms, spectrum, shapes.oracle_decomposition(shape, device))


inputs = functools.lru_cache(maxsize=1)(timing.batches)
