"""The losses and their gradients in plain torch, without autograd: the mathematics on one page.

    z[k, i]   embedding of view k of image i, a row of D numbers; with K views of N images, z is (K, N, D)
    t[k, i]   embedding by the target network, which carries no gradient
    ẑ, t̂, ĉ   rows of unit length
    n̂[i]      a random direction
    M         the N x D matrix of the rows ẑ[k, i] of one view, with r = min(N, D) singular values s_j

    L   = λ_m L_M + λ_s L_S + λ_b L_B             λ_m is 1 but for ablations
    L_M = mean_k mean_i |ẑ[k, i] - ĉ[i]|²       the views of an image attract each other
    L_S = mean_k Σ_j f(s_j²)                    all embeddings spread out evenly
    L_B = mean_k mean_i <ẑ[k, i], n̂[i]>         each gets a small random push

Moon, Buracas, Park, Kim, Canny, "An Embedding-Dynamic Approach to Self-supervised Learning", WACV 2023,
https://arxiv.org/abs/2207.03552. The forms are reconstructions: the paper's method section could not be read. Its
introduction says of L_M that it brings the centroids of online and target embeddings together; here it is
2 - 2 <mean_k ẑ[k, i], ĉ[i]>, with ĉ alone of unit length.

Each gradient here is with respect to ẑ; `tangent` turns their sum into the one with respect to z. All tensors are
float32 or float64; `functional` sees to that.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from msbreg.linalg import finite_gram
from msbreg.linalg import gram as plain_gram

__all__ = [
    "Spectrum",
    "brownian_gradient",
    "brownian_loss",
    "centroid_gradient",
    "centroid_loss",
    "centroids",
    "coding_rate",
    "nuclear_norm",
    "singular_value_loss",
    "tangent",
    "unit_rows",
]

Spectrum = Literal["nuclear", "whitening", "coding_rate"]
InverseRoot = Callable[[Tensor, float], Tensor]

CODING_PRECISION = 0.2
"""ε of the coding rate, as in EMP-SSL, https://arxiv.org/abs/2304.03977, where it is not squared either."""


def eps() -> float:
    """Rows no longer than this have no direction; the value of `torch.nn.functional.normalize`.

    Not a constant: torch.compile with dynamic=True turns a module's numbers into inputs of the graph, and torch 2.14
    fails where two losses in one graph share one.
    """
    return 1e-12


def unit_rows(z: Tensor) -> tuple[Tensor, Tensor]:
    """ẑ = z / |z|, (..., N, D), and |z|, (..., N, 1), which is at least `eps`; shorter rows than that count as zero.

    Right too where squares overflow or vanish, or |z| itself is more than the dtype holds, and infinite then. Nothing
    is changed in place: torch.compile of torch 2.11 loses the gradient of an autograd function's output that was.
    """
    norms = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    if can_be_asked(z) and bool(((norms > eps()) & norms.isfinite()).all()):
        return z / norms, norms  # three passes less: an eighth of the loss on a CPU
    largest = torch.maximum(z.amax(-1, keepdim=True), -z.amin(-1, keepdim=True)).clamp_min(eps())
    scaled = z / largest
    lengths = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    norms = largest * lengths
    return scaled * torch.where(norms < eps(), 0.0, 1 / lengths), norms.clamp_min(eps())


def can_be_asked(z: Tensor) -> bool:
    """Whether z has numbers, and reading one neither waits for a device nor breaks a graph that is being traced."""
    return type(z) is Tensor and z.device.type == "cpu" and not torch.compiler.is_compiling()


def tangent(g: Tensor, z_hat: Tensor, norms: Tensor) -> Tensor:
    """dL/dz = (g - ẑ <ẑ, g>) / |z| for g = dL/dẑ, (K, N, D), which it overwrites.

    Zero where z has no direction that could turn.
    """
    radial = (z_hat * g).sum(-1, keepdim=True)
    return g.addcmul_(z_hat, radial, value=-1).mul_(torch.where(norms <= eps(), 0.0, 1 / norms))


def centroids(t: Tensor, *, leave_one_out: bool) -> Tensor:
    """ĉ, the direction of the mean over k of t̂[k, i]: (N, D); or of its mean over the other views: (K, N, D)."""
    t_hat, _ = unit_rows(t)
    mean = (t_hat.sum(0) - t_hat) / (t.shape[0] - 1) if leave_one_out else t_hat.mean(0)
    return unit_rows(mean)[0]


def centroid_loss(z_hat: Tensor, c_hat: Tensor) -> Tensor:
    """|ẑ - ĉ|² = 2 - 2 <ẑ, ĉ>, (K, N)."""
    return torch.linalg.vector_norm(z_hat - c_hat, dim=-1).square()


def centroid_gradient(z_hat: Tensor, c_hat: Tensor) -> Tensor:
    """2 (ẑ - ĉ), (K, N, D). -2 ĉ has the same tangent, but none of its digits are left where the two nearly agree."""
    return (z_hat - c_hat).mul_(2)


