"""The losses in plain torch, with one backward pass for all that are wanted: what `msbreg.ops` is by kernels.

The mathematics is in `msbreg.reference`.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from msbreg import linalg, reference
from msbreg.derivatives import Saved, once_differentiable
from msbreg.distributed import world_size
from msbreg.linalg import Solver
from msbreg.matrices import gram_and_inverse_root
from msbreg.noise import brownian_directions
from msbreg.precision import full_precision, raised, raised_dtype
from msbreg.reference import Spectrum

__all__ = ["SpectralOptions", "losses"]


class SpectralOptions(NamedTuple):
    """The singular value loss that is wanted."""

    spectrum: Spectrum
    smoothing: float
    solver: Solver
    group: dist.ProcessGroup | None


def losses(
    z: Tensor,
    t: Tensor | None,
    noise: tuple[int | Tensor, int | Tensor, int] | None,
    *,
    leave_one_out: bool,
    per_view: bool,
    weights: tuple[float, float, float],
    spectral: SpectralOptions | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of one tensor of embeddings, in float32, or float64 for float64 embeddings; differentiable in z.

    Args:
        z: (K, N, D), any floating dtype.
        t: (K', N, D), the targets; None for no centroid loss.
        noise: seed, step and first image; None for no Brownian loss.
        leave_one_out: a view's centroid is of the targets of the other views; K' is then K.
        per_view: directions for each view rather than for each image.
        weights: of the centroid, the singular value and the Brownian loss.
        spectral: None for no singular value loss.

    Returns:
        The weighted sum, differentiable; the three losses, (3,), detached; and |ẑ - ĉ|², (K, N), differentiable.
    """
    c_hat = None if t is None else _centroids(z, t, leave_one_out)
    n_hat = None if noise is None else _directions(z, *noise, per_view)
    attraction, singular_value, push = _RowLosses.apply(z, c_hat, n_hat, spectral)
    terms = (attraction.mean(), singular_value, push)
    total = weights[0] * terms[0] + weights[1] * singular_value + weights[2] * push
    return total, torch.stack(terms).detach(), attraction


class _RowLosses(torch.autograd.Function):
    """The losses of one tensor of embeddings z, (K, N, D), that are wanted: (K, N), scalar, scalar; 0 for the others.

    They share the norms on the way and write one gradient on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, c_hat: Tensor | None, n_hat: Tensor | None, spectral: SpectralOptions | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        with full_precision(z):
            z_hat, norms = reference.unit_rows(raised(z))
            attraction, singular_value, push = (z_hat.new_zeros(()) for _ in range(3))
            weight = None
            if c_hat is not None:
                attraction = reference.centroid_loss(z_hat, c_hat)
            if spectral is not None:
                singular_value, weight = _spectral_loss(z_hat, spectral)
            if n_hat is not None:
                push = reference.brownian_loss(z_hat, n_hat)
            ctx.save_for_backward(z, z_hat, norms, c_hat, n_hat, weight)
            return attraction, singular_value, push

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, d_attraction: Tensor, d_singular_value: Tensor, d_push: Tensor
    ) -> tuple[Tensor | None, ...]:
        z, z_hat, norms, c_hat, n_hat, weight = saved
        with full_precision(z_hat):
            g = torch.zeros_like(z_hat) if weight is None else linalg.multiply(z_hat, weight * d_singular_value)
            if c_hat is not None:
                g.addcmul_(reference.centroid_gradient(z_hat, c_hat), d_attraction[..., None])
            if n_hat is not None:
                g += reference.brownian_gradient(z_hat, n_hat).mul_(d_push)
            return reference.tangent(g, z_hat, norms).to(z.dtype), None, None, None


def _spectral_loss(z_hat: Tensor, options: SpectralOptions) -> tuple[Tensor, Tensor]:
    """L_S and the weight W, (K, p, p), of its gradient ẑ W in this process."""
    spectrum, smoothing, solver, group = options
    world, (views, rows, dim) = world_size(group), z_hat.shape
    gram, inverse_root = gram_and_inverse_root(z_hat, smoothing, solver, group, trace=rows * world)
    values, weight = reference.singular_value_loss(
        gram, inverse_root, rows=rows * world, dim=dim, spectrum=spectrum, smoothing=smoothing
    )
    # Each process has its rows' gradient of the one loss of all rows; DDP's average divides it by the world size.
    # Copies, since torch.compile of torch 2.11 loses the gradient of an output that is cast to the dtype it has.
    return values.mean().to(z_hat.dtype, copy=True), (weight * (world / views)).to(z_hat.dtype)


@torch.no_grad()
def _centroids(z: Tensor, t: Tensor, leave_one_out: bool) -> Tensor:
    with full_precision(z):
        return reference.centroids(raised(t), leave_one_out=leave_one_out).to(raised_dtype(z))


def _directions(z: Tensor, seed: int | Tensor, step: int | Tensor, first_image: int, per_view: bool) -> Tensor:
    views, batch, dim = z.shape
    return brownian_directions(
        batch,
        dim,
        seed=seed,
        step=step,
        first_image=first_image,
        views=views if per_view else None,
        device=z.device,
        dtype=raised_dtype(z),
    )
