"""Float32 matrices on tensor cores: each entry is split into a pair of halves, high + low / 2048.

Both are float16, of 11 bits: together 22, as many as three TF32 products keep, at twice their rate. And a tile of
halves goes from memory to the tensor cores as it is, where one of float32 is taken apart in registers whenever it is
read. Low is scaled because float16's numbers end at 6e-8: without that, nothing of it is left in a number below 1e-4.

A split matrix, here and in the kernels that read it, is a tensor [..., parts, rows, width]: of float32 two parts, the
high halves and the low ones; of float64 one, and of float32 too on AMD, whose MI200 takes halves below 6e-5 for zero.
The width is that of the matrix rounded up to a multiple of 16, which is what Triton must know to load 16 bytes at
a time; beyond the matrix is zero.

For matrices whose entries are about one: from 65520 on a number is infinite, below 6e-5 it is wrong by up to 1.5e-11.

Ootomo, Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", 2022, https://arxiv.org/abs/2203.03341.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import STAGES, cdiv, load_tile, offsets, scalar

__all__ = [
    "LARGEST",
    "SCALE",
    "ample_shared_memory",
    "depth",
    "empty_split",
    "halves",
    "in_parts",
    "parts_of",
    "split",
    "split_product",
    "store_split",
    "sum_dtype",
]  # fmt: skip

SCALE = tl.constexpr(2048.0)
"""Of the low half, which is then up to half as large as the high one."""
LARGEST = 2.0**15
"""What entries may come to, well below the 65520 that no half holds."""


@triton.jit
def halves(x):
    """High and low, float16, of float32 numbers."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * SCALE).to(tl.float16)


@triton.jit
def parts_of(pointer):
    """How many of the pointer's numbers make an entry: two halves, or the entry itself."""
    return 2 if pointer.dtype.element_ty == tl.float16 else 1


@triton.jit
def store_split(pointer, plane, x, mask):
    """Stores x as it is; where pointer has places of halves as a pair, low one plane of elements behind high."""
    if pointer.dtype.scalar.element_ty == tl.float16:
        x_high, x_low = halves(x)
        tl.store(pointer, x_high, mask=mask)
        tl.store(pointer + plane, x_low, mask=mask)
    else:
        tl.store(pointer, x, mask=mask)


