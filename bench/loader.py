"""Views per second of the data pipeline, against torchvision in a DataLoader, in one run on the same cores.

    python bench/loader.py                                # images that msbreg renders, views of 32 pixels
    python bench/loader.py --data PHOTOS --size 224

All loaders read the same files and make views by the same recipe, with as many threads or worker processes. They take
turns, round after round, so that what else the machine does hits all alike; a loader rests while others have theirs.
CPU time is that of all processes and threads of a loader, and says more than the clock where the machine is not quiet.
"""

import argparse
import io
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from options import add_device, not_negative, positive
from PIL import Image, ImageFilter
from records import cell, keep, provenance, spread
from runs import end_with_parent
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2

from msbreg.data import Source, View, ViewLoader, load_recipe, open_source, open_split
from msbreg.data.recipes import MEAN, STD, WHOLE_IMAGE_BELOW, Recipe
from msbreg.data.rendered import render
from msbreg.errors import MSBRegError
from msbreg.machine import synchronize, usable_cores
from msbreg.tables import markdown_table

__all__ = ["LOADERS", "Case", "Loader", "Turn", "loaders", "rows", "table", "turn"]

K = TypeVar("K")

MANY = 10**9
"""Images that nobody comes to the end of."""
PREFETCH = 2
"""Batches that each of a DataLoader's workers prepares ahead: torch's default."""
SHARED = "/dev/shm"
"""Where workers leave their batches."""
INTERPOLATION = {"cubic": v2.InterpolationMode.BICUBIC, "linear": v2.InterpolationMode.BILINEAR}
BASES = {"torchvision": "torchvision", "torchvision-pillow-blur": "torchvision, Pillow's blur"}
"""What ratios are to, with the heading of the column."""


class Case(NamedTuple):
    """What is loaded."""

    source: Source
    recipe: Recipe
    batch: int
    threads: int
    """Threads of msbreg's loaders, worker processes of a DataLoader."""
    device: torch.device


class Loader(Protocol):
    """A way to make batches of views."""

    rest: int
    """Batches before one is made as all later ones are, once the loader has rested."""
    together: int
    """Batches that become ready at about the same time, since as many workers each make one."""

    @contextmanager
    def running(self) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """Lets it work; gives batches without end, each (K B, 3, H, W) in one tensor or in K."""

    def cpu_seconds(self) -> float:
        """CPU time so far of all of its processes."""

    def close(self) -> None:
        """Frees what it holds."""


