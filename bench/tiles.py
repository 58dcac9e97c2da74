"""Each kernel of the losses with the tile that its launcher chooses, and with others: which one a GPU is fastest with.

    python bench/tiles.py --json bench/results/GPU/DATE/tiles.json

A tile here is the block sizes, warps and stages that the launchers' `launch_config` functions return; the others differ
from it in one or two of these. Times are of replayed CUDA graphs, all tiles in turn; large inputs come from memory,
small ones from the cache, as in training. A tile whose results differ from the chosen one's by more than rounding, or
that does not fit into the GPU, is refused with the reason. Needs a GPU.
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from options import above_zero, positive, the_gpu
from records import cell, keep, provenance, spread
from timing import device_round, turns
from torch import Tensor
from triton.errors import TritonError

from msbreg.functional import SMOOTHING
from msbreg.kernels import gradient, gram, inverse_root, product, rows
from msbreg.kernels.halves import SCALE, split
from msbreg.linalg import newton_schulz_plan
from msbreg.tables import markdown_table

__all__ = ["Case", "cases", "chosen", "measure", "table"]

SHAPES = ("8x512x256 bfloat16", "8x4096x2048 bfloat16", "8x4096x2048 float32")
"""K, B, D and dtype."""
ROWS = (
    {"num_warps": 1},
    {"num_warps": 2},
    {"num_warps": 4},
    {"num_warps": 8},
    {"STAGES": 1},
    {"STAGES": 2},
    {"STAGES": 3},
    {"STAGES": 5},
    {"num_warps": 2, "STAGES": 1},
    {"num_warps": 2, "STAGES": 2},
    {"num_warps": 8, "STAGES": 1},
    {"BLOCK_K": 1, "STAGES": 1},
    {"BLOCK_K": 2},
    {"BLOCK_K": 2, "STAGES": 1},
    {"BLOCK_K": 2, "num_warps": 8, "STAGES": 1},
    {"BLOCK_K": 8, "num_warps": 4, "STAGES": 1},
    {"BLOCK_K": 8, "num_warps": 8, "STAGES": 1},
)
MOST_A_THREAD = 64
"""Numbers of a tile of rows: with more the assembler takes minutes, and spills."""
DEPTHS = ({"BLOCK_Q": 32}, {"BLOCK_Q": 64}, {"num_stages": 2}, {"num_stages": 4})
SQUARES = (*DEPTHS, {"BLOCK_P": 64, "num_warps": 4}, {"BLOCK_P": 128, "num_warps": 8}, {"BLOCK_P": 128, "num_warps": 4})
PRODUCTS = (
    *DEPTHS, {"BLOCK_I": 64, "BLOCK_D": 64, "num_warps": 4}, {"BLOCK_I": 128, "BLOCK_D": 64, "num_warps": 4},
    {"BLOCK_I": 128, "BLOCK_D": 128, "num_warps": 8},
)  # fmt: skip
TOLERANCE = 1e-4
"""Of the largest number of a result in float32: other tiles add, and have tensor cores cut off, in another order."""
CALLS = 4
"""Of a graph."""


class Case(NamedTuple):
    """A call that launches a kernel, and other tiles for it."""

    kernel: str
    module: ModuleType
    chooser: str
    """The function in it whose result is the tile."""
    call: Callable[[], Sequence[Tensor]]
    others: Sequence[Mapping[str, int]]


def cases(views: int, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every kernel of a forward and backward pass that has a choice of tiles; rows alone, too, of large shapes."""
    generator = torch.Generator(device).manual_seed(0)
    z, t = torch.randn(2, views, batch, dim, device=device, generator=generator).to(dtype)
    noise = torch.zeros(2, dtype=torch.int64, device=device).unbind()
    one = torch.ones((), device=device)
    made = rows.row_losses(z, t, noise, want_z_hat=True)
    z_hat = made.z_hat
    g, squares = gram.unit_gram(z_hat, dim, smaller=True)
    weight, left = split(g / batch, 1.0), batch < dim
    shift = SMOOTHING**2 * batch / min(batch, dim)
    floor, steps = newton_schulz_plan(shift / batch, torch.float32)

    def backward() -> list[Tensor]:
        return [
            gradient.row_losses_backward(
                one, None, z, None, made.key, made.norms, made.centroid, None, None, attraction_weight=1e-3,
                product_weight=0.0, weight_left=False, push_weight=1e-4, first_image=0, leave_one_out=False,
                per_view=False,
            )
        ]  # fmt: skip

    def root() -> list[Tensor]:
        return [inverse_root.inverse_root(g, squares, shift, floor, steps, at_once=False)[0]]

    yield Case("rows_forward", rows, "launch_config", lambda: present(rows.row_losses(z, t, noise)), ROWS)
    yield Case(
        "rows_forward, ẑ too",
        rows,
        "launch_config",
        lambda: present(rows.row_losses(z, t, noise, want_z_hat=True)),
        ROWS,
    )
    yield Case("image_gradient", gradient, "launch_config", backward, ROWS)
    yield Case("unit_gram", gram, "unit_launch_config", lambda: gram.unit_gram(z_hat, dim, smaller=True)[:1], SQUARES)
    yield Case(
        "unit_product",
        product,
        "unit_launch_config",
        lambda: [product.unit_product(z_hat, weight, dim, left=left)],
        PRODUCTS,
    )
    yield Case("inverse root", inverse_root, "launch_config", root, SQUARES)


