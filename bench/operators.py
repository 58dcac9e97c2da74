"""What the operators of the data pipeline cost, each alone, beside others that would do the same.

    python bench/operators.py --data PHOTOS --size 224 --json bench/results/cpu/DATE/operators-224.json

An operator is put several times side by side into a DALI pipeline, with the draws of msbreg's own recipe; its time is
what that takes longer than a pipeline that is fed alike and computes nothing. The pipelines take turns, round after
round, so that what else the machine does hits all alike. On a CPU DALI has one thread, and CPU time says more than the
clock on a busy machine. On a GPU the clock counts, decoding is tried with different shares of the images given to the
hardware's decoder, and what follows the blur is what the package leaves to one kernel, see `pixels.py`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from loader import images
from numpy.typing import NDArray
from options import add_device, not_negative, positive
from records import cell, keep, provenance, spread

from msbreg.data import Source, View
from msbreg.data.blur import gaussian_window
from msbreg.data.draws import draw
from msbreg.data.images import decode
from msbreg.data.recipes import MEAN, STD
from msbreg.errors import MSBRegError
from msbreg.machine import synchronize, usable_cores
from msbreg.tables import markdown_table

__all__ = ["Operator", "measure", "operators", "pipeline", "table"]

SIDE_BY_SIDE = {"cpu": 4, "cuda": 16}
"""Of an operator in its pipeline: many on a GPU, where feeding a pipeline takes longer than an operator."""
DECODER_SHARES = (0.5, 0.65, 0.8, 0.9, 1.0)
"""Of the images, for the hardware's decoder; DALI's default is 0.65."""
Batch = list[NDArray] | NDArray
Node = Any
Argument = Callable[[Batch], Node]
"""A batch of numbers for an operator, one a sample, as a node of the graph."""


class Operator(NamedTuple):
    """A way to do one of the pipeline's steps."""

    step: str
    name: str
    inputs: list[NDArray]
    """A batch of what it works on, uint8."""
    apply: Callable[[Node, Argument, int], Node]
    """The number is which of several copies it is: copies must differ, or DALI computes them once."""


