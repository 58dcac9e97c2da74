"""Everything after the crop and the blur by one kernel on bytes, against plain and compiled torch.

    python bench/pixels.py --json bench/results/GPU/DATE/pixels.json

The package's kernel takes bytes, (B, H, W, 3), of each of an image's four views, and does what was done to them one
operator after another: colours, solarize, flip, normalisation, joining the views in one tensor, and the cast to the
network's dtype.

Ways must agree within a level of 255 before they are timed by replayed CUDA graphs. DALI's operators would take the
sum of three steps of `operators.py`, colours, solarize, and flip and normalise, and of the last row here, joining and
cast. Needs a GPU.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from options import above_zero, positive, the_gpu
from records import cell, keep, provenance, spread
from timing import device_round, turns
from torch import Tensor

from msbreg.data.draws import Draw, colour_matrices
from msbreg.data.pixels import joined_views, normalisation, packed, pixelwise_plain
from msbreg.data.recipes import View
from msbreg.tables import markdown_table

__all__ = ["measure", "plain", "random_views", "refusal"]

SCALE, SHIFT = normalisation()
TOLERANCE = 1.01 * max(SCALE)
"""A level of 255: the rounding of colours, and of the cast."""
VIEWS_OF_AN_IMAGE = 4
"""As many tensors come from DALI, and are joined."""


def plain(crops: Sequence[Tensor], drawn: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`joined_views` in plain torch."""
    numbers = torch.cat(list(drawn))
    colour = numbers[:, :12].unflatten(1, (3, 4))
    x = pixelwise_plain(torch.cat(list(crops)), colour, numbers[:, 12], numbers[:, 13], SCALE, SHIFT)
    return x.to(dtype).permute(0, 3, 1, 2)


def random_views(images: int, size: int, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Bytes by chance, and what the default recipe draws for them; half are flipped, a fifth solarized."""
    random = np.random.default_rng(0)
    count = VIEWS_OF_AN_IMAGE * images
    crops = torch.from_numpy(random.integers(0, 256, (count, size, size, 3), np.uint8)).to(device)
    none = np.zeros(count, np.int32)
    colour = colour_matrices(View(size=size), random.uniform(0, 1, (32, count)))
    draw = Draw(none, colour, none, none, random.uniform(size=count) < 0.2, random.uniform(size=count) < 0.5)
    drawn = torch.from_numpy(packed([draw])[:, 0]).to(device)
    return list(crops.split(images)), list(drawn.split(images))


def refusal(result: Tensor, expected: Tensor) -> str | None:
    """Why a way is not to be timed, or None."""
    error = (result.float() - expected.float()).abs()
    # A value next to 128 is inverted by one and not by the other where they round differently, which is seldom.
    if (share := (error > TOLERANCE).double().mean().item()) > 1e-4:
        return f"{share:.2%} of its values are off by more than a level of 255, and as much as {error.max():.2f}"
    return None


def measure(
    crops: Sequence[Tensor], drawn: Sequence[Tensor], dtype: torch.dtype, *, seconds: float, rounds: int
) -> list[dict[str, Any]]:
    """A row for each way: microseconds of a view, over rounds in which the ways take turns."""
    device, count = crops[0].device, sum(map(len, crops))
    compiled = torch.compile(plain, dynamic=False)
    expected = plain(crops, drawn, torch.float32)
    ways: dict[str, Callable[[], Tensor]] = {
        "kernel": lambda: joined_views(crops, drawn, dtype),
        "torch": lambda: plain(crops, drawn, dtype),
        "torch compiled": lambda: compiled(crops, drawn, dtype),
    }
    for name, way in ways.items():
        if why := refusal(way(), expected):
            sys.exit(f"{name}: {why}")
    made = [part.clone() for part in expected.to(torch.float16).chunk(len(crops))]
    ways["joining and cast alone"] = lambda: torch.cat(made).to(dtype)
    clocks = {name: device_round(lambda way=way: [way], device, waits=False)[0] for name, way in ways.items()}
    return [
        {"way": name, "microseconds_a_view": spread([time / count for time in taken])}
        for name, taken in turns(clocks, 1, seconds=seconds, rounds=rounds).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=positive, default=224, help="side of a view, pixels; default: %(default)s")
    parser.add_argument("--images", type=positive, default=128, help="of four views each; default: %(default)s")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each way; default: %(default)s")
    parser.add_argument("--seconds", type=above_zero, default=0.5, help="timed for each way; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    device = the_gpu("bench/pixels.py")
    crops, drawn = random_views(options.images, options.size, device)
    rows = measure(crops, drawn, torch.bfloat16, seconds=options.seconds, rounds=options.rounds)
    result = provenance("bench/pixels.py", None, device, ("triton",))
    result |= {"size": options.size, "images": options.images, "rows": rows}
    keep(result, options.json)
    print(f"{options.images} images of four views of {options.size} pixels in bfloat16, {result['device_name']}\n")
    cells = [[row["way"], cell(row["microseconds_a_view"], 3)] for row in rows]
    print(markdown_table(["way", "µs a view"], cells))


if __name__ == "__main__":
    main()
