"""The fused kernels as operators of torch, with the order of launches.

`msbreg.functional` calls `losses`: in eager mode it runs the launches inside an autograd function, and while
`torch.compile` traces, or of fake tensors, it is the registered operator `msbreg::losses`, with the same two functions
behind it: eager calls skip the operator's dispatch. `gram`, `multiply` and `newton_schulz` are what the nuclear norm
and the coding rate take, as those of `msbreg.linalg` in plain torch; they carry no gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from msbreg import linalg, reference
from msbreg.derivatives import Saved, once_differentiable
from msbreg.distributed import world_size
from msbreg.kernels.gradient import row_losses_backward
from msbreg.kernels.gram import gram as gram_of_rows
from msbreg.kernels.gram import unit_gram
from msbreg.kernels.halves import LARGEST, empty_split, split
from msbreg.kernels.inverse_root import inverse_root
from msbreg.kernels.product import product
from msbreg.kernels.rows import row_losses
from msbreg.kernels.tiles import accumulator
from msbreg.kernels.totals import spectral_sums, totals
from msbreg.precision import full_precision

__all__ = ["gram", "losses", "multiply", "newton_schulz"]

_plan = functools.lru_cache(maxsize=64)(linalg.newton_schulz_plan)

MAX_MATRICES = 2**15 - 1
"""As many as the third axis of a grid can number, twice over: a step of the inverse root makes two of each."""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The weighted sum; the three losses, (3,); |ẑ - ĉ|², (K, B); and, for the way back, |z|, (K, B), the centroids,
(B, D), ẑ and the matrix that the singular value loss multiplies it by, both split (see `kernels.halves`), and the
noise's seed and step, (2,), which their owner may change in between. Those not asked for are empty."""


