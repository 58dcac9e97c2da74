"""Gradients that are given in closed form, once: what asks for second derivatives is refused instead of misled."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["once_differentiable"]

Backward = TypeVar("Backward", bound=Callable[..., Any])


def once_differentiable(backward: Backward) -> Backward:
    """Decorates the backward pass of an autograd function that has no derivative of its own.

    `torch.autograd.function.once_differentiable` refuses a second derivative only where the incoming gradient needs
    one. That of a loss is a constant, and the second derivative would come out as zero.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # it is with create_graph=True
            return found
        results = found if isinstance(found, tuple) else (found,)
        leaf = torch.zeros((), requires_grad=True)
        return tuple(None if result is None else _Refused.apply(result, leaf) for result in results)

    return once  # type: ignore[return-value]


class _Refused(torch.autograd.Function):
    """A gradient, unchanged, that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, leaf: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("expected first derivatives alone, got a second one: msbreg's gradients have none")
