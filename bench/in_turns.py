"""Losses in turns, for ratios that the load of a machine's other users does not decide.

    python bench/in_turns.py --shape 8x512x256 --providers fused svd --json in_turns.json

`test_loss_times.py` times one loss after the other, and minutes on a shared machine are not alike. Here each round
times all of them, forward and backward, and ratios are taken within a round. A loss that disagrees with the oracle is
left out.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import shapes
import torch
from gate import Reference, reference, verdict
from options import add_device, listed, positive
from providers import Provider, Terms, providers
from records import cell, keep, provenance, spread
from shapes import Shape
from timing import Round, batches, calls, device_round

from msbreg.tables import markdown_table

__all__ = ["main", "measure"]

SPECTRUM = "nuclear"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
WARM_UP = 3
"""Rounds that do not count."""


def measure(
    wanted: Sequence[str], shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int
) -> dict[str, Any]:
    """Milliseconds of each loss, and its time over the first one's: median, smallest and largest of the rounds.

    Ctrl-C ends it with the rounds that there are.

    Returns:
        rows; rounds, that were measured; left_out, name to reason.
    """

    @functools.cache
    def truth(terms: Terms) -> Reference:
        z, t = shapes.inputs(shape, dtype, device)
        return reference(z, t, terms, SPECTRUM, shapes.oracle_decomposition(shape, device))

    clocks: dict[str, tuple[Round, str]] = {}
    left_out: dict[str, str] = {}
    for name in wanted:
        clock = prepared(providers(SPECTRUM)[name], shape, dtype, device, truth)
        if isinstance(clock, str):
            left_out[name] = clock
            print(f"{name} is left out: {clock}", file=sys.stderr, flush=True)
        else:
            clocks[name] = clock

    seconds: list[list[float]] = []
    try:
        while clocks and len(seconds) < WARM_UP + rounds:
            seconds.append([clock() for clock, _ in clocks.values()])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    seconds = seconds[WARM_UP:]
    rows = []
    for (name, (_, clock)), times in zip(clocks.items(), zip(*seconds, strict=True), strict=False):
        ratios = [own / base for own, (base, *_) in zip(times, seconds, strict=True)]
        figures = {"ms": spread([1e3 * time for time in times]), "ratio": spread(ratios)}
        rows.append({"provider": name, "clock": clock, **figures})
    return {"rows": rows, "rounds": len(seconds), "left_out": left_out}


def prepared(
    provider: Provider, shape: Shape, dtype: torch.dtype, device: torch.device, truth: Callable[[Terms], Reference]
) -> tuple[Round, str] | str:
    """A loss's clock, or why there is none."""
    if reason := shapes.left_out(shape, provider, device):
        return reason
    inputs = batches(provider, shape, dtype, device)
    loss, _, fault = verdict(provider, *inputs[0], provider.terms and truth(provider.terms))
    if fault:
        return fault
    try:
        return device_round(lambda: calls(loss, inputs, "both"), device, waits=provider.waits)
    except RuntimeError as error:  # of memory, or of a graph that cannot be recorded
        return f"it cannot be timed: {type(error).__name__}: {error}"


def main(arguments: Sequence[str] | None = None) -> None:
    known = providers(SPECTRUM)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shapes.one_shape, default="8x512x256", help="K x B x D; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add_device(parser, "of the losses")
    parser.add_argument(
        "--providers", nargs="+", default=["fused", "svd"], metavar="NAME",
        help=f"the first is what the others are compared with; default: fused svd; of {', '.join(known)}",
    )  # fmt: skip
    parser.add_argument("--threads", type=positive, help="of torch; default: its own choice")
    parser.add_argument("--rounds", type=positive, default=31, help="that count; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    wanted = listed(parser, options.providers, known)
    device, shape = torch.device(options.device), options.shape
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    result = provenance("bench/in_turns.py", None, device, ("triton", "lightly"))
    result |= {"threads": torch.get_num_threads(), "shape": str(shape), "dtype": options.dtype}
    result |= measure(wanted, shape, DTYPES[options.dtype], device, rounds=options.rounds)
    keep(result, options.json)
    heading = f"{shape} in {options.dtype}, forward and backward, {result['device_name']}, {result['threads']} threads"
    print(f"{heading}, {result['rounds']} rounds\n")
    cells = [[row["provider"], row["clock"], cell(row["ms"], 2), cell(row["ratio"], 2)] for row in result["rows"]]
    if not cells:
        sys.exit("No loss was timed.")
    print(markdown_table(["provider", "clock", "ms", f"time / {result['rows'][0]['provider']}"], cells, text=2))
    for name, reason in result["left_out"].items():
        print(f"\nLeft out: {name}: {reason}.")


if __name__ == "__main__":
    main()
