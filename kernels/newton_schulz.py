"""The coupled Newton-Schulz iteration, a tile at a time: what the kernels of `inverse_root` are made of.

Y ← T Y, Z ← Z T with T = a I + b Y Z takes Y = A, Z = I to A^(1/2) and A^(-1/2). The factors do not commute exactly
once they are rounded, so their order is not free to change, and symmetry must not be made use of: mirroring one
triangle of the iterates diverges, multiplying in another order loses digits near collapse.

The iterates are in memory as tensor cores want them: split, [..., parts, w, w] (see `halves`), whose entries stay
below 2 / sqrt(smallest eigenvalue of A), 2e3.
"""

import triton
import triton.language as tl

from msbreg.kernels.halves import split_product, store_split
from msbreg.kernels.tiles import affine, load_tile, offsets, scalar
from msbreg.kernels.totals import total_of

__all__ = ["affine_product", "first_factors", "loss_sum", "normalisation", "store_matrix"]


@triton.jit
def normalisation(squares, count, shift, floor):
    """s and h of A = s (G + h I), whose eigenvalues are in (0, 1]: s = 1 / (|G| + h), h = max(shift, floor |G|).

    squares: [count], float64, the sum of which is |G|².
    """
    size = tl.sqrt(total_of(squares, count, 64))
    size = tl.where(size == 0, 1.0, size)
    h = tl.where(shift > floor * size, shift, floor * size)
    return 1.0 / (size + h), h


@triton.jit
def store_matrix(output, tile, p, r, width):
    """Stores a tile [P, R] of a matrix: split, [parts, width, width], or as it is, [width, width]."""
    mask = (p < width)[:, None] & (r < width)[None, :]
    store_split(output + offsets(p, width, r, 1), scalar(width, tl.int64) * width, tile, mask)


@triton.jit
def first_factors(gram, a_output, t_output, side, width, a, b, s, h, p, r):
    """Writes a tile [P, R] of A = s (G + h I) and of T = a I + b A.

    gram: [side, side], G, contiguous. a_output, t_output: [parts, width, width], split.
    a, b, s, h: float64. p, r: int32, rows and columns of the tile.
    """
    ACC: tl.constexpr = gram.dtype.element_ty
    root = tl.sqrt(s)  # in two factors, since float32 does not hold the s of a tiny G
    g = load_tile(gram, p, side, side, r, side, 1, ACC) * root.to(ACC)
    store_matrix(a_output, affine(g, p, r, side, (s * h).to(ACC), root.to(ACC)), p, r, width)
    store_matrix(t_output, affine(g, p, r, side, (a + b * s * h).to(ACC), (b * root).to(ACC)), p, r, width)


@triton.jit
def affine_product(
    left, right, side, width, identity, scale, p, r, BLOCK_Q: tl.constexpr, IN_PARTS: tl.constexpr, WHOLE: tl.constexpr
):
    """A tile [P, R] of i I + s L R.

    left, right: [parts, width, width], split, L and R.
    identity, scale: i and s, float64. p, r: int32, rows and columns of the tile.
    BLOCK_Q, IN_PARTS, WHOLE: see `split_product`.
    """
    plane = scalar(width, tl.int64) * width
    product = split_product(
        left=left, left_plane=plane, left_stride_p=width, left_stride_q=1,
        right=right, right_plane=plane, right_stride_q=width, right_stride_r=1,
        p=p, p_count=width, left_count=width, right_count=width, r=r, r_count=width,
        BLOCK_Q=BLOCK_Q, IN_PARTS=IN_PARTS, WHOLE=WHOLE,
    )  # fmt: skip
    return affine(product, p, r, side, identity.to(product.dtype), scale.to(product.dtype))


@triton.jit
def loss_sum(gram, root, p, r, side, shift, trace_weight, root_weight):
    """w_t trace(G) + w_r <G + shift I, Z> over a tile, summed in float64 since the terms of the loss cancel.

    gram: [side, side], G, contiguous. root: [P, R], Z. p, r: int32, rows and columns of the tile.
    """
    ACC: tl.constexpr = root.dtype
    g = load_tile(gram, p, side, side, r, side, 1, ACC)
    terms = scalar(root_weight, ACC) * affine(g, p, r, side, scalar(shift, ACC), 1.0) * root
    terms += tl.where(p[:, None] == r[None, :], scalar(trace_weight, ACC) * g, 0.0)
    return tl.sum(terms.to(tl.float64))
