"""Gram matrices, all views at once: of any matrices, and of unit rows, whose entries halves can hold."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.halves import depth, in_parts, parts_of, split_product, sum_dtype
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

__all__ = ["gram", "gram_kernel", "unit_gram", "unit_gram_kernel"]


@triton.jit(do_not_specialize=["batch"])
def gram_kernel(
    z_pointer,
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
    """MᵀM of each matrix, or with ROWS M Mᵀ.

    z_pointer: [views, batch, dim], M, any strides, any floating dtype, numbers whose squares have one.
    gram_pointer: [views, side, side], float32, or float64 for float64 matrices; side is dim, or batch with ROWS.

    One program makes a tile of one matrix's lower triangle and writes it on both sides of the diagonal.
    """
    if tl.program_id(1) > tl.program_id(0):
        return
    ACC: tl.constexpr = gram_pointer.dtype.element_ty
    k = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    z_view = z_pointer + k * z_stride_k

    sums = tl.zeros([BLOCK_P, BLOCK_P], ACC)
    for first in range(0, dim if ROWS else batch, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        if ROWS:
            left = load_tile(z_view, p, batch, z_stride_i, q, dim, z_stride_d, ACC)
            right = load_tile(z_view, r, batch, z_stride_i, q, dim, z_stride_d, ACC)
            sums = tl.dot(left, tl.trans(right), sums, input_precision=PRECISION, out_dtype=ACC)
        else:
            left = load_tile(z_view, q, batch, z_stride_i, p, dim, z_stride_d, ACC)
            right = load_tile(z_view, q, batch, z_stride_i, r, dim, z_stride_d, ACC)
            sums = tl.dot(tl.trans(left), right, sums, input_precision=PRECISION, out_dtype=ACC)
    store_symmetric(gram_pointer + k * side * side, sums, p, r, side)


@triton.jit
def unit_gram_kernel(
    z_hat_pointer,
    gram_pointer,
    squares_pointer,
    batch,
    dim,
    width,
    ROWS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    IN_PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """As `gram_kernel`, of unit rows.

    z_hat_pointer: [views, parts, batch, width], split, ẑ of dim dimensions; see `halves`.
    gram_pointer: [views, dim, dim], or with ROWS [views, batch, batch], float32 or float64.
    squares_pointer: [views, tiles of the triangle], float64, which add up to |G|² of each view.
    IN_PARTS, WHOLE: see `split_product`.
    """
    wait_for_last_launch(EARLY)
    if tl.program_id(1) > tl.program_id(0):
        return
    k = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    plane = scalar(batch, tl.int64) * width
    m = z_hat_pointer + k * parts_of(z_hat_pointer) * plane
    if ROWS:
        side, padded_side, length, stride_p, stride_q = batch, batch, width, width, 1
    else:
        side, padded_side, length, stride_p, stride_q = dim, width, batch, 1, width
    sums = split_product(
        left=m, left_plane=plane, left_stride_p=stride_p, left_stride_q=stride_q,
        right=m, right_plane=plane, right_stride_q=stride_q, right_stride_r=stride_p,
        p=p, p_count=padded_side, left_count=length, right_count=length, r=r, r_count=padded_side,
        BLOCK_Q=BLOCK_Q, IN_PARTS=IN_PARTS, WHOLE=WHOLE,
    )  # fmt: skip
    store_symmetric(gram_pointer + k * side * side, sums, p, r, side)
    let_next_launch_begin(EARLY)
    row, column, rows = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0).to(tl.int64)
    square = tl.sum(sums * sums).to(tl.float64) * tl.where(row == column, 1.0, 2.0)
    tl.store(squares_pointer + (k * (rows * (rows + 1) // 2) + row * (row + 1) // 2 + column), square)


@triton.jit
def store_symmetric(matrix, tile, p, r, side):
    """Writes a tile [P, R] of a matrix [side, side] at rows p and columns r, and below the diagonal turned too."""
    tl.store(matrix + offsets(p, side, r, 1), tile, mask=(p < side)[:, None] & (r < side)[None, :])
    if tl.program_id(1) < tl.program_id(0):
        tl.store(matrix + offsets(r, side, p, 1), tl.trans(tile), mask=(r < side)[:, None] & (p < side)[None, :])


def gram(z: Tensor, *, smaller: bool) -> Tensor:
    """MᵀM of each matrix, (K, D, D), or with `smaller` and B < D, M Mᵀ, (K, B, B), float32 or float64 as it is summed.

    Args:
        z: M, (K, B, D), any floating dtype and strides.
        smaller: whether the smaller of the two may be taken; it does not add up over processes.
    """
    views, batch, dim = z.shape
    by_rows = smaller and batch < dim
    side = batch if by_rows else dim
    output = torch.empty(views, side, side, device=z.device, dtype=accumulator(z.dtype))
    config = launch_config(side, output)
    tiles = cdiv(side, config["BLOCK_P"])
    with torch.cuda.device_of(z):
        gram_kernel[(tiles, tiles, views)](
            z,
            output,
            batch,
            dim,
            side,
            *z.stride(),
            ROWS=by_rows,
            PRECISION=precision(output.dtype),
            **config,
        )
    return output


def unit_gram(z_hat: Tensor, dim: int, *, smaller: bool) -> tuple[Tensor, Tensor]:
    """As `gram`, of unit rows as `row_losses` makes them, (K, parts, B, w), split, of dim dimensions.

    Returns:
        The Gram matrices, and (K, n), float64, which add up over a view to |G|², its squared Frobenius norm.
    """
    views, _, batch, width = z_hat.shape
    by_rows = smaller and batch < dim
    side = batch if by_rows else dim
    output = torch.empty(views, side, side, device=z_hat.device, dtype=sum_dtype(z_hat))
    config = unit_launch_config(side, output)
    tiles = cdiv(side, config["BLOCK_P"])
    squares = torch.empty(views, tiles * (tiles + 1) // 2, device=z_hat.device, dtype=torch.float64)
    with torch.cuda.device_of(z_hat):
        unit_gram_kernel[(tiles, tiles, views)](
            z_hat,
            output,
            squares,
            batch,
            dim,
            width,
            ROWS=by_rows,
            IN_PARTS=in_parts(dim if by_rows else batch),
            WHOLE=side % config["BLOCK_P"] == (width if by_rows else batch) % config["BLOCK_Q"] == 0,
            **config,
            **early(z_hat.device, output.numel()),
        )
    return output, squares


def launch_config(side: int, like: Tensor) -> dict[str, int | bool]:
    """The block sizes, warps and stages of sums like that tensor.

    Small tiles for float64, and while there are few, so that each processor has one.
    """
    block = 32 if side <= 256 or like.dtype == torch.float64 else 64 if side < 1024 else 128
    return {
        "BLOCK_P": min(block, max(16, next_power_of_2(side))),
        "BLOCK_Q": 16 if block >= 64 else 32,  # more numbers a factor spill, 128 x 32 on sm_80, 64 x 32 on sm_100
        "num_warps": 8 if block == 128 else 4,
        "num_stages": stages(like.device),
        "enable_fp_fusion": True,
    }


def unit_launch_config(side: int, like: Tensor) -> dict[str, int | bool]:
    """As `launch_config`, of split matrices like that tensor."""
    block = 32 if like.dtype == torch.float64 else 64 if side < 1024 or side % 16 else 128  # numbers stored one by one
    return {
        "BLOCK_P": min(block, max(16, next_power_of_2(side))),
        "BLOCK_Q": min(depth(block, block, like), 32 if block == 128 else 64),  # 128 x 64 numbers spill on sm_100
        "num_warps": 8 if block == 128 else 4,
        "num_stages": stages(like.device),
        "enable_fp_fusion": True,
    }
