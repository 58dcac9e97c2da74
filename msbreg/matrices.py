"""Functions of the Gram matrices of given rows, by kernels or in plain torch: nuclear norm and coding rate.

The mathematics is in `msbreg.reference`.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msbreg import kernels, linalg, reference
from msbreg.derivatives import Saved, once_differentiable
from msbreg.distributed import all_reduce_sum, world_size
from msbreg.linalg import Solver
from msbreg.precision import full_precision, raised

__all__ = ["coding_rates", "gram_and_inverse_root", "nuclear_norms", "products"]


def nuclear_norms(z: Tensor, smoothing: float, solver: Solver, group: dist.ProcessGroup | None) -> Tensor:
    """Σ_j sqrt(s_j² + δ²) of the matrices z, (K, N, D), of all processes' rows: (K,); see `functional.nuclear_norm`."""
    return _NuclearNorm.apply(z, smoothing, solver, group)


def coding_rates(z: Tensor, precision: float, group: dist.ProcessGroup | None) -> Tensor:
    """½ log det(I + D / (N ε) MᵀM) of the matrices z, as above: (K,); see `functional.coding_rate`."""
    return _CodingRate.apply(z, precision, group)


class _NuclearNorm(torch.autograd.Function):
    """Nuclear norms (K,) of the matrices (K, N, D)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, smoothing: float, solver: Solver, group: dist.ProcessGroup | None) -> Tensor:
        with full_precision(z):
            x = raised(z)
            world, (_, rows, dim) = world_size(group), x.shape
            gram, inverse_root = gram_and_inverse_root(x, smoothing, solver, group)
            values, weight = reference.nuclear_norm(gram, inverse_root, rows=rows * world, dim=dim, smoothing=smoothing)
            ctx.save_for_backward(z, (weight * world).to(x.dtype))
            return values.to(x.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, d_values: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = saved
        return _weighted(z, weight, d_values), None, None, None


class _CodingRate(torch.autograd.Function):
    """Coding rates (K,) of the matrices (K, N, D)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, precision: float, group: dist.ProcessGroup | None) -> Tensor:
        with full_precision(z):
            x = raised(z)
            world, (_, rows, dim) = world_size(group), x.shape
            gram = all_reduce_sum(products(x).gram(x, smaller=group is None), group)
            values, weight = reference.coding_rate(
                gram, rows=rows * world, dim=dim, precision=precision, gram_of=products(x).gram
            )
            ctx.save_for_backward(z, weight * world)
            return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, d_values: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = saved
        return _weighted(z, weight, d_values), None, None


def _weighted(z: Tensor, weight: Tensor, d_values: Tensor) -> Tensor:
    """dL/dz, (K, N, D), from z and the weights W, (K, p, p), of the forward pass."""
    with full_precision(z):
        gradient = d_values[:, None, None] * products(z).multiply(raised(z), weight)
        return gradient.to(z.dtype)


def products(x: Tensor) -> Any:
    """`msbreg.ops` where x is on a device that runs kernels, else `msbreg.linalg`.

    Both have `gram`, `multiply` and `newton_schulz`, of matrices (K, N, D) and without autograd.
    """
    if x.device.type != kernels.DEVICE_TYPE:
        return linalg
    from msbreg import ops  # needs triton

    return ops


def gram_and_inverse_root(
    m: Tensor, smoothing: float, solver: Solver, group: dist.ProcessGroup | None, *, trace: float | None = None
) -> tuple[Tensor, reference.InverseRoot]:
    """The Gram matrix of all processes' rows and a function to its inverse root, by the solver that is wanted.

    Eigenvalues near zero want float64 where no smoothing covers for what is wrong with them in float32. `trace` is that
    of the Gram matrix, where it is known.
    """
    x = m.double() if solver != "newton_schulz" and smoothing == 0 else m
    gram = all_reduce_sum(products(x).gram(x, smaller=group is None), group)
    tolerance = linalg.rank_tolerance(m, solver) if smoothing == 0 else 0.0

    def root(g: Tensor, shift: float) -> Tensor:
        if solver == "newton_schulz":
            return products(x).newton_schulz(g, shift, trace)
        return linalg.inverse_root(g, shift, solver, x, tolerance)

    return gram, root
