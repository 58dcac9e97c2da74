"""Inverse square roots of symmetric positive matrices, all views at once, by matrix products alone.

The coupled Newton-Schulz iteration Y ← T Y, Z ← Z T with T = a I + b Y Z takes Y = A, Z = I to A^(1/2) and A^(-1/2).
A step is two launches: T, then both products with it. The factors do not commute exactly once they are rounded, so
their order is not free to change, and symmetry must not be made use of: mirroring one triangle of the iterates
diverges, multiplying in another order loses digits near collapse.

The iterates are in memory as tensor cores want them: of float32 matrices as pairs of halves (`halves`), [..., 2, w, w],
where entries stay below 2 / sqrt(smallest eigenvalue of A), 2e3; else as they are, [..., 1, w, w]. The width w is the
side rounded up to a multiple of 16, which is what Triton must know to load 16 bytes at a time; beyond the side is zero.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.halves import SCALE, store_number
from msbreg.kernels.tiles import load_tile, offsets
from msbreg.kernels.totals import spectral_sums, total_of

__all__ = ["first_factors_kernel", "inverse_root", "step_kernel"]


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
def parts_of(pointer):
    """How many numbers of the pointer's make one: two halves, or the number itself."""
    return 2 if pointer.dtype.element_ty == tl.float16 else 1


@triton.jit
def first_factors(
    gram,
    squares,
    a_pointer,
    t_pointer,
    side,
    width,
    count,
    a,
    b,
    shift,
    floor,
    row,
    column,
    BLOCK: tl.constexpr,
):
    """A tile of A = s (G + h I) and of T = a I + b A.

    gram: [side, side], contiguous; squares: [count]; a_pointer, t_pointer: [parts, width, width]; all of one view.
    row, column: which tile.
    """
    ACC: tl.constexpr = gram.dtype.element_ty
    s, h = normalisation(squares, count, shift, floor, 64)
    p = row * BLOCK + tl.arange(0, BLOCK)
    r = column * BLOCK + tl.arange(0, BLOCK)
    g = load_tile(gram, p, side, side, r, side, 1, ACC)
    place, mask = offsets(p, width, r, 1), (p < width)[:, None] & (r < width)[None, :]
    low = tl.full([], width, tl.int64) * width
    store_number(a_pointer + place, low, affine(g, p, r, side, (s * h).to(ACC), s.to(ACC)), mask)
    store_number(t_pointer + place, low, affine(g, p, r, side, (a + b * s * h).to(ACC), (b * s).to(ACC)), mask)


@triton.jit
def first_factors_kernel(
    gram_pointer,
    squares_pointer,
    a_pointer,
    t_pointer,
    side,
    width,
    count,
    a: tl.float64,
    b: tl.float64,
    shift: tl.float64,
    floor: tl.float64,
    BLOCK: tl.constexpr,
):
    """A = s (G + h I), where the iteration begins, and T of the first step.

    gram_pointer: [views, side, side], G, contiguous.
    squares_pointer: [views, count], float64, which add up to |G|² of each view.
    a_pointer, t_pointer: [views, parts, width, width], contiguous; parts is 2 for halves, 1 for numbers as they are.
    a, b: of T = a I + b A.
    shift, floor: see `normalisation`.

    One program makes a tile of both.
    """
    k = tl.program_id(2).to(tl.int64)
    matrix = k * parts_of(a_pointer) * width * width
    first_factors(
        gram_pointer + k * side * side,
        squares_pointer + k * count,
        a_pointer + matrix,
        t_pointer + matrix,
        side,
        width,
        count,
        a,
        b,
        shift,
        floor,
        tl.program_id(0),
        tl.program_id(1),
        BLOCK,
    )


