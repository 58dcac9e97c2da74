"""Everything after the crop as one kernel on bytes, against plain and compiled torch.

    python bench/pixels.py --json bench/results/GPU/DATE/pixels.json

The kernel takes bytes, (B, H, W, 3), of each of an image's four views, and does what the data pipeline does to them one
operator after another: colours, solarize, flip, normalisation, joining the views in one tensor, and the cast to the
network's dtype. (A blur would come before it; it commutes with the colours but for clipping.) It works on any batch of
bytes, without DALI.

Ways must agree within a level of 255 before they are timed by replayed CUDA graphs. What the package does instead is
the sum of three steps of `operators.py`, colours, solarize, and flip and normalise, and of the last row here, joining
and cast. Needs a GPU. If the kernel wins or is within a tenth, it belongs in `kernels/`.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from records import cell, keep, markdown, provenance, spread
from timing import device_round, plan
from torch import Tensor

from msbreg.data.draws import colour_matrices
from msbreg.data.recipes import MEAN, STD, View

__all__ = ["Views", "measure", "pixels", "pixels_kernel", "plain", "random_views", "refusal"]

SCALE = tuple(1 / (255 * std) for std in STD)
SHIFT = tuple(-mean / std for mean, std in zip(MEAN, STD, strict=True))
TOLERANCE = 1.01 * max(SCALE)
"""A level of 255: the rounding of colours, and of the cast."""
VIEWS_OF_AN_IMAGE = 4
"""As many tensors come from DALI, and are joined."""


class Views(NamedTuple):
    """Bytes, and what was drawn for them."""

    bytes: Tensor
    """(N, H, W, 3) uint8, contiguous."""
    colour: Tensor
    """(N, 3, 4) float32: RGB becomes colour[:, :, :3] RGB + colour[:, :, 3], on the scale 0 to 255."""
    solarize: Tensor
    """(N,) bool: values of 128 and more are inverted."""
    flip: Tensor
    """(N,) bool: from left to right."""


@triton.jit
def pixels_kernel(
    views_pointer,
    colour_pointer,
    solarize_pointer,
    flip_pointer,
    output_pointer,
    pixels,
    width,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Colours, solarize, flip and normalisation.

    views_pointer: [images, height, width, 3], uint8; pixels: height * width.
    colour_pointer: [images, 3, 4], float32. solarize_pointer, flip_pointer: [images], bool.
    output_pointer: [images, height, width, 3], any floating dtype.
    SCALE, SHIFT: three numbers each: a byte x becomes SCALE x + SHIFT.

    One program makes BLOCK pixels of one image.
    """
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < pixels
    column = place % width
    mirrored = tl.load(flip_pointer + image) != 0
    source = views_pointer + 3 * (image * pixels + tl.where(mirrored, place - column + (width - 1 - column), place))
    red = tl.load(source, mask=inside, other=0).to(tl.float32)
    green = tl.load(source + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(source + 2, mask=inside, other=0).to(tl.float32)
    inverted = tl.load(solarize_pointer + image) != 0
    for channel in tl.static_range(3):
        row = colour_pointer + 12 * image + 4 * channel
        x = tl.load(row) * red + tl.load(row + 1) * green + tl.load(row + 2) * blue + tl.load(row + 3)
        x = tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0) + 0.5)
        x = tl.where(inverted & (x >= 128.0), 255.0 - x, x)
        x = SCALE[channel] * x + SHIFT[channel]
        target = output_pointer + 3 * (image * pixels + place) + channel
        tl.store(target, x.to(output_pointer.dtype.element_ty), mask=inside)


def pixels(parts: Sequence[Views], dtype: torch.dtype) -> Tensor:
    """All views, joined: (N, 3, H, W) in channels_last, normalised by ImageNet's constants. One launch a part."""
    _, height, width, _ = parts[0].bytes.shape
    count = sum(len(views.bytes) for views in parts)
    output = torch.empty(count, height, width, 3, dtype=dtype, device=parts[0].bytes.device)
    first = 0
    with torch.cuda.device_of(output):
        for views in parts:
            pixels_kernel[(triton.cdiv(height * width, 1024), len(views.bytes))](
                *views, output[first:], height * width, width, SCALE=SCALE, SHIFT=SHIFT, BLOCK=1024, num_warps=8,
                enable_fp_fusion=True,
            )  # fmt: skip
            first += len(views.bytes)
    return output.permute(0, 3, 1, 2)