def operators(source: Source, view: View, batch: int, device: torch.device) -> list[Operator]:
    """The steps of a view in their order, and for each the ways to do it, the package's first.

    Args:
        source: images, of which the first `batch` are worked on.
        view: the draws' block; blurred, solarized and flipped as often as it says.
        batch: images.
        device: of the operators.
    """
    from nvidia.dali import fn, types

    gpu = device.type == "cuda"
    encoded = [np.frombuffer(source.read(index), np.uint8) for index in range(batch)]
    decoded = [np.asarray(decode(data.data)) for data in encoded]
    sizes = np.array([image.shape[:2] for image in decoded])
    one = draw((view,), np.arange(batch), sizes, seed=0)[0]
    random = np.random.default_rng(0)
    views = list(random.integers(0, 256, (batch, view.size, view.size, 3), np.uint8))
    box = one.box.astype(np.float32)
    windows = [window[None] for window in map(gaussian_window, one.sigma.tolist(), one.radius.tolist())]
    jitter = random.uniform(0.6, 1.4, (3, batch)).astype(np.float32)
    hue = random.uniform(-36, 36, batch).astype(np.float32)

    def decoder(x: Node, _: Argument, copy: int, **options: float) -> Node:
        kind = "mixed" if gpu else "cpu"
        return fn.decoders.image(x, device=kind, output_type=types.RGB, jpeg_fancy_upsampling=True, **options)

    def resize(x: Node, argument: Argument, copy: int, interpolation: str) -> Node:
        start, end = argument(np.ascontiguousarray(box[:, :2])), argument(box[:, :2] + box[:, 2:])
        kind = getattr(types, f"INTERP_{interpolation}")
        size = [view.size, view.size]
        return fn.resize(x, size=size, roi_start=start, roi_end=end, interp_type=kind, antialias=True)

    def matrix(x: Node, argument: Argument, copy: int) -> Node:
        return fn.coord_transform(x, MT=argument(one.colour), dtype=types.UINT8)

    def twist(x: Node, argument: Argument, copy: int) -> Node:
        brightness, contrast, saturation = map(argument, jitter)
        return fn.color_twist(x, brightness=brightness, contrast=contrast, saturation=saturation, hue=argument(hue))

    def two_filters(x: Node, argument: Argument, copy: int) -> Node:
        row = argument(windows)
        row = row.gpu() if gpu else row
        return fn.filter(fn.filter(x, row), fn.transpose(row, perm=[1, 0]))

    def gaussian_blur(x: Node, argument: Argument, copy: int) -> Node:
        return fn.gaussian_blur(x, sigma=argument(one.sigma), window_size=argument(2 * one.radius + 1))

    def solarize(x: Node, argument: Argument, copy: int) -> Node:
        inverted = argument(255 * one.solarize.astype(np.uint8))
        return x ^ (fn.cast(x >= 128 + copy, dtype=types.UINT8) * (inverted.gpu() if gpu else inverted))

    def normalise(x: Node, argument: Argument, copy: int) -> Node:
        return fn.crop_mirror_normalize(
            x,
            mirror=argument(one.flip.astype(np.int32)),
            mean=[255 * value for value in MEAN],
            std=[255 * value for value in STD],
            dtype=types.FLOAT16 if gpu else types.FLOAT,
            output_layout="HWC",
        )

    shares = DECODER_SHARES if gpu else ()
    blurs = [Operator("blur", "gaussian_blur", views, gaussian_blur), Operator("blur", "filter", views, two_filters)]
    return [
        Operator("decode", "decoders.image", encoded, decoder),
        *(
            Operator("decode", f"hw_decoder_load={share}", encoded, partial(decoder, hw_decoder_load=share))
            for share in shares
        ),
        Operator("crop and resize", "resize, cubic", decoded, partial(resize, interpolation="CUBIC")),
        Operator("crop and resize", "resize, linear", decoded, partial(resize, interpolation="LINEAR")),
        *(blurs if gpu else reversed(blurs)),
        Operator("colours", "coord_transform", views, matrix),
        Operator("colours", "color_twist", views, twist),
        Operator("solarize", "x ^ 255", views, solarize),
        Operator("flip and normalise", "crop_mirror_normalize", views, normalise),
    ]


def pipeline(operator: Operator, copies: int, device: torch.device, threads: int, *, works: bool = True) -> Any:
    """A DALI pipeline with so many of the operator side by side; one that does not work hands out what it is given."""
    from nvidia.dali import Pipeline, fn, types

    def given(values: Batch, layout: str | None = None) -> Node:
        first = np.asarray(values[0])
        kind = {"uint8": types.UINT8, "int32": types.INT32, "float32": types.FLOAT}[first.dtype.name]
        return fn.external_source(source=lambda: values, dtype=kind, ndim=first.ndim, layout=layout, no_copy=True)

    index = None if device.type == "cpu" else device.index or 0
    built = Pipeline(len(operator.inputs), threads, index, prefetch_queue_depth=1)
    with built:
        images = operator.inputs[0].ndim == 3
        x = given(operator.inputs, "HWC" if images else None)
        x = x.gpu() if images and device.type == "cuda" else x
        arguments: list[Node] = []

        def argument(values: Batch) -> Node:
            arguments.append(given(values))
            return arguments[-1]

        outputs = [operator.apply(x, argument, copy) for copy in range(copies)]
        built.set_outputs(*(outputs if works else [x, *arguments]))  # what is not handed out, DALI does not compute
    built.build()
    return built


class Turn(NamedTuple):
    """What a batch took in one round."""

    seconds: float
    cpu_seconds: float


def turn(work: Any, device: torch.device, seconds: float) -> Turn:
    """Runs a pipeline for about these seconds, and at least once."""
    runs, cpu, began = 0, time.process_time(), time.perf_counter()
    while runs == 0 or time.perf_counter() - began < seconds:
        work.run()
        runs += 1
    synchronize(device)
    return Turn((time.perf_counter() - began) / runs, (time.process_time() - cpu) / runs)


