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

from msbreg.kernels.tiles import cdiv, next_power_of_2, scalar

__all__ = [
    "brownian_directions",
    "brownian_directions_kernel",
    "brownian_normals",
    "brownian_rows",
    "brownian_words",
    "normals",
]

MULTIPLIER_0 = tl.constexpr(0xD2511F53)
MULTIPLIER_2 = tl.constexpr(0xCD9E8D57)
WEYL_0 = tl.constexpr(0x9E3779B9)
WEYL_1 = tl.constexpr(0xBB67AE85)
ROUNDS = tl.constexpr(10)
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 of this size has no bits behind the point."""
TWO_THIRDS = tl.constexpr(0x3F2AAAAB)
"""The bits of 2/3 in float32."""


@triton.jit
def high_and_low(word, multiplier):
    """Both words of a product of two: one instruction, where `tl.philox` asks for each word by itself."""
    product = word.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four random words for each counter c0, c1, c2, c3, all uint32 [R, Q], under a key: the seed, an int64 scalar."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high_0, low_0 = high_and_low(c0, MULTIPLIER_0)
        high_2, low_2 = high_and_low(c2, MULTIPLIER_2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 = tl.add(k0, WEYL_0, sanitize_overflow=False)  # modulo 2^32, which Triton takes for a mistake in debug mode
        k1 = tl.add(k1, WEYL_1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """uint32 words to float32 in the open interval (0, 1): the upper 23 bits plus a half, in units of 2**-23, exact."""
    one_and_more = (word >> 9) | 0x3F800000  # these bits behind the exponent of 1, which is faster than a conversion
    return one_and_more.to(tl.float32, bitcast=True) - (1.0 - 5.960464477539063e-08)  # 2**-24


@triton.jit
def radius(u):
    """sqrt(-2 log(u)) for u in (0, 1), a normal float32; wrong by 2e-7 of itself at most, half of that by a GPU's root.

    u = 2^e (1 + f) with f from -1/3 to 1/3, exact, and -2 log(1 + f) by the polynomial with the least largest relative
    error. Triton's own logarithm asks about zero, infinity and numbers that are not normal.
    """
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - TWO_THIRDS) & -0x800000  # e 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = 0.328386992 + f * (-0.278418481 + f * (0.307454854 + f * -0.287481993))
    q = 0.999998808 + f * (-0.666662097 + f * (0.500151992 + f * (-0.400321186 + f * q)))
    return tl.sqrt(exponent.to(tl.float32) * (-2 * 0.6931471805599453 / 0x800000) + f * (-2.0 + f * q))


@triton.jit
def cosine_and_sine(u):
    """cos(2πu) and sin(2πu) for u in (0, 1), float32, each wrong by 1.2e-7 at the most.

    Of the nearest quarter turn, exact, and of the rest, half a quarter at the most, by the polynomials with the least
    largest error. Triton's own, for angles of any size, are ten times as long.
    """
    rounded = 4.0 * u + ROUNDING  # whose last bits are the nearest integer, 0 to 4
    quarters = rounded.to(tl.uint32, bitcast=True)
    x = 4.0 * u - (rounded - ROUNDING)
    y = x * x
    sine = x * (1.57079637 + y * (-0.645963669 + y * (0.0796817392 + y * -0.00460568676)))
    cosine = 1.0 + y * (-1.23369801 + y * (0.253606349 + y * -0.0204262491))
    odd = quarters & 1 == 1
    turned_cosine, turned_sine = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    back = quarters & 2 == 2
    return tl.where(back, -turned_cosine, turned_cosine), tl.where(back, -turned_sine, turned_sine)


@triton.jit
def normals(w0, w1, w2, w3):
    """Four tiles of uint32 words to four of float32 standard normals, by two Box-Muller pairs (cosine first)."""
    radius_0, radius_1 = radius(uniform(w0)), radius(uniform(w2))
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
    return philox(seed, c0, c1, c2, c3)


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
    return n * tl.rsqrt(row_squares(n))[:, None]


@triton.jit
def row_squares(n):
    """Squared lengths [R] of rows [R, D], float32. In float64 the squares sum to the same float32 in any order."""
    n = n.to(tl.float64)
    return tl.sum(n * n, axis=1).to(tl.float32)


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
    mask = (rows < scalar(views, tl.int64) * batch)[:, None] & (columns < dim)[None, :]
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
        batch: images, at least 1.
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
    config = launch_config(dim)
    with torch.cuda.device_of(output):
        brownian_directions_kernel[(cdiv((views or 1) * batch, config["BLOCK_ROWS"]),)](
            output, seed, step, views or 1, batch, dim, first_image, int(views is not None), **config
        )
    return output if views else output[0]


def launch_config(dim: int) -> dict[str, int | bool]:
    """Whole rows, as many as make 1024 numbers; 4 or 8 numbers a thread, more where 16 warps do not suffice."""
    block = max(4, next_power_of_2(dim))
    rows = max(1, 1024 // block)
    return {
        "BLOCK_ROWS": rows,
        "BLOCK_D": block,
        "num_warps": min(16, max(8, rows * block // 256)),
        "enable_fp_fusion": True,
    }
