"""ẑ W for each view, through memory: what the gradient of the singular value loss needs where rows are wide."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import accumulator, load_tile, offsets, precision

__all__ = ["product", "product_kernel"]


@triton.jit(do_not_specialize=["batch"])
def product_kernel(
    z_pointer,
    norm_pointer,
    weight_pointer,
    output_pointer,
    batch,
    dim,
    side,
    z_stride_k,
    z_stride_i,
    z_stride_d,
    WEIGHT_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """ẑ W, or with WEIGHT_LEFT W ẑ, of each view.

    z_pointer: [views, batch, dim], any strides, any floating dtype.
    norm_pointer: [views, batch], what rows are divided by, in the accumulator's dtype, contiguous, as are the next two;
        None for nothing.
    weight_pointer: [views, side, side], W; side is dim, or batch with WEIGHT_LEFT.
    output_pointer: [views, batch, dim].

    One program makes a tile of BLOCK_I images and BLOCK_D dimensions of one view.
    """
    ACC: tl.constexpr = output_pointer.dtype.element_ty
    k = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z_view = z_pointer + k * z_stride_k
    w_view = weight_pointer + k * side * side
    if norm_pointer is not None:
        norm_view = norm_pointer + k * batch
        if not WEIGHT_LEFT:
            norm_i = tl.load(norm_view + i.to(tl.int64), mask=i < batch, other=1.0)

    sums = tl.zeros([BLOCK_I, BLOCK_D], ACC)
    for first in range(0, side, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        if WEIGHT_LEFT:
            w = load_tile(w_view, i, batch, side, q, side, 1, ACC)
            z_hat = load_tile(z_view, q, batch, z_stride_i, d, dim, z_stride_d, ACC)
            if norm_pointer is not None:
                z_hat /= tl.load(norm_view + q.to(tl.int64), mask=q < batch, other=1.0)[:, None]
            sums = tl.dot(w, z_hat, sums, input_precision=PRECISION, out_dtype=ACC)
        else:
            z_hat = load_tile(z_view, i, batch, z_stride_i, q, dim, z_stride_d, ACC)
            if norm_pointer is not None:
                z_hat /= norm_i[:, None]
            w = load_tile(w_view, q, side, side, d, dim, 1, ACC)
            sums = tl.dot(z_hat, w, sums, input_precision=PRECISION, out_dtype=ACC)
    mask = (i < batch)[:, None] & (d < dim)[None, :]
    tl.store(output_pointer + offsets(k * batch + i, dim, d, 1), sums, mask=mask)


def product(z: Tensor, norms: Tensor | None, weight: Tensor) -> Tensor:
    """ẑ W, (K, B, D), contiguous, in the accumulator's dtype.

    Args:
        z: (K, B, D), any floating dtype and strides.
        norms: (K, B), what rows are divided by: |z| for unit rows; None for nothing.
        weight: (K, D, D), contiguous; or (K, B, B) for W ẑ.
    """
    views, batch, dim = z.shape
    side = weight.shape[-1]
    output = torch.empty(z.shape, device=z.device, dtype=accumulator(z.dtype))
    config = tile(batch, dim, output.element_size())
    grid = (triton.cdiv(batch, config["BLOCK_I"]), triton.cdiv(dim, config["BLOCK_D"]), views)
    with torch.cuda.device_of(z):
        product_kernel[grid](
            z,
            norms,
            weight,
            output,
            batch,
            dim,
            side,
            *z.stride(),
            WEIGHT_LEFT=side != dim,
            PRECISION=precision(output.dtype),
            **config,
        )
    return output


def tile(rows: int, columns: int, itemsize: int) -> dict[str, int | bool]:
    """The block sizes and warps of a product: 16 sums a thread, 64 where there is more than enough to do.

    Float64, whose large tiles are more than the shared memory of some GPUs, has small ones.
    """
    large = rows >= 1024 and columns >= 1024 and itemsize == 4
    block = 32 if itemsize == 8 else 128 if large else 64
    narrow = itemsize == 8 or rows % 16 or columns % 16  # numbers with an address each take more registers
    return {
        "BLOCK_I": min(block, max(16, triton.next_power_of_2(rows))),
        "BLOCK_D": min(block, max(16, triton.next_power_of_2(columns))),
        "BLOCK_Q": 16 if narrow else 32,
        "num_warps": 8 if large else 4,
        "enable_fp_fusion": True,
    }