def present(losses: rows.RowLosses) -> list[Tensor]:
    """What there is of them, the noise's key excepted."""
    return [tensor for tensor in losses[:-1] if tensor is not None]


def measure(case: Case, device: torch.device, *, seconds: float, rounds: int) -> list[dict[str, Any]]:
    """The chosen tile first, then the others, quickest first, then those that do not fit."""
    usual, expected = chosen(case), case.call()
    measured, misfits, clocks = [], [], {}
    for tile in tried(usual, case.others):
        call = functools.partial(with_tile, case, tile)
        row = {"kernel": case.kernel, "tile": tile, "chosen": tile == usual}
        try:
            wrong = [said for pair in zip(call(), expected, strict=True) if (said := difference(*pair))]
        except TritonError as reason:  # more shared memory than there is, or an assembler that fails
            wrong = [(str(reason).strip() or type(reason).__name__).splitlines()[0]]
        if wrong:
            misfits.append(row | {"misfit": wrong[0]})
            continue
        clocks[len(measured)] = device_round(lambda call=call: [call] * CALLS, device, waits=False)[0]
        measured.append(row)
    for number, taken in turns(clocks, CALLS, seconds=seconds, rounds=rounds).items():
        measured[number]["microseconds"] = taken
    first, *rest = measured
    return [first, *sorted(rest, key=lambda row: min(row["microseconds"])), *misfits]


def tried(usual: dict[str, int], others: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """The usual tile and what the others make of it, but for rows of more numbers than a thread should hold."""

    def of_a_thread(tile: Mapping[str, int]) -> int:
        return tile["BLOCK_K"] * tile["BLOCK_D"] // (32 * tile["num_warps"]) if "BLOCK_K" in tile else 0

    changed = [usual | other for other in others]
    return [usual, *(tile for tile in changed if tile != usual and of_a_thread(tile) <= MOST_A_THREAD)]


def chosen(case: Case) -> dict[str, int]:
    """The launcher's tile."""
    tiles: list[dict[str, int]] = []
    choose = getattr(case.module, case.chooser)
    with mock.patch.object(
        case.module, case.chooser, lambda *sizes, **options: tiles.append(choose(*sizes, **options)) or tiles[-1]
    ):
        case.call()
    return tiles[-1]


def with_tile(case: Case, tile: Mapping[str, int]) -> Sequence[Tensor]:
    """The call with another tile."""
    with mock.patch.object(case.module, case.chooser, side_effect=lambda *_, **__: dict(tile)):
        return case.call()


def difference(got: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a result that should be another one but for rounding."""
    tolerance = TOLERANCE
    if got.dtype == torch.float16 and got.dim() == 4:
        # Split: where a high half is rounded otherwise, so is the low one.
        got, expected = (pair[:, 0].double() + pair[:, 1].double() / SCALE.value for pair in (got, expected))
    elif got.dtype in (torch.float16, torch.bfloat16):
        tolerance = 2 * torch.finfo(got.dtype).eps
    error = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    return None if error <= tolerance else f"its results differ by {error:.0e}"  # NaN too


def table(shape: str, found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: of each kernel the chosen tile, those that are not slower by a tenth, and those that were refused."""
    lines = []
    for row in found:
        tile = " ".join(f"{name}={value}" for name, value in row["tile"].items() if name != "enable_fp_fusion")
        name = f"**{row['kernel']}**" if row["chosen"] else row["kernel"]
        if "misfit" in row:
            lines.append([shape, name, tile, "", row["misfit"]])
            continue
        if row["chosen"]:
            usual = min(row["microseconds"])
        share = min(row["microseconds"]) / usual
        if share <= 1.1:
            lines.append([shape, name, tile, cell(spread(row["microseconds"]), 1), f"{share:.2f}"])
    return markdown_table(["shape", "kernel", "launch_config", "µs", "of the chosen"], lines, text=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each tile; default: %(default)s")
    parser.add_argument("--seconds", type=above_zero, default=0.05, help="timed for each tile; default: %(default)s")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="'KxBxD DTYPE'", help="default: %(default)s")
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="those whose names begin like this; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    device = the_gpu("bench/tiles.py")
    result = provenance("bench/tiles.py", None, device, ("triton",)) | {"shapes": []}
    for shape in options.shapes:
        sizes, dtype = shape.split()
        result["shapes"].append({"shape": shape, "rows": []})
        for case in cases(*map(int, sizes.split("x")), getattr(torch, dtype), device):
            if not case.kernel.startswith(tuple(options.kernels or [""])):
                continue
            found = measure(case, device, seconds=options.seconds, rounds=options.rounds)
            result["shapes"][-1]["rows"] += found
            keep(result, options.json)
            print(table(shape, found), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
