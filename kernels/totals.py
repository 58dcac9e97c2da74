"""From partial sums to the losses: what a Gram matrix adds to the singular value loss, and the weighted sum of all."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import affine, cdiv, early, load_tile, next_power_of_2, scalar, wait_for_last_launch

__all__ = ["spectral_sums", "spectral_sums_kernel", "totals", "totals_kernel"]


@triton.jit
def spectral_sums_kernel(
    gram_pointer,
    sums_pointer,
    side,
    identity: tl.float64,
    scale: tl.float64,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """|A|² for A = i I + s G, in float64.

    gram_pointer: [views, side, side], G, contiguous, float32 or float64.
    sums_pointer: [views, blocks], float64.
    identity, scale: i and s.

    One program sums BLOCK_P rows of one matrix.
    """
    k = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_Q], tl.float64)
    for first in range(0, side, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        g = load_tile(gram_pointer + k * side * side, p, side, side, q, side, 1, tl.float64)
        a = affine(g, p, q, side, scalar(identity, tl.float64), scale)
        sums += a * a
    tl.store(sums_pointer + (k * tl.num_programs(0) + tl.program_id(0)), tl.sum(tl.sum(sums, axis=1), axis=0))


def spectral_sums(gram: Tensor, *, identity: float, scale: float) -> Tensor:
    """Numbers, float64, any shape, that add up over a view to |A|², the squared Frobenius norm, for A = i I + s G.

    Args:
        gram: G, (K, p, p), contiguous.
        identity: i.
        scale: s.
    """
    views, side, _ = gram.shape
    blocks = cdiv(side, 16)
    sums = torch.empty(views, blocks, device=gram.device, dtype=torch.float64)
    with torch.cuda.device_of(gram):
        spectral_sums_kernel[(blocks, views)](
            gram, sums, side, identity, scale, BLOCK_P=16, BLOCK_Q=64, num_warps=4, enable_fp_fusion=True
        )
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
    image_sums_pointer,
    spectral_pointer,
    total_pointer,
    terms_pointer,
    batch,
    spectral_count,
    row_scale: tl.float64,
    spectral_scale: tl.float64,
    spectral_constant: tl.float64,
    attraction_weight: tl.float64,
    spectral_weight: tl.float64,
    push_weight: tl.float64,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The three losses and their weighted sum.

    image_sums_pointer: [2, batch], float32 or float64, sums over views of each image; None for zero.
    spectral_pointer: [spectral_count], float64; None for zero.
    total_pointer: one element, float32 or float64.
    terms_pointer: [3], the same: centroid, singular value and Brownian loss.
    row_scale: 1 / (views * batch). spectral_scale, spectral_constant: L_S = scale * sum + constant.

    One program does it all.
    """
    wait_for_last_launch(EARLY)
    attraction = 0.0
    push = 0.0
    spectral = 0.0
    if image_sums_pointer is not None:
        attraction = row_scale * total_of(image_sums_pointer, batch, BLOCK)
        push = row_scale * total_of(image_sums_pointer + batch.to(tl.int64), batch, BLOCK)
    if spectral_pointer is not None:
        spectral = spectral_scale * total_of(spectral_pointer, spectral_count, BLOCK) + spectral_constant
    tl.store(terms_pointer, attraction)
    tl.store(terms_pointer + 1, spectral)
    tl.store(terms_pointer + 2, push)
    tl.store(total_pointer, attraction_weight * attraction + spectral_weight * spectral + push_weight * push)


def totals(
    image_sums: Tensor | None,
    spectral: Tensor | None,
    *,
    views: int,
    weights: Sequence[float],
    spectral_constant: float,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the losses, a scalar, and the three losses, (3,).

    Args:
        image_sums: (2, B) of `row_losses`; None for no such losses.
        spectral: of `spectral_sums`; None for no such loss.
        views: K.
        weights: of the centroid, the singular value and the Brownian loss.
        spectral_constant: L_S is the sum of `spectral` over K, plus this.
        dtype: of the results.
        device: of the results.
    """
    total, terms = torch.empty((), dtype=dtype, device=device), torch.empty(3, dtype=dtype, device=device)
    batch = 1 if image_sums is None else image_sums.shape[1]
    with torch.cuda.device_of(total):
        totals_kernel[(1,)](
            image_sums, spectral, total, terms, batch, 0 if spectral is None else spectral.numel(), 1 / (views * batch),
            1 / views, spectral_constant, *weights, num_warps=8, enable_fp_fusion=True,
            # All at once up to 8,192: one block after another would have the only program wait for memory each time.
            BLOCK=min(8192, max(1024, next_power_of_2(batch))),
            **early(device, batch),
        )  # fmt: skip
    return total, terms
