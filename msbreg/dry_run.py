"""`msbreg pretrain --dry-run`: whether a config runs on this machine, in how much memory, and in how many hours."""

import copy
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from msbreg.config import Config
from msbreg.cuda_graph import WARM_UP
from msbreg.data import Source, ViewLoader, open_source, rendered
from msbreg.data.loader import whole_batches
from msbreg.findings import keep_findings
from msbreg.inputs import open_images, open_loader, share_of_batch
from msbreg.machine import gpu_megabytes_in_use, memory_megabytes, synchronize, usable_cores
from msbreg.preflight import planned_steps, require_networks, require_packages, require_processes
from msbreg.processes import Processes
from msbreg.step import TrainingStep
from msbreg.tables import markdown_table

__all__ = ["dry_run"]

RENDERED = 16
"""Different images; a larger batch has them several times."""
PIXELS_ON_A_CPU = 400_000
"""Pixels of all views that a process steps on where there is no GPU: a whole batch of ImageNet takes a CPU minutes."""
BATCHES_LOADED = 4
"""Batches that the loader is timed on."""


class _Measured(NamedTuple):
    """What was measured, each of the process that has most of it."""

    steps: list[float]
    """Seconds of each step."""
    loading: float
    """Seconds that the loader takes for a batch."""
    memory: float
    """MB at the peak, see `memory_megabytes`."""
    gpu_memory: float
    """MB of its GPU that are in use, by DALI and other programs too; 0 on a CPU."""
    parameters: int
    """Numbers that a step changes."""