class Spectral(NamedTuple):
    """The singular value loss from Gram matrices: of a view it is Σ sums + constant, and dL_S/dẑ is weight ẑ W.

    W leaves out what is along the rows themselves, which the projection onto the sphere takes away.
    """

    spectrum: str
    smoothing: float
    views: int
    rows: int
    """Of all processes together."""
    dim: int
    side: int
    """p of the Gram matrices, (K, p, p)."""
    processes: int

    @property
    def rank(self) -> int:
        """r, the number of singular values."""
        return min(self.rows, self.dim)

    @property
    def c(self) -> float:
        """r / N: s̃² = c s²."""
        return self.rank / self.rows

    @property
    def constant(self) -> float:
        """What does not depend on the embeddings; the p - r zeros that a sum over processes adds are taken off."""
        zeros = self.side - self.rank
        if self.spectrum == "nuclear":
            return self.side * (self.smoothing**2 + 1) - zeros * (1 - self.smoothing) ** 2
        return -float(zeros) if self.spectrum == "whitening" else 0.0

    @property
    def left(self) -> bool:
        """Whether the Gram matrices are of the rows, and the gradient is weight Wᵀ ẑ."""
        return self.side != self.dim

    @property
    def scale(self) -> float:
        """What W is multiplied by, so that halves can hold its entries: those of G may be N, of a (I + a G)^(-1) a."""
        rate = self.dim / (self.rows * reference.CODING_PRECISION)
        most = {"nuclear": 1.0, "whitening": float(self.rows), "coding_rate": rate}[self.spectrum]
        return min(1.0, LARGEST / most)

    @property
    def product_weight(self) -> float:
        """Of ẑ W, in this process: an average over processes follows."""
        by_view = {"nuclear": -2 * self.c**0.5, "whitening": 4 * self.c**2, "coding_rate": -1.0}
        return by_view[self.spectrum] * self.processes / self.views / self.scale

    def sums(self, g: Tensor, squares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Numbers that add up to the loss, float64, any shape; and W, (K, parts, w, w), split, see `kernels.halves`.

        `squares` are those of `unit_gram`; None where g is the sum of several processes' Gram matrices.
        """
        if self.spectrum == "whitening":
            # Σ (cλ - 1)² = |cG - I|²
            return spectral_sums(g, identity=-1.0, scale=self.c), split(g, self.scale)
        if self.spectrum == "coding_rate":
            rates, weight = reference.coding_rate(
                g, rows=self.rows, dim=self.dim, precision=reference.CODING_PRECISION, gram_of=gram
            )
            return -rates.double(), split(weight.contiguous(), self.scale)
        # Σ (sqrt(cλ + δ²) - 1)² = c trace(G) + pδ² - 2 sqrt(c) trace((G + shift I)^(1/2)) + p
        shift = self.smoothing**2 / self.c
        floor, steps = _plan(shift / self.rows, g.dtype)
        squares = spectral_sums(g, identity=0.0, scale=1.0) if squares is None else squares
        root, sums = inverse_root(g, squares, shift, floor, steps, weights=(self.c, -2 * self.c**0.5))
        return cast("Tensor", sums), root


def _spectral(z: Tensor, spectrum: str, smoothing: float, group: str | None) -> Spectral:
    views, batch, dim = z.shape
    processes = world_size(_group(group))
    side = min(batch, dim) if group is None else dim
    return Spectral(spectrum, smoothing, views, batch * processes, dim, side, processes)


def _group(name: str | None) -> dist.ProcessGroup | None:
    if name is None:
        return None
    from torch.distributed.distributed_c10d import _resolve_process_group  # some builds of torch have none of it

    return _resolve_process_group(name)  # type: ignore[arg-type]  # a name is a str of its own kind in newer torch


def _forward(
    z: Tensor,
    t: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    first_image: int,
    leave_one_out: bool,
    per_view: bool,
    each: bool,
    weights: Sequence[float],
    spectrum: str | None,
    smoothing: float,
    group: str | None,
) -> Outputs:
    noise = None if seed is None or step is None else (seed, step)
    losses_of_rows = functools.partial(
        row_losses, z, t, noise, first_image=first_image, leave_one_out=leave_one_out, per_view=per_view, each=each
    )
    spectral = None if spectrum is None else _spectral(z, spectrum, smoothing, group)
    z_hat, sums, weight = None, None, None
    if spectral is None:
        rows = losses_of_rows()
    else:
        if group is None:
            rows = losses_of_rows(want_z_hat=True)
            z_hat = cast("Tensor", rows.z_hat)
            g, squares = unit_gram(z_hat, z.shape[2], smaller=True)
        else:
            # The sum over the processes goes on while the rows are computed.
            rows = row_losses(z, want_z_hat=True)
            z_hat = cast("Tensor", rows.z_hat)
            g, squares = unit_gram(z_hat, z.shape[2], smaller=False)[0], None
            sent = dist.all_reduce(g, group=_group(group), async_op=True)
            if t is not None or noise is not None:
                rows = losses_of_rows()
            sent.wait()
        with full_precision(z):
            sums, weight = spectral.sums(g, squares)
    total, terms = totals(
        rows.image_sums,
        sums,
        views=z.shape[0],
        weights=weights,
        spectral_constant=0.0 if spectral is None else spectral.constant,
        dtype=rows.norms.dtype,
        device=z.device,
    )
    key = z.new_empty(0, dtype=torch.int64) if rows.key is None else rows.key
    outputs = (total, terms, rows.attraction, rows.norms, rows.centroid, z_hat, weight)
    return cast("Outputs", (*(rows.norms.new_empty(0) if output is None else output for output in outputs), key))


def _forward_fake(
    z: Tensor,
    t: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    first_image: int,
    leave_one_out: bool,
    per_view: bool,
    each: bool,
    weights: Sequence[float],
    spectrum: str | None,
    smoothing: float,
    group: str | None,
) -> Outputs:
    views, batch, dim = z.shape
    new = functools.partial(z.new_empty, dtype=accumulator(z.dtype))
    side = 0 if spectrum is None else _spectral(z, spectrum, smoothing, group).side
    return (
        new(()),
        new(3),
        new((views, batch) if each else 0),
        new(views, batch),
        new(0 if t is None else (batch, dim)),
        new(0) if spectrum is None else empty_split(new(0), (views,), batch, dim),
        new(0) if spectrum is None else empty_split(new(0), (views,), side, side, square=True),
        z.new_empty(0 if seed is None else 2, dtype=torch.int64),
    )


def _backward(
    d_total: Tensor,
    d_attraction: Tensor | None,
    z: Tensor,
    t: Tensor | None,
    norms: Tensor,
    centroid: Tensor,
    z_hat: Tensor,
    weight: Tensor,
    key: Tensor,
    first_image: int,
    leave_one_out: bool,
    per_view: bool,
    weights: Sequence[float],
    spectrum: str | None,
    smoothing: float,
    group: str | None,
) -> Tensor:
    views, batch, _ = z.shape
    attraction_weight, spectral_weight, push_weight = weights
    spectral = None if spectrum is None else _spectral(z, spectrum, smoothing, group)
    return row_losses_backward(
        d_total,
        d_attraction,
        z,
        t,
        key if key.numel() else None,
        norms,
        centroid if centroid.numel() else None,
        z_hat if z_hat.numel() else None,
        weight if weight.numel() else None,
        attraction_weight=attraction_weight / (views * batch),
        product_weight=0.0 if spectral is None else spectral_weight * spectral.product_weight,
        weight_left=spectral is not None and spectral.left,
        push_weight=push_weight / (views * batch),
        first_image=first_image,
        leave_one_out=leave_one_out,
        per_view=per_view,
    )


def _backward_fake(d_total: Tensor, d_attraction: Tensor | None, z: Tensor, *_: Any) -> Tensor:
    return torch.empty(z.shape, dtype=z.dtype, device=z.device)


def _operator(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    operator = torch.library.custom_op(f"msbreg::{name}", run, mutates_args=())
    operator.register_fake(fake)
    return operator


_losses_operator = _operator("losses", _forward, _forward_fake)
_backward_operator = _operator("losses_backward", _backward, _backward_fake)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    z, t, _, _, first_image, leave_one_out, per_view, each, weights, spectrum, smoothing, group = inputs
    _, terms, attraction, norms, centroid, z_hat, weight, key = output
    ctx.save_for_backward(z, t if leave_one_out else None, norms, centroid, z_hat, weight, key)
    ctx.each = each
    ctx.options = (first_image, leave_one_out, per_view, weights, spectrum, smoothing, group)
    ctx.mark_non_differentiable(terms, norms, centroid, z_hat, weight, key, *(() if each else (attraction,)))
    ctx.set_materialize_grads(False)


def _gradients(
    backward: Any, ctx: Any, saved: Saved, d_total: Tensor | None, d_attraction: Tensor | None
) -> tuple[Any, ...]:
    norms = saved[2]
    d_total = norms.new_zeros(()) if d_total is None else d_total.contiguous()
    d_attraction = d_attraction.contiguous() if ctx.each and d_attraction is not None else None
    return backward(d_total, d_attraction, *saved, *ctx.options), *(None,) * 11


def _operator_backward(
    ctx: Any, d_total: Tensor | None, d_terms: Tensor | None, d_attraction: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    return _gradients(_backward_operator, ctx, ctx.saved_tensors, d_total, d_attraction)


_losses_operator.register_autograd(_operator_backward, setup_context=_save)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Outputs:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: Saved, d_total: Tensor | None, d_terms: Tensor | None, d_attraction: Tensor | None, *_: Any
    ) -> tuple[Any, ...]:
        return _gradients(_backward, ctx, saved, d_total, d_attraction)


def _wants_operators(x: Tensor) -> bool:
    """While torch compiles, and of tensors that have no numbers to launch a kernel on, such as FakeTensor."""
    return torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter)


def _check_count(matrices: Tensor) -> None:
    if matrices.shape[0] > MAX_MATRICES:
        raise ValueError(
            f"expected at most {MAX_MATRICES:,} matrices at once, got {matrices.shape[0]:,}; make several calls of it"
        )


def losses(
    z: Tensor,
    t: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    *,
    first_image: int,
    leave_one_out: bool,
    per_view: bool,
    each: bool,
    weights: tuple[float, float, float],
    spectrum: str | None,
    smoothing: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of one tensor of embeddings, in float32, or float64 for float64 embeddings; differentiable in z.

    Args:
        z: (K, B, D), any floating dtype and strides, on a device that runs kernels, D at most `kernels.MAX_DIM`.
        t: (K', B, D), the targets, on z's device; None for no centroid loss.
        seed: one int64 on z's device; None for no Brownian loss.
        step: as seed.
        first_image: number of the first image among those of all processes.
        leave_one_out: a view's centroid is of the targets of the other views; K' is then K.
        per_view: directions for each view rather than for each image.
        each: whether the third result is wanted.
        weights: of the centroid, the singular value and the Brownian loss.
        spectrum: of the singular value loss, of which `"nuclear"` has its inverse root by Newton-Schulz; None for none.
        smoothing: of `"nuclear"`.
        group: process group over which the rows are spread; None for this process alone.

    Returns:
        The weighted sum, differentiable; the three losses, (3,), detached; and |ẑ - ĉ|², (K, B), or empty,
        differentiable.
    """
    if spectrum is not None:
        _check_count(z)
    run = _losses_operator if _wants_operators(z) else _Losses.apply
    name = None if group is None else group.group_name
    total, terms, attraction, *_ = run(
        z, t, seed, step, first_image, leave_one_out, per_view, each, weights, spectrum, smoothing, name
    )
    return total, terms, attraction


def _gram(matrix: Tensor, smaller: bool) -> Tensor:
    return gram_of_rows(matrix, smaller=smaller)


def _gram_fake(matrix: Tensor, smaller: bool) -> Tensor:
    views, rows, dim = matrix.shape
    side = min(rows, dim) if smaller else dim
    return matrix.new_empty((views, side, side), dtype=accumulator(matrix.dtype))


def _multiply(matrix: Tensor, weight: Tensor) -> Tensor:
    return product(matrix, weight.contiguous())


def _multiply_fake(matrix: Tensor, weight: Tensor) -> Tensor:
    return torch.empty(matrix.shape, dtype=accumulator(matrix.dtype), device=matrix.device)


def _newton_schulz(gram: Tensor, shift: float, trace: float | None) -> Tensor:
    floor, steps = _plan(0.0 if trace is None else shift / trace, gram.dtype)
    gram = gram.contiguous()
    return inverse_root(gram, spectral_sums(gram, identity=0.0, scale=1.0), shift, floor, steps)[0]


def _newton_schulz_fake(gram: Tensor, shift: float, trace: float | None) -> Tensor:
    return torch.empty(gram.shape, dtype=gram.dtype, device=gram.device)


_gram_operator = _operator("gram", _gram, _gram_fake)
_multiply_operator = _operator("multiply", _multiply, _multiply_fake)
_newton_schulz_operator = _operator("newton_schulz", _newton_schulz, _newton_schulz_fake)


def gram(matrix: Tensor, *, smaller: bool = True) -> Tensor:
    """MᵀM, (K, D, D), or with `smaller` and N < D, M Mᵀ, (K, N, N); matrix is (K, N, D), any floating dtype."""
    _check_count(matrix)
    return (_gram_operator if _wants_operators(matrix) else _gram)(matrix, smaller)


def multiply(matrix: Tensor, weight: Tensor) -> Tensor:
    """M W, (K, N, D), for a weight (K, D, D), and Wᵀ M for a weight (K, N, N), as `linalg.multiply`."""
    return (_multiply_operator if _wants_operators(matrix) else _multiply)(matrix, weight)


def newton_schulz(gram: Tensor, shift: float, trace: float | None = None) -> Tensor:
    """(G + shift I)^(-1/2), (K, p, p), of as many matrices as `gram` makes; see `linalg.newton_schulz`."""
    return (_newton_schulz_operator if _wants_operators(gram) else _newton_schulz)(gram, shift, trace)