@triton.jit
def affine_product(
    left,
    right,
    output,
    side,
    width,
    output_width,
    identity,
    scale,
    row,
    column,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A tile of i I + s L R.

    left, right: [parts, width, width], L and R, contiguous; output: as they are, or [output_width, output_width].
    identity, scale: i and s, float64.
    row, column: which tile.
    """
    NUMBER: tl.constexpr = left.dtype.element_ty
    ACC: tl.constexpr = tl.float32 if tl.float16 == NUMBER else NUMBER
    low = tl.full([], width, tl.int64) * width
    p = row * BLOCK_P + tl.arange(0, BLOCK_P)
    r = column * BLOCK_P + tl.arange(0, BLOCK_P)
    sums = tl.zeros([BLOCK_P, BLOCK_P], ACC)
    sums_low = tl.zeros([BLOCK_P, BLOCK_P], ACC)
    for first in range(0, width, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        x = load_tile(left, p, width, width, q, width, 1, NUMBER)
        y = load_tile(right, q, width, width, r, width, 1, NUMBER)
        sums = tl.dot(x, y, sums, input_precision="ieee", out_dtype=ACC)
        if tl.float16 == NUMBER:  # low times low is below the last bit
            sums_low = tl.dot(x, load_tile(right + low, q, width, width, r, width, 1, NUMBER), sums_low)
            sums_low = tl.dot(load_tile(left + low, p, width, width, q, width, 1, NUMBER), y, sums_low)
    sums = affine(sums + sums_low / SCALE, p, r, side, identity.to(ACC), scale.to(ACC))
    mask = (p < output_width)[:, None] & (r < output_width)[None, :]
    store_number(output + offsets(p, output_width, r, 1), low, sums, mask)


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
    width,
    count,
    identity: tl.float64,
    scale: tl.float64,
    shift: tl.float64,
    floor: tl.float64,
    LAST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One or two batches of products, i I + s L R.

    left_pointer, right_pointer: [views, parts, width, width], L and R of the first batch, contiguous; parts is 2 for
        halves, 1 for numbers as they are.
    second_left_pointer, second_right_pointer: those of the second batch.
    squares_pointer: [views, count], float64, which add up to |G|² of each view.
    output_pointer: [1 or 2, views, parts, width, width].
    identity, scale: i and s.
    LAST: s is also multiplied by the square root of A's scale, which makes A^(-1/2) (G + h I)^(-1/2); the output is
        [views, side, side], of G's dtype.
    shift, floor: see `normalisation`.

    One program makes a tile of one product; those from `views` on in the third grid axis are the second batch.
    """
    batch = tl.program_id(2)
    second = batch >= views
    k = tl.where(second, batch - views, batch).to(tl.int64)
    matrix = tl.full([], parts_of(left_pointer), tl.int64) * width * width
    weight = tl.full([], scale, tl.float64)
    if LAST:
        s, _ = normalisation(squares_pointer + k * count, count, shift, floor, 64)
        weight *= tl.sqrt(s)
    affine_product(
        tl.where(second, second_left_pointer, left_pointer) + k * matrix,
        tl.where(second, second_right_pointer, right_pointer) + k * matrix,
        output_pointer + (k * side * side if LAST else batch * matrix),
        side,
        width,
        side if LAST else width,
        tl.full([], identity, tl.float64),
        weight,
        tl.program_id(0),
        tl.program_id(1),
        BLOCK_P,
        BLOCK_Q,
    )


def inverse_root(gram: Tensor, shift: float, floor: float, steps: Sequence[tuple[float, float]]) -> Tensor:
    """(G + h I)^(-1/2), (K, p, p).

    Args:
        gram: G, (K, p, p), contiguous, float32 or float64.
        shift: h, at least 0, of all views...
        floor: ... but in each at least this times |G|, the Frobenius norm.
        steps: (a, b) of T in each step, two or more, for eigenvalues from h / (|G| + h) to 1.
    """
    views, side, _ = gram.shape
    squares = spectral_sums(gram, None, identity=0.0, scale=1.0, trace_weight=0.0, square_weight=1.0, root_weight=0.0)
    root, t, both = torch.empty_like(gram), iterates(gram), iterates(gram, 2, 2)
    width = t.shape[-1]
    sizes, normalised = (side, width, squares.shape[1]), (shift, floor)
    config = tile(width, views, gram.element_size())
    tiles = triton.cdiv(width, config["BLOCK_P"])

    def multiply(
        output: Tensor, *pairs: tuple[Tensor, Tensor], i: float = 0.0, s: float = 1.0, last: bool = False
    ) -> None:
        """i I + s L R for one or two (L, R)."""
        step_kernel[(tiles, tiles, len(pairs) * views)](
            *pairs[0], *pairs[-1], squares, output, views, *sizes, i, s, *normalised, LAST=last, **config
        )

    with torch.cuda.device_of(gram):
        # A is where T will be, and the first T is Z.
        y, z = both[0]
        first_factors_kernel[(triton.cdiv(width, 32), triton.cdiv(width, 32), views)](
            gram, squares, t, z, *sizes, *steps[0], *normalised, BLOCK=32, num_warps=4, enable_fp_fusion=True
        )
        multiply(y, (z, t))
        for step, (a, b) in enumerate(steps[1:], start=1):
            y, z = both[(step - 1) % 2]
            multiply(t, (y, z), i=a, s=b)
            if step < len(steps) - 1:
                multiply(both[step % 2], (t, y), (z, t))
            else:
                multiply(root, (z, t), last=True)  # Y is not needed any more
    return root


def iterates(gram: Tensor, *batch: int) -> Tensor:
    """Memory for the iterates of G, (K, p, p), once or a batch of times: (*batch, K, parts, w, w).

    Not halves on AMD: the matrix units of its MI200 take halves below 6e-5 for zero.
    """
    halves = gram.dtype == torch.float32 and not torch.version.hip
    views, side, _ = gram.shape
    width = 16 * triton.cdiv(side, 16)
    return gram.new_empty(*batch, views, 1 + halves, width, width, dtype=torch.float16 if halves else gram.dtype)


def tile(width: int, views: int, itemsize: int) -> dict[str, int | bool]:
    """The block sizes, warps and stages: small tiles while there are few, so that each processor has one.

    Of halves as many are on their way to a processor as registers and shared memory allow from sm_80 on.
    """
    if itemsize == 8 or width <= 64:
        block, depth, stages = 32, 16 if itemsize == 8 else 64, 3
    elif width * width * views < 2**24:
        block, depth, stages = 64, 32, 4
    else:
        block, depth, stages = 128, 16, 4
    return {
        "BLOCK_P": min(block, max(16, triton.next_power_of_2(width))),
        "BLOCK_Q": depth,
        "num_warps": 8 if block == 128 else 4,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
