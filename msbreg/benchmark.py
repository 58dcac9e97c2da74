"""`msbreg bench`: how fast this machine trains a config, and what bounds it."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from msbreg.config import Config
from msbreg.console import say
from msbreg.errors import MSBRegError
from msbreg.findings import keep_findings
from msbreg.machine import synchronize
from msbreg.processes import Processes
from msbreg.tables import markdown_table
from msbreg.trainer import Trainer

__all__ = ["benchmark"]


def benchmark(config: Config, *, steps: int, file: Path | None = None) -> str | None:
    """Times the loader alone, the step alone, both together, and the step's parts, one after the other.

    Args:
        config: the run's options; its run folder is not touched.
        steps: how many of each are timed, after some that are not.
        file: where the figures go as JSON, too.

    Returns:
        A Markdown table of images/s and views/s, and of the parts' shares of the step, on the first process alone,
        which says each time on standard error as it has it.

    Raises:
        MSBRegError: whatever would keep the run from its first step.
    """
    config.validate()
    if steps < 1:
        raise MSBRegError(f"--steps is {steps}, but must be at least 1.")
    with Processes(config.run.device, timeout=config.run.timeout) as processes, tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, processes, Path(folder))
        trainer.step.train()
        step, batches = trainer.step, trainer.loader.batches()
        batch = next(batches)
        whole = _timed(
            {
                "loader alone": lambda: next(batches),
                "step alone": lambda: step(batch, 0),
                "both": lambda: step(next(batches), 0),
            },
            trainer,
            steps,
        )
        parts = _timed(
            {
                "loss, forward and backward": step.loss_alone(batch),
                "optimizer": step.optimizer.step,
                "moving average": lambda: step.method.after_step(1.0),
            },
            trainer,
            steps,
        )
        trainer.loader.close()
        if not processes.first:
            return None
    if file is not None:
        figures = {f"{name.replace(',', '').replace(' ', '_')}_s": time_ for name, time_ in {**whole, **parts}.items()}
        keep_findings(file, config, processes.device, {"steps": steps, "processes": processes.world, **figures})
    images, views = config.data.batch_size, config.data.views
    rows = [
        (name, f"{milliseconds(time_)}  {images / time_:,.0f} images/s  {views * images / time_:,.0f} views/s")
        for name, time_ in whole.items()
    ]
    rows += [
        (f"{name} alone", f"{milliseconds(time_)}  {time_ / whole['step alone']:.1%} of the step")
        for name, time_ in parts.items()
    ]
    device = torch.cuda.get_device_name() if processes.device.type == "cuda" else "cpu"
    return markdown_table((f"{config.model.backbone}, {views} views of {images} images, {device}", "a step"), rows)


def _timed(work: dict[str, Callable[[], object]], trainer: Trainer, steps: int) -> dict[str, float]:
    """Seconds of each kind of work, one after the other; the first process says each as it has it."""
    # Batches prepared ahead would flatter the loader: the first ones are not timed.
    warm_up = 2 * trainer.config.data.prefetch + 1
    seconds = {}
    for name, one in work.items():
        for _ in range(warm_up):
            one()
        synchronize(trainer.device)
        began = time.perf_counter()
        for _ in range(steps):
            one()
        synchronize(trainer.device)
        seconds[name] = (time.perf_counter() - began) / steps
        if trainer.processes.first:  # now: who stops it here keeps what there is
            say(f"{name}: {milliseconds(seconds[name])}", sys.stderr)
    return seconds


def milliseconds(seconds: float) -> str:
    """In milliseconds, with two digits at the least: of a small network's moving average they are all there is."""
    number = 1e3 * seconds
    return f"{number:.1f} ms" if number >= 1 else f"{number:.2g} ms"
