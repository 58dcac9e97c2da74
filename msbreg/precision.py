"""The precision that losses compute in: float32 at the least, inside autocast too."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["full_precision", "raised", "raised_dtype"]


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Within it autocast is off; meta tensors have none."""
    kind = x.device.type
    return nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def raised_dtype(x: Tensor) -> torch.dtype:
    """Float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def raised(x: Tensor) -> Tensor:
    """Half precisions in float32, the others as they are."""
    return x.to(raised_dtype(x))
