"""Views per second of msbreg's loader by its threads and by the batches that it works ahead, in turns.

    python bench/threads.py                                # images that msbreg renders, views of 32 pixels
    python bench/threads.py --data PHOTOS --size 224 --views 4

What else the machine does hits all settings alike, since they take turns, and ratios are to the defaults in the same
round: as many threads as cores, two batches ahead.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loader import Case, OurLoader, Turn, facts, images, turn
from records import cell, keep, markdown, spread

from msbreg.data import load_recipe
from msbreg.data.recipes import WHOLE_IMAGE_BELOW
from msbreg.errors import MSBRegError
from msbreg.machine import usable_cores

__all__ = ["Setting", "main", "measure", "settings"]


class Setting(NamedTuple):
    """What is tried."""

    threads: int
    prefetch: int


def settings(cores: int) -> list[Setting]:
    """The defaults first, then other numbers of threads, and of batches ahead."""
    threads = dict.fromkeys((cores, max(1, cores // 2), cores + 1, 2 * cores))
    return [*(Setting(number, 2) for number in threads), Setting(cores, 1), Setting(cores, 4)]


def measure(case: Case, tried: list[Setting], *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Images/s and CPU milliseconds a view of each setting, and its speed over the first one's in the same round."""
    with ExitStack() as stack:
        opened = []
        for threads, prefetch in tried:
            opened.append(OurLoader(case._replace(threads=threads), "dali", prefetch=prefetch))
            stack.callback(opened[-1].close)
        for loader in opened:
            turn(loader, case, seconds=0)
        taken: list[list[Turn]] = [[turn(loader, case, seconds=seconds) for loader in opened] for _ in range(rounds)]
    rows = []
    for setting, turns in zip(tried, zip(*taken, strict=True), strict=True):
        speeds = [case.batch * one.batches / one.seconds for one in turns]
        first = [case.batch * one[0].batches / one[0].seconds for one in taken]
        cpu = [1e3 * one.cpu_seconds / (one.batches * case.batch * len(case.recipe)) for one in turns]
        over = [speed / base for speed, base in zip(speeds, first, strict=True)]
        row = {"images_per_second": spread(speeds), "over_the_first": spread(over), "cpu_ms_per_view": spread(cpu)}
        rows.append(setting._asdict() | row)
    return rows


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="images, as for msbreg pretrain; default: images that msbreg renders")
    parser.add_argument("--size", type=int, default=32, help="side of a view, pixels; default: %(default)s")
    parser.add_argument("--views", type=int, default=4, help="of an image; default: %(default)s")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each setting; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn at least; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if options.device == "cuda" and not gpu:
        parser.error("--device cuda: torch sees no GPU here")
    if min(options.rounds, options.views) < 1:
        parser.error("--rounds and --views: expected 1 or more")
    options.batch = 256 if options.size < WHOLE_IMAGE_BELOW else 32
    options.images, options.threads, options.recipe = 2 * options.batch, usable_cores(), "auto"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = images(options, folder)
            recipe = load_recipe(options.recipe, options.views, options.size)
            case = Case(source, recipe, options.batch, options.threads, torch.device(options.device))
            result = facts(options, source, script="bench/threads.py") | {"views": options.views}
            tried = settings(options.threads)
            result["rows"] = measure(case, tried, rounds=options.rounds, seconds=options.seconds)
    except (MSBRegError, ImportError) as error:
        sys.exit(str(error))
    keep(result, options.json)
    print(
        f"{options.views} views of {options.size} pixels, batches of {options.batch}, {result['device_name']}, "
        f"{options.threads} cores\n"
    )
    cells = [
        [
            str(row["threads"]),
            str(row["prefetch"]),
            cell(row["images_per_second"], 0),
            cell(row["over_the_first"], 2),
            cell(row["cpu_ms_per_view"], 2),
        ]
        for row in result["rows"]
    ]
    print(markdown(["threads", "batches ahead", "images/s", "over the first", "CPU ms a view"], cells, text=0))


if __name__ == "__main__":
    main()
