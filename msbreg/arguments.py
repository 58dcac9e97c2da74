"""What the losses are called with: checked, with a sentence for what does not fit, and made one tensor."""

import math
from typing import Any, get_args

import torch
from torch import Tensor

from msbreg.derivatives import refuse_transforms
from msbreg.reference import Spectrum

__all__ = [
    "Views",
    "batch_size",
    "check_choice",
    "check_embedding",
    "check_number",
    "check_precision",
    "check_smoothing",
    "check_spectral",
    "check_targets",
    "check_weight",
    "stacked",
]  # fmt: skip

Views = Tensor | list[Tensor] | tuple[Tensor, ...]
"""(K, B, D), or K tensors (B, D)."""


def stacked(x: Views, name: str, *, one: bool = False) -> Tensor:
    """The argument as a tensor (K, B, D) that can be computed with; with `one`, a tensor (B, D) is K = 1."""
    wanted = f"a tensor (K, B, D){', a tensor (B, D)' if one else ''} or a list or tuple of tensors (B, D)"
    if isinstance(x, Tensor):
        _check_tensor(x, name)
        z = x[None] if one and x.dim() == 2 else x
        if z.dim() != 3:
            raise ValueError(f"expected {name} to be {wanted}, got shape {tuple(x.shape)}")
    elif isinstance(x, (list, tuple)) and all(isinstance(view, Tensor) for view in x):
        if not x:
            raise ValueError(f"expected {name} to hold at least one view, got an empty {type(x).__name__}")
        for k, view in enumerate(x):
            _check_tensor(view, f"{name}[{k}]")
            _check_device(f"{name}[{k}]", view, f"{name}[0]", x[0])
            if view.dim() != 2 or view.shape != x[0].shape:
                shapes = ", ".join(str(tuple(view.shape)) for view in x)
                raise ValueError(f"expected the views in {name} to be of one shape (B, D), got {shapes}")
        z = torch.stack(tuple(x))
    else:
        raise TypeError(f"expected {name} to be {wanted}, got {type(x).__name__}")
    if 0 in z.shape:
        raise ValueError(f"expected {name} to have at least one view, image and dimension, got shape {tuple(z.shape)}")
    return z.resolve_neg()  # a kernel would read what a lazy minus has not negated yet


def batch_size(views: Views) -> int:
    """B, or 0 for an argument that the losses are going to refuse."""
    view = views[0] if isinstance(views, (list, tuple)) and views else views
    return view.shape[-2] if isinstance(view, Tensor) and view.dim() >= 2 else 0


def _check_tensor(x: Tensor, name: str) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"expected {name} in float16, bfloat16, float32 or float64, got {x.dtype}")
    if not torch.compiler.is_compiling() and hasattr(x, "to_local"):
        raise TypeError(
            f"expected {name} to be a plain tensor, got a {type(x).__name__}: pass this process's rows, as "
            "x.to_local(), and the process group"
        )
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"expected {name} to be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    refuse_transforms(x)


def _check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"expected {name} on {other.device}, as {other_name}, got {x.device}")


def check_targets(z: Tensor, t: Tensor, leave_one_out: bool) -> None:
    """Raises ValueError for targets (K', B, D) that do not go with embeddings (K, B, D)."""
    _check_device("target", t, "online", z)
    if t.shape[1:] != z.shape[1:]:
        raise ValueError(
            f"expected target (K', B, D) with online's B and D, {tuple(z.shape[1:])}, got {tuple(t.shape[1:])}"
        )
    if leave_one_out and (t.shape[0] < 2 or t.shape[0] != z.shape[0]):
        raise ValueError(
            "expected as many target views as online views, at least 2, with leave_one_out; "
            f"got {t.shape[0]} and {z.shape[0]}"
        )


def check_embedding(y: Tensor, z: Tensor) -> None:
    """Raises ValueError for a projector's output (K, B, D') that does not go with a predictor's (K, B, D)."""
    _check_device("embedding", y, "online", z)
    if y.shape[:2] != z.shape[:2]:
        raise ValueError(
            f"expected embedding (K, B, D) with online's K and B, {tuple(z.shape[:2])}, got {tuple(y.shape[:2])}"
        )


def check_spectral(spectrum: Spectrum, smoothing: float) -> None:
    """Raises ValueError for options that no singular value loss has."""
    check_choice("spectrum", spectrum, Spectrum)
    check_smoothing(smoothing)


def check_smoothing(smoothing: float) -> None:
    """Raises ValueError for a δ that is negative, infinite or NaN, TypeError for one that is no number."""
    check_number("smoothing", smoothing)
    if not 0 <= smoothing < math.inf:
        raise ValueError(f"expected smoothing of at least 0, and finite, got {smoothing}")


def check_precision(precision: float) -> None:
    """Raises ValueError for an ε of the coding rate that is not positive, TypeError for one that is no number."""
    check_number("precision", precision)
    if not precision > 0:
        raise ValueError(f"expected precision above 0, got {precision}")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError for what is no real number, or is a tensor, which the host would have to read."""
    if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        return  # before hasattr, which torch.compile of torch 2.11 cannot ask of a number that changes
    if isinstance(value, (Tensor, str)) or not hasattr(value, "__float__"):
        hint = "; for weights that are learned, add up the losses one by one" if isinstance(value, Tensor) else ""
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__}{hint}")


def check_weight(name: str, value: Any) -> None:
    """As `check_number`; ValueError for a weight that is infinite or NaN."""
    check_number(name, value)
    # Not while torch.compile traces: a number that changes is a symbol there.
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite, got {value}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raises ValueError for what is not among the values of a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")
