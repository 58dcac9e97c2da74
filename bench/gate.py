"""The check before the timing: a provider's value and gradient against a float64 oracle, on the inputs that are timed.

The error may be no larger than that of plain torch in the same dtype, plus a small tolerance. Plain torch has the
definition, a decomposition and autograd, as the oracle has in float64.
"""

import textwrap
from typing import NamedTuple

import torch
from providers import SEED, Loss, Provider, Terms, by_gram, by_svd, definition
from torch import Tensor

from msbreg.functional import brownian_directions
from msbreg.reference import Spectrum

__all__ = ["CEILING", "TOLERANCES", "Errors", "Reference", "Verdict", "reference", "refusal", "verdict"]

TOLERANCES = {  # what value and gradient may be off more than plain torch is: Newton-Schulz in float32 takes its part
    torch.float64: (1e-8, 1e-8),  # the package's noise is float32's, whose rows are 6e-8 longer or shorter than 1
    torch.float32: (1e-4, 1e-3),
    torch.float16: (1e-4, 1e-3),
    torch.bfloat16: (1e-4, 1e-3),
}
CEILING = 2e-2
"""Of any error: were plain torch itself no good at some shape, it would excuse nobody."""

GRADIENT_SCALE = 2.0**16
"""Of losses in float16, as in training: the mean over rows leaves gradients that float16 has few digits for."""


class Errors(NamedTuple):
    """Of a value, relative; and of a gradient, as the ratio of root mean squares."""

    value: float
    gradient: float


class Reference(NamedTuple):
    """What a loss has to give at z, t and n, and how far plain torch in their dtype is from it."""

    z: Tensor
    t: Tensor
    n: Tensor
    value: Tensor
    gradient: Tensor
    plain: Errors

    def errors(self, loss: Loss) -> Errors:
        """Of another way to compute the same."""
        return errors(*value_and_gradient(loss, self.z, self.t, self.n), self.value, self.gradient)


def reference(z: Tensor, t: Tensor, terms: Terms, spectrum: Spectrum, decomposition: str) -> Reference:
    """The oracle at z and t, with the noise that the package makes in its first step.

    Args:
        z: (K, B, D).
        t: (K, B, D).
        terms: of the loss.
        spectrum: of the singular value loss.
        decomposition: `"svd"`, or `"eigh"` of the Gram matrix, whose loss of digits float64 covers.
    """
    loss = definition((by_svd if decomposition == "svd" else by_gram)(spectrum), terms)
    n = brownian_directions(z.shape[1], z.shape[2], seed=SEED, step=0).to(z.device)
    value, gradient = value_and_gradient(loss, z.double(), t.double(), n.double())
    plain = errors(*value_and_gradient(loss, z, t, n), value, gradient)
    return Reference(z, t, n, value, gradient, plain)


def value_and_gradient(loss: Loss, z: Tensor, t: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
    """Of a loss that takes n in place of its own noise, or makes the same."""
    z = z.detach().requires_grad_()
    value = loss(z, t, n)
    scale = GRADIENT_SCALE if z.dtype == torch.float16 else 1.0
    return value.detach(), torch.autograd.grad(value * scale, z)[0].double() / scale


def errors(value: Tensor, gradient: Tensor, expected: Tensor, expected_gradient: Tensor) -> Errors:
    """NaN where something is not finite."""
    difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
    return Errors(abs(value.item() / expected.item() - 1), difference.item())


class Verdict(NamedTuple):
    """What is known of a loss before it is timed."""

    loss: Loss | None
    """None where it raises."""
    errors: Errors | None
    """None of other mathematics, too."""
    fault: str | None
    """Why it is not to be timed."""


def verdict(provider: Provider, z: Tensor, t: Tensor, truth: Reference | None) -> Verdict:
    """Builds a loss and holds it against the oracle; with None, for other mathematics, it is called alone."""
    try:
        loss = provider.build(z.device)
        if truth is None:
            torch.autograd.grad(loss(z, t), z)
            return Verdict(loss, None, None)
        found = truth.errors(loss)
    except Exception as error:  # the others are still to be timed
        return Verdict(None, None, textwrap.shorten(f"it raises {type(error).__name__}: {error}", 300))
    return Verdict(loss, found, refusal(found, truth))


def refusal(found: Errors, truth: Reference) -> str | None:
    """Why a loss with these errors is not to be timed, or None."""
    for name, error, plain, tolerance in zip(
        Errors._fields, found, truth.plain, TOLERANCES[truth.z.dtype], strict=True
    ):
        allowed = min(plain, CEILING) + tolerance
        if not error <= allowed:  # NaN too
            return (
                f"its {name} is off by {error:.1e} from the float64 oracle, where {allowed:.1e} is allowed: plain "
                f"torch is off by {plain:.1e} in {str(truth.z.dtype).removeprefix('torch.')}"
            )
    return None
