"""Counter-based Gaussian noise: Philox4x32-10 words, normals, and the unit rows of the Brownian loss.

Philox is a pure function of counter and key, so any program can draw a tile, as often as it likes, and the numbers
depend on neither block size nor grid.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The key is the seed's low and high 32 bits; the counter of dimension d of an image is (d // 4, image, step, 0), and its
four words give dimensions 4 (d // 4) to 4 (d // 4) + 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["brownian_directions", "brownian_directions_kernel", "brownian_normals", "brownian_words", "normals"]

TWO_PI = tl.constexpr(6.283185307179586)

IMAGES_PER_PROGRAM = 4
MAX_QUADS = 32  # groups of four dimensions in a tile: one for each thread of NUM_WARPS warps
NUM_WARPS = 4


@triton.jit
def uniform(word):
    """uint32 words to float32 in the open interval (0, 1): the upper 23 bits plus a half, exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23


@triton.jit
def normals(w0, w1, w2, w3):
    """Four tiles of uint32 words to four of float32 standard normals, by two Box-Muller pairs (cosine first)."""
    radius_0, angle_0 = tl.sqrt(-2.0 * tl.log(uniform(w0))), uniform(w1) * TWO_PI
    radius_1, angle_1 = tl.sqrt(-2.0 * tl.log(uniform(w2))), uniform(w3) * TWO_PI
    return (
        radius_0 * tl.cos(angle_0),
        radius_0 * tl.sin(angle_0),
        radius_1 * tl.cos(angle_1),
        radius_1 * tl.sin(angle_1),
    )


@triton.jit
def brownian_words(seed, step, images, quads):
    """The random words of some images and dimensions.

    seed, step: int64 scalars; of the step the low 32 bits count.
    images: int64 [I], global image numbers; the low 32 bits count.
    quads: int32 [Q], dimensions divided by four.
    Returns four uint32 [I, Q].
    """
    zero = tl.zeros([images.shape[0], quads.shape[0]], tl.uint32)
    c0 = zero + quads.to(tl.uint32)[None, :]
    c1 = zero + images.to(tl.uint32)[:, None]
    c2 = zero + step.to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, zero)


@triton.jit
def brownian_normals(seed, step, images, quads):
    """The normals of some images and dimensions, not yet scaled to unit rows.

    Arguments as for `brownian_words`. Returns float32 [I, 4 Q]; column 4 q + j is dimension 4 quads[q] + j.
    """
    w0, w1, w2, w3 = brownian_words(seed, step, images, quads)
    n0, n1, n2, n3 = normals(w0, w1, w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit(do_not_specialize=["batch", "first_image"])
def brownian_directions_kernel(
    output_pointer,
    seed_pointer,
    step_pointer,
    batch,
    dim,
    first_image: tl.int64,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_QUADS: tl.constexpr,
):
    """Writes one random unit row an image.

    output_pointer: [batch, dim], contiguous, any floating dtype.
    seed_pointer, step_pointer: int64, one element each.
    first_image: global number of the first row's image.
    BLOCK_QUADS: groups of four dimensions that are drawn at once.

    One program writes BLOCK_IMAGES rows. It draws them twice, once for their lengths and once to write them, so that
    rows of any width need no memory but the output.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)  # [I]
    quads, columns = tl.arange(0, BLOCK_QUADS), tl.arange(0, 4 * BLOCK_QUADS)  # [Q], [4 Q]
    seed, step = tl.load(seed_pointer), tl.load(step_pointer)

    squares = tl.zeros([BLOCK_IMAGES], tl.float64)  # rounds to the same float32 length in any order of summing
    for start in range(0, tl.cdiv(dim, 4), BLOCK_QUADS):
        n = brownian_normals(seed, step, first_image + rows, start + quads)
        n = tl.where((4 * start + columns < dim)[None, :], n, 0.0)
        squares += tl.sum(n.to(tl.float64) * n.to(tl.float64), axis=1)
    length = tl.sqrt(squares).to(tl.float32)

    for start in range(0, tl.cdiv(dim, 4), BLOCK_QUADS):
        n = brownian_normals(seed, step, first_image + rows, start + quads) / length[:, None]
        offsets = rows[:, None] * dim + (4 * start + columns)[None, :]
        mask = (rows < batch)[:, None] & (4 * start + columns < dim)[None, :]
        tl.store(output_pointer + offsets, n.to(output_pointer.dtype.element_ty), mask=mask)


def block_quads(dim: int) -> int:
    """Groups of four dimensions in a tile: the whole row where it is at most 128 wide."""
    return min(triton.next_power_of_2(triton.cdiv(dim, 4)), MAX_QUADS)


def brownian_directions(
    batch: int,
    dim: int,
    *,
    seed: Tensor,
    step: Tensor,
    first_image: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random unit rows, one an image, drawn in one launch that nothing on the host waits for.

    Args:
        batch: images, 0 or more.
        dim: D, at least 1.
        seed: one int64 on the device where the rows are wanted, so that a CUDA graph replays with new values.
        step: one int64 on the same device.
        first_image: global number of the first row's image: rank times batch, where ranks share one.
        dtype: of the result, rounded from float32.

    Returns:
        (batch, dim), contiguous; each row has length 1 and depends on seed, step and its image's number alone.
    """
    output = torch.empty(batch, dim, device=seed.device, dtype=dtype)
    if batch == 0:
        return output
    with torch.cuda.device_of(output):
        brownian_directions_kernel[(triton.cdiv(batch, IMAGES_PER_PROGRAM),)](
            output,
            seed,
            step,
            batch,
            dim,
            first_image,
            BLOCK_IMAGES=IMAGES_PER_PROGRAM,
            BLOCK_QUADS=block_quads(dim),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return output
