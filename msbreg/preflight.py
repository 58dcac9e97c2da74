"""What must hold before a run begins, beyond what its options alone tell: one set of checks for all that train."""

import math

import torch
from torch import nn

from msbreg.config import Config
from msbreg.data import load_recipe
from msbreg.data.recipes import Recipe
from msbreg.errors import MSBRegError
from msbreg.processes import Processes

__all__ = ["planned_steps", "recipe_of", "require_sizes", "share_of_batch"]


def share_of_batch(config: Config, processes: Processes) -> int:
    """B, the images of a step that each process has.

    Raises:
        MSBRegError: the processes cannot share a batch evenly.
    """
    if config.data.batch_size % processes.world:
        raise MSBRegError(
            f"--data.batch_size is {config.data.batch_size} images over all processes, which {processes.world} "
            "processes cannot share evenly."
        )
    return config.data.batch_size // processes.world


def recipe_of(config: Config) -> Recipe:
    """The K views of each image.

    Raises:
        MSBRegError: there is no such recipe, or the method cannot compare its views with each other.
    """
    recipe = load_recipe(config.data.recipe, config.data.views, config.data.size)
    if len({view.size for view in recipe}) > 1 and (config.method.leave_one_out or config.method.name != "msbreg"):
        raise MSBRegError(
            f"--data.recipe {config.data.recipe} has views of several sizes, and targets of the first size alone: "
            "leave out --method.leave_one_out, and use --method.name msbreg."
        )
    return recipe


def planned_steps(config: Config, steps_per_epoch: int) -> int:
    """Steps of the whole run."""
    return config.optim.steps or max(1, math.ceil(config.optim.epochs * steps_per_epoch))


@torch.no_grad()
def require_sizes(backbone: nn.Module, config: Config) -> None:
    """Runs one black image of each size that a run has through its backbone: some networks take one size alone.

    Args:
        backbone: (N, 3, H, W) to (N, F), on the CPU; nothing in it is changed.
        config: the run's options: views have their recipe's sizes, images for evaluation `data.size`.

    Raises:
        MSBRegError: the network does not take a size.
    """
    mode = backbone.training
    backbone.eval()  # which keeps running statistics, and takes a batch of one
    for size in sorted({config.data.size, *(view.size for view in recipe_of(config))}):
        try:
            backbone(torch.zeros(1, 3, size, size))
        except Exception as error:  # networks refuse with whatever came to their authors' minds
            why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
            raise MSBRegError(
                f"--model.backbone {config.model.backbone} does not take images of {size} pixels ({why}); use another "
                "backbone, --data.size or --data.recipe."
            ) from error
    backbone.train(mode)
