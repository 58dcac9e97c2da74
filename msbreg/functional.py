"""The losses as differentiable functions: checked arguments, then `msbreg.ops` by kernels or `msbreg.plain` by torch.

The mathematics is in `msbreg.reference`. Half-precision inputs are raised to float32 before anything is subtracted,
gradients come back in the dtype of their tensor, and nothing waits for the device: the functions trace under
`torch.compile(fullgraph=True)` and record in CUDA graphs. (The solvers `"eigh"` and `"svd"` wait inside torch.)

Floating-point dtypes are float16, bfloat16, float32 and float64. CUDA tensors take the kernels up to `kernels.MAX_DIM`
dimensions, and plain torch beyond, without Triton, and for the nuclear spectrum with another solver than
`"newton_schulz"`. A second derivative, and `torch.func`, is a RuntimeError.
"""

import functools
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from msbreg import kernels, linalg, plain, reference
from msbreg.arguments import (
    Views,
    check_choice,
    check_embedding,
    check_precision,
    check_smoothing,
    check_spectral,
    check_targets,
    check_weight,
    stacked,
)
from msbreg.linalg import Solver
from msbreg.matrices import coding_rates, nuclear_norms
from msbreg.noise import as_int, brownian_directions, check_noise, integer_on
from msbreg.reference import Spectrum

__all__ = [
    "MSBRegOutput",
    "brownian_directions",
    "brownian_loss",
    "centroid_loss",
    "coding_rate",
    "msbreg_loss",
    "nuclear_norm",
    "singular_value_loss",
]

Per = Literal["image", "view"]
Reduction = Literal["mean", "none"]

# The defaults that functions, modules and configurations share.
LAMBDA_M = 1.0
LAMBDA_S = 0.004  # the paper's largest, as others quote it
LAMBDA_B = 0.5  # the same
LEAVE_ONE_OUT = False
SPECTRUM: Spectrum = "nuclear"
# Ours: small beside a flat spectrum's 1, large enough for an inverse root of 10 or 11 steps in float32.
SMOOTHING = 0.03
SOLVER: Solver = "auto"
PER: Per = "image"


class MSBRegOutput(NamedTuple):
    """What `msbreg_loss` returns, all scalars in float32 (float64 for float64 inputs)."""

    loss: Tensor
    """λ_m centroid + λ_s singular_value + λ_b brownian, differentiable."""
    centroid: Tensor
    """L_M in [0, 4], before its weight; detached, as are the next two: they are for the log."""
    singular_value: Tensor
    """L_S before its weight; 0 where λ_s is 0."""
    brownian: Tensor
    """L_B in [-1, 1] before its weight; 0 where λ_b is 0."""