class OurLoader:
    """`msbreg.data.ViewLoader`, after a pass over the images, which brings their files into memory."""

    together = 1

    def __init__(self, case: Case, backend: Literal["dali", "torchvision"], *, prefetch: int = 2) -> None:
        self.rest = 2 * prefetch
        options: dict[str, Any] = {"device": case.device, "backend": backend, "threads": case.threads}
        self._loader = ViewLoader(case.source, case.recipe, case.batch, prefetch=prefetch, **options)
        self._step = 0
        with self.running() as batches:
            for _ in range(math.ceil(len(case.source) / case.batch)):
                next(batches)

    @contextmanager
    def running(self) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """See `Loader.running`."""
        try:
            yield self._batches()
        finally:
            self._loader.batches(0, 0)  # which ends the stream before it, and what works ahead for it

    def _batches(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._loader.batches(self._step):
            self._step += 1
            yield batch.views

    def cpu_seconds(self) -> float:
        """See `Loader.cpu_seconds`."""
        return time.process_time()

    def close(self) -> None:
        """See `Loader.close`."""
        self._loader.close()


class TorchvisionLoader:
    """`torchvision.transforms.v2` in a `torch.utils.data.DataLoader`, one thread in each worker process.

    Images are drawn with replacement, without end: at the end of an epoch the workers would wait for each other, which
    happens seldom with a large data set and every second with a small one. Between turns the workers are stopped.
    """

    rest = 0

    def __init__(self, case: Case, *, pillow_blur: bool) -> None:
        dataset = TorchvisionViews(case.source, case.recipe, pillow_blur=pillow_blur)
        others = set(multiprocessing.active_children())
        self._batches = iter(
            DataLoader(
                dataset,
                batch_size=case.batch,
                sampler=RandomSampler(dataset, replacement=True, num_samples=MANY),
                num_workers=case.threads,
                drop_last=True,
                pin_memory=case.device.type == "cuda",
                prefetch_factor=PREFETCH,
                worker_init_fn=end_with_parent,
            )
        )
        self._workers = [child.pid for child in multiprocessing.active_children() if child.pid and child not in others]
        self._device, self.together = case.device, case.threads
        self._signal(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[Iterator[tuple[Tensor, ...]]]:
        """See `Loader.running`."""
        self._signal(signal.SIGCONT)
        try:
            yield (tuple(view.to(self._device, non_blocking=True) for view in views) for views, _ in self._batches)
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self._workers:
            os.kill(worker, number)

    def cpu_seconds(self) -> float:
        """See `Loader.cpu_seconds`."""
        return time.process_time() + sum(map(cpu_seconds_of, self._workers))

    def close(self) -> None:
        """See `Loader.close`."""
        self._signal(signal.SIGCONT)
        del self._batches


def cpu_seconds_of(pid: int) -> float:
    """CPU time so far of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class TorchvisionViews(Dataset):
    """K views of each image: decoded once by Pillow, then through K chains of transforms."""

    def __init__(self, source: Source, recipe: Recipe, *, pillow_blur: bool) -> None:
        self.source, self.transforms = source, [transform(view, pillow_blur=pillow_blur) for view in recipe]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        image = Image.open(io.BytesIO(self.source.read(index))).convert("RGB")
        return [transform(image) for transform in self.transforms], int(self.source.labels[index])


def transform(view: View, *, pillow_blur: bool) -> v2.Compose:
    """The block of a recipe in torchvision's own transforms: Pillow image to (3, size, size) float32.

    On Pillow images throughout, which was the fastest of the ways tried on photographs and on small images; so was
    making the image contiguous before its type is changed.
    """
    window = 2 * math.ceil(3 * view.sigma[1]) + 1  # torchvision's is the same for every sigma
    crop = v2.RandomResizedCrop(view.size, view.area, view.ratio, INTERPOLATION[view.interpolation], antialias=True)
    jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
    blur = PillowBlur(view.sigma) if pillow_blur else v2.GaussianBlur(window, view.sigma)
    chances = {
        v2.RandomApply([jitter], view.jitter): view.jitter,
        v2.RandomGrayscale(view.grayscale): view.grayscale,
        v2.RandomApply([blur], view.blur): view.blur,
        v2.RandomSolarize(128, view.solarize): view.solarize,
        v2.RandomHorizontalFlip(view.flip): view.flip,
    }
    possible = [step for step, chance in chances.items() if chance > 0]
    tensor = [v2.ToImage(), v2.Lambda(torch.Tensor.contiguous), v2.ToDtype(torch.float32, scale=True)]
    return v2.Compose([crop, *possible, *tensor, v2.Normalize(MEAN, STD)])


class PillowBlur(nn.Module):
    """Pillow's blur, three box filters in place of a Gaussian, which many training scripts use for its speed.

    Args:
        sigma: smallest and largest standard deviation, pixels.
    """

    def __init__(self, sigma: tuple[float, float]) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self.sigma).item()))


class Provider(NamedTuple):
    """A loader by name."""

    about: str
    open: Callable[[Case], Loader]


LOADERS = {
    "torchvision": Provider(
        "torchvision.transforms.v2 in a DataLoader", lambda case: TorchvisionLoader(case, pillow_blur=False)
    ),
    "torchvision-pillow-blur": Provider(
        "the same with Pillow's approximate blur", lambda case: TorchvisionLoader(case, pillow_blur=True)
    ),
    "msbreg": Provider("msbreg's loader on DALI", lambda case: OurLoader(case, "dali")),
    "msbreg-torchvision": Provider(
        "msbreg's loader without DALI, on Pillow and numpy", lambda case: OurLoader(case, "torchvision")
    ),
}


def loaders(recipe: Recipe) -> list[str]:
    """Names of those that differ for this recipe."""
    blurred = any(view.blur > 0 for view in recipe)
    return [name for name in LOADERS if blurred or name != "torchvision-pillow-blur"]


def require_shared_memory(workers: int, batch_bytes: int) -> None:
    """Sees that the batches which a DataLoader's workers prepare have room: where they have not, a worker is killed.

    Raises:
        MSBRegError: they have not.
    """
    needed, free = PREFETCH * workers * batch_bytes, shutil.disk_usage(SHARED).free
    if free < needed:
        raise MSBRegError(
            f"the batches of {workers} workers need {needed / 1e9:.1f} GB of shared memory, but {SHARED} has "
            f"{free / 1e9:.1f} GB free; give it more (docker run --shm-size), or lower --threads"
        )


def missing() -> dict[str, str]:
    """Loaders that need a package that is not installed, with the reason."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        return {"msbreg": f"DALI cannot be imported ({error})"}
    return {}


class Turn(NamedTuple):
    """What a loader did in one round."""

    batches: int
    seconds: float
    cpu_seconds: float


def turn(loader: Loader, case: Case, *, seconds: float) -> Turn:
    """Lets a loader work for at least these seconds, and until batches that become ready together are there."""
    with loader.running() as stream:
        for _ in range(loader.rest):
            next(stream)
        synchronize(case.device)
        done, used, began = 0, loader.cpu_seconds(), time.perf_counter()
        while done == 0 or time.perf_counter() - began < seconds:
            for _ in range(loader.together):
                next(stream)
            done += loader.together
        synchronize(case.device)
        return Turn(done, time.perf_counter() - began, loader.cpu_seconds() - used)


def measure(
    case: Case, openers: dict[K, Callable[[Case], Loader]], *, rounds: int, seconds: float
) -> dict[K, list[Turn]]:
    """Turns of these loaders, by what they are called, after a short one that does not count."""
    with ExitStack() as stack:
        opened = {}
        for name, opener in openers.items():
            opened[name] = opener(case)
            stack.callback(opened[name].close)
        for loader in opened.values():
            turn(loader, case, seconds=0)
        taken: dict[K, list[Turn]] = {name: [] for name in opened}
        for _ in range(rounds):
            for name, loader in opened.items():
                taken[name].append(turn(loader, case, seconds=seconds))
        return taken


def rates(case: Case, turns: list[Turn]) -> list[float]:
    """Images/s of each turn."""
    return [case.batch * one.batches / one.seconds for one in turns]


def costs(case: Case, turns: list[Turn]) -> list[float]:
    """CPU seconds a view of each turn."""
    return [one.cpu_seconds / (len(case.recipe) * case.batch * one.batches) for one in turns]


def rows(case: Case, turns: dict[str, list[Turn]]) -> list[dict[str, Any]]:
    """A row for each loader: figures over the rounds, and ratios within each round."""
    views = len(case.recipe)
    rate = {name: rates(case, taken) for name, taken in turns.items()}
    cost = {name: costs(case, taken) for name, taken in turns.items()}
    return [
        {
            "views": views,
            "loader": name,
            "images_per_second": spread(rate[name]),
            "views_per_second": spread([views * value for value in rate[name]]),
            "cpu_ms_per_view": spread([1e3 * value for value in cost[name]]),
            "speed_over": {base: spread(ratios(rate[name], rate[base])) for base in BASES if base in turns},
            "cpu_time_over": {base: spread(ratios(cost[name], cost[base])) for base in BASES if base in turns},
            "turns": [one._asdict() for one in taken],
        }
        for name, taken in turns.items()
    ]


def ratios(values: list[float], bases: list[float]) -> list[float]:
    return [value / base for value, base in zip(values, bases, strict=True)]


def table(result: dict[str, Any]) -> str:
    """Markdown: median over the rounds, and the smallest and largest in brackets."""
    found = result["rows"]
    bases = [base for base in BASES if any(base in row["speed_over"] for row in found)]
    header = ["K", "loader", "images/s", "views/s", "CPU ms a view"]
    header += [f"images/s over {BASES[base]}" for base in bases] + [f"CPU time over {BASES[base]}" for base in bases]
    cells = [
        [
            row["views"],
            row["loader"],
            cell(row["images_per_second"], 0),
            cell(row["views_per_second"], 0),
            cell(row["cpu_ms_per_view"], 2),
            *(cell(row["speed_over"].get(base), 2) for base in bases),
            *(cell(row["cpu_time_over"].get(base), 2) for base in bases),
        ]
        for row in found
    ]
    about = {name: LOADERS[name].about for name in dict.fromkeys(row["loader"] for row in found)}
    heading = (
        f"Views of {result['size']} pixels, recipe {result['recipe']}, batches of {result['batch']}, "
        f"{result['device_name']}, {result['threads']} threads, {result['processor']}"
    )
    notes = [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    loaders = [f"* `{name}`: {text}" for name, text in about.items()]
    return "\n".join([heading, "", markdown_table(header, cells, text=2), "", *loaders, "", *notes]).strip()


def facts(options: argparse.Namespace, source: Source, script: str = "bench/loader.py") -> dict[str, Any]:
    """Where the figures are from."""
    packages = ("torchvision", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    device = torch.device(options.device)
    return {
        **provenance(script, options.data, device, packages),
        "images": {
            "from": "rendered" if options.data is None else "files",
            "count": len(source),
            "mean_bytes": statistics.mean(len(source.read(index)) for index in range(len(source))),
        },
        **{name: getattr(options, name) for name in ("size", "recipe", "batch", "threads", "rounds", "seconds")},
    }


def images(options: argparse.Namespace, folder: str) -> Source:
    """The images of the command line, or rendered ones: as large as the views, or twice that from 96 pixels on."""
    if options.data is None:
        side = options.size if options.size < WHOLE_IMAGE_BELOW else 2 * options.size
        return open_source(render(Path(folder, "images"), images=options.images, test_images=0, size=side) / "train")
    source, _ = open_split(options.data)
    count = min(options.images, len(source))
    return source.subset(np.linspace(0, len(source) - 1, count).astype(np.int64))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="images, as for msbreg pretrain; default: images that msbreg renders")
    parser.add_argument("--images", type=positive, help="of these at most; default: two batches, at least 128")
    parser.add_argument("--size", type=positive, default=32, help="side of a view, pixels; default: %(default)s")
    parser.add_argument("--recipe", default="auto", help="byol, cifar, ...; default: auto, which goes by the size")
    parser.add_argument("--views", type=positive, nargs="+", default=[2, 4, 8], help="of an image; default: 2 4 8")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, metavar="NAME", help="only these; default: all")
    parser.add_argument("--batch", type=positive, help="images; default: 256, from views of 96 pixels on 32")
    parser.add_argument("--threads", type=positive, default=usable_cores(), help="and cores; default: all, %(default)s")
    add_device(parser, "where the views are to be")
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each loader; default: %(default)s")
    parser.add_argument("--seconds", type=not_negative, default=1.0, help="of a turn at least; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if options.batch is None:
        options.batch = 256 if options.size < WHOLE_IMAGE_BELOW else 32
    if options.images is None:
        options.images = max(128, 2 * options.batch)
    return options


def main() -> None:
    options = parse()
    # Whatever threads a loader starts beside those asked for, no loader has more cores than another.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    torch.set_num_threads(options.threads)
    result = None
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = images(options, folder)
            result = facts(options, source) | {"rows": [], "left_out": missing()}
            for name, reason in result["left_out"].items():
                print(f"{name} is left out: {reason}", file=sys.stderr, flush=True)
            for views in options.views:
                recipe = load_recipe(options.recipe, views, options.size)
                case = Case(source, recipe, options.batch, options.threads, torch.device(options.device))
                wanted = options.loaders or LOADERS
                names = [name for name in loaders(recipe) if name in wanted and name not in result["left_out"]]
                workers = [name for name in names if name in BASES]
                try:
                    in_bytes = case.batch * sum(3 * view.size**2 * 4 for view in recipe)  # float32
                    require_shared_memory(len(workers) * case.threads, in_bytes)
                except MSBRegError as error:
                    names = [name for name in names if name not in workers]
                    result["left_out"] |= {f"{name} with {views} views": str(error) for name in workers}
                openers = {name: LOADERS[name].open for name in names}
                result["rows"] += rows(case, measure(case, openers, rounds=options.rounds, seconds=options.seconds))
                print(f"{views} views: done", file=sys.stderr, flush=True)
                keep(result, options.json)
    except MSBRegError as error:
        sys.exit(str(error))
    finally:  # of what there is, where it is interrupted
        if result is not None:
            print(table(result), flush=True)


if __name__ == "__main__":
    main()
