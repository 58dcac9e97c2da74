"""M W for each view, or Wᵀ M: of any matrices, and of unit rows, whose entries halves can hold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.halves import ample_shared_memory, depth, parts_of, split_product, sum_dtype
from msbreg.kernels.tiles import (
    accumulator,
    cdiv,
    early,
    let_next_launch_begin,
    load_tile,
    next_power_of_2,
    offsets,
    precision,
    scalar,
    stages,
    wait_for_last_launch,
)

__all__ = ["product", "product_kernel", "unit_product", "unit_product_kernel"]


@triton.jit(do_not_specialize=["batch"])
def product_kernel(
    z_pointer,
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
    """M W, or with WEIGHT_LEFT Wᵀ M, of each view.

    z_pointer: [views, batch, dim], M, any strides, any floating dtype.
    weight_pointer: [views, side, side], W, contiguous, as is the output; side is dim, or batch with WEIGHT_LEFT.
    output_pointer: [views, batch, dim], float32, or float64 for float64 matrices.

    One program makes a tile of BLOCK_I images and BLOCK_D dimensions of one view.
    """
    ACC: tl.constexpr = output_pointer.dtype.element_ty
    k = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    z_view = z_pointer + k * z_stride_k
    w_view = weight_pointer + k * side * side

    sums = tl.zeros([BLOCK_I, BLOCK_D], ACC)
    for first in range(0, side, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        if WEIGHT_LEFT:
            w = load_tile(w_view, i, batch, 1, q, side, side, ACC)
            z = load_tile(z_view, q, batch, z_stride_i, d, dim, z_stride_d, ACC)
            sums = tl.dot(w, z, sums, input_precision=PRECISION, out_dtype=ACC)
        else:
            z = load_tile(z_view, i, batch, z_stride_i, q, dim, z_stride_d, ACC)
            w = load_tile(w_view, q, side, side, d, dim, 1, ACC)
            sums = tl.dot(z, w, sums, input_precision=PRECISION, out_dtype=ACC)
    mask = (i < batch)[:, None] & (d < dim)[None, :]
    tl.store(output_pointer + offsets(k * batch + i, dim, d, 1), sums, mask=mask)


@triton.jit
def unit_product_kernel(
    z_hat_pointer,
    weight_pointer,
    output_pointer,
    batch,
    dim,
    width,
    weight_width,
    WEIGHT_LEFT: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As `product_kernel`, of unit rows.

    z_hat_pointer: [views, parts, batch, width], split, ẑ of dim dimensions; see `halves`.
    weight_pointer: [views, parts, weight_width, weight_width], split, W.
    output_pointer: [views, batch, dim], float32 or float64, contiguous.
    WHOLE: see `split_product`.

    Short sums are made in parts too: otherwise Triton 3.6, which it was timed with, has each product of halves here
    wait for the one before. Triton 3.8 has them wait in parts instead.
    """
    wait_for_last_launch(EARLY)
    k = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    plane, w_plane = scalar(batch, tl.int64) * width, scalar(weight_width, tl.int64) * weight_width
    m, w = z_hat_pointer + k * parts_of(z_hat_pointer) * plane, weight_pointer + k * parts_of(weight_pointer) * w_plane
    if WEIGHT_LEFT:
        sums = split_product(
            left=w, left_plane=w_plane, left_stride_p=1, left_stride_q=weight_width,
            right=m, right_plane=plane, right_stride_q=width, right_stride_r=1,
            p=i, p_count=weight_width, left_count=weight_width, right_count=batch, r=d, r_count=width,
            BLOCK_Q=BLOCK_Q, IN_PARTS=True, WHOLE=WHOLE,
        )  # fmt: skip
    else:
        sums = split_product(
            left=m, left_plane=plane, left_stride_p=width, left_stride_q=1,
            right=w, right_plane=w_plane, right_stride_q=weight_width, right_stride_r=1,
            p=i, p_count=batch, left_count=width, right_count=width, r=d, r_count=width,
            BLOCK_Q=BLOCK_Q, IN_PARTS=True, WHOLE=WHOLE,
        )  # fmt: skip
    let_next_launch_begin(EARLY)
    mask = (i < batch)[:, None] & (d < dim)[None, :]
    tl.store(output_pointer + offsets(k * batch + i, dim, d, 1), sums, mask=mask)


def product(z: Tensor, weight: Tensor) -> Tensor:
    """M W, (K, B, D), contiguous, float32, or float64 for float64 matrices.

    Args:
        z: M, (K, B, D), any floating dtype and strides.
        weight: (K, D, D), contiguous; or (K, B, B) for Wᵀ M.
    """
    views, batch, dim = z.shape
    side = weight.shape[-1]
    output = torch.empty(z.shape, device=z.device, dtype=accumulator(z.dtype))
    config = launch_config(batch, dim, output)
    grid = (cdiv(batch, config["BLOCK_I"]), cdiv(dim, config["BLOCK_D"]), views)
    with torch.cuda.device_of(z):
        product_kernel[grid](
            z,
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


def unit_product(z_hat: Tensor, weight: Tensor, dim: int, *, left: bool) -> Tensor:
    """As `product`, of unit rows as `row_losses` makes them, (K, parts, B, w), split, of dim dimensions.

    Args:
        z_hat: ẑ.
        weight: W, (K, parts, v, v), split, of dim x dim matrices, or with left of B x B.
        dim: D.
        left: Wᵀ ẑ rather than ẑ W.
    """
    views, _, batch, width = z_hat.shape
    output = torch.empty(views, batch, dim, device=z_hat.device, dtype=sum_dtype(z_hat))
    config = unit_launch_config(batch, dim, output)
    block_i, block_d, block_q = config["BLOCK_I"], config["BLOCK_D"], config["BLOCK_Q"]
    grid = (cdiv(batch, block_i), cdiv(dim, block_d), views)
    with torch.cuda.device_of(z_hat):
        unit_product_kernel[grid](
            z_hat,
            weight,
            output,
            batch,
            dim,
            width,
            weight.shape[-1],
            WEIGHT_LEFT=left,
            WHOLE=batch % block_i == width % block_d == (batch if left else width) % block_q == 0,
            **config,
            **early(z_hat.device, output.numel()),
        )
    return output


def launch_config(rows: int, columns: int, like: Tensor) -> dict[str, int | bool]:
    """The block sizes, warps and stages of a product like that tensor.

    32 sums a thread, or 64 for matrices of 1,024 x 1,024 and more.
    Float64, whose large tiles are more than the shared memory of some GPUs, has small ones.
    """
    large = rows >= 1024 and columns >= 1024 and like.dtype == torch.float32
    block = 32 if like.dtype == torch.float64 else 128 if large else 64
    # Numbers with an address each take more registers.
    narrow = like.dtype == torch.float64 or rows % 16 or columns % 16
    return {
        "BLOCK_I": min(block, max(16, next_power_of_2(rows))),
        "BLOCK_D": min(block, max(16, next_power_of_2(columns))),
        "BLOCK_Q": 16 if narrow else 32,
        "num_warps": 8 if large else 4,
        "num_stages": stages(like.device),
        "enable_fp_fusion": True,
    }


def unit_launch_config(rows: int, columns: int, like: Tensor) -> dict[str, int | bool]:
    """As `launch_config`, of split matrices like that tensor."""
    config = launch_config(rows, columns, like)
    block = 32 if like.dtype == torch.float64 else 128 if config["num_warps"] == 8 else 64
    block_q = depth(block, block, like) if ample_shared_memory(like.device) else 16  # deeper, sm_80 spills
    return config | {"BLOCK_Q": block_q}