def brownian_loss(z_hat: Tensor, n_hat: Tensor) -> Tensor:
    """mean_k mean_i <ẑ[k, i], n̂[i]>, a scalar; n̂ is (N, D), or (K, N, D) with a direction for each view."""
    z = z_hat.mean(0) if n_hat.dim() == 2 else z_hat
    return (z * n_hat).sum(-1).mean()


def brownian_gradient(z_hat: Tensor, n_hat: Tensor) -> Tensor:
    """n̂ / (K N), of n̂'s shape."""
    return n_hat / (z_hat.shape[0] * z_hat.shape[1])


def singular_value_loss(
    gram: Tensor, inverse_root: InverseRoot, *, rows: int, dim: int, spectrum: Spectrum, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Σ_j f(s_j²) for each view, and the weight W that makes its gradient, M W (or Wᵀ M; see `linalg.multiply`).

    Unit rows fix Σ s̃_j² = r for s̃_j = s_j sqrt(r / N), so that a flat spectrum is s̃_j = 1. With λ = s²,
    c = r / N, a = D / (N ε) and the smoothing δ,

        spectrum       f(λ)                       f'(λ)
        nuclear        (sqrt(cλ + δ²) - 1)²       c (1 - 1 / sqrt(cλ + δ²))
        whitening      (cλ - 1)²                  2c (cλ - 1)
        coding_rate    -½ log(1 + aλ)             -½ a / (1 + aλ)

    The gradient of Σ_j f(s_j²) is 2 M f'(MᵀM) = 2 f'(M Mᵀ) M, so W = 2 f'(G).

    Args:
        gram: G, (K, p, p). p is r, or D > r where processes summed it; f of the p - r zeros in it is taken off.
        inverse_root: G and a shift to (G + shift I)^(-1/2), which `"nuclear"` needs.
        rows: N, of all processes together.
        dim: D.
        spectrum: f.
        smoothing: δ.

    Returns:
        (K,) and W, (K, p, p); NaN where G is not finite.
    """
    if spectrum == "coding_rate":
        value, weight = coding_rate(gram, rows=rows, dim=dim, precision=CODING_PRECISION)
        return -value, -weight
    r, p = min(rows, dim), gram.shape[-1]
    c = r / rows
    if spectrum == "whitening":
        excess = c * gram - torch.eye(p, dtype=gram.dtype, device=gram.device)
        return excess.square().sum((-2, -1)) - (p - r), 4 * c * excess
    # Σ (sqrt(cλ + δ²) - 1)² over all p is c trace(G) + p δ² - 2 trace((cG + δ²I)^(1/2)) + p.
    shift = smoothing**2 / c
    inverse = inverse_root(gram, shift)
    roots = c**0.5 * trace_of_root(gram, shift, inverse)
    value = c * _trace(gram) + p * (smoothing**2 + 1) - 2 * roots - (p - r) * (1 - smoothing) ** 2
    weight = -2 * c**0.5 * inverse
    weight.diagonal(dim1=-2, dim2=-1).add_(2 * c)
    return value.to(gram.dtype), weight


def nuclear_norm(
    gram: Tensor, inverse_root: InverseRoot, *, rows: int, dim: int, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Σ_{j <= r} sqrt(s_j² + δ²) of each matrix, (K,), and the weight W of its gradient M W, (K, p, p).

    The arguments are those of `singular_value_loss`.
    """
    inverse = inverse_root(gram, smoothing**2)
    roots = trace_of_root(gram, smoothing**2, inverse)
    return (roots - (gram.shape[-1] - min(rows, dim)) * smoothing).to(gram.dtype), inverse


def coding_rate(
    gram: Tensor, *, rows: int, dim: int, precision: float, gram_of: Callable[..., Tensor] = plain_gram
) -> tuple[Tensor, Tensor]:
    """½ log det(I + a G) of each matrix, (K,), for a = D / (N ε), and the weight W = a (I + a G)^(-1) of its gradient.

    The arguments are those of `singular_value_loss`, and how to make a Gram matrix, as `linalg.gram` does. NaN too
    where I is lost in the rounding of a G.
    """
    a = dim / (rows * precision)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    finite = finite_gram(gram)
    factor, failed = torch.linalg.cholesky_ex(identity + a * torch.where(finite, gram, 0.0))
    value = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # torch.cholesky_inverse would make the host wait for the device.
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    weight = a * gram_of(inverse, smaller=False)
    right = finite & (failed == 0)[..., None, None]
    return torch.where(right[..., 0, 0], value, torch.nan), torch.where(right, weight, torch.nan)


def trace_of_root(gram: Tensor, shift: float, inverse: Tensor) -> Tensor:
    """trace(A^(1/2)) = <A, A^(-1/2)> for A = G + shift I, (K,): the roots come for free with the gradient."""
    # Rows are summed as they are, which is fast, and their sums in float64, since the terms of the loss cancel.
    return (gram * inverse).sum(-1).sum(-1, dtype=torch.float64) + shift * _trace(inverse)


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
