"""What kernels share: tiles of matrices in memory, rows of unit length, when they begin, how many blocks there are."""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "EPS", "FEW", "STAGES", "accumulator", "affine", "architecture", "cdiv", "early", "inverse_length",
    "let_next_launch_begin", "load_tile", "next_power_of_2", "offsets", "precision", "scalar", "stages", "unit",
    "wait_for_last_launch",
]  # fmt: skip

EPS = tl.constexpr(1e-12)
"""Rows no longer than this have no direction."""
FEW = 2**21
"""Numbers below which a kernel takes a GPU few microseconds: launches begin early then, the inverse root is one launch,
and its tiles are small, so that each processor has one."""
TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
"""Its version, such as (3, 8)."""
STAGES = 3
"""Tiles of each factor of a product that are on their way to a processor, or there, but for what `stages` says."""


@triton.jit
def wait_for_last_launch(EARLY: tl.constexpr):
    """The first line of a kernel that is launched with `early`: returns once all that was launched before is stored."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_next_launch_begin(EARLY: tl.constexpr):
    """Once all programs have come here, those of the next launch take their places, and wait.

    Where there are several programs to a processor, this stands behind what they compute: earlier, the next launch's
    programs take whatever places are free, and some processors have more of them than others.
    """
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def scalar(x, DTYPE: tl.constexpr):
    """A number in that dtype. An argument may be a constant without `.to`: 1, or in the interpreter any float."""
    return tl.full([], x, DTYPE)


@triton.jit
def offsets(rows, row_stride, columns, column_stride):
    """Places of the elements of a tile [R, C], int64: products of two ints overflow 32 bits in large tensors."""
    return rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def load_tile(pointer, rows, row_count, row_stride, columns, column_count, column_stride, ACC: tl.constexpr):
    """A tile [R, C] in the accumulator's dtype, zero beyond the matrix: nothing is computed in half precision.

    A single row (R = 1) is not masked: it must lie inside the matrix.
    """
    mask = (columns < column_count)[None, :]
    if rows.shape[0] > 1:
        mask &= (rows < row_count)[:, None]
    return tl.load(pointer + offsets(rows, row_stride, columns, column_stride), mask=mask, other=0.0).to(ACC)


@triton.jit
def affine(x, rows, columns, side, identity, scale):
    """A tile of identity * I + scale * X, where X's tile is x; I is [side, side]."""
    diagonal = (rows[:, None] == columns[None, :]) & (rows < side)[:, None]
    return scale * x + tl.where(diagonal, identity, tl.zeros([], identity.dtype))


@triton.jit
def unit(x):
    """Rows x̂ = x / |x|, [R, D]; |x|, [R], which is at least EPS; |x̂|², [R], 1. Shorter rows than EPS count as zero.

    All are NaN where a row is not finite. |x| is infinite where it is more than the dtype holds, and x̂ is right still:
    where the squares of a row overflow, all rows are divided by their largest entries before they are squared.
    """
    squares = tl.sum(x * x, axis=1)
    eps = scalar(EPS, x.dtype)  # a bare number is float32 in a comparison and float64 in tl.where
    short = squares < eps * eps  # false for NaN, which stays
    inverse = tl.where(short, 0.0, tl.rsqrt(squares))
    norm = tl.where(short, eps, squares * inverse)
    square = squares * (inverse * inverse)
    if tl.max((squares == float("inf")).to(tl.int32), axis=0) == 1:
        largest = tl.max(tl.abs(x), axis=1)
        largest = tl.where(largest < eps, eps, largest)
        y = x * (1.0 / largest)[:, None]
        squares = tl.sum(y * y, axis=1)
        root = tl.rsqrt(squares)
        norm = largest * tl.sqrt(squares)
        short = norm < eps
        inverse = tl.where(short, 0.0, root * (1.0 / largest))  # 1 / norm, which may be infinite
        norm = tl.where(short, eps, norm)
        square = tl.where(short, 0.0, squares * (root * root))
    # One product for both branches: where it is added to something, the two are one instruction.
    return x * inverse[:, None], norm, square


@triton.jit
def inverse_length(norm):
    """1 / |x| of the |x| that `unit` gives; 0 for rows that have no direction."""
    return tl.where(norm <= scalar(EPS, norm.dtype), 0.0, 1.0 / norm)


def early(device: torch.device, numbers: int) -> dict[str, bool]:
    """Arguments of a launch whose programs may take their places while those of the one before end.

    NVIDIA calls it programmatic dependent launch. It saves a microsecond, much of a small launch and nothing of a
    large one.

    Args:
        device: that it is launched on.
        numbers: of the rows, matrices or sums that it is about, by which it takes long or not.
    """
    able = architecture(device) >= 90  # Hopper
    return {"EARLY": True, "launch_pdl": True} if able and numbers < FEW else {"EARLY": False}


def stages(device: torch.device) -> int:
    """`STAGES`; one on Blackwell's sm_100 to sm_110 with Triton before 3.8.

    There a loop of products that copies tiles ahead may read one before it has come: results were now and then wrong on
    a B200 (https://github.com/triton-lang/triton/issues/9871) and with Triton 3.7 on a B300 (10590).
    """
    return 1 if TRITON < (3, 8) and 100 <= architecture(device) < 120 else STAGES


@functools.cache
def architecture(device: torch.device) -> int:
    """The number of an NVIDIA GPU's architecture, 90 for sm_90; 0 of other devices."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def cdiv(length: int, block: int) -> int:
    """How many blocks cover a length. Triton's own takes the host 2 µs a call, of which a loss makes two dozen."""
    return -(-length // block)


def next_power_of_2(number: int) -> int:
    """The least power of two that is no less than a number, 1 or more; as above."""
    return 1 << (number - 1).bit_length()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel computes in: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: on tensor cores with three TF32 products for a float32 one, which keep all its digits.

    One TF32 product keeps ten bits, and near collapse the Gram matrix needs twenty.
    """
    return "ieee" if dtype == torch.float64 or torch.version.hip else "tf32x3"
