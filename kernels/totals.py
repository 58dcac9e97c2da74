"""From partial sums to the losses: what a Gram matrix adds to the singular value loss, and the weighted sum of all."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import offsets

__all__ = ["spectral_sums", "spectral_sums_kernel", "totals", "totals_kernel"]


@triton.jit
def spectral_sums_kernel(
    gram_pointer,
    root_pointer,
    sums_pointer,
    side,
    identity: tl.float64,
    gram_scale: tl.float64,
    trace_weight: tl.float64,
    square_weight: tl.float64,
    root_weight: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """w_t trace(G) + w_s |A|² + w_r <A, Z> for A = identity I + scale G, in float64 since the terms cancel.

    gram_pointer: [views, side, side], G, contiguous, float32 or float64.
    root_pointer: [views, side, side], Z, as G; None for no last term.
    sums_pointer: [views, blocks], float64.

    One program sums BLOCK_P rows of one matrix.
    """
    k = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_Q], tl.float64)
    for first in range(0, side, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        mask = (p < side)[:, None] & (q < side)[None, :]
        diagonal = mask & (p[:, None] == q[None, :])
        place = k * side * side + offsets(p, side, q, 1)
        g = tl.load(gram_pointer + place, mask=mask, other=0.0).to(tl.float64)
        a = gram_scale * g + tl.where(diagonal, tl.full([], identity, tl.float64), 0.0)
        sums += square_weight * a * a + tl.where(diagonal, trace_weight * g, 0.0)
        if root_pointer is not None:
            sums += root_weight * a * tl.load(root_pointer + place, mask=mask, other=0.0).to(tl.float64)
    tl.store(sums_pointer + (k * tl.num_programs(0) + tl.program_id(0)), tl.sum(tl.sum(sums, axis=1), axis=0))


def spectral_sums(
    gram: Tensor,
    root: Tensor | None,
    *,
    identity: float,
    scale: float,
    trace_weight: float,
    square_weight: float,
    root_weight: float,
) -> Tensor:
    """Numbers, float64, any shape, that add up over a view to w_t trace(G) + w_s |A|² + w_r <A, Z>.

    Args:
        gram: G, (K, p, p), contiguous.
        root: Z, (K, p, p), contiguous; None where it has no weight.
        identity: i of A = i I + s G.
        scale: s.
        trace_weight: w_t.
        square_weight: w_s.
        root_weight: w_r.
    """
    views, side, _ = gram.shape
    blocks = triton.cdiv(side, 16)
    sums = torch.empty(views, blocks, device=gram.device, dtype=torch.float64)
    with torch.cuda.device_of(gram):
        spectral_sums_kernel[(blocks, views)](
            gram, root, sums, side, identity, scale, trace_weight, square_weight, root_weight,
            BLOCK_P=16, BLOCK_Q=64, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return sums


@triton.jit
def total_of(pointer, count, BLOCK: tl.constexpr):
    """The sum of `count` numbers, float64, in a fixed order."""
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        place = (first + tl.arange(0, BLOCK)).to(tl.int64)
        sums += tl.load(pointer + place, mask=place < count, other=0.0).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["batch", "spectral_count"])
def totals_kernel(
    image_pointer,
    spectral_pointer,
    total_pointer,
    parts_pointer,
    batch,
    spectral_count,
    row_scale: tl.float64,
    spectral_scale: tl.float64,
    spectral_constant: tl.float64,
    attraction_weight: tl.float64,
    dispersion_weight: tl.float64,
    push_weight: tl.float64,
    BLOCK: tl.constexpr,
):
    """The three losses and their weighted sum.

    image_pointer: [2, batch], float32 or float64, sums over views of each image; None for zero.
    spectral_pointer: [spectral_count], float64; None for zero.
    total_pointer: one element, float32 or float64.
    parts_pointer: [3], the same: centroid, singular value and Brownian loss.
    row_scale: 1 / (views * batch). spectral_scale, spectral_constant: L_S = scale * sum + constant.

    One program does it all.
    """
    attraction = 0.0
    push = 0.0
    dispersion = 0.0
    if image_pointer is not None:
        attraction = row_scale * total_of(image_pointer, batch, BLOCK)
        push = row_scale * total_of(image_pointer + batch.to(tl.int64), batch, BLOCK)
    if spectral_pointer is not None:
        dispersion = spectral_scale * total_of(spectral_pointer, spectral_count, BLOCK) + spectral_constant
    tl.store(parts_pointer, attraction)
    tl.store(parts_pointer + 1, dispersion)
    tl.store(parts_pointer + 2, push)
    tl.store(total_pointer, attraction_weight * attraction + dispersion_weight * dispersion + push_weight * push)


def totals(
    images: Tensor | None,
    spectral: Tensor | None,
    *,
    views: int,
    weights: tuple[float, float, float],
    spectral_constant: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses, a scalar, and the three losses, (3,).

    Args:
        images: (2, B) of `row_losses`; None for no such losses.
        spectral: of `spectral_sums`; None for no such loss.
        views: K.
        weights: of the centroid, the singular value and the Brownian loss.
        spectral_constant: L_S is the sum of `spectral` over K, plus this.
        dtype: of the results.
        device: of the results.
    """
    total, parts = torch.empty((), dtype=dtype, device=device), torch.empty(3, dtype=dtype, device=device)
    batch = 1 if images is None else images.shape[1]
    with torch.cuda.device_of(total):
        totals_kernel[(1,)](
            images, spectral, total, parts, batch, 0 if spectral is None else spectral.numel(), 1 / (views * batch),
            1 / views, spectral_constant, *weights, BLOCK=1024, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return total, parts
