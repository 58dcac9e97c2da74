"""The inverse root in one launch, against the sequence of launches that msbreg makes.

    python bench/one_launch.py --json bench/results/GPU/DATE/one_launch.json

Every step of the iteration needs all tiles of the step before, so that a launch for each is the plain way. Here all
programs are on the GPU at once, a cooperative launch, and wait for each other at a barrier in memory instead. What they
compute is the same tiles by the same device functions. Before it is timed its result is held against float64, and must
be the same bit for bit in many calls on two inputs in turn: it would not if a program did not wait long enough.

Times are of replayed CUDA graphs of ten calls, both ways in turn, with the Gram matrices in the cache, as in training.
Both have the launch for |G|² in front, and the one launch also the fill that sets its counter to zero.
Needs a GPU. Whichever is faster is what `kernels/inverse_root.py` should do.
"""

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from records import keep, markdown, provenance
from timing import device_round, plan
from torch import Tensor

from msbreg.functional import SMOOTHING
from msbreg.kernels.inverse_root import (
    affine_product,
    first_factors,
    inverse_root,
    iterates,
    normalisation,
    parts_of,
    tile,
)
from msbreg.kernels.totals import spectral_sums
from msbreg.linalg import newton_schulz_plan

__all__ = ["one_launch", "one_launch_kernel", "oracle_error", "refusal"]

SHAPES = ((2, 256), (4, 128), (8, 128), (8, 256), (16, 256), (4, 512), (8, 512), (16, 512))
"""K and p."""
REPEATS = 50
"""Calls on each input whose results are compared."""
CALLS = 10
"""Of a graph, so that its own beginning and end count little."""
RESIDENT = 2
"""Programs of a processor. Its registers hold two of any kernel with four warps, and two for each of an H200's 132
processors are enough for the 256 tiles of (8, 256)."""


