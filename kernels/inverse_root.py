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

__all__ = ["inverse_root", "step_kernel"]


@triton.jit
def affine(x, rows, columns, side, identity, scale):
    """A tile of identity * I + scale * X, where X's tile is x."""
    diagonal = (rows[:, None] == columns[None, :]) & (rows < side)[:, None]
    return scale * x + tl.where(diagonal, identity, tl.zeros([], identity.dtype))


@triton.jit
def step_kernel(
    left_pointer,
    right_pointer,
    second_left_pointer,
    second_right_pointer,
    output_pointer,
    views,
    side,
    left_identity: tl.float64,
    left_scale: tl.float64,
    right_identity: tl.float64,
    right_scale: tl.float64,
    second_left_identity: tl.float64,
    second_left_scale: tl.float64,
    second_right_identity: tl.float64,
    second_right_scale: tl.float64,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One or two batches of products (i I + s L)(i' I + s' R).

    left_pointer, right_pointer: [views, side, side], L and R of the first batch, contiguous, all of one dtype.
    second_left_pointer, second_right_pointer: those of the second batch.
    output_pointer: [1 or 2, views, side, side].

    One program makes a tile of one product; those from `views` on in the third grid axis are the second batch.
    """
    ACC: tl.constexpr = output_pointer.dtype.element_ty
    batch = tl.program_id(2)
    second = batch >= views
    k = tl.where(second, batch - views, batch).to(tl.int64)
    left = tl.where(second, second_left_pointer, left_pointer) + k * side * side
    right = tl.where(second, second_right_pointer, right_pointer) + k * side * side
    i_left = tl.where(second, tl.full([], second_left_identity, ACC), tl.full([], left_identity, ACC))
    s_left = tl.where(second, tl.full([], second_left_scale, ACC), tl.full([], left_scale, ACC))
    i_right = tl.where(second, tl.full([], second_right_identity, ACC), tl.full([], right_identity, ACC))
    s_right = tl.where(second, tl.full([], second_right_scale, ACC), tl.full([], right_scale, ACC))
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)

    sums = tl.zeros([BLOCK_P, BLOCK_P], ACC)
    for first in range(0, side, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        x = affine(load_tile(left, p, side, side, q, side, 1, ACC), p, q, side, i_left, s_left)
        y = affine(load_tile(right, q, side, side, r, side, 1, ACC), q, r, side, i_right, s_right)
        sums = tl.dot(x, y, sums, input_precision=PRECISION, out_dtype=ACC)
    mask = (p < side)[:, None] & (r < side)[None, :]
    output = output_pointer + batch.to(tl.int64) * side * side
    tl.store(output + offsets(p, side, r, 1), sums, mask=mask)


def inverse_root(gram: Tensor, identity: float, scale: float, steps: Sequence[tuple[float, float]]) -> Tensor:
    """A^(-1/2), (K, p, p), of A = identity I + scale G, whose eigenvalues are in (0, 1].

    Args:
        gram: G, (K, p, p), contiguous, float32 or float64.
        identity: what is added to the diagonal.
        scale: what multiplies G.
        steps: (a, b) of T in each step, at least one.
    """
    views, side, _ = gram.shape
    config = tile(side, views)
    tiles = triton.cdiv(side, config["BLOCK_P"])
    both = [gram.new_empty(2, views, side, side) for _ in range(min(2, len(steps) - 1))]
    residual, root = torch.empty_like(gram), torch.empty_like(gram)

    def multiply(output: Tensor, *factors: tuple) -> None:
        """Each of one or two products is L, i, s, R, i', s'."""
        first, second = factors[0], factors[-1]
        step_kernel[(tiles, tiles, len(factors) * views)](
            first[0], first[3], second[0], second[3], output, views, side, *first[1:3], *first[4:], *second[1:3],
            *second[4:], PRECISION=precision(gram.dtype), **config,
        )  # fmt: skip

    with torch.cuda.device_of(gram):
        for number, (a, b) in enumerate(steps):
            if number == 0:
                # Y is A and Z is I, so that R is A, and neither needs to be in memory.
                y, z = (gram, identity, scale), (gram, 1.0, 0.0)
                t = (gram, a + b * identity, b * scale)
            else:
                y, z = ((matrix, 0.0, 1.0) for matrix in both[(number - 1) % 2])
                multiply(residual, (*y, *z))
                t = (residual, a, b)
            if number == len(steps) - 1:
                multiply(root, (*z, *t))  # Y is not needed any more
            else:
                multiply(both[number % 2], (*t, *y), (*z, *t))
    return root


def tile(side: int, views: int) -> dict[str, int | bool]:
    """The block sizes and warps: small tiles while there are few, so that every multiprocessor has one."""
    block = 128 if side * side * views >= 2**24 else 64 if side > 64 else 32
    return {
        "BLOCK_P": min(block, max(16, triton.next_power_of_2(side))),
        "BLOCK_Q": 32,
        "num_warps": 8 if block == 128 else 4,
        "enable_fp_fusion": True,
    }
