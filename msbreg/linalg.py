"""Singular values and what follows from them, batched, and quiet about input that is not finite.

No loss takes a singular value decomposition here unless its solver is "svd": for M of N rows and D columns everything
comes from the Gram matrix G on the smaller side, MᵀM (D x D) or, when N < D, M Mᵀ (N x N). The public functions carry
no gradient; `msbreg.functional.nuclear_norm` does.

torch's own decompositions raise on NaN and Inf. These give NaN for the matrices concerned and right values for their
neighbours in the batch, without asking the device whether there are any.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from msbreg import kernels
from msbreg.precision import full_precision, raised

__all__ = ["Solver", "effective_rank", "polar", "singular_values"]

Solver = Literal["auto", "newton_schulz", "eigh", "svd"]

NEWTON_SCHULZ_FLOOR = 8.0
"""In roundings: the smallest eigenvalue, relative to the Frobenius norm, that Newton-Schulz tells from zero. The
eigenvalues of a Gram matrix are wrong by one or two of these, some to below zero, where the iteration diverges."""

NEWTON_SCHULZ_SCALE = 1.65
"""Largest c of `newton_schulz_steps`. Measured at (512, 256) in float32 (`tests/test_spectral.py`): rows that point one
way but for 1e-4 have a gradient wrong by 5e-2 with c up to √3 and by 8e-3 with this, for as many steps."""


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Singular values, largest first, to the precision of the matrix: not through its Gram matrix.

    Args:
        matrix: (..., N, D), floating point; half precisions are computed in float32.

    Returns:
        (..., min(N, D)), float32 or float64; all NaN for a matrix that is not finite.

    Raises:
        ValueError: fewer than two dimensions.
        TypeError: not floating point.
    """
    matrix = checked(matrix)
    finite = torch.isfinite(matrix).all(-1).all(-1)[..., None]
    values = torch.linalg.svdvals(torch.where(finite[..., None], matrix, 0.0))
    return torch.where(finite, values, torch.nan)


@torch.no_grad()
def effective_rank(matrix: Tensor) -> Tensor:
    """Effective rank: exp of the entropy of the singular values, normalised to sum to one.

    From 1 (all rows along one direction) to min(N, D) (a flat spectrum); 0 for a matrix of zeros. Roy, Vetterli, "The
    effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        matrix: (..., N, D), floating point; half precisions are computed in float32.

    Returns:
        (...), float32 or float64; NaN for a matrix that is not finite.

    Raises:
        ValueError: fewer than two dimensions.
        TypeError: not floating point.
    """
    return entropy_rank(singular_values(matrix))


def entropy_rank(values: Tensor) -> Tensor:
    """The `effective_rank`, (...), of matrices with these singular values (..., p), largest first."""
    largest = values[..., :1]
    p = values / torch.where(largest == 0, 1.0, largest)  # whose sum cannot overflow
    total = p.sum(-1, keepdim=True)
    p = p / torch.where(total == 0, 1.0, total)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    return torch.where(total[..., 0] == 0, 0.0, entropy.exp())


@torch.no_grad()
def polar(matrix: Tensor, *, solver: Solver = "auto") -> Tensor:
    """Polar factor U Vᵀ of M = U S Vᵀ, taken over the nonzero singular values: the gradient of the nuclear norm.

    At full rank it is the matrix with orthonormal columns (rows, when N < D) that is nearest to M.

    Args:
        matrix: (..., N, D), floating point.
        solver: `"eigh"` (of the Gram matrix in float64) and `"svd"` count singular values below max(N, D) roundings of
            the largest as zero; `"newton_schulz"` (matrix products alone) fades them out below about 1e-3 of the
            Frobenius norm in float32, 5e-8 in float64. `"auto"`: newton_schulz on CUDA, eigh elsewhere.

    Returns:
        (..., N, D) in the matrix's dtype; all NaN for a matrix that is not finite.

    Raises:
        ValueError: fewer than two dimensions, or an unknown solver.
        TypeError: not floating point.
    """
    solver = resolve_solver(solver, matrix.device)
    m = checked(matrix)
    if m.numel() == 0:
        return torch.zeros_like(matrix)
    tolerance = rank_tolerance(m, solver)
    if solver == "eigh":
        m = m.double()
    with full_precision(m):
        return multiply(m, inverse_root(gram(m), 0.0, solver, m, tolerance)).to(matrix.dtype)