@triton.jit
def wait_for_all(counter_pointer, goal):
    """Returns once all programs have come here, and sees what they had stored by then.

    counter_pointer: one int32, zero before the launch; goal: how many programs come, times how often until now.
    """
    tl.debug_barrier()  # all of this program's threads have stored
    arrived = tl.atomic_add(counter_pointer, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < goal:
        arrived = tl.atomic_add(counter_pointer, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def one_launch_kernel(
    gram_pointer,
    squares_pointer,
    weights_pointer,
    work_pointer,
    output_pointer,
    counter_pointer,
    views,
    side,
    width,
    count,
    steps,
    shift: tl.float64,
    floor: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """All steps of `inverse_root`.

    gram_pointer: [views, side, side], G, contiguous.
    squares_pointer: [views, count], float64, which add up to |G|² of each view.
    weights_pointer: [steps, 2], float64, a and b of each step; two steps or more.
    work_pointer: [5, views, parts, width, width], see `iterates`: Y and Z after the first step and every second one
        from there, those after the others, and T, where A is at first.
    output_pointer: [views, side, side].
    counter_pointer: see `wait_for_all`.
    shift, floor: see `normalisation`.

    All programs run at once; each makes some tiles of every product.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    across = tl.cdiv(width, BLOCK_P)
    tiles = views * across * across
    matrix = tl.full([], parts_of(work_pointer), tl.int64) * width * width
    batch = views * matrix
    t = work_pointer + 4 * batch
    for item in range(program, tiles, programs):
        k = (item // (across * across)).to(tl.int64)
        first_factors(
            gram_pointer + k * side * side, squares_pointer + k * count, t + k * matrix,
            work_pointer + batch + k * matrix, side, width, count, tl.load(weights_pointer),
            tl.load(weights_pointer + 1), shift, floor, item // across % across, item % across, BLOCK_P,
        )  # fmt: skip
    # The first step's Y = T A, then two phases to each later step: T = a I + b Y Z; then T Y and Z T, of which the last
    # step has the second alone.
    for phase in range(1, 2 * steps):
        wait_for_all(counter_pointer, phase * programs)
        step = phase // 2
        first, mixing, last = phase == 1, phase % 2 == 0, phase == 2 * steps - 1
        y = work_pointer + (step + 1) % 2 * 2 * batch  # Z comes behind it
        new = work_pointer + step % 2 * 2 * batch
        for item in range(program, tl.where(first | mixing | last, tiles, 2 * tiles), programs):
            second = last | (item >= tiles)
            k = (item % tiles // (across * across)).to(tl.int64)
            left = tl.where(first, new + batch, tl.where(second, y + batch, tl.where(mixing, y, t)))
            right = tl.where(first | second, t, tl.where(mixing, y + batch, y))
            output = tl.where(mixing, t, tl.where(second, new + batch, new))
            identity, scale = tl.full([], 0.0, tl.float64), tl.full([], 1.0, tl.float64)
            if mixing:
                identity, scale = tl.load(weights_pointer + 2 * step), tl.load(weights_pointer + 2 * step + 1)
            row, column = item // across % across, item % across
            if last:
                size, _ = normalisation(squares_pointer + k * count, count, shift, floor, 64)
                affine_product(
                    left + k * matrix, right + k * matrix, output_pointer + k * side * side, side, width, side,
                    identity, tl.sqrt(size), row, column, BLOCK_P, BLOCK_Q,
                )  # fmt: skip
            else:
                affine_product(
                    left + k * matrix, right + k * matrix, output + k * matrix, side, width, width,
                    identity, scale, row, column, BLOCK_P, BLOCK_Q,
                )  # fmt: skip


def one_launch(gram: Tensor, shift: float, floor: float, steps: Sequence[tuple[float, float]]) -> Tensor:
    """What `msbreg.kernels.inverse_root.inverse_root` returns for the same arguments."""
    views, side, _ = gram.shape
    squares = spectral_sums(gram, None, identity=0.0, scale=1.0, trace_weight=0.0, square_weight=1.0, root_weight=0.0)
    work, output = iterates(gram, 5), torch.empty_like(gram)
    width = work.shape[-1]
    config = tile(width, views, gram.element_size())
    tiles = views * triton.cdiv(width, config["BLOCK_P"]) ** 2
    # As many as are sure to run at once. In the interpreter, which needs no GPU, programs run one after another: the
    # first would wait for the second for ever.
    processors = torch.cuda.get_device_properties(gram.device).multi_processor_count if gram.is_cuda else 0
    programs = max(1, min(2 * tiles, RESIDENT * processors))
    counter = torch.zeros(1, dtype=torch.int32, device=gram.device)
    with torch.cuda.device_of(gram):
        one_launch_kernel[(programs,)](
            gram, squares, weights_of(tuple(steps), gram.device), work, output, counter, views, side, width,
            squares.shape[1], len(steps), shift, floor, launch_cooperative_grid=gram.is_cuda, **config,
        )  # fmt: skip
    return output


@functools.lru_cache
def weights_of(steps: tuple[tuple[float, float], ...], device: torch.device) -> Tensor:
    """(steps, 2) on the device, copied there once."""
    return torch.tensor(steps, dtype=torch.float64, device=device)


def oracle_error(root: Tensor, gram: Tensor, shift: float) -> float:
    """The largest error of a view's root, relative in the Frobenius norm, of float64's eigenvalues."""
    values, vectors = torch.linalg.eigh(gram.double())
    exact = vectors @ (vectors.mT / (values.clamp(min=0) + shift).sqrt()[..., None])
    return ((root - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max().item()


def refusal(errors: dict[str, float], repeatable: bool) -> str | None:
    """Why one launch is not to be timed, or None."""
    if not repeatable:
        return "one launch gives other bits in some calls; its programs do not wait for each other as they should"
    if not errors["one launch"] <= 1.5 * errors["sequence"]:  # NaN too
        return "one launch is off by {one launch:.1e}, and the sequence of launches by {sequence:.1e}".format(**errors)
    return None


def measure(views: int, side: int, device: torch.device, *, seconds: float, rounds: int) -> dict[str, Any]:
    """Both ways at one shape, on unit rows twice as many as dimensions."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(2, views, 2 * side, side, device=device, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=-1)
    gram, other = rows.mT @ rows
    shift = SMOOTHING**2 * 2  # c = side / rows
    floor, steps = newton_schulz_plan(shift / (2 * side), gram.dtype)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "sequence": lambda g: inverse_root(g, shift, floor, steps),
        "one launch": lambda g: one_launch(g, shift, floor, steps),
    }
    errors = {name: oracle_error(way(gram), gram, shift) for name, way in ways.items()}
    one = ways["one launch"]
    first = one(gram), one(other)
    repeatable = all(
        torch.equal(one(g), root) for _ in range(REPEATS) for g, root in zip((gram, other), first, strict=True)
    )
    if why := refusal(errors, repeatable):
        sys.exit(f"K = {views}, p = {side}: {why}")
    clocks = {
        name: device_round(lambda way=way: [lambda: way(gram)] * CALLS, device, waits=False)[0]
        for name, way in ways.items()
    }
    counts = {name: plan(clock, CALLS, seconds / rounds) for name, clock in clocks.items()}
    medians: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, clock in clocks.items():
            medians[name].append(1e6 * statistics.median(clock() for _ in range(counts[name])))
    return {"views": views, "side": side, "steps": len(steps), "error": errors, "microseconds": medians}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the median of the rounds' medians, the smallest and largest in brackets."""
    cells = []
    for row in rows:
        sequence, one = row["microseconds"].values()
        ratios = [a / b for a, b in zip(sequence, one, strict=True)]
        cells.append(
            [str(row["views"]), str(row["side"]), str(row["steps"]), f"{row['error']['one launch']:.0e}"]
            + [f"{statistics.median(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in (sequence, one)]
            + [f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"]
        )
    head = ["K", "p", "steps", "error", "sequence, µs", "one launch, µs", "times as fast"]
    return markdown(head, cells, text=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed for each way; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/one_launch.py measures a GPU, and torch finds none here; msbreg doctor says what it finds.")
    device = torch.device("cuda")
    result = provenance("bench/one_launch.py", None, device, ("triton",)) | {"rows": []}
    for views, side in SHAPES:
        result["rows"].append(measure(views, side, device, seconds=options.seconds, rounds=options.rounds))
        keep(result, options.json)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
