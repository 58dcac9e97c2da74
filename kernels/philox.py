"""Counter-based Gaussian noise: Philox4x32-10 words, normals, and the unit rows of the Brownian loss.

Philox is a pure function of counter and key, so any program can draw a tile, as often as it likes, and the numbers
depend on neither block size nor grid.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The key is the seed's low and high 32 bits; the counter of dimension d of an image is (d // 4, image, step, stream), and
its four words give dimensions 4 (d // 4) to 4 (d // 4) + 3. Stream 0 is shared by the views of an image, 1 + k is view
k's own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "brownian_directions",
    "brownian_directions_kernel",
    "brownian_normals",
    "brownian_rows",
    "brownian_words",
    "normals",
]

HALF_PI = tl.constexpr(1.5707963267948966)
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 of this size has no bits behind the point."""


@triton.jit
def uniform(word):
    """uint32 words to float32 in the open interval (0, 1): the upper 23 bits plus a half, in units of 2**-23, exact."""
    one_and_more = (word >> 9) | 0x3F800000  # these bits behind the exponent of 1, which is faster than a conversion
    return one_and_more.to(tl.float32, bitcast=True) - (1.0 - 5.960464477539063e-08)  # 2**-24


@triton.jit
def cosine_and_sine(u):
    """cos(2πu) and sin(2πu) for u in (0, 1), float32, each wrong by 1e-7 at the most.

    Of the nearest quarter turn, exact, and of the rest, an eighth of a turn at the most, by the Taylor series. Triton's
    own, for angles of any size, are ten times as long.
    """
    rounded = 4.0 * u + ROUNDING  # whose last bits are the nearest integer, 0 to 4
    quarters = rounded.to(tl.uint32, bitcast=True)
    x = (4.0 * u - (rounded - ROUNDING)) * HALF_PI
    y = x * x
    sine = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    cosine = 1.0 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    odd = quarters & 1 == 1
    turned_cosine, turned_sine = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    back = quarters & 2 == 2
    return tl.where(back, -turned_cosine, turned_cosine), tl.where(back, -turned_sine, turned_sine)


@triton.jit
def normals(w0, w1, w2, w3):
    """Four tiles of uint32 words to four of float32 standard normals, by two Box-Muller pairs (cosine first)."""
    radius_0, radius_1 = tl.sqrt(-2.0 * tl.log(uniform(w0))), tl.sqrt(-2.0 * tl.log(uniform(w2)))
    cosine_0, sine_0 = cosine_and_sine(uniform(w1))
    cosine_1, sine_1 = cosine_and_sine(uniform(w3))
    return radius_0 * cosine_0, radius_0 * sine_0, radius_1 * cosine_1, radius_1 * sine_1


@triton.jit
def brownian_words(seed, step, images, streams, quads):
    """The random words of some rows and dimensions.

    seed, step: int64 scalars; of the step the low 32 bits count.
    images: int64 [R], global image numbers; the low 32 bits count.
    streams: int32 [R], 0, or 1 + view.
    quads: int32 [Q], dimensions divided by four.
    Returns four uint32 [R, Q].
    """
    zero = tl.zeros([images.shape[0], quads.shape[0]], tl.uint32)
    c0 = zero + quads.to(tl.uint32)[None, :]
    c1 = zero + images.to(tl.uint32)[:, None]
    c2 = zero + step.to(tl.uint32)
    c3 = zero + streams.to(tl.uint32)[:, None]
    return tl.philox(seed, c0, c1, c2, c3)


@triton.jit
def brownian_normals(seed, step, images, streams, quads):
    """The normals of some rows and dimensions, not yet scaled to unit rows.

    Arguments as for `brownian_words`. Returns float32 [R, 4 Q]; column 4 q + j is dimension 4 quads[q] + j.
    """
    w0, w1, w2, w3 = brownian_words(seed, step, images, streams, quads)
    n0, n1, n2, n3 = normals(w0, w1, w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def brownian_rows(seed, step, images, streams, dim, BLOCK_D: tl.constexpr):
    """Random unit rows, float32 [R, BLOCK_D], zero from `dim` on; BLOCK_D is at least 4. Arguments as above."""
    n = brownian_normals(seed, step, images, streams, tl.arange(0, BLOCK_D // 4))
    n = tl.where((tl.arange(0, BLOCK_D) < dim)[None, :], n, 0.0)
    return n * (1.0 / row_lengths(n))[:, None]


@triton.jit
def row_lengths(n):
    """Lengths [R] of rows [R, D], float32. In float64 the squares sum to the same float32 in any order."""
    n = n.to(tl.float64)
    return tl.sqrt(tl.sum(n * n, axis=1)).to(tl.float32)


@triton.jit(do_not_specialize=["views", "batch", "first_image"])
def brownian_directions_kernel(
    output_pointer,
    seed_pointer,
    step_pointer,
    views,
    batch,
    dim,
    first_image: tl.int64,
    first_stream,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes one random unit row an image, or one a view of each image.

    output_pointer: [views, batch, dim], contiguous, any floating dtype.
    seed_pointer, step_pointer: int64, one element each.
    first_image: global number of the first row's image.
    first_stream: that of the first view: 0 for directions that views share, else 1.

    One program writes BLOCK_ROWS rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # [R]
    columns = tl.arange(0, BLOCK_D)
    view, image = rows // batch, rows % batch
    n = brownian_rows(
        tl.load(seed_pointer), tl.load(step_pointer), first_image + image, first_stream + view, dim, BLOCK_D
    )
    mask = (rows < views * batch)[:, None] & (columns < dim)[None, :]
    place = rows[:, None] * dim + columns[None, :]
    tl.store(output_pointer + place, n.to(output_pointer.dtype.element_ty), mask=mask)


def brownian_directions(
    batch: int,
    dim: int,
    *,
    seed: Tensor,
    step: Tensor,
    first_image: int = 0,
    views: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random unit rows, drawn in one launch that nothing on the host waits for.

    Args:
        batch: images, 0 or more.
        dim: D, at least 1.
        seed: one int64 on the device where the rows are wanted, so that a CUDA graph replays with new values.
        step: one int64 on the same device.
        first_image: global number of the first row's image: rank times batch, where ranks share one.
        views: None for one direction an image, or K for independent directions for each of K views.
        dtype: of the result, rounded from float32.

    Returns:
        (batch, dim) or (views, batch, dim), contiguous; each row has length 1 and depends on seed, step, its image's
        number and its view alone.
    """
    output = torch.empty(views or 1, batch, dim, device=seed.device, dtype=dtype)
    if batch:
        config = tile(dim)
        with torch.cuda.device_of(output):
            brownian_directions_kernel[(triton.cdiv((views or 1) * batch, config["BLOCK_ROWS"]),)](
                output, seed, step, views or 1, batch, dim, first_image, int(views is not None), **config
            )
    return output if views else output[0]


def tile(dim: int) -> dict[str, int | bool]:
    """Whole rows, as many as make 1024 numbers; 4 or 8 numbers for each of a program's threads, up to 8192."""
    block = max(4, triton.next_power_of_2(dim))
    rows = max(1, 1024 // block)
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_D": block,
        "num_warps": min(16, max(8, rows * block // 256)),
        "enable_fp_fusion": True,
    }