def msbreg_loss(
    online: Views,
    target: Views,
    *,
    embedding: Views | None = None,
    lambda_m: float = LAMBDA_M,
    lambda_s: float = LAMBDA_S,
    lambda_b: float = LAMBDA_B,
    seed: int | Tensor,
    step: int | Tensor,
    first_image: int = 0,
    leave_one_out: bool = LEAVE_ONE_OUT,
    spectrum: Spectrum = SPECTRUM,
    smoothing: float = SMOOTHING,
    solver: Solver = SOLVER,
    per: Per = PER,
    group: dist.ProcessGroup | None = None,
) -> MSBRegOutput:
    """L = λ_m L_M + λ_s L_S + λ_b L_B, with one gradient pass over each input.

    Moon et al., "An Embedding-Dynamic Approach to Self-supervised Learning", WACV 2023,
    https://arxiv.org/abs/2207.03552; λ_s and λ_b are theirs as others quote them, the forms reconstructions: see
    `msbreg/reference.py`.

    Args:
        online: (K, B, D) or K tensors (B, D), any floating-point dtype: the predictor's output where there is a
            predictor. L_M acts on it.
        target: (K', B, D) or K' tensors (B, D), by the EMA network. No gradient flows to it.
        embedding: (K, B, D') or K tensors (B, D'): the projector's output, on which L_S and L_B act. None for online.
            Where both of their weights are 0 it is not read, and gets no gradient.
        lambda_m: weight of L_M; at 0 it is computed for the log alone.
        lambda_s: weight of L_S; at 0 it is not computed.
        lambda_b: weight of L_B; at 0 it is not computed.
        seed: of the noise; see `brownian_loss`.
        step: of the noise.
        first_image: of the noise: rank * B.
        leave_one_out: see `centroid_loss`.
        spectrum: see `singular_value_loss`.
        smoothing: see there.
        solver: see there.
        per: see `brownian_loss`.
        group: see `singular_value_loss`. L_S is then of all processes' rows, while L_M and L_B stay this process's
            part: DistributedDataParallel's average over processes is right for all three.

    Returns:
        The differentiable loss and its three parts, detached.

    Raises:
        ValueError: shapes that do not fit, empty tensors, tensors on several devices, an unknown option, a weight that
            is not finite, a smoothing that is negative or infinite, a seed, step or first image beyond 64 bits,
            `"svd"` with a group; on a GPU more than 32,767 views with a singular value loss.
        TypeError: not tensors, or not floating point; a weight or smoothing that is no number; a seed, step or first
            image that is no integer.
    """
    z, t = stacked(online, "online"), stacked(target, "target")
    y = None if embedding is None or embedding is online else stacked(embedding, "embedding")
    check_targets(z, t, leave_one_out)
    if y is not None:
        check_embedding(y, z)
    check_spectral(spectrum, smoothing)
    check_choice("per", per, Per)
    for name, weight in (("lambda_m", lambda_m), ("lambda_s", lambda_s), ("lambda_b", lambda_b)):
        check_weight(name, weight)
    check_noise(seed, step, first_image)

    dispersion = spectrum if lambda_s != 0 else None
    noise = (seed, step, first_image) if lambda_b != 0 else None
    disperse = functools.partial(
        _losses, spectrum=dispersion, smoothing=smoothing, solver=solver, group=group, noise=noise, per=per
    )
    if y is None:
        total, parts, _ = disperse(z, weights=(lambda_m, lambda_s, lambda_b), targets=t, leave_one_out=leave_one_out)
    else:
        total, parts, _ = _losses(z, weights=(lambda_m, 0.0, 0.0), targets=t, leave_one_out=leave_one_out)
        if dispersion is not None or noise is not None:
            other_total, other_parts, _ = disperse(y, weights=(0.0, lambda_s, lambda_b))
            total, parts = total + other_total, parts + other_parts
    return MSBRegOutput(total, parts[0], parts[1], parts[2])


def centroid_loss(
    online: Views, target: Views, *, leave_one_out: bool = LEAVE_ONE_OUT, reduction: Reduction = "mean"
) -> Tensor:
    """L_M = mean_i mean_k |ẑ[k, i] - ĉ[i]|², the squared distance to the centroid of the target views.

    Args:
        online: (K, B, D) or K tensors (B, D), any floating-point dtype.
        target: (K', B, D) or K' tensors (B, D). No gradient flows to it.
        leave_one_out: the centroid for view k is of the targets of the other views. K' is then K, at least 2. At K = 2
            this is the mean of the two terms whose sum is BYOL's loss, https://arxiv.org/abs/2006.07733.
        reduction: `"mean"` for a scalar, `"none"` for (K, B).

    Returns:
        Float32, or float64 for float64 inputs. On CUDA the float32 mean is wrong by 1e-7 or so, however small it is.

    Raises:
        ValueError: shapes that do not fit, empty tensors, tensors on several devices, an unknown reduction.
        TypeError: not tensors, or not floating point.
    """
    z, t = stacked(online, "online"), stacked(target, "target")
    check_targets(z, t, leave_one_out)
    check_choice("reduction", reduction, Reduction)
    each = reduction == "none"
    mean, _, losses = _losses(z, weights=(1.0, 0.0, 0.0), targets=t, leave_one_out=leave_one_out, each=each)
    return losses if each else mean


