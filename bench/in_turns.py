"""Losses in turns, for ratios that the load of a machine's other users does not decide.

    python bench/in_turns.py --shape 8x512x256 --providers fused svd --json in_turns.json

`test_loss_times.py` times one loss after the other, and minutes on a shared machine are not alike. Here each round
times all of them, forward and backward, and ratios are taken within a round. A loss that disagrees with the oracle is
not timed.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
from gate import Reference, reference, verdict
from options import add_device, positive
from providers import Loss, providers
from records import cell, keep, provenance, spread
from shapes import Shape
from timing import Round, calls, copies, device_round
from torch import Tensor

from msbreg.tables import markdown_table

__all__ = ["main", "measure"]

SPECTRUM = "nuclear"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
WARM_UP = 3
"""Rounds that do not count."""


def measure(
    names: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int
) -> list[dict[str, Any]]:
    """Milliseconds of each loss, and its time over the first one's: median, smallest and largest of the rounds."""
    number = copies(2 * shape.size * dtype.itemsize, device)
    batches = [shapes.inputs(shape, dtype, device, seed) for seed in range(number)]

    @functools.cache
    def truth(terms: str) -> Reference:
        return reference(*batches[0], terms, SPECTRUM, shapes.oracle_decomposition(shape, device))

    clocks: dict[str, tuple[Round, str]] = {}
    for name in names:
        provider = providers(SPECTRUM)[name]
        fault = shapes.left_out(shape, provider, device)
        if fault is None:
            expected = truth(provider.terms) if provider.terms else None
            loss, _, fault = verdict(provider, *batches[0], expected)
        if fault:
            sys.exit(f"{name} is not timed: {fault}")
        clocks[name] = device_round(functools.partial(made, loss, batches), device, waits=provider.waits)

    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(WARM_UP + rounds):
        for name, (clock, _) in clocks.items():
            seconds[name].append(clock())
    first = seconds[names[0]][WARM_UP:]
    rows = []
    for name, times in seconds.items():
        ratios = [own / base for own, base in zip(times[WARM_UP:], first, strict=True)]
        rows.append(
            {
                "provider": name,
                "clock": clocks[name][1],
                "ms": spread([1e3 * t for t in times[WARM_UP:]]),
                "ratio": spread(ratios),
            }
        )
    return rows


def made(loss: Loss, batches: list[tuple[Tensor, Tensor]]) -> list[Any]:
    return calls(loss, batches, "both")


def main(arguments: Sequence[str] | None = None) -> None:
    known = providers(SPECTRUM)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8x512x256", help="K x B x D; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add_device(parser, "of the losses")
    parser.add_argument(
        "--providers", nargs="+", choices=known, default=["fused", "svd"], metavar="NAME",
        help=f"the first is what the others are compared with; default: fused svd; of {', '.join(known)}",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, help="of torch; default: its own choice")
    parser.add_argument("--rounds", type=positive, default=31, help="that count; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        (shape,) = shapes.parse(options.shape)
    except ValueError:
        parser.error(f"--shape: expected one shape KxBxD such as 8x512x256, got {options.shape!r}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = provenance("bench/in_turns.py", None, device, ("triton", "lightly"))
    result |= {"threads": torch.get_num_threads(), "shape": str(shape)}
    result |= {"dtype": options.dtype, "rounds": options.rounds}
    result["rows"] = measure(options.providers, shape, DTYPES[options.dtype], device, rounds=options.rounds)
    keep(result, options.json)
    print(f"{shape} in {options.dtype}, forward and backward, {result['device_name']}, {result['threads']} threads\n")
    cells = [[row["provider"], row["clock"], cell(row["ms"], 2), cell(row["ratio"], 2)] for row in result["rows"]]
    print(markdown_table(["provider", "clock", "ms", f"time / {options.providers[0]}"], cells, text=2))


if __name__ == "__main__":
    main()
