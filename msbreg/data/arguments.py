"""What a loader is made with: checked, with a sentence for what does not fit."""

from __future__ import annotations

import os
from numbers import Integral, Real
from typing import Any

import torch
import torch.distributed as dist

from msbreg.data.recipes import View
from msbreg.data.source import Source

__all__ = ["check_count", "check_made", "check_recipe", "check_seconds", "check_source", "place"]


def check_source(source: Any) -> None:
    """Raises TypeError for what is no source."""
    if isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected a source of images, got a path: use open_source({os.fspath(source)!r})")
    if not isinstance(source, Source):
        raise TypeError(
            f"expected a source of images, got {type(source).__name__}: open_source takes a path, and for other data "
            "write a subclass of msbreg.data.Source"
        )


def check_recipe(recipe: Any) -> None:
    """Raises TypeError for what is no recipe."""
    if isinstance(recipe, str):
        raise TypeError(f"expected a recipe of views, got {recipe!r}: use load_recipe({recipe!r}, views, size)")
    if not (isinstance(recipe, (tuple, list)) and recipe and all(isinstance(view, View) for view in recipe)):
        raise TypeError(f"expected a recipe, a tuple of one View or more, as byol() gives, got {recipe!r}")


def check_made(device: torch.device, dtype: Any) -> None:
    """Raises ValueError for a device or dtype that no views are made on or in, TypeError for what is no dtype."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected views to be made on cpu or cuda, got {device}: move them there batch by batch")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"views cannot be made on {device}, since torch sees no GPU here")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"expected a dtype of torch for views, got {dtype!r}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"expected a floating dtype for views, got {dtype}")


def check_count(name: str, value: Any, *, least: int = 0) -> None:
    """Raises TypeError for what is no whole number, Python's or NumPy's, ValueError for one out of range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"expected {name} to be a whole number, got {value!r}")
    if not least <= int(value) < 2**63:
        raise ValueError(f"expected {name} of {'any int64' if least < 0 else f'{least} or more'}, got {value}")


def check_seconds(name: str, value: Any) -> None:
    """Raises TypeError for what is no number, ValueError for one below 0, or NaN."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} to be a number of seconds, got {value!r}")
    if not float(value) >= 0:
        raise ValueError(f"expected {name} of 0 seconds or more, got {value}")


def place(rank: int | None, world_size: int | None, shuffle: bool) -> tuple[int, int]:
    """Which of how many processes this is, see `ViewLoader`."""
    if rank is None and world_size is None:
        together = shuffle and dist.is_available() and dist.is_initialized()
        return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    if rank is None or world_size is None:
        raise ValueError(f"expected both rank and world_size, or neither, got {rank} and {world_size}")
    check_count("rank", rank)
    check_count("world_size", world_size, least=1)
    if rank >= world_size or (world_size > 1 and not shuffle):
        raise ValueError(
            f"expected a rank below world_size, and one process where not shuffled; got {rank} of {world_size}"
        )
    return rank, world_size