@triton.jit
def load_part(place, mask, WHOLE: tl.constexpr):
    """A tile, zero outside the mask; with WHOLE all of it is inside."""
    if WHOLE:
        return tl.load(place)
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def split_product(
    left,
    left_plane,
    left_stride_p,
    left_stride_q,
    right,
    right_plane,
    right_stride_q,
    right_stride_r,
    p,
    p_count,
    left_count,
    right_count,
    r,
    r_count,
    BLOCK_Q: tl.constexpr,
    IN_PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """A tile [P, R] of L R for split matrices, float32, or float64 for such.

    left, left_stride_p, left_stride_q: L, [p_count, left_count], split; left_plane: elements of one part, which is how
        far behind its high half a low one is, int64.
    right and so on: R, [right_count, r_count], split. Where there are fewer than L has columns, those are zero.
    p, r: int32, which rows and columns.
    IN_PARTS: see `in_parts`. WHOLE: all of the matrices' tiles are inside them.
    """
    NUMBER: tl.constexpr = left.dtype.element_ty
    ACC: tl.constexpr = tl.float32 if tl.float16 == NUMBER else NUMBER
    q = tl.arange(0, BLOCK_Q)
    x_place = left + offsets(p, left_stride_p, q, left_stride_q)
    y_place = right + offsets(q, right_stride_q, r, right_stride_r)
    block = scalar(BLOCK_Q, tl.int64)
    sums = tl.zeros([p.shape[0], r.shape[0]], ACC)  # high times high, but with IN_PARTS
    cross = tl.zeros([p.shape[0], r.shape[0]], ACC)  # SCALE times all other products
    THREE_SUMS: tl.constexpr = tl.float16 == NUMBER and not IN_PARTS and p.shape[0] * r.shape[0] <= 4096
    if THREE_SUMS:
        second_cross = tl.zeros([p.shape[0], r.shape[0]], ACC)
    for first in range(0, right_count, BLOCK_Q):
        x_mask = (p < p_count)[:, None] & (q < left_count - first)[None, :]
        y_mask = (q < right_count - first)[:, None] & (r < r_count)[None, :]
        x, y = load_part(x_place, x_mask, WHOLE), load_part(y_place, y_mask, WHOLE)
        if tl.float16 == NUMBER:
            x_low = load_part(x_place + left_plane, x_mask, WHOLE)
            y_low = load_part(y_place + right_plane, y_mask, WHOLE)
        if tl.float16 != NUMBER:
            sums = tl.dot(x, y, sums, input_precision="ieee", out_dtype=ACC)
        elif IN_PARTS:  # one after the other, since registers hold no third tile of sums
            cross += tl.dot(x_low, y, tl.dot(x, y_low))  # low times low is below the last bit
            cross += tl.dot(x, y) * SCALE
        elif THREE_SUMS:  # one for each product: with two in one, tensor cores wait for the first before the second
            sums = tl.dot(x, y, sums)
            cross = tl.dot(x, y_low, cross)
            second_cross = tl.dot(x_low, y, second_cross)
        else:
            sums = tl.dot(x, y, sums)
            cross = tl.dot(x_low, y, tl.dot(x, y_low, cross))
        x_place += block * left_stride_q
        y_place += block * right_stride_q
    if THREE_SUMS:
        cross += second_cross
    return sums + cross / SCALE


@triton.jit
def split_kernel(
    matrix_pointer, split_pointer, side, width, scale: tl.float64, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Splits scale * X.

    matrix_pointer: [views, side, side], X, contiguous, float32 or float64.
    split_pointer: [views, parts, width, width].

    One program makes a tile.
    """
    ACC: tl.constexpr = matrix_pointer.dtype.element_ty
    k = tl.program_id(2).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    x = load_tile(matrix_pointer + k * side * side, p, side, side, q, side, 1, ACC) * scalar(scale, ACC)
    plane = scalar(width, tl.int64) * width
    place = split_pointer + k * parts_of(split_pointer) * plane + offsets(p, width, q, 1)
    store_split(place, plane, x, (p < width)[:, None] & (q < width)[None, :])


def split(matrix: Tensor, scale: float) -> Tensor:
    """scale X, split, (K, parts, w, w), for matrices X, (K, p, p), contiguous, float32 or float64."""
    views, side, _ = matrix.shape
    output = empty_split(matrix, (views,), side, side, square=True)
    width = output.shape[-1]
    grid = (cdiv(width, 16), cdiv(width, 128), views)
    with torch.cuda.device_of(matrix):
        split_kernel[grid](
            matrix, output, side, width, scale, BLOCK_P=16, BLOCK_Q=128, num_warps=4, enable_fp_fusion=True
        )
    return output


def empty_split(like: Tensor, batch: tuple[int, ...], rows: int, columns: int, *, square: bool = False) -> Tensor:
    """Memory for split matrices (*batch, rows, columns) of a float32 or float64 tensor's dtype, on its device.

    Where they are square, rows are rounded up too.
    """
    halved = like.dtype == torch.float32 and not torch.version.hip
    width = 16 * cdiv(columns, 16)
    shape = (*batch, 1 + halved, width if square else rows, width)
    return like.new_empty(shape, dtype=torch.float16 if halved else like.dtype)


def sum_dtype(made: Tensor) -> torch.dtype:
    """What products of split matrices are summed in: float32 for halves, or the matrices' own dtype."""
    return torch.float32 if made.dtype == torch.float16 else made.dtype


def depth(rows: int, columns: int, like: Tensor) -> int:
    """The depth of the tiles of a product of split matrices: 64, or what fits into the shared memory `STAGES` times.

    Without `ample_shared_memory` factors are held in registers too, and it is a part of what there is.

    Args:
        rows: of a tile of the product.
        columns: of it.
        like: a float32 or float64 tensor, on the device, of what is split.
    """
    if like.dtype == torch.float64:
        return 16
    room = shared_memory(like.device) if ample_shared_memory(like.device) else 64 << 10
    return next((q for q in (64, 32) if STAGES * (rows + columns) * q * 4 <= room), 16)


def in_parts(length: int) -> bool:
    """Whether sums over so many products of halves are made in parts, of a tile's depth, that are added in float32.

    Tensor cores take sixteen products and the sum until then, and cut off what any of these has below the second bit
    behind the largest one's last: so what is lost grows with the number of steps, and is always of one sign. An H200
    made the singular value loss wrong by 4.5e-4 of itself at D = 2048. A model of that (`tests/test_kernels_halves.py`)
    has 5e-5 at 256, and less than a third of it where each part of 64 begins at zero.
    """
    return length > 256


def ample_shared_memory(device: torch.device) -> bool:
    """Whether a program may have 227 kB, as on an H100 and a B200, whose tensor cores take both factors from there."""
    return shared_memory(device) >= 227 << 10


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have: a GPU's, or in Triton's interpreter an H100's."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
