"""Views per second of msbreg's loader by its threads and by the batches that it works ahead, in turns.

    python bench/threads.py                                # images that msbreg renders, views of 32 pixels
    python bench/threads.py --data PHOTOS --size 224 --views 4

What else the machine does hits all settings alike, since they take turns, and ratios are to the defaults in the same
round: as many threads as cores, two batches ahead.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from loader import Case, Loader, OurLoader, Turn, costs, facts, images, measure, rates, ratios
from options import add_device, not_negative, positive
from records import cell, keep, spread

from msbreg.data import load_recipe
from msbreg.data.recipes import WHOLE_IMAGE_BELOW
from msbreg.errors import MSBRegError
from msbreg.machine import usable_cores
from msbreg.tables import markdown_table

__all__ = ["Setting", "main", "rows", "settings"]


class Setting(NamedTuple):
    """What is tried."""

    threads: int
    prefetch: int


def settings(cores: int) -> list[Setting]:
    """The defaults first, then other numbers of threads, and of batches ahead."""
    threads = dict.fromkeys((cores, max(1, cores // 2), cores + 1, 2 * cores))
    return [*(Setting(number, 2) for number in threads), Setting(cores, 1), Setting(cores, 4)]


def opener(setting: Setting) -> Callable[[Case], Loader]:
    """What opens a loader with this setting."""
    return lambda case: OurLoader(case._replace(threads=setting.threads), "dali", prefetch=setting.prefetch)


def rows(case: Case, turns: dict[Setting, list[Turn]]) -> list[dict[str, Any]]:
    """A row for each setting: figures over the rounds, and its speed over the first one's in the same round."""
    first = rates(case, next(iter(turns.values())))
    return [
        setting._asdict()
        | {
            "images_per_second": spread(rates(case, taken)),
            "over_the_first": spread(ratios(rates(case, taken), first)),
            "cpu_ms_per_view": spread([1e3 * cost for cost in costs(case, taken)]),
        }
        for setting, taken in turns.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="images, as for msbreg pretrain; default: images that msbreg renders")
    parser.add_argument("--size", type=positive, default=32, help="side of a view, pixels; default: %(default)s")
    parser.add_argument("--views", type=positive, default=4, help="of an image; default: %(default)s")
    add_device(parser, "where the views are to be")
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each setting; default: %(default)s")
    parser.add_argument("--seconds", type=not_negative, default=1.0, help="of a turn at least; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    options.batch = 256 if options.size < WHOLE_IMAGE_BELOW else 32
    options.images, options.threads, options.recipe = 2 * options.batch, usable_cores(), "auto"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = images(options, folder)
            recipe = load_recipe(options.recipe, options.views, options.size)
            case = Case(source, recipe, options.batch, options.threads, torch.device(options.device))
            result = facts(options, source, script="bench/threads.py") | {"views": options.views}
            openers = {setting: opener(setting) for setting in settings(options.threads)}
            result["rows"] = rows(case, measure(case, openers, rounds=options.rounds, seconds=options.seconds))
    except (MSBRegError, ImportError) as error:
        sys.exit(str(error))
    keep(result, options.json)
    print(
        f"{options.views} views of {options.size} pixels, batches of {options.batch}, {result['device_name']}, "
        f"{options.threads} cores\n"
    )
    cells = [
        [
            row["threads"],
            row["prefetch"],
            cell(row["images_per_second"], 0),
            cell(row["over_the_first"], 2),
            cell(row["cpu_ms_per_view"], 2),
        ]
        for row in result["rows"]
    ]
    print(markdown_table(["threads", "batches ahead", "images/s", "over the first", "CPU ms a view"], cells, text=0))


if __name__ == "__main__":
    main()