def checked(matrix: Tensor) -> Tensor:
    """The matrix in float32 or float64, once it is known to be one."""
    if not matrix.is_floating_point():
        raise TypeError(f"expected a floating-point matrix, got {matrix.dtype}")
    if matrix.dim() < 2:
        raise ValueError(f"expected a matrix (..., N, D), got shape {tuple(matrix.shape)}")
    return raised(matrix)


def resolve_solver(solver: Solver, device: torch.device) -> Solver:
    """`"auto"` made definite; raises ValueError on a name that is none."""
    if solver not in get_args(Solver):
        raise ValueError(f"expected solver to be one of {get_args(Solver)}, got {solver!r}")
    if solver == "auto":
        return "newton_schulz" if device.type in ("cuda", kernels.DEVICE_TYPE) else "eigh"
    return solver


def finite_gram(gram: Tensor) -> Tensor:
    """(..., 1, 1): whether a Gram matrix is finite. Its diagonal bounds the rest of it."""
    return torch.isfinite(gram.diagonal(dim1=-2, dim2=-1).sum(-1))[..., None, None]


def gram(matrix: Tensor, *, smaller: bool = True) -> Tensor:
    """MᵀM (..., D, D), or with `smaller` and N < D, M Mᵀ (..., N, N)."""
    rows, dim = matrix.shape[-2:]
    return matrix @ matrix.mT if smaller and rows < dim else matrix.mT @ matrix


def multiply(matrix: Tensor, weight: Tensor) -> Tensor:
    """M W for a weight (..., D, D) and Wᵀ M for a weight (..., N, N): whichever side its Gram matrix was.

    A weight is symmetric but for rounding, which for M of less than full rank matters: a root by `newton_schulz` is
    exact on one side, and W M would be of the other.
    """
    return matrix @ weight if weight.shape[-1] == matrix.shape[-1] else weight.mT @ matrix


def inverse_root(
    gram: Tensor, shift: float, solver: Solver, matrix: Tensor, tolerance: float | torch.SymFloat
) -> Tensor:
    """A^(-1/2), (..., p, p), of A = G + shift I.

    Args:
        gram: G, (..., p, p), float32 or float64.
        shift: at least 0. At 0 the root is taken over the eigenvalues of G above `tolerance` times the largest.
        solver: not `"auto"`.
        matrix: the M that G is the Gram matrix of, which `"svd"` decomposes.
        tolerance: see `rank_tolerance`.

    Returns:
        NaN for a G that is not finite.
    """
    if solver == "newton_schulz":
        return newton_schulz(gram, shift)
    values, vectors = eigenpairs(gram, matrix if solver == "svd" else None)
    inverse = torch.rsqrt(values + shift)
    if shift == 0:
        inverse = torch.where(values <= tolerance * values.amax(-1, keepdim=True), 0.0, inverse)
    return (vectors * inverse[..., None, :]) @ vectors.mT


def rank_tolerance(matrix: Tensor, solver: Solver) -> float | torch.SymFloat:
    """The eigenvalue of the Gram matrix, relative to the largest, up to which it stands for a singular value of zero.

    As in `torch.linalg.matrix_rank` a matrix resolves singular values down to max(N, D) roundings. A Gram matrix,
    which without a shift is decomposed in float64, resolves their squares no better than that.
    """
    by_matrix = (max(matrix.shape[-2:]) * torch.finfo(matrix.dtype).eps) ** 2
    by_gram = min(matrix.shape[-2:]) * torch.finfo(torch.float64).eps
    return by_matrix if solver == "svd" else torch.sym_max(by_matrix, by_gram)  # torch.export may know them as symbols


def eigenpairs(gram: Tensor, matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., p), at least 0, and eigenvectors (..., p, p), as columns, of G; through M's SVD where given."""
    finite = finite_gram(gram)
    if matrix is None:
        g = torch.where(finite, gram, 0.0)
        # With a rounding of the trace on the diagonal: without it LAPACK fails, or gives NaN, on some matrices of one
        # direction with rows of zeros, as behind a ReLU.
        shift = torch.finfo(g.dtype).eps * g.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        values, vectors = torch.linalg.eigh(g + torch.diag_embed(shift.expand(g.shape[:-1])))
        values = (values - shift).clamp_min(0.0)
    else:
        u, s, vt = torch.linalg.svd(torch.where(finite, matrix, 0.0), full_matrices=False)
        values, vectors = s.square(), vt.mT if vt.shape[-2] == vt.shape[-1] else u
    return torch.where(finite[..., 0], values, torch.nan), vectors


