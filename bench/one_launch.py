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
import math
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
from msbreg.kernels.halves import numbers, parts_of
from msbreg.kernels.inverse_root import affine_product, first_factors, inverse_root, normalisation, store_numbers, tile
from msbreg.kernels.tiles import load_tile
from msbreg.linalg import newton_schulz_plan

__all__ = ["one_launch", "one_launch_kernel", "oracle_error", "refusal"]

SHAPES = ((2, 256), (4, 128), (8, 128), (8, 256), (16, 256), (4, 512), (8, 512), (16, 512))
"""K and p."""
SCALE = tl.constexpr(1.65)
REPEATS = 50
"""Calls on each input whose results are compared."""
CALLS = 10
"""Of a graph, so that its own beginning and end count little."""
RESIDENT = 2
"""Programs of a processor. Its registers hold two of any kernel with four warps, and two for each of an H200's 132
processors are enough for the 256 tiles of (8, 256)."""


@triton.jit
def wait_for_all(counter_pointer, goal):
    """Returns once all programs of a view have come here, and sees what they had stored by then.

    counter_pointer: one int32, zero before the launch; goal: how many programs come, times how often until now.
    """
    tl.debug_barrier()  # all of this program's threads have stored
    arrived = tl.atomic_add(counter_pointer, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < goal:
        arrived = tl.atomic_add(counter_pointer, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def coefficients(x):
    """a and b of a step for square roots of eigenvalues from x to 1, and the smallest after it; see `linalg`."""
    c = tl.minimum(SCALE, tl.sqrt(3.0 / (1.0 + x + x * x)))
    a, b = 1.5 * c, -0.5 * c * c * c
    return a, b, tl.minimum(a * x + b * x * x * x, a + b)


@triton.jit
def one_launch_kernel(
    gram_pointer,
    squares_pointer,
    work_pointer,
    output_pointer,
    counter_pointer,
    views,
    members,
    side,
    width,
    output_width,
    steps,
    smallest: tl.float64,
    shift: tl.float64,
    floor: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """All steps of `inverse_root`.

    gram_pointer: [views, side, side], G, contiguous.
    squares_pointer: [views, members], float64, which add up to |G|² of each view once they are written.
    work_pointer: [5, views, parts, width, width], see `iterates`: Y and Z after the first step and every second one
        from there, those after the others, and T, where A is at first.
    output_pointer: [views, side, side].
    counter_pointer: [views, 32] int32, zero; see `wait_for_all`.
    steps: two or more. smallest: square root of the smallest eigenvalue of A, at least.
    shift, floor: see `normalisation`.

    All programs run at once. So many members have a view to themselves; each makes some tiles of every product.
    """
    member = tl.program_id(0) % members
    across = tl.cdiv(width, BLOCK_P)
    tiles = across * across
    matrix = tl.full([], parts_of(work_pointer), tl.int64) * width * width
    batch = views * matrix
    for view in range(tl.program_id(0) // members, views, tl.num_programs(0) // members):
        k = tl.full([], view, tl.int64)
        counter = counter_pointer + 32 * k
        gram, squares = gram_pointer + k * side * side, squares_pointer + k * members
        work = work_pointer + k * matrix
        t = work + 4 * batch
        zero = tl.zeros([], tl.float64)

        total = tl.zeros([BLOCK_P, BLOCK_P], tl.float64)
        for item in range(member, tiles, members):
            p, r = rows_of(item // across, BLOCK_P), rows_of(item % across, BLOCK_P)
            g = load_tile(gram, p, side, side, r, side, 1, tl.float64)
            total += g * g
        tl.store(squares + member, tl.sum(tl.sum(total, axis=1), axis=0))
        wait_for_all(counter, members)
        s, h = normalisation(squares, members, shift, floor, 64)

        a, b, x = coefficients(tl.full([], smallest, tl.float64))
        for item in range(member, tiles, members):
            p, r = rows_of(item // across, BLOCK_P), rows_of(item % across, BLOCK_P)
            first_factors(gram, t, work + batch, side, width, a, b, s, h, p, r)
        wait_for_all(counter, 2 * members)
        for item in range(member, tiles, members):
            p, r = rows_of(item // across, BLOCK_P), rows_of(item % across, BLOCK_P)
            store_numbers(
                work, affine_product(work + batch, t, side, width, zero, zero + 1, p, r, BLOCK_Q), p, r, width
            )
        wait_for_all(counter, 3 * members)

        for step in range(1, steps):
            y, new = work + (step + 1) % 2 * 2 * batch, work + step % 2 * 2 * batch  # Z comes behind Y
            a, b, x = coefficients(x)
            last = step == steps - 1
            if last:
                a, b = zero + 1.5, zero - 0.5
            for item in range(member, tiles, members):
                p, r = rows_of(item // across, BLOCK_P), rows_of(item % across, BLOCK_P)
                store_numbers(t, affine_product(y, y + batch, side, width, a, b, p, r, BLOCK_Q), p, r, width)
            wait_for_all(counter, (2 * step + 2) * members)
            if last:
                for item in range(member, tiles, members):
                    p, r = rows_of(item // across, BLOCK_P), rows_of(item % across, BLOCK_P)
                    root = affine_product(y + batch, t, side, width, zero, tl.sqrt(s), p, r, BLOCK_Q)
                    size = tl.full([], parts_of(output_pointer), tl.int64) * output_width * output_width
                    store_numbers(output_pointer + k * size, root, p, r, output_width)
            else:
                for item in range(member, 2 * tiles, members):
                    second = item >= tiles
                    p, r = rows_of(item % tiles // across, BLOCK_P), rows_of(item % across, BLOCK_P)
                    left, right = tl.where(second, y + batch, t), tl.where(second, t, y)
                    made = affine_product(left, right, side, width, zero, zero + 1, p, r, BLOCK_Q)
                    store_numbers(tl.where(second, new + batch, new), made, p, r, width)
                wait_for_all(counter, (2 * step + 3) * members)


@triton.jit
def rows_of(block, BLOCK: tl.constexpr):
    """The rows of a block, int32."""
    return block * BLOCK + tl.arange(0, BLOCK)


def one_launch(gram: Tensor, shift: float, floor: float, steps: Sequence[tuple[float, float]]) -> Tensor:
    """What `msbreg.kernels.inverse_root.inverse_root` returns for the same arguments."""
    views, side, _ = gram.shape
    work, output = numbers(gram, (5, views), side, side, square=True), torch.empty_like(gram)
    width = work.shape[-1]
    config = tile(width, views, gram.element_size())
    tiles = triton.cdiv(width, config["BLOCK_P"]) ** 2
    programs = processors(gram.device)
    members = min(tiles, max(1, programs // views))
    groups = min(views, max(1, programs // members))
    squares = torch.empty(views, members, device=gram.device, dtype=torch.float64)
    counter = torch.zeros(views, 32, device=gram.device, dtype=torch.int32)
    smallest = max(shift / (gram.shape[1] * 1e9), floor)
    smallest = SMALLEST.get((shift, floor, len(steps)), smallest)
    if gram.device.type == "cuda":
        config["launch_cooperative_grid"] = True
    with torch.cuda.device_of(gram):
        one_launch_kernel[(groups * members,)](
            gram, squares, work, output, counter, views, members, side, width, side, len(steps),
            math.sqrt(smallest / (1 + smallest)), shift, floor, **config,
        )  # fmt: skip
    return output


SMALLEST: dict = {}


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs are on the GPU at once; one in Triton's interpreter, which runs them one after another."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


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
    SMALLEST[shift, floor, len(steps)] = max(shift / (2 * side), floor)
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