def dry_run(config: Config, *, file: Path | None = None) -> str | None:
    """Takes two real steps of a run, on rendered images where it has none yet; its run folder is not touched.

    Args:
        config: the run's options. The number of images comes from `data.path`, where it is given, or `data.images`.
        file: where the figures go as JSON, too.

    Returns:
        A Markdown table, on the first process alone: memory, the seconds of the first step (which compiles and chooses
        algorithms) and of the last (the second, or the second that a CUDA graph replays), the seconds in which the
        loader makes a batch, of the run's images or of rendered ones as large as a view, and the hours that the whole
        run would take. On a GPU, which works while the loader does, the slower of step and loader sets the pace; a
        CPU's cores do both in turn. A CPU steps on a few images, and the table says so; the hours are then in
        proportion.

    Raises:
        MSBRegError: whatever would keep the run from its first step, or a step that does not fit into memory.
    """
    config.validate()
    require_packages(config)
    require_networks(config)
    asked, config = config, copy.deepcopy(config)
    whole, views = config.data.batch_size, config.data.views
    with Processes(config.run.device, timeout=config.run.timeout) as processes, tempfile.TemporaryDirectory() as folder:
        require_processes(config, processes)
        mine, gpu = share_of_batch(config, processes), processes.device.type == "cuda"
        images, where, source = _images(config, processes)
        steps = planned_steps(config, whole_batches(images, mine, processes.world, of=where))
        if not gpu:
            mine = min(mine, max(2, PIXELS_ON_A_CPU // (views * config.data.size**2)))
        config.data.batch_size = mine * processes.world
        of = "its images" if source else f"{config.data.size}-pixel images"
        if source is None:
            pictures = rendered.render(Path(folder) / "images", images=RENDERED, test_images=10, size=config.data.size)
            source = open_source(pictures / "train")
        measured = _measure(config, processes, source, steps)
        if not processes.first:
            return None
    share = config.data.batch_size / whole
    step, loading = measured.steps[-1] / share, measured.loading / share
    hours = steps * (max(step, loading) if gpu else step + loading) / 3600
    device = torch.cuda.get_device_name(processes.device) if gpu else f"CPU, {usable_cores()} cores"
    part = "" if share == 1 else f", measured with {config.data.batch_size}"
    rows = [
        ("device of each process", device),
        ("processes", f"{processes.world}"),
        ("images a step, of all processes", f"{whole:,}{part}"),
        ("views a step", f"{whole * views:,}"),
        ("parameters trained", f"{measured.parameters / 1e6:,.1f} M"),
        (f"first step{part}, s", f"{measured.steps[0]:.1f}"),
        (f"step {len(measured.steps)}{part}, s", f"{measured.steps[-1]:.3f}"),
        (f"loading a batch of {of}{part}, s", f"{measured.loading:.3f}"),
        (f"peak memory {'of torch in' if gpu else 'of'} a process{part}, MB", f"{measured.memory:,.0f}"),
        (f"steps of the run, {images:,} images", f"{steps:,}"),
        (f"hours of the run, projected from {'the slower' if gpu else 'the sum'} of step and loading", f"{hours:,.1f}"),
    ]
    if file is not None:
        figures = {
            "processes": processes.world,
            "images_a_step": whole,
            "images_measured": config.data.batch_size,
            "views_a_step": whole * views,
            "parameters": measured.parameters,
            "steps_s": measured.steps,
            "loading_s": measured.loading,
            "memory_mb": measured.memory,
            "gpu_memory_in_use_mb": measured.gpu_memory if gpu else None,
            "steps_of_the_run": steps,
            "hours_of_the_run": hours,
        }
        keep_findings(file, asked, processes.device, figures)
    if gpu:
        rows.insert(-2, ("memory in use on its GPU, DALI and others included, MB", f"{measured.gpu_memory:,.0f}"))
    return markdown_table((f"dry run: {config.method.name}, {config.model.backbone}", "value"), rows)


def _images(config: Config, processes: Processes) -> tuple[int, object, Source | None]:
    """How many images an epoch of the run has, what to call where they are, and where they are."""
    if config.data.path is None:
        where = "--data.images" if config.data.images else "the rendered images"
        return config.data.images or rendered.IMAGES, where, None
    source, _ = open_images(config, processes)
    return len(source), source, source


def _measure(config: Config, processes: Processes, source: Source, steps: int) -> _Measured:
    """Takes some steps of a run of so many, then lets the loader work alone: on images from all over the source."""
    images = (2 + BATCHES_LOADED) * config.data.batch_size  # each is read once, as from a disk
    enough = np.linspace(0, len(source), images, endpoint=False, dtype=np.int64)
    loader = open_loader(config, processes, source.subset(enough))

    def most(number: float) -> float:
        return max(processes.gather(round(1e6 * number))) / 1e6

    try:
        seconds, parameters = _take_steps(config, processes, loader, steps)
        loading = _load(loader, len(seconds))
        return _Measured(
            steps=[most(each) for each in seconds],
            loading=most(loading),
            memory=most(memory_megabytes(processes.device)),
            gpu_memory=most(gpu_megabytes_in_use(processes.device)),
            parameters=parameters,
        )
    finally:
        loader.close()


def _take_steps(config: Config, processes: Processes, loader: ViewLoader, steps: int) -> tuple[list[float], int]:
    """The seconds of each step, and how many numbers it changes. A CUDA graph has to be recorded before the last."""
    taken = 2 + (WARM_UP if config.model.cuda_graph else 0)
    step = TrainingStep(config, processes, steps=max(steps, taken), warmup_steps=0)
    step.train()
    seconds = []
    for number, batch in enumerate(loader.batches(0, taken)):
        synchronize(processes.device)
        began = time.perf_counter()
        step(batch, number)
        synchronize(processes.device)
        seconds.append(time.perf_counter() - began)
    return seconds, sum(weight.numel() for weight in step.method.parameters() if weight.requires_grad)


def _load(loader: ViewLoader, first: int) -> float:
    """The seconds that the loader, which has worked before, takes for a batch: none of them is prepared beforehand."""
    began = time.perf_counter()
    for _ in loader.batches(first, first + BATCHES_LOADED):
        synchronize(loader.device)
    return (time.perf_counter() - began) / BATCHES_LOADED
