"""Gram matrices of unit rows, or of rows as they are, all views at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import accumulator, load_tile, offsets, precision

__all__ = ["gram", "gram_kernel"]


@triton.jit(do_not_specialize=["batch"])
def gram_kernel(
    z_pointer,
    norm_pointer,
    gram_pointer,
    batch,
    dim,
    side,
    z_stride_k,
    z_stride_i,
    z_stride_d,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """MᵀM of the rows of each view, or with ROWS M Mᵀ.

    z_pointer: [views, batch, dim], any strides, any floating dtype.
    norm_pointer: [views, batch], what rows are divided by, in the accumulator's dtype, contiguous; None for nothing.
    gram_pointer: [views, side, side], in the accumulator's dtype; side is dim, or batch with ROWS.

    One program makes a tile of one view's lower triangle and writes it on both sides of the diagonal.
    """
    if tl.program_id(1) > tl.program_id(0):
        return
    ACC: tl.constexpr = gram_pointer.dtype.element_ty
    k = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    z_view = z_pointer + k * z_stride_k
    if norm_pointer is not None:
        norm_view = norm_pointer + k * batch
        if ROWS:
            norm_p = tl.load(norm_view + p.to(tl.int64), mask=p < batch, other=1.0)
            norm_r = tl.load(norm_view + r.to(tl.int64), mask=r < batch, other=1.0)

    sums = tl.zeros([BLOCK_P, BLOCK_P], ACC)
    for first in range(0, dim if ROWS else batch, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        if ROWS:
            left = load_tile(z_view, p, batch, z_stride_i, q, dim, z_stride_d, ACC)
            right = load_tile(z_view, r, batch, z_stride_i, q, dim, z_stride_d, ACC)
            if norm_pointer is not None:
                left /= norm_p[:, None]
                right /= norm_r[:, None]
            sums = tl.dot(left, tl.trans(right), sums, input_precision=PRECISION, out_dtype=ACC)
        else:
            left = load_tile(z_view, q, batch, z_stride_i, p, dim, z_stride_d, ACC)
            right = load_tile(z_view, q, batch, z_stride_i, r, dim, z_stride_d, ACC)
            if norm_pointer is not None:
                norm = tl.load(norm_view + q.to(tl.int64), mask=q < batch, other=1.0)
                left /= norm[:, None]
                right /= norm[:, None]
            sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION, out_dtype=ACC)
    mask = (p < side)[:, None] & (r < side)[None, :]
    g_view = gram_pointer + k * side * side
    tl.store(g_view + offsets(p, side, r, 1), sums, mask=mask)
    if tl.program_id(1) < tl.program_id(0):
        tl.store(g_view + offsets(p, 1, r, side), sums, mask=mask)


def gram(z: Tensor, norms: Tensor | None, *, smaller: bool) -> Tensor:
    """MᵀM of the rows of each view, (K, D, D), or with `smaller` and B < D, M Mᵀ, (K, B, B), as the accumulator is.

    Args:
        z: (K, B, D), any floating dtype and strides.
        norms: (K, B), what rows are divided by: |z| for unit rows; None for nothing.
        smaller: whether the smaller of the two may be taken; it does not add up over processes.
    """
    views, batch, dim = z.shape
    rows = smaller and batch < dim
    side = batch if rows else dim
    output = torch.empty(views, side, side, device=z.device, dtype=accumulator(z.dtype))
    config = tile(side, output.element_size())
    tiles = triton.cdiv(side, config["BLOCK_P"])
    with torch.cuda.device_of(z):
        gram_kernel[(tiles, tiles, views)](
            z,
            norms,
            output,
            batch,
            dim,
            side,
            *z.stride(),
            ROWS=rows,
            PRECISION=precision(output.dtype),
            **config,
        )
    return output


def tile(side: int, itemsize: int) -> dict[str, int | bool]:
    """The block sizes and warps: small tiles for float64, and while there are few, so that each processor has one."""
    block = 32 if side <= 256 or itemsize == 8 else 64 if side < 1024 else 128
    return {
        "BLOCK_P": min(block, max(16, triton.next_power_of_2(side))),
        "BLOCK_Q": 16 if block == 128 else 32,  # 128 x 32 numbers a factor spill on sm_80
        "num_warps": 8 if block == 128 else 4,
        "enable_fp_fusion": True,
    }
