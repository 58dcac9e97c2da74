"""What must hold before a run begins, beyond what its options alone tell: one set of checks for all that train."""

import math
import os
import shutil

import torch
from torch import nn

from msbreg.config import Config
from msbreg.errors import MSBRegError
from msbreg.evaluation import evaluation_mode
from msbreg.inputs import recipe_of, share_of_batch
from msbreg.methods import build_method
from msbreg.processes import Processes

__all__ = [
    "planned_steps",
    "require_images",
    "require_networks",
    "require_packages",
    "require_processes",
    "require_sizes",
]


def planned_steps(config: Config, steps_per_epoch: int) -> int:
    """Steps of the whole run."""
    return config.optim.steps or max(1, math.ceil(config.optim.epochs * steps_per_epoch))


def require_packages(config: Config) -> None:
    """Raises MSBRegError where an option wants a package or program that is not there, before anything is written."""
    if config.run.tensorboard:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise MSBRegError("--run.tensorboard needs the tensorboard package: pip install tensorboard.") from error
    if config.model.compile is True and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise MSBRegError(
            "--model.compile true needs a C++ compiler, and there is neither g++ nor clang++ here nor what CXX names: "
            "install one, or leave out the option."
        )


def require_images(config: Config) -> None:
    """Raises MSBRegError where options for some images come without their path, or it is the run's own folder."""
    path = config.data.path
    if path is None and config.data.images:
        raise MSBRegError(
            f"--data.images says that this config is for {config.data.images:,} images, but there is no --data.path to "
            "them; give it, or --data.images 0 to train on images that msbreg renders."
        )
    if path is not None and _real(path) == _real(config.run.dir):
        raise MSBRegError(f"--run.dir {config.run.dir} is the folder of the images; give the run a folder of its own.")


def require_networks(config: Config) -> None:
    """Builds a run's networks once: what is wrong with their names, weights and sizes is not for after a long listing.

    Raises:
        MSBRegError: of `build_method` and `require_sizes`.
    """
    require_sizes(build_method(config).online.backbone, config)


def require_processes(config: Config, processes: Processes) -> None:
    """Raises MSBRegError where the processes cannot share a batch evenly, or make a CUDA graph of a step."""
    share_of_batch(config, processes)
    if config.model.cuda_graph and (processes.device.type != "cuda" or processes.world > 1):
        raise MSBRegError("--model.cuda_graph needs a GPU, and is for one process alone.")


def _real(path: str) -> str:
    return os.path.realpath(os.path.expanduser(path))


@torch.no_grad()
def require_sizes(backbone: nn.Module, config: Config) -> None:
    """Runs one black image of each size that a run has through its backbone: some networks take one size alone.

    Args:
        backbone: (N, 3, H, W) to (N, F), on the CPU; nothing in it is changed.
        config: the run's options: views have their recipe's sizes, images for evaluation `data.size`.

    Raises:
        MSBRegError: the network does not take a size.
    """
    sizes = sorted({config.data.size, *(view.size for view in recipe_of(config))})
    with evaluation_mode(backbone):  # which keeps running statistics, and takes a batch of one
        for size in sizes:
            try:
                backbone(torch.zeros(1, 3, size, size))
            except Exception as error:  # networks refuse with whatever came to their authors' minds
                why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
                raise MSBRegError(
                    f"--model.backbone {config.model.backbone} does not take images of {size} pixels ({why}); use "
                    "another backbone, --data.size or --data.recipe."
                ) from error