def singular_value_loss(
    embeddings: Views,
    *,
    spectrum: Spectrum = SPECTRUM,
    smoothing: float = SMOOTHING,
    solver: Solver = SOLVER,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """L_S: how far the singular values of each view's unit rows are from equal, averaged over the views.

    Args:
        embeddings: (K, N, D), K tensors (N, D), or one tensor (N, D), any floating-point dtype.
        spectrum: `"nuclear"` (the default; bounded force), `"whitening"` or `"coding_rate"`; the formulas are in
            `msbreg.reference.singular_value_loss`.
        smoothing: δ of `"nuclear"`, at least 0, in units of a flat spectrum's singular values: smaller ones are pushed
            no harder than it.
        solver: how `"nuclear"` finds its inverse root, the others need none. `"newton_schulz"`: matrix products alone.
            `"eigh"`: of the Gram matrix. `"svd"`: of the embeddings, slow and most exact, one process alone. `"auto"`:
            newton_schulz on CUDA, eigh elsewhere. The kernels multiply with about float32's digits; elsewhere
            Newton-Schulz follows `torch.set_float32_matmul_precision`, whose TF32 is too coarse for it near collapse.
        group: process group over which the rows are spread, as many in each process; None for this process alone. The
            value is then that of all rows, and the gradient is scaled so that the *average* over processes, which
            DistributedDataParallel takes, is the gradient of one process with all rows.

    Returns:
        A scalar, float32, or float64 for float64 embeddings.

    Raises:
        ValueError: a wrong shape, an empty tensor, an unknown spectrum or solver, a smoothing that is negative or
            infinite, `"svd"` with a group; on a GPU more than 32,767 views.
        TypeError: not tensors, or not floating point; a smoothing that is no number.
    """
    z = stacked(embeddings, "embeddings", one=True)
    check_spectral(spectrum, smoothing)
    return _losses(z, weights=(0.0, 1.0, 0.0), spectrum=spectrum, smoothing=smoothing, solver=solver, group=group)[0]


def brownian_loss(
    embeddings: Views,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    first_image: int = 0,
    per: Per = PER,
) -> Tensor:
    """L_B = mean_k mean_i <ẑ[k, i], n̂[i]>: its gradient moves each embedding in a random direction.

    Value and gradient are zero on average: a step is one of a random walk on the sphere.

    Args:
        embeddings: (K, B, D), K tensors (B, D), or one tensor (B, D), any floating-point dtype.
        seed: an int, or a zero-dimensional int64 tensor, which the host does not read.
        step: as seed; a new one for each training step.
        first_image: number of the first image among those of all processes, rank * B.
        per: `"image"` for a direction that the views of an image share, `"view"` for one each.

    Returns:
        A scalar, float32, or float64 for float64 embeddings.

    Raises:
        ValueError: a wrong shape, an empty tensor, an unknown `per`, a seed, step or first image beyond 64 bits.
        TypeError: not tensors, or not floating point; a seed, step or first image that is no integer.
    """
    z = stacked(embeddings, "embeddings", one=True)
    check_choice("per", per, Per)
    check_noise(seed, step, first_image)
    return _losses(z, weights=(0.0, 0.0, 1.0), noise=(seed, step, first_image), per=per)[0]


def nuclear_norm(
    embeddings: Views, *, smoothing: float = 0.0, solver: Solver = SOLVER, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Σ_j sqrt(s_j² + δ²) over the min(N, D) singular values, one number a matrix; the nuclear norm where δ is 0.

    Rows are taken as they are, not normalised. The gradient is the polar factor, over the nonzero singular values.
    MMCR (https://arxiv.org/abs/2303.03307) is `-nuclear_norm(normalize(z, dim=-1).mean(0))`, SVMax
    (https://arxiv.org/abs/2103.02770) raises `nuclear_norm(normalize(z, dim=-1))`.

    Args:
        embeddings: (K, N, D), K tensors (N, D), or one tensor (N, D), any floating-point dtype.
        smoothing: δ, at least 0, in units of the singular values.
        solver: as in `singular_value_loss`; `msbreg.linalg.polar` says what counts as zero.
        group: as in `singular_value_loss`.

    Returns:
        (K,), or a scalar for one tensor (N, D); float32, or float64 for float64 embeddings.

    Raises:
        ValueError: a wrong shape, an empty tensor, an unknown solver, a smoothing that is negative or infinite, `"svd"`
            with a group; on a GPU more than 32,767 matrices.
        TypeError: not tensors, or not floating point; a smoothing that is no number.
    """
    z = stacked(embeddings, "embeddings", one=True)
    check_smoothing(smoothing)
    norms = nuclear_norms(z, smoothing, _solver(solver, z, group), group)
    return norms[0] if isinstance(embeddings, Tensor) and embeddings.dim() == 2 else norms


def coding_rate(
    embeddings: Views, *, precision: float = reference.CODING_PRECISION, group: dist.ProcessGroup | None = None
) -> Tensor:
    """½ log det(I + D / (N ε) MᵀM), one number a matrix M, (N, D): large where its rows spread out.

    Yu, Chan, You, Song, Ma, https://arxiv.org/abs/2006.08558, with ε not squared, as EMP-SSL
    (https://arxiv.org/abs/2304.03977) has it. Rows are taken as they are, not normalised.

    Args:
        embeddings: (K, N, D), K tensors (N, D), or one tensor (N, D), any floating-point dtype.
        precision: ε, above 0.
        group: as in `singular_value_loss`.

    Returns:
        (K,), or a scalar for one tensor (N, D); float32, or float64 for float64 embeddings. NaN where rows are so long
        that D / (N ε) MᵀM leaves nothing of I in that precision.

    Raises:
        ValueError: a wrong shape, an empty tensor, a precision that is not positive; on a GPU more than 32,767
            matrices.
        TypeError: not tensors, or not floating point; a precision that is no number.
    """
    z = stacked(embeddings, "embeddings", one=True)
    check_precision(precision)
    rates = coding_rates(z, precision, group)
    return rates[0] if isinstance(embeddings, Tensor) and embeddings.dim() == 2 else rates


def _losses(
    z: Tensor,
    *,
    weights: tuple[float, float, float],
    targets: Tensor | None = None,
    leave_one_out: bool = False,
    each: bool = False,
    spectrum: Spectrum | None = None,
    smoothing: float = 0.0,
    solver: Solver = "auto",
    group: dist.ProcessGroup | None = None,
    noise: tuple[int | Tensor, int | Tensor, int] | None = None,
    per: Per = PER,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of one tensor of embeddings z, (K, N, D), that are wanted; their gradient is made in one pass.

    Args:
        z: the embeddings.
        weights: of the centroid, the singular value and the Brownian loss.
        targets: (K', N, D); None for no centroid loss.
        leave_one_out: see `centroid_loss`.
        each: whether the third result is wanted.
        spectrum: None for no singular value loss.
        smoothing: see `singular_value_loss`.
        solver: see there.
        group: see there.
        noise: seed, step and first image; None for no Brownian loss.
        per: see `brownian_loss`.

    Returns:
        The weighted sum, differentiable; the three losses, (3,), detached; and where wanted |ẑ - ĉ|², (K, N),
        differentiable.
    """
    solver = _solver(solver, z, group)
    if z.device.type == kernels.DEVICE_TYPE and (spectrum != "nuclear" or solver == "newton_schulz"):
        from msbreg import ops  # needs triton

        if z.shape[-1] <= kernels.MAX_DIM:
            if targets is not None:
                # A tensor of inference mode cannot be saved for the way back.
                fresh = torch.compiler.is_compiling() or not targets.is_inference()
                targets = targets.detach() if fresh else targets.clone()
            seed: Tensor | None = None
            step: Tensor | None = None
            if noise is not None:
                seed, step = integer_on(z.device, noise[0]), integer_on(z.device, noise[1])
            return ops.losses(
                z,
                targets,
                seed,
                step,
                first_image=0 if noise is None else as_int(noise[2]),
                leave_one_out=leave_one_out,
                per_view=per == "view",
                each=each,
                weights=weights,
                spectrum=spectrum,
                smoothing=smoothing,
                group=group,
            )
    return plain.losses(
        z,
        targets,
        noise,
        leave_one_out=leave_one_out,
        per_view=per == "view",
        weights=weights,
        spectral=None if spectrum is None else plain.SpectralOptions(spectrum, smoothing, solver, group),
    )


def _solver(solver: Solver, z: Tensor, group: dist.ProcessGroup | None) -> Solver:
    if solver == "svd" and group is not None:
        raise ValueError("expected solver 'eigh' or 'newton_schulz' with a process group, got 'svd': it needs all rows")
    return linalg.resolve_solver(solver, z.device)
