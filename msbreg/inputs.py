"""What a config trains and is judged on: its images, the views of them, and the loader that makes these."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

from msbreg.config import NONE, Config
from msbreg.console import say
from msbreg.data import Source, ViewLoader, load_recipe, open_source, open_split, with_classes_of
from msbreg.data.recipes import Recipe
from msbreg.errors import MSBRegError
from msbreg.files import cache_folder, expanded
from msbreg.processes import Processes

__all__ = [
    "LABELLED_IMAGES_A_CLASS", "has_labels", "input_dtype", "open_images", "open_loader", "recipe_of", "share_of_batch",
]  # fmt: skip

LABELLED_IMAGES_A_CLASS = 4
"""Training images that a class needs on average before their labels are voted on."""


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


def input_dtype(config: Config, processes: Processes) -> torch.dtype:
    """What the networks compute in, and their inputs come in: bfloat16 or float32."""
    precision, gpu = config.model.precision, processes.device.type == "cuda"
    return torch.bfloat16 if precision == "bf16" or (precision == "auto" and gpu) else torch.float32


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


def open_loader(config: Config, processes: Processes, source: Source) -> ViewLoader:
    """The views of this process's share of each batch; to be called on all ranks.

    Raises:
        MSBRegError: of `share_of_batch`, `recipe_of` and `ViewLoader`.
    """
    return ViewLoader(
        source,
        recipe_of(config),
        share_of_batch(config, processes),
        seed=config.run.seed,
        rank=processes.rank,
        world_size=processes.world,
        device=processes.device,
        dtype=input_dtype(config, processes),
        backend=config.data.backend,
        threads=config.data.threads or processes.share_of_cores(),
        prefetch=config.data.prefetch,
        timeout=config.data.timeout,
    )


def open_images(config: Config, processes: Processes, *, trained_on: int | None = None) -> tuple[Source, Source | None]:
    """Training images, and held-out ones where there are any; some labelled training images where not.

    To be called on all ranks. The first one lists the images for all of them: listing millions is what file systems of
    many machines are slow at. What tar shards hold is kept in the cache, beside rendered images.

    Args:
        config: the run's options.
        processes: this process and its peers.
        trained_on: how many images a run that goes on was trained on, so that as many are set aside as before, whatever
            `eval.queries` is by now; None: it begins.

    Raises:
        MSBRegError: there are no images where the config says, or they cannot be rendered there.
    """
    from msbreg.data.rendered import render

    if config.data.path is not None:
        path = config.data.path
        return processes.of_first(lambda: _listed(config, path, trained_on), "list the images")
    rendered = _cache(config) / f"rendered-{config.data.size}"
    if processes.local_rank == 0:
        render(rendered, size=config.data.size)
    processes.wait()
    return _listed(config, rendered, trained_on)  # each machine has its own


def _cache(config: Config) -> Path:
    return expanded(config.data.cache) if config.data.cache else cache_folder()


def _listed(config: Config, path: str | Path, trained_on: int | None) -> tuple[Source, Source | None]:
    cache: Path | None = None
    with contextlib.suppress(MSBRegError):  # what cannot be kept is made again
        cache = _cache(config)
    train, held_out = open_split(path, cache=cache)
    if config.data.eval_path == NONE:
        return train, None
    if config.data.eval_path is not None:
        held_out = with_classes_of(train, open_source(config.data.eval_path, cache=cache))
    elif held_out is None and has_labels(train):
        tenth = max(1, round(0.1 * np.count_nonzero(train.labels >= 0)))
        aside, before = min(tenth, config.eval.queries), -1 if trained_on is None else len(train) - trained_on
        if aside := before if 0 <= before <= tenth else aside:
            train, held_out = set_aside(train, aside)
            say(
                f"{aside:,} of the {len(train) + aside:,} images of {path} are not trained on, but kept for "
                f"evaluation: --data.eval_path can name others, or {NONE}",
                sys.stderr,
            )
    if held_out is not None and has_labels(train) and not (held_out.labels >= 0).any():
        raise MSBRegError(
            f"{held_out} has no classes, but {train} has {len(train.classes):,}: sort it into a folder for each, or "
            f"give --data.eval_path an index file of it (path, tab, class), or {NONE} to do without held-out images."
        )
    return train, held_out


def has_labels(source: Source, *, a_class: int = LABELLED_IMAGES_A_CLASS) -> bool:
    """Whether a source has two classes or more, with so many images each on average."""
    labels = np.asarray(source.labels)
    known = labels[labels >= 0]
    return len(np.unique(known)) >= 2 and len(known) >= a_class * len(np.unique(known))


def set_aside(source: Source, images: int) -> tuple[Source, Source]:
    """Splits so many of the labelled images off a source, at random but always alike."""
    labelled = np.flatnonzero(np.asarray(source.labels) >= 0)
    order = labelled[np.random.Generator(np.random.Philox(0)).permutation(len(labelled))]
    held_out = np.sort(order[:images])
    return source.subset(np.setdiff1d(np.arange(len(source.labels)), held_out)), source.subset(held_out)
