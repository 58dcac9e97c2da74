"""`msbreg pretrain --dry-run`: whether a config runs on this machine, in how much memory, and in how many hours."""

import copy
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from msbreg.benchmark import synchronize
from msbreg.config import Config
from msbreg.data import ViewLoader, load_recipe, open_source, open_split, rendered
from msbreg.errors import MSBRegError
from msbreg.machine import usable_cores
from msbreg.monitor import markdown_table, memory_megabytes
from msbreg.processes import Processes
from msbreg.step import TrainingStep

__all__ = ["dry_run"]

RENDERED = 16
"""Different images; a larger batch has them several times."""
PIXELS_ON_A_CPU = 400_000
"""Pixels of all views that a process steps on where there is no GPU: a whole batch of ImageNet takes a CPU minutes."""


def dry_run(config: Config) -> str:
    """Takes two real steps of a run on rendered images; its run folder is not touched.

    Args:
        config: the run's options. The number of images comes from `data.path`, where it is given, or `data.images`.

    Returns:
        A Markdown table: memory, seconds of both steps (the first one compiles, chooses algorithms and fills the
        loader's queue), and the hours that the whole run would take at the pace of the second. A CPU steps on a few
        images, and the table says so; the hours are then in proportion.

    Raises:
        MSBRegError: contradicting options, no images to project to, or a step that does not fit into the GPU's memory.
    """
    config.validate()
    images = _images(config)
    config = copy.deepcopy(config)
    with Processes(config.run.device) as processes, tempfile.TemporaryDirectory() as folder:
        whole = config.data.batch_size
        if whole % processes.world:
            raise MSBRegError(f"--data.batch_size {whole} cannot be shared evenly by {processes.world} processes.")
        mine = whole // processes.world
        if processes.device.type == "cpu":
            mine = min(mine, max(2, PIXELS_ON_A_CPU // (config.data.views * config.data.size**2)))
        config.data.batch_size = mine * processes.world
        steps = config.optim.steps or max(1, math.ceil(config.optim.epochs * (images // whole)))
        pictures = rendered.render(Path(folder) / "images", images=RENDERED, test_images=10, size=config.data.size)
        source = open_source(pictures / "train")
        loader = ViewLoader(
            source.subset(np.arange(max(RENDERED, 2 * config.data.batch_size)) % RENDERED),
            load_recipe(config.data.recipe, config.data.views, config.data.size),
            mine,
            seed=config.run.seed,
            rank=processes.rank,
            world_size=processes.world,
            device=processes.device,
            backend=config.data.backend,
            threads=config.data.threads or max(1, usable_cores() // processes.local_world),
            prefetch=config.data.prefetch,
        )
        try:
            seconds, parameters = _two_steps(config, processes, loader, steps)
        finally:
            loader.close()
        gpu = processes.device.type == "cuda"
        device = torch.cuda.get_device_name(processes.device) if gpu else f"CPU, {usable_cores()} cores"
        per_step = seconds[1] * whole / config.data.batch_size
        measured = "" if config.data.batch_size == whole else f", measured with {config.data.batch_size}"
        rows = [
            ("device of each process", device),
            ("processes", f"{processes.world}"),
            ("images a step, of all processes", f"{whole:,}{measured}"),
            ("views a step", f"{whole * config.data.views:,}"),
            ("parameters trained", f"{parameters / 1e6:,.1f} M"),
            ("first step, s", f"{seconds[0]:.1f}"),
            ("second step, s", f"{seconds[1]:.3f}"),
            (f"peak memory a process{measured}, MB", f"{memory_megabytes(processes.device):,.0f}"),
            (f"steps of the run, {images:,} images", f"{steps:,}"),
            ("hours of the run, projected", f"{steps * per_step / 3600:,.1f}"),
        ]
    return markdown_table(rows, (f"dry run: {config.method.name}, {config.model.backbone}", "value"))


def _images(config: Config) -> int:
    """How many images an epoch of the run has."""
    if config.data.path is not None:
        return len(open_split(config.data.path)[0])
    return config.data.images or rendered.IMAGES


def _two_steps(config: Config, processes: Processes, loader: ViewLoader, steps: int) -> tuple[list[float], int]:
    """The seconds of each step, and the number of parameters that it changes."""
    step = TrainingStep(config, processes, steps=max(steps, 2), warmup_steps=0)
    step.train()
    seconds = []
    try:
        for number, batch in enumerate(loader.batches(0, 2)):
            began = time.perf_counter()
            step(batch, number)
            synchronize(processes.device)
            seconds.append(time.perf_counter() - began)
    except torch.OutOfMemoryError as error:
        raise MSBRegError(
            f"a step on {config.data.batch_size // processes.world} images of {config.data.views} views does not fit "
            f"into the memory of {torch.cuda.get_device_name(processes.device)}; use --model.view_chunk, a smaller "
            "--data.batch_size, or more processes."
        ) from error
    return seconds, sum(weight.numel() for weight in step.method.parameters() if weight.requires_grad)