def newton_schulz(gram: Tensor, shift: float, trace: float | None = None) -> Tensor:
    """A^(-1/2) of A = G + shift I by the coupled Newton-Schulz iteration: a fixed number of matrix products.

    Higham, "Functions of Matrices", SIAM 2008, section 6.7. Y and Z start at A and I and tend to A^(1/2) and A^(-1/2).
    The order of the factors matters once rounding keeps them from commuting: with Y on the left of Z the gradient M Z
    near collapse is five times as exact as with Z on the left of Y; for a Gram matrix M Mᵀ that is Zᵀ M (`multiply`).

    Args:
        gram: G, (..., p, p), float32 or float64.
        shift: at least 0; raised to what rounding leaves of the small eigenvalues of G, `NEWTON_SCHULZ_FLOOR`.
        trace: at least the trace of G, where it is known beforehand: a large shift beside it saves steps. Not while
            torch.compile traces, which may know it as a symbol alone.
    """
    share = 0.0 if trace is None or torch.compiler.is_compiling() else shift / trace
    floor, steps = newton_schulz_plan(share, gram.dtype)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # By the Frobenius norm rather than the trace: eigenvalues as large as can be keep their digits. No entry is larger
    # than the largest on the diagonal, by which they are divided before squares overflow or vanish.
    largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
    largest = torch.where(largest == 0, 1.0, largest)
    size = largest * torch.linalg.matrix_norm(gram / largest, keepdim=True)
    size = torch.where(size == 0, 1.0, size)
    shifts = (floor * size).clamp_min(shift)
    scale = size + shifts
    a = gram / scale + (shifts / scale) * identity
    y, z = a, identity.expand_as(a)
    for identity_weight, product_weight in steps:
        t = identity_weight * identity + product_weight * (y @ z)
        y, z = t @ y, z @ t
    return z * scale.rsqrt()


def newton_schulz_plan(shift: float, dtype: torch.dtype) -> tuple[float, list[tuple[float, float]]]:
    """The least shift, as a share of the Frobenius norm of G, and the coefficients of all steps.

    Args:
        shift: as a share of the trace of G, or of more; 0 where that is not known. The Frobenius norm, by which the
            iteration divides, is at most the trace.
        dtype: of G.
    """
    floor = NEWTON_SCHULZ_FLOOR * torch.finfo(dtype).eps
    smallest = max(shift, floor)
    return floor, newton_schulz_steps(smallest / (1 + smallest), dtype)


# As torch.compiler.assume_constant_result does, which would import the compiler: traced, the loop would not come to an
# end where numbers are symbols.
newton_schulz_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def newton_schulz_steps(smallest: float, dtype: torch.dtype) -> list[tuple[float, float]]:
    """The coefficients (a, b) of T = a I + b Y Z, the factor of each step, for eigenvalues from `smallest` to 1.

    On the square root x of an eigenvalue, a step is the polynomial a x + b x³ = 3/2 (cx) - 1/2 (cx)³, which tends to 1.
    The c that maximises the smallest result over the interval is that of Chen, Chow, "A stable scaling of
    Newton-Schulz for improving the sign function computation of a Hermitian matrix", 2014: about half the steps of
    c = 1. It is capped, since near √3 it sends the largest eigenvalue to almost zero, where rounding spoils it.
    """
    steps: list[tuple[float, float]] = []
    x, left, eps = math.sqrt(smallest), 1.0, torch.finfo(dtype).eps
    while len(steps) < 2 or left > eps:  # the kernels want two or more
        left = 0.375 * (1 - x) ** 2  # of the distance to 1, once it is small; that itself is lost to rounding
        c = min(NEWTON_SCHULZ_SCALE, math.sqrt(3 / (1 + x + x * x)))
        a, b = 1.5 * c, -0.5 * c**3
        x = min(a * x + b * x**3, a + b)
        steps.append((a, b))
    return steps