class Measured(NamedTuple):
    """An operator, the pipelines without it and with it, and its turns so far."""

    way: Operator
    copies: int
    pair: list[Any]
    turns: list[Turn]

    def row(self) -> dict[str, Any]:
        """Microseconds of an image by the clock and of CPU time, over the rounds."""
        images = len(self.way.inputs)
        return {
            "step": self.way.step,
            "operator": self.way.name,
            "us": spread([1e6 * one.seconds / images for one in self.turns]),
            "cpu_us": spread([1e6 * one.cpu_seconds / images for one in self.turns]),
        }


def measure(
    ways: list[Operator], device: torch.device, *, threads: int, rounds: int, seconds: float
) -> Iterator[tuple[list[dict[str, Any]], dict[str, str]]]:
    """After each round a row for each operator, and those that DALI refuses on this device, with the reason."""
    measured, refused = [], {}
    for way in ways:
        copies = 1 if way.step == "decode" else SIDE_BY_SIDE[device.type]
        try:
            pair = [pipeline(way, copies, device, threads, works=works) for works in (False, True)]
            for work in pair:
                turn(work, device, 0)
        except (RuntimeError, ValueError, TypeError) as error:  # as DALI raises them
            _, _, reason = str(error).rpartition("encountered:\n")
            refused[f"{way.step}: {way.name}"] = (reason.strip() or type(error).__name__).splitlines()[0]
            continue
        measured.append(Measured(way, copies, pair, []))
    for _ in range(rounds):
        for one in measured:
            empty, full = (turn(work, device, seconds) for work in one.pair)
            one.turns.append(Turn(*((b - a) / one.copies for a, b in zip(empty, full, strict=True))))
        yield [one.row() for one in measured], refused


def table(result: dict[str, Any]) -> str:
    """Markdown: the median over the rounds, and the smallest and largest in brackets."""
    digits = 0 if result["device_name"] == "cpu" else 2
    rows = [
        [row["step"], row["operator"], cell(row["cpu_us"], digits), cell(row["us"], digits)] for row in result["rows"]
    ]
    heading = (
        f"Views of {result['size']} pixels, batches of {result['batch']}, {result['device_name']}, "
        f"{result['threads']} threads, {result['processor']}"
    )
    figures = markdown_table(["step", "operator", "CPU µs an image", "µs an image"], rows, text=2)
    notes = [f"Refused by DALI: {name}: {reason}" for name, reason in result["refused"].items()]
    return "\n\n".join([heading, figures, *notes])


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="images, as for msbreg pretrain; default: images that msbreg renders")
    parser.add_argument("--size", type=positive, default=224, help="side of a view, pixels; default: %(default)s")
    parser.add_argument("--batch", type=positive, default=256 if gpu else 16, help="images; default: %(default)s")
    add_device(parser, "of the operators")
    parser.add_argument(
        "--threads", type=positive, default=usable_cores() if gpu else 1, help="of DALI; default: %(default)s"
    )
    parser.add_argument("--rounds", type=positive, default=7, help="turns of each operator; default: %(default)s")
    parser.add_argument("--seconds", type=not_negative, default=0.3, help="of a turn; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    options.images = options.batch
    return options


def main() -> None:
    options = parse()
    device = torch.device(options.device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = images(options, folder)
            batch = min(options.batch, len(source))
            view = View(size=options.size, solarize=0.2)
            ways = operators(source, view, batch, device)
    except (ImportError, MSBRegError) as error:
        sys.exit(f"bench/operators.py: {error}")
    result = provenance("bench/operators.py", options.data, device, ("nvidia-dali-cuda130", "nvidia-dali-cuda120"))
    result |= {"size": options.size, "batch": batch, "threads": options.threads, "rows": [], "refused": {}}
    try:
        measured = measure(ways, device, threads=options.threads, rounds=options.rounds, seconds=options.seconds)
        for rows, refused in measured:
            result |= {"rows": rows, "refused": refused}
            keep(result, options.json)
    finally:  # of the rounds that there are, where it is interrupted
        print(table(result), flush=True)


if __name__ == "__main__":
    main()
