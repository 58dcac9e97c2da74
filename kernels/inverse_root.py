"""Inverse square roots of symmetric positive matrices, all views at once, by matrix products alone.

The coupled Newton-Schulz iteration Y ← T Y, Z ← Z T with T = a I + b Y Z takes Y = A, Z = I to A^(1/2) and A^(-1/2).
The first step is one launch, each later one two: T, then both products with it. The factors do not commute exactly once
they are rounded, so their order is not free to change, and symmetry must not be made use of: mirroring one triangle of
the iterates diverges, multiplying in another order loses digits near collapse.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import load_tile, offsets, precision
from msbreg.kernels.totals import spectral_sums, total_of

__all__ = ["first_step_kernel", "inverse_root", "step_kernel"]


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
def first_step(
    gram,
    squares,
    y_pointer,
    z_pointer,
    side,
    count,
    a,
    b,
    shift,
    floor,
    row,
    column,
    ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A tile of Y = T A and one of Z = T for T = a I + b A, where A = s (G + h I) is not in memory.

    gram, y_pointer, z_pointer: [side, side], contiguous; squares: [count]; all of one view.
    row, column: which tile.
    """
    ACC: tl.constexpr = z_pointer.dtype.element_ty
    s, h = normalisation(squares, count, shift, floor, 64)
    t_identity, t_scale = (a + b * s * h).to(ACC), (b * s).to(ACC)
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    r = column * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (p < side)[:, None] & (r < side)[None, :]
    if not ONLY:
        y = tl.zeros([BLOCK_P, BLOCK_P], ACC)
        for first in range(0, side, BLOCK_Q):
            q = first + tl.arange(0, BLOCK_Q)
            left = affine(load_tile(gram, p, side, side, q, side, 1, ACC), p, q, side, t_identity, t_scale)
            right = affine(load_tile(gram, q, side, side, r, side, 1, ACC), q, r, side, (s * h).to(ACC), s.to(ACC))
            y = tl.dot(left, right, y, input_precision=PRECISION, out_dtype=ACC)
        tl.store(y_pointer + offsets(p, side, r, 1), y, mask=mask)
    t = affine(load_tile(gram, p, side, side, r, side, 1, ACC), p, r, side, t_identity, t_scale)
    if ONLY:
        t *= tl.sqrt(s).to(ACC)
    tl.store(z_pointer + offsets(p, side, r, 1), t, mask=mask)


@triton.jit
def first_step_kernel(
    gram_pointer,
    squares_pointer,
    output_pointer,
    views,
    side,
    count,
    a: tl.float64,
    b: tl.float64,
    shift: tl.float64,
    floor: tl.float64,
    ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """`first_step` of all views.

    gram_pointer: [views, side, side], G, contiguous.
    squares_pointer: [views, count], float64, which add up to |G|² of each view.
    output_pointer: [2, views, side, side], Y and Z, of G's dtype.
    shift, floor: see `normalisation`.
    ONLY: no step follows: the output is [views, side, side], sqrt(s) T.

    One program makes a tile of Y and of Z.
    """
    k = tl.program_id(2).to(tl.int64)
    z = k if ONLY else views + k
    first_step(
        gram_pointer + k * side * side,
        squares_pointer + k * count,
        output_pointer + k * side * side,
        output_pointer + z * side * side,
        side,
        count,
        a,
        b,
        shift,
        floor,
        tl.program_id(0),
        tl.program_id(1),
        ONLY,
        PRECISION,
        BLOCK_P,
        BLOCK_Q,
    )


@triton.jit
def affine_product(
    left,
    right,
    output,
    side,
    identity,
    scale,
    row,
    column,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A tile of i I + s L R.

    left, right, output: [side, side], L, R and the result, contiguous, all of one dtype.
    identity, scale: i and s, float64.
    row, column: which tile.
    """
    ACC: tl.constexpr = output.dtype.element_ty
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    r = column * BLOCK_P + tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_P], ACC)
    for first in range(0, side, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        x = load_tile(left, p, side, side, q, side, 1, ACC)
        y = load_tile(right, q, side, side, r, side, 1, ACC)
        sums = tl.dot(x, y, sums, input_precision=PRECISION, out_dtype=ACC)
    sums = affine(sums, p, r, side, identity.to(ACC), scale.to(ACC))
    tl.store(output + offsets(p, side, r, 1), sums, mask=(p < side)[:, None] & (r < side)[None, :])


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
    identity: tl.float64,
    scale: tl.float64,
    shift: tl.float64,
    floor: tl.float64,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One or two batches of products, i I + s L R.

    left_pointer, right_pointer: [views, side, side], L and R of the first batch, contiguous, all of one dtype.
    second_left_pointer, second_right_pointer: those of the second batch.
    squares_pointer: [views, count], float64, which add up to |G|² of each view.
    output_pointer: [1 or 2, views, side, side].
    identity, scale: i and s.
    LAST: s is also multiplied by the square root of A's scale, which makes A^(-1/2) (G + h I)^(-1/2).
    shift, floor: see `normalisation`.

    One program makes a tile of one product; those from `views` on in the third grid axis are the second batch.
    """
    batch = tl.program_id(2)
    second = batch >= views
    k = tl.where(second, batch - views, batch).to(tl.int64)
    weight = tl.full([], scale, tl.float64)
    if LAST:
        size, _ = normalisation(squares_pointer + k * count, count, shift, floor, 64)
        weight *= tl.sqrt(size)
    affine_product(
        tl.where(second, second_left_pointer, left_pointer) + k * side * side,
        tl.where(second, second_right_pointer, right_pointer) + k * side * side,
        output_pointer + batch.to(tl.int64) * side * side,
        side,
        tl.full([], identity, tl.float64),
        weight,
        tl.program_id(0),
        tl.program_id(1),
        PRECISION,
        BLOCK_P,
        BLOCK_Q,
    )


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
    blocks = tile(side, views, gram.element_size()) | {"PRECISION": precision(gram.dtype)}
    tiles = triton.cdiv(side, blocks["BLOCK_P"])
    sizes, normalised = (views, side, squares.shape[1]), (shift, floor)
    t, root, both = torch.empty_like(gram), torch.empty_like(gram), gram.new_empty(2, 2, views, side, side)

    def multiply(
        output: Tensor, *pairs: tuple[Tensor, Tensor], i: float = 0.0, s: float = 1.0, last: bool = False
    ) -> None:
        """i I + s L R for one or two (L, R)."""
        step_kernel[(tiles, tiles, len(pairs) * views)](
            *pairs[0], *pairs[-1], squares, output, *sizes, i, s, *normalised, LAST=last, **blocks
        )

    with torch.cuda.device_of(gram):
        only = len(steps) == 1
        first_step_kernel[(tiles, tiles, views)](
            gram, squares, root if only else both[0], *sizes, *steps[0], *normalised, ONLY=only, **blocks
        )
        for number, (a, b) in enumerate(steps[1:], start=1):
            y, z = both[(number - 1) % 2]
            multiply(t, (y, z), i=a, s=b)
            if number < len(steps) - 1:
                multiply(both[number % 2], (t, y), (z, t))
            else:
                multiply(root, (z, t), last=True)  # Y is not needed any more
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
