"""What decodes and augments: DALI or torchvision, by name or as suits the device and the size of the views."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msbreg.data.draws import Draw
from msbreg.data.recipes import Recipe
from msbreg.errors import MSBRegError

__all__ = ["Backend", "open_backend"]

LARGE = 128
"""Side of the views from which on Pillow and numpy take a CPU: at 224 they are 1.1 to 1.5 times as fast as DALI, at 128
0.8 to 0.9 times, at 96 between 0.7 and 1.1 times, by the machine, and at 32 DALI is several times as fast
(bench/README.md, "On two cores")."""


class Backend(Protocol):
    """What decodes and augments; see `DaliBackend`."""

    def submit(self, encoded: list[NDArray[np.uint8]], draws: list[Draw]) -> None:
        """Starts work on a batch."""

    def receive(self) -> tuple[Tensor, ...]:
        """Waits for the earliest batch."""

    def discard(self) -> None:
        """Forgets all batches under way."""

    def close(self) -> None:
        """Frees threads and memory."""


def open_backend(
    name: str, recipe: Recipe, batch_size: int, device: torch.device, threads: int, dtype: torch.dtype
) -> Backend:
    """The backend of that name; "auto": DALI where it can be imported, but torchvision on a CPU for large views.

    Raises:
        MSBRegError: it cannot be imported; of "auto", neither can.
        ValueError: another name.
    """
    if name not in ("auto", "dali", "torchvision"):
        raise ValueError(f'backend is "auto", "dali" or "torchvision", not {name!r}')
    large = device.type == "cpu" and max(view.size for view in recipe) >= LARGE
    if name == "auto" and large and find_spec("torchvision"):
        name = "torchvision"
    missing = ""
    if name != "torchvision":
        from msbreg.data.dali_backend import DaliBackend

        try:
            return DaliBackend(recipe, batch_size, device, threads, dtype)
        except ImportError as error:
            if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None  # Ctrl-C, of which DALI's C++ makes an import that failed
            if name == "dali":
                raise MSBRegError(
                    f"DALI cannot be imported ({error}); install it with pip install 'msbreg[train]' or use torchvision"
                ) from error
            missing = f"DALI cannot be imported ({error})"
    try:
        from msbreg.data.torchvision_backend import TorchvisionBackend
    except ImportError as error:
        neither = f"{missing}, nor torchvision" if missing else "torchvision cannot be imported"
        raise MSBRegError(f"{neither} ({error}); install them with pip install 'msbreg[train]'") from error
    if missing:
        warnings.warn(f"{missing}, so torchvision decodes and augments, which is slower", stacklevel=3)
    return TorchvisionBackend(recipe, device, threads, dtype)
