"""Gradients that are given in closed form, once: what asks for more is refused instead of misled."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Saved", "once_differentiable", "refuse_transforms"]

Saved = tuple[Any, ...]
"""What `ctx.save_for_backward` was given: tensors, or None."""


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `backward(ctx, saved, *gradients)` an autograd function's backward pass without a derivative of its own.

    `torch.autograd.function.once_differentiable` refuses a second derivative only where the incoming gradient needs
    one. That of a loss is a constant, and the second derivative would come out as zero.

    Args:
        backward: gets the saved tensors as a tuple, since checkpoints let `ctx` be asked for them once. Those inputs
            that may need a gradient are to be among them: results lead to these, so that a derivative of a result by
            whatever they were made from meets the refusal.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        refuse_transforms(*gradients)
        with torch.no_grad():
            found = backward(ctx, saved, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # it is with create_graph=True
            return found
        results = found if isinstance(found, tuple) else (found,)
        sources = [x for x in (*saved, *gradients) if x is not None and x.requires_grad]
        sources = sources or [torch.zeros((), requires_grad=True)]  # checkpoints give back what leads nowhere
        return tuple(None if result is None else _Refused.apply(result, *sources) for result in results)

    return once


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Raises RuntimeError for tensors inside a transform of `torch.func`, for which the losses have no rules."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        if x is not None and (torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_gradtrackingtensor(x)):
            raise RuntimeError(
                "expected plain tensors, got one inside vmap, grad or another transform of torch.func, for which "
                "msbreg's losses have no rules; call them outside of it, and take gradients by torch.autograd"
            )


class _Refused(torch.autograd.Function):
    """A gradient, unchanged, that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            "expected first derivatives alone, got a second one: msbreg's gradients have none. Detach the gradient to "
            "use it as a number"
        )
