"""Other people's losses on singular values, from the same Gram matrices: MMCR, SVMax, EMP-SSL, VICReg, Barlow Twins.

    ẑ[k, b]   embedding of view k of image b, (K, B, D), a row of unit length
    ‖M‖_*     nuclear norm, the sum of the singular values
    R(M)      coding rate, ½ log det(I + D / (B ε) MᵀM)

Half precisions are raised to float32, inside autocast too. Where rows are made ẑ, one of zeros has gradient zero. What
is not finite comes out as NaN, and nothing waits for the device.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from msbreg import reference
from msbreg.arguments import Views, check_choice, check_precision, check_targets, check_weight, stacked
from msbreg.derivatives import Saved, once_differentiable
from msbreg.distributed import world_size
from msbreg.functional import SOLVER, coding_rate, nuclear_norm
from msbreg.linalg import Solver
from msbreg.losses import Loss
from msbreg.matrices import products
from msbreg.precision import full_precision, raised

__all__ = ["CodingRateLoss", "MMCRLoss", "SVMaxLoss", "covariance_energy", "cross_correlation_energy"]

BATCH_NORM_EPS = 1e-5
"""What Barlow Twins' batch normalisation adds to the variance: torch's default."""


class MMCRLoss(Loss):
    """-‖C‖_* + λ mean_b ‖Ẑ[b]‖_* for the centroids C[b] = mean_k ẑ[k, b], which views that disagree make shorter.

    Yerxa, Kuang, Simoncelli, Chung, "Learning Efficient Coding of Natural Images with Maximum Manifold Capacity
    Representations", NeurIPS 2023, https://arxiv.org/abs/2303.03307. Ẑ[b] is the K x D matrix of an image's views.

    Args:
        local_weight: λ; at 0, as in the authors' code, the second term is not computed.
        solver: as in `msbreg.functional.nuclear_norm`.
        group: process group over which a batch is spread, as many images in each process. ‖C‖_* is then of all
            images, and the second term stays this process's part: DistributedDataParallel's average over processes is
            the gradient of one process with the whole batch.

    Raises:
        ValueError: an unknown solver, a weight that is not finite.
        TypeError: a weight that is no number, a group that is none.

    Example:
        >>> criterion = MMCRLoss()
        >>> loss = criterion(torch.randn(4, 32, 16, requires_grad=True))  # K = 4 views of B = 32 images, D = 16
        >>> loss.backward()
    """

    options = ("local_weight", "solver")

    def __init__(
        self, local_weight: float = 0.0, *, solver: Solver = SOLVER, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__(group)
        check_weight("local_weight", local_weight)
        check_choice("solver", solver, Solver)
        self.local_weight = local_weight
        self.solver = solver

    def forward(self, online: Views, target: Views | None = None) -> Tensor:
        """The loss of one batch, a scalar in float32, or float64 for float64 embeddings.

        Args:
            online: (K, B, D) or K tensors (B, D), any floating-point dtype.
            target: (K', B, D) or K' tensors (B, D) by the EMA network, without gradient, for the momentum version: C is
                then the mean of online's centroids and target's.

        Raises:
            ValueError: one view in all, shapes that do not fit, empty tensors, tensors on several devices, an unknown
                solver, `"svd"` with a group; on a GPU more than 32,767 images with a local term.
            TypeError: not tensors, or not floating point.
        """
        z = stacked(online, "online")
        z_hat = _UnitRows.apply(z)
        centroids = z_hat.mean(0)
        if target is not None:
            t = stacked(target, "target")
            check_targets(z, t, leave_one_out=False)
            centroids = (centroids + _UnitRows.apply(t.detach()).mean(0).to(z_hat.dtype)) / 2
        elif z.shape[0] < 2:
            raise ValueError("expected at least two views of each image, or a target view, got one view")
        loss = -nuclear_norm(centroids, solver=self.solver, group=self._over())
        if self.local_weight != 0:
            loss = loss + self.local_weight * nuclear_norm(z_hat.transpose(0, 1), solver=self.solver).mean()
        return loss

    if TYPE_CHECKING:
        __call__ = forward


class SVMaxLoss(Loss):
    """weight exp((U - s_μ) / (U - L)): the mean singular value s_μ of a batch of unit rows is pushed up to its bound U.

    Taha, Hanson, Shrivastava, Davis, "SVMax: A Feature Embedding Regularizer", 2021,
    https://arxiv.org/abs/2103.02770. For N rows and r = min(N, D), L = sqrt(N) / r is the s_μ of rows that all point
    one way, and U = sqrt(N / r) that of a flat spectrum: the penalty falls from e times the weight to the weight. The
    paper has N > D, and so D for r, in L and U; with N < D a mean of the N singular values would not stay between
    those. Here all three are by r, whatever N. At r = 1 nothing can spread, and the penalty is the weight. Rows of
    zeros may bring s_μ below L: of nothing but zeros the penalty is the weight times exp(U / (U - L)).

    Args:
        weight: 1 is that of the authors' demonstration.
        solver: as in `msbreg.functional.nuclear_norm`.
        group: process group over which the rows are spread, as many in each process; None for this process alone.
            Value and gradients as in `msbreg.functional.singular_value_loss`.

    Raises:
        ValueError: an unknown solver, a weight that is not finite.
        TypeError: a weight that is no number, a group that is none.

    Example:
        >>> criterion = SVMaxLoss()
        >>> loss = criterion(torch.randn(32, 16, requires_grad=True))  # N = 32 rows, D = 16
        >>> loss.backward()
    """

    options = ("weight", "solver")

    def __init__(self, weight: float = 1.0, *, solver: Solver = SOLVER, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        check_weight("weight", weight)
        check_choice("solver", solver, Solver)
        self.weight = weight
        self.solver = solver

    def forward(self, embeddings: Views) -> Tensor:
        """The penalty, averaged over the views, a scalar in float32, or float64 for float64 embeddings.

        Args:
            embeddings: (K, N, D), K tensors (N, D), or one tensor (N, D), any floating-point dtype.

        Raises:
            ValueError: a wrong shape, an empty tensor, an unknown solver, `"svd"` with a group; on a GPU more than
                32,767 views.
            TypeError: not tensors, or not floating point.
        """
        z_hat = _UnitRows.apply(stacked(embeddings, "embeddings", one=True))
        rows, dim = z_hat.shape[1] * world_size(self.group), z_hat.shape[2]
        r = min(rows, dim)
        lower, upper = rows**0.5, (rows * r) ** 0.5  # of r s_μ
        norms = nuclear_norm(z_hat, solver=self.solver, group=self._over())
        falls = (upper - norms) / (upper - lower) if r > 1 else 0.0 * norms
        return self.weight * falls.exp().mean()

    if TYPE_CHECKING:
        __call__ = forward


class CodingRateLoss(Loss):
    """-λ_c mean_b mean_k cos(ẑ[k, b], z̄[b]) - λ_r mean_k R(Ẑ[k]): EMP-SSL's similarity and total coding rate.

    Tong, Chen, Ma, LeCun, "EMP-SSL: Towards Self-Supervised Learning in One Training Epoch", 2023,
    https://arxiv.org/abs/2304.03977; λ_c, λ_r and ε are those of its code. z̄[b] = mean_k ẑ[k, b] has a gradient.

    Args:
        similarity_weight: λ_c.
        rate_weight: λ_r.
        precision: ε of the coding rate; see `msbreg.functional.coding_rate`.
        group: process group over which a batch is spread, as many images in each process. The coding rate is then of
            all images, and the similarity stays this process's part: DistributedDataParallel's average over processes
            is the gradient of one process with the whole batch.

    Raises:
        ValueError: an unknown solver, a weight that is not finite, a precision that is not above 0.
        TypeError: a weight or precision that is no number, a group that is none.

    Example:
        >>> criterion = CodingRateLoss()
        >>> loss = criterion(torch.randn(20, 32, 16, requires_grad=True))  # K = 20 patches of B = 32 images, D = 16
        >>> loss.backward()
    """

    options = ("similarity_weight", "rate_weight", "precision")

    def __init__(
        self,
        similarity_weight: float = 200.0,
        rate_weight: float = 1.0,
        *,
        precision: float = reference.CODING_PRECISION,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group)
        check_weight("similarity_weight", similarity_weight)
        check_weight("rate_weight", rate_weight)
        check_precision(precision)
        self.similarity_weight = similarity_weight
        self.rate_weight = rate_weight
        self.precision = precision

    def forward(self, embeddings: Views) -> Tensor:
        """The loss of one batch, a scalar in float32, or float64 for float64 embeddings.

        Args:
            embeddings: (K, B, D) or K tensors (B, D), any floating-point dtype.

        Raises:
            ValueError: a wrong shape, an empty tensor, a precision that is not positive; on a GPU more than 32,767
                views.
            TypeError: not tensors, or not floating point.
        """
        z_hat = _UnitRows.apply(stacked(embeddings, "embeddings"))
        # For unit rows mean_k <ẑ[k], z̄> / |z̄| is |z̄|² / |z̄|.
        similarity = torch.linalg.vector_norm(z_hat.mean(0), dim=-1).mean()
        rate = coding_rate(z_hat, precision=self.precision, group=self._over()).mean()
        return -self.similarity_weight * similarity - self.rate_weight * rate

    if TYPE_CHECKING:
        __call__ = forward


def covariance_energy(embeddings: Views) -> Tensor:
    """Σ_{i≠j} cov_ij² of each matrix, with cov = XᵀX / (N - 1) for X of centred columns: VICReg's decorrelation.

    VICReg adds this over its two views, divided by D: Bardes, Ponce, LeCun, https://arxiv.org/abs/2105.04906. Where
    N < D it is ‖X Xᵀ‖² / (N - 1)² - Σ_j var_j², O(N² D) in place of O(N D²): in float32 it is off by some 4% where one
    column is 1,000 times as wide as the others, and may be below 0 where one is wider still, while the gradient keeps
    its digits. The rows of other processes do not count.

    Args:
        embeddings: (K, N, D), K tensors (N, D), or one tensor (N, D), any floating-point dtype.

    Returns:
        (K,), or a scalar for one tensor (N, D); float32, or float64 for float64 embeddings. 0 for N = 1.

    Raises:
        ValueError: a wrong shape, an empty tensor; on a GPU more than 32,767 matrices.
        TypeError: not tensors, or not floating point.
    """
    x = stacked(embeddings, "embeddings", one=True)
    rows, dim = x.shape[1:]
    with full_precision(x):
        x = raised(x)
        x = (x - x.mean(1, keepdim=True)) / math.sqrt(max(rows - 1, 1))
        gram = _Gram.apply(x)
        if rows < dim:
            energies = gram.square().sum((1, 2)) - x.square().sum(1).square().sum(1)
        else:
            energies = _off_diagonal(gram).square().sum((1, 2))
    return energies[0] if isinstance(embeddings, Tensor) and embeddings.dim() == 2 else energies


def cross_correlation_energy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_j (1 - C_jj)² and Σ_{i≠j} C_ij², with C = XᵀY / N for standardised columns: the two terms of Barlow Twins.

    Barlow Twins is the first plus 0.0051 times the second: Zbontar, Jing, Misra, LeCun, Deny,
    https://arxiv.org/abs/2103.03230. Columns are divided by the root of their biased variance + 1e-5. Where 2 N < D the
    second term is <X Xᵀ, Y Yᵀ> / N² - Σ_j C_jj², O(N² D) in place of O(N D²). The rows of other processes do not count.

    Args:
        x: (N, D), one view, any floating-point dtype.
        y: (N, D), the other.

    Returns:
        Two scalars, float32, or float64 for float64 inputs.

    Raises:
        ValueError: shapes that differ or are not (N, D), empty tensors, tensors on two devices.
        TypeError: not tensors, or not floating point.
    """
    for name, view in (("x", x), ("y", y)):
        if not isinstance(view, Tensor):
            raise TypeError(f"expected {name} to be a tensor (N, D), got {type(view).__name__}")
    if x.dim() != 2 or x.shape != y.shape:
        raise ValueError(f"expected x and y of one shape (N, D), got {tuple(x.shape)} and {tuple(y.shape)}")
    z = stacked((x, y), "(x, y)")
    rows, dim = z.shape[1:]
    with full_precision(z):
        z = raised(z)
        z = z - z.mean(1, keepdim=True)
        z = z * torch.rsqrt(z.square().mean(1, keepdim=True) + BATCH_NORM_EPS) / math.sqrt(rows)
        diagonal = (z[0] * z[1]).sum(0)
        if 2 * rows < dim:
            gram = _Gram.apply(z)
            off_diagonal = (gram[0] * gram[1]).sum() - diagonal.square().sum()
        else:
            off_diagonal = _off_diagonal(_Correlation.apply(z)).square().sum()
        return (1 - diagonal).square().sum(), off_diagonal


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1))


class _Gram(torch.autograd.Function):
    """MᵀM, (K, D, D), or M Mᵀ, (K, N, N), where N < D, of matrices (K, N, D)."""

    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return products(m).gram(m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, g: Tensor) -> Tensor:
        (m,) = saved
        with full_precision(m):
            return products(m).multiply(m, g + g.mT)


class _Correlation(torch.autograd.Function):
    """XᵀY, (D, D), of X and Y, (2, N, D), whose gradient keeps its digits inside autocast too."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z[0].mT @ z[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, g: Tensor) -> Tensor:
        (z,) = saved
        with full_precision(z):
            return torch.stack((z[1] @ g.mT, z[0] @ g))


class _UnitRows(torch.autograd.Function):
    """ẑ of z, (K, B, D). `torch.nn.functional.normalize` overflows on huge rows and blows up the gradient of zeros."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z_hat, norms = reference.unit_rows(raised(z))
        ctx.save_for_backward(z, z_hat, norms)
        return z_hat

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, g: Tensor) -> Tensor:
        z, z_hat, norms = saved
        return reference.tangent(g.clone(), z_hat, norms).to(z.dtype)
