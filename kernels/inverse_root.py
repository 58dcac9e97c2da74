"""Inverse square roots of symmetric positive matrices, all views at once, by matrix products alone.

The coupled Newton-Schulz iteration Y ← T Y, Z ← Z T with T = a I + b Y Z takes Y = A, Z = I to A^(1/2) and A^(-1/2).
Each step is two launches: R = Y Z, then both products with T, which is made of R as it is read. The factors do not
commute exactly once they are rounded, so their order is not free to change, and symmetry must not be made use of:
mirroring one triangle of the iterates diverges, multiplying in another order loses digits near collapse.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import load_tile, offsets, precision
from msbreg.kernels.totals import spectral_sums, total_of

__all__ = ["inverse_root", "step_kernel"]


@triton.jit
def affine(x, rows, columns, side, identity, scale):
    """A tile of identity * I + scale * X, where X's tile is x."""
    diagonal = (rows[:, None] == columns[None, :]) & (rows < side)[:, None]
    return scale * x + tl.where(diagonal, identity, tl.zeros([], identity.dtype))


@triton.jit
def normalisation(squares_pointer, count, shift, floor, BLOCK: tl.constexpr):
    """s and h of A = s (G + h I), whose eigenvalues are in (0, 1]: 1 / (|G| + h), and the shift or what floor makes it.

    squares_pointer: [count], float64, the sum of which is |G|².
    """
    size = tl.sqrt(total_of(squares_pointer, count, BLOCK))
    size = tl.where(size == 0, 1.0, size)
    h = tl.where(shift > floor * size, shift, floor * size)
    return 1.0 / (size + h), h


@triton.jit
def step_kernel(
    left_pointer,
    right_pointer,
    second_left_pointer,
    second_right_pointer,
    squares_pointer,
    output_pointer,
    views,
    side,
    count,
    left_identity: tl.float64,
    left_scale: tl.float64,
    right_identity: tl.float64,
    right_scale: tl.float64,
    second_left_identity: tl.float64,
    second_left_scale: tl.float64,
    second_right_identity: tl.float64,
    second_right_scale: tl.float64,
    shift: tl.float64,
    floor: tl.float64,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One or two batches of products (i I + s L)(i' I + s' R).

    left_pointer, right_pointer: [views, side, side], L and R of the first batch, contiguous, all of one dtype.
    second_left_pointer, second_right_pointer: those of the second batch.
    squares_pointer: [views, count], float64, which add up to |G|² of each view.
    output_pointer: [1 or 2, views, side, side].
    shift, floor: see `normalisation`.
    FIRST: L and R are G, and stand for A = s (G + h I).
    LAST: the product is multiplied by sqrt(s), which makes A^(-1/2) (G + h I)^(-1/2).

    One program makes a tile of one product; those from `views` on in the third grid axis are the second batch.
    """
    ACC: tl.constexpr = output_pointer.dtype.element_ty
    batch = tl.program_id(2)
    second = batch >= views
    k = tl.where(second, batch - views, batch).to(tl.int64)
    left = tl.where(second, second_left_pointer, left_pointer) + k * side * side
    right = tl.where(second, second_right_pointer, right_pointer) + k * side * side
    i_left = tl.where(second, tl.full([], second_left_identity, tl.float64), tl.full([], left_identity, tl.float64))
    s_left = tl.where(second, tl.full([], second_left_scale, tl.float64), tl.full([], left_scale, tl.float64))
    i_right = tl.where(second, tl.full([], second_right_identity, tl.float64), tl.full([], right_identity, tl.float64))
    s_right = tl.where(second, tl.full([], second_right_scale, tl.float64), tl.full([], right_scale, tl.float64))
    if FIRST or LAST:
        size, h = normalisation(squares_pointer + k * count, count, shift, floor, 64)
    if FIRST:
        i_left, s_left = i_left + s_left * size * h, s_left * size
        i_right, s_right = i_right + s_right * size * h, s_right * size
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)

    sums = tl.zeros([BLOCK_P, BLOCK_P], ACC)
    for first in range(0, side, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        x = affine(load_tile(left, p, side, side, q, side, 1, ACC), p, q, side, i_left.to(ACC), s_left.to(ACC))
        y = affine(load_tile(right, q, side, side, r, side, 1, ACC), q, r, side, i_right.to(ACC), s_right.to(ACC))
        sums = tl.dot(x, y, sums, input_precision=PRECISION, out_dtype=ACC)
    if LAST:
        sums *= tl.sqrt(size).to(ACC)
    mask = (p < side)[:, None] & (r < side)[None, :]
    output = output_pointer + batch.to(tl.int64) * side * side
    tl.store(output + offsets(p, side, r, 1), sums, mask=mask)


def inverse_root(gram: Tensor, shift: float, floor: float, steps: Sequence[tuple[float, float]]) -> Tensor:
    """(G + h I)^(-1/2), (K, p, p).

    Args:
        gram: G, (K, p, p), contiguous, float32 or float64.
        shift: h, at least 0, of all views...
        floor: ... but in each at least this times |G|, the Frobenius norm.
        steps: (a, b) of T in each step, at least one, for eigenvalues from h / (|G| + h) to 1.
    """
    views, side, _ = gram.shape
    squares = spectral_sums(gram, None, identity=0.0, scale=1.0, trace_weight=0.0, square_weight=1.0, root_weight=0.0)
    config = tile(side, views, gram.element_size())
    tiles = triton.cdiv(side, config["BLOCK_P"])
    both = [gram.new_empty(2, views, side, side) for _ in range(min(2, len(steps) - 1))]
    residual, root = torch.empty_like(gram), torch.empty_like(gram)

    def multiply(output: Tensor, *factors: tuple, first: bool = False, last: bool = False) -> None:
        """Each of one or two products is L, i, s, R, i', s'."""
        one, two = factors[0], factors[-1]
        step_kernel[(tiles, tiles, len(factors) * views)](
            one[0], one[3], two[0], two[3], squares, output, views, side, squares.shape[1], *one[1:3], *one[4:],
            *two[1:3], *two[4:], shift, floor, FIRST=first, LAST=last, PRECISION=precision(gram.dtype), **config,
        )  # fmt: skip

    with torch.cuda.device_of(gram):
        for number, (a, b) in enumerate(steps):
            first, last = number == 0, number == len(steps) - 1
            if first:
                # Y is A and Z is I, so that R is A, and none of them needs to be in memory.
                y, z, t = (gram, 0.0, 1.0), (gram, 1.0, 0.0), (gram, a, b)
            else:
                y, z = ((matrix, 0.0, 1.0) for matrix in both[(number - 1) % 2])
                multiply(residual, (*y, *z))
                t = (residual, a, b)
            if last:
                multiply(root, (*z, *t), first=first, last=last)  # Y is not needed any more
            else:
                multiply(both[number % 2], (*t, *y), (*z, *t), first=first)
    return root


def tile(side: int, views: int, itemsize: int) -> dict[str, int | bool]:
    """The block sizes and warps: small tiles for float64, and while there are few, so that each processor has one."""
    small = side <= 64 or itemsize == 8
    block = 32 if small else 128 if side * side * views >= 2**24 else 64
    # Half as deep where registers or shared memory would not do: large tiles, numbers with an address each, float64.
    shallow = block == 128 or side % 16 != 0 or itemsize == 8
    return {
        "BLOCK_P": min(block, max(16, triton.next_power_of_2(side))),
        "BLOCK_Q": 16 if shallow else 32,
        "num_warps": 8 if block == 128 else 4,
        "enable_fp_fusion": True,
    }
