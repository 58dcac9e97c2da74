"""What is computed row by row on the way forward: lengths, centroids, the centroid loss and the Brownian loss.

One program has one image, and goes through its views a tile [views, D] at a time, with whole rows in registers: the
sums over views that make the centroid and those over dimensions that make lengths are sums over a tile, and each number
is read once.

The mathematics, with the same symbols, is in `msbreg/reference.py`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.halves import empty_split, parts_of, store_split
from msbreg.kernels.philox import brownian_rows
from msbreg.kernels.tiles import (
    accumulator,
    early,
    load_tile,
    next_power_of_2,
    offsets,
    scalar,
    unit,
    wait_for_last_launch,
)

__all__ = ["RowLosses", "centroid_of_others", "launch_config", "row_losses", "rows_forward_kernel"]


@triton.jit
def centroid_of_others(centroid, t):
    """ĉ of the target views other than each, [K, D], and |ĉ|², [K].

    centroid: [D], the sum of all views' t̂. t: [K, D], rows of the target.
    """
    t_hat, _, _ = unit(t)
    c_hat, _, c_square = unit(centroid[None, :] - t_hat)  # the sum's direction is the mean's
    return c_hat, c_square


@triton.jit(do_not_specialize=["views", "target_views", "batch", "first_image"])
def rows_forward_kernel(
    z_pointer,
    t_pointer,
    seed_pointer,
    step_pointer,
    norm_pointer,
    z_hat_pointer,
    centroid_pointer,
    attraction_pointer,
    image_sums_pointer,
    key_pointer,
    views,
    target_views,
    batch,
    dim,
    width,
    first_image: tl.int64,
    z_stride_k,
    z_stride_i,
    z_stride_d,
    t_stride_k,
    t_stride_i,
    t_stride_d,
    LEAVE_ONE_OUT: tl.constexpr,
    PER_VIEW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Lengths of rows, centroids of targets, and the two losses that need nothing but an image's own rows.

    z_pointer: [views, batch, dim], any strides, any floating dtype.
    t_pointer: [target_views, batch, dim], as z; None for no attraction.
    seed_pointer, step_pointer: int64, one element each; None for no push.
    norm_pointer: [views, batch], |z|, in the accumulator's dtype, as are the losses and centroids; contiguous, as are
        all below.
    z_hat_pointer: [views, parts, batch, width], split, ẑ; None where they are not wanted. See `halves`.
    centroid_pointer: [batch, dim], ĉ; with LEAVE_ONE_OUT the sum of the views' t̂.
    attraction_pointer: [views, batch], |ẑ - ĉ|²; None where only its sum is wanted.
    image_sums_pointer: [2, batch], sums over the views of |ẑ - ĉ|² and of <ẑ, n̂>; None for neither.
    key_pointer: [2], int64, a copy of seed and step for the way back, when their owner may have changed them.

    One program does one image.
    """
    wait_for_last_launch(EARLY)
    ACC: tl.constexpr = norm_pointer.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    z_image = z_pointer + i * z_stride_i

    if t_pointer is not None:
        t_image = t_pointer + i * t_stride_i
        centroid = tl.zeros([BLOCK_D], ACC)
        for first in tl.range(0, target_views, BLOCK_K, num_stages=STAGES):
            k = first + tl.arange(0, BLOCK_K)
            t_hat, _, _ = unit(load_tile(t_image, k, target_views, t_stride_k, d, dim, t_stride_d, ACC))
            centroid += tl.sum(t_hat, axis=0)
        if not LEAVE_ONE_OUT:
            centroid, _, c_square = unit(centroid[None, :])  # the sum's direction is the mean's
            centroid, c_square = tl.reshape(centroid, [BLOCK_D]), tl.sum(c_square, axis=0)
        tl.store(centroid_pointer + (i * dim + d), centroid, mask=d < dim)
    if seed_pointer is not None and PER_VIEW:
        seed, step = tl.load(seed_pointer), tl.load(step_pointer)

    # Sums over the views. |ẑ - ĉ|² is |ẑ|² + |ĉ|² - 2 <ẑ, ĉ>, so that views that share ĉ and n̂ need but the sum of ẑ.
    total_z = tl.zeros([BLOCK_D], ACC)  # ẑ
    meeting = tl.zeros([BLOCK_D], ACC)  # ẑ ĉ, by dimension: where only lengths are sums over rows, there is less to do
    push = tl.zeros([BLOCK_D], ACC)  # ẑ n̂, by dimension
    squares = tl.zeros([BLOCK_K], ACC)  # |ẑ|² + |ĉ|²
    for first in tl.range(0, views, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        if seed_pointer is not None and PER_VIEW:  # first, while most registers are free
            image = first_image + i + tl.zeros([BLOCK_K], tl.int64)
            n_hat = brownian_rows(seed, step, image, 1 + k, dim, BLOCK_D).to(ACC)
        if LEAVE_ONE_OUT:
            t = load_tile(t_image, k, views, t_stride_k, d, dim, t_stride_d, ACC)
            c_hat, c_square = centroid_of_others(centroid, t)
        elif t_pointer is not None:
            c_hat = centroid[None, :]
        z_hat, norm, square = unit(load_tile(z_image, k, views, z_stride_k, d, dim, z_stride_d, ACC))
        if seed_pointer is not None and PER_VIEW:
            push += tl.sum(z_hat * n_hat, axis=0)
        if LEAVE_ONE_OUT:
            meeting += tl.sum(z_hat * c_hat, axis=0)
            square += tl.where(k < views, c_square, 0.0)
        total_z += tl.sum(z_hat, axis=0)
        squares += square
        tl.store(norm_pointer + k.to(tl.int64) * batch + i, norm, mask=k < views)
        if z_hat_pointer is not None:
            plane = scalar(batch, tl.int64) * width
            place = z_hat_pointer + i * width + offsets(k, parts_of(z_hat_pointer) * plane, d, 1)
            store_split(place, plane, z_hat, (k < views)[:, None] & (d < width)[None, :])
        if attraction_pointer is not None:
            apart = z_hat - c_hat
            tl.store(attraction_pointer + k.to(tl.int64) * batch + i, tl.sum(apart * apart, axis=1), mask=k < views)
    attraction = tl.zeros([], ACC)
    if t_pointer is not None:
        if not LEAVE_ONE_OUT:
            meeting = total_z * centroid
            attraction += views * c_square
        attraction += tl.sum(squares, axis=0) - 2.0 * tl.sum(meeting, axis=0)
    if image_sums_pointer is not None:  # now, while there is no noise in registers
        tl.store(image_sums_pointer + i, tl.maximum(attraction, 0.0, propagate_nan=tl.PropagateNan.ALL))
    if seed_pointer is not None and not PER_VIEW:
        seed, step = tl.load(seed_pointer), tl.load(step_pointer)
        image = first_image + i + tl.zeros([1], tl.int64)
        n_hat = brownian_rows(seed, step, image, tl.zeros([1], tl.int32), dim, BLOCK_D).to(ACC)
        push = total_z * tl.reshape(n_hat, [BLOCK_D])
    if seed_pointer is not None and i == 0:
        tl.store(key_pointer, seed)
        tl.store(key_pointer + 1, step)
    if image_sums_pointer is not None:
        tl.store(image_sums_pointer + (batch + i), tl.sum(push, axis=0))


class RowLosses(NamedTuple):
    """What `row_losses` returns, in float32, or float64 for float64 rows; None for what was not asked for."""

    norms: Tensor
    """(K, B): |z|."""
    z_hat: Tensor | None
    """(K, parts, B, w): ẑ, split; see `kernels.halves`."""
    centroid: Tensor | None
    """(B, D): ĉ, or with leave_one_out the sum of the views' t̂."""
    attraction: Tensor | None
    """(K, B): |ẑ - ĉ|²."""
    image_sums: Tensor | None
    """(2, B): sums over the views of |ẑ - ĉ|² and of <ẑ, n̂>."""
    key: Tensor | None
    """(2,), int64: the noise's seed and step as they were."""


def row_losses(
    z: Tensor,
    t: Tensor | None = None,
    noise: tuple[Tensor, Tensor] | None = None,
    *,
    first_image: int = 0,
    leave_one_out: bool = False,
    per_view: bool = False,
    each: bool = False,
    want_z_hat: bool = False,
) -> RowLosses:
    """The centroid and Brownian losses of embeddings, in one launch.

    Args:
        z: (K, B, D), any floating dtype and strides, D at most `kernels.MAX_DIM`.
        t: (K', B, D), the targets; None for no centroid loss. With `leave_one_out` K' is K.
        noise: seed and step, one int64 each on z's device; None for no Brownian loss.
        first_image: number of the first image among those of all processes.
        leave_one_out: a view's centroid is of the targets of the other views.
        per_view: a direction for each view of an image rather than one for all of them.
        each: whether the loss of each row is wanted beside their sums.
        want_z_hat: whether ẑ is wanted, for products with it.
    """
    views, batch, dim = z.shape
    new: dict[str, Any] = {"device": z.device, "dtype": accumulator(z.dtype)}
    norms = torch.empty(views, batch, **new)
    z_hat = empty_split(norms, (views,), batch, dim) if want_z_hat else None
    centroid = None if t is None else torch.empty(batch, dim, **new)
    attraction = torch.empty(views, batch, **new) if each else None
    image_sums = None if t is None and noise is None else torch.empty(2, batch, **new)
    seed, step = noise or (None, None)
    key = None if noise is None else torch.empty(2, device=z.device, dtype=torch.int64)
    half = z.element_size() == 2 and not leave_one_out and not per_view
    with torch.cuda.device_of(z):
        rows_forward_kernel[(batch,)](
            z,
            t,
            seed,
            step,
            norms,
            z_hat,
            centroid,
            attraction,
            image_sums,
            key,
            views,
            0 if t is None else t.shape[0],
            batch,
            dim,
            0 if z_hat is None else z_hat.shape[-1],
            first_image,
            *z.stride(),
            *((0, 0, 0) if t is None else t.stride()),
            LEAVE_ONE_OUT=leave_one_out,
            PER_VIEW=per_view,
            **launch_config(views, dim, norms.element_size(), half=half),
            **early(z.device, z.numel()),
        )
    return RowLosses(norms, z_hat, centroid, attraction, image_sums, key)


def launch_config(views: int, dim: int, itemsize: int, *, half: bool = False) -> dict[str, int | bool]:
    """The block sizes and warps for rows of D numbers: 512 numbers or a row, 16 a thread, 8 if D is no multiple of 16.

    32 a thread forward in half precision: with half as many warps an H200 took 4% less for rows of 2,048, and 4% more
    back. More a thread where 16 warps do not suffice for that, and fewer where a row is short. The next numbers are on
    their way meanwhile, in shared memory, where there is room for them; AMD has registers for it.

    Args:
        views: K.
        dim: D.
        itemsize: bytes of a number in the accumulator's dtype.
        half: whether this is the way forward of numbers in half precision, with registers to spare.
    """
    block_d = max(16, next_power_of_2(dim))
    block_k = min(next_power_of_2(views), max(1, 512 // block_d))
    return {
        "BLOCK_K": block_k,
        "BLOCK_D": block_d,
        "STAGES": 1 if block_k * block_d * itemsize > 8192 or torch.version.hip else 4,
        # Numbers that are loaded one by one have an address each, in a register.
        "num_warps": min(16, max(1, block_k * block_d // (256 if dim % 16 else 1024 if half else 512))),
        "enable_fp_fusion": True,
    }