def plain(parts: Sequence[Views], normal: Tensor, dtype: torch.dtype) -> Tensor:
    """`pixels` in plain torch; normal: SCALE and SHIFT, (2, 3), on the views' device."""
    views = Views(*(torch.cat(each) for each in zip(*parts, strict=True)))
    x = views.bytes.float()
    x = torch.where(views.flip[:, None, None, None], x.flip(2), x)
    colour = views.colour[:, None, None]  # (N, 1, 1, 3, 4)
    # Not a matrix product, which torch.compile could not make part of one kernel.
    x = sum((x[..., c : c + 1] * colour[..., c] for c in range(3)), colour[..., 3])
    x = (x.clamp(0, 255) + 0.5).floor()
    x = torch.where(views.solarize[:, None, None, None] & (x >= 128), 255 - x, x)
    return (x * normal[0] + normal[1]).to(dtype).permute(0, 3, 1, 2)


def random_views(count: int, size: int, device: torch.device) -> Views:
    """Bytes by chance, with colours by the default recipe; half are flipped, a fifth solarized."""
    random = np.random.default_rng(0)
    colour = colour_matrices(View(size=size), random.uniform(0, 1, (32, count)))
    drawn = (
        random.integers(0, 256, (count, size, size, 3), np.uint8),
        colour,
        random.uniform(size=count) < 0.2,
        random.uniform(size=count) < 0.5,
    )
    return Views(*(torch.from_numpy(values).to(device) for values in drawn))


def refusal(result: Tensor, expected: Tensor) -> str | None:
    """Why a way is not to be timed, or None."""
    error = (result.float() - expected.float()).abs()
    # A value next to 128 is inverted by one and not by the other where they round differently, which is seldom.
    if (share := (error > TOLERANCE).double().mean().item()) > 1e-4:
        return f"{share:.2%} of its values are off by more than a level of 255, and as much as {error.max():.2f}"
    return None


def measure(views: Views, dtype: torch.dtype, *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """A row for each way: microseconds of a view, over rounds in which the ways take turns."""
    device, count = views.bytes.device, len(views.bytes)
    normal = torch.tensor([SCALE, SHIFT], device=device)
    parts = [Views(*each) for each in zip(*(each.chunk(VIEWS_OF_AN_IMAGE) for each in views), strict=True)]
    compiled = torch.compile(plain, dynamic=False)
    expected = plain(parts, normal, torch.float32)
    ways: dict[str, Callable[[], Tensor]] = {
        "kernel": lambda: pixels(parts, dtype),
        "torch": lambda: plain(parts, normal, dtype),
        "torch compiled": lambda: compiled(parts, normal, dtype),
    }
    for name, way in ways.items():
        if why := refusal(way(), expected):
            sys.exit(f"{name}: {why}")
    made = [part.clone() for part in expected.to(torch.float16).chunk(VIEWS_OF_AN_IMAGE)]
    ways["joining and cast alone"] = lambda: torch.cat(made).to(dtype)
    clocks = {name: device_round(lambda way=way: [way], device, waits=False)[0] for name, way in ways.items()}
    rounds_of = {name: plan(clock, 1, seconds / rounds) for name, clock in clocks.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, clock in clocks.items():
            times[name].append(1e6 / count * statistics.median(clock() for _ in range(rounds_of[name])))
    return [{"way": name, "microseconds_a_view": spread(taken)} for name, taken in times.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels; default: %(default)s")
    parser.add_argument("--views", type=int, default=512, help="N; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.5, help="timed for each way; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/pixels.py measures a GPU, and torch finds none here; msbreg doctor says what it finds.")
    device = torch.device("cuda")
    views = random_views(options.views, options.size, device)
    rows = measure(views, torch.bfloat16, seconds=options.seconds, rounds=options.rounds)
    result = provenance("bench/pixels.py", None, device, ("triton",))
    result |= {"size": options.size, "views": options.views, "rows": rows}
    keep(result, options.json)
    print(f"{options.views} views of {options.size} pixels in bfloat16, {result['device_name']}\n")
    cells = [[row["way"], cell(row["microseconds_a_view"], 3)] for row in rows]
    print(markdown(["way", "µs a view"], cells))


if __name__ == "__main__":
    main()
