"""The gradient of the three losses with respect to the embeddings, in one pass that writes one tensor.

The noise is drawn again from its counters. What the singular value loss adds, ẑ W, is a matrix product before it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.philox import brownian_rows
from msbreg.kernels.product import unit_product
from msbreg.kernels.rows import centroid_of_others, launch_config
from msbreg.kernels.tiles import early, inverse_length, load_tile, offsets, scalar, wait_for_last_launch

__all__ = ["image_gradient_kernel", "row_gradient", "row_losses_backward"]


@triton.jit
def row_gradient(z_hat, norm, c_hat, n_hat, w_hat, d_attraction, d_push):
    """dL/dz = (g - ẑ <ẑ, g>) / |z|, [R, D], where g adds up the gradients of the losses with respect to ẑ.

    z_hat: [R, D]. c_hat, n_hat: [R, D] or [1, D], or None. w_hat: [R, D], of the singular value loss, or None.
    norm: [R]. d_attraction, [R], and d_push, a scalar: the gradients of L with respect to |ẑ - ĉ|²/2 and <ẑ, n̂>.
    """
    g = tl.zeros_like(z_hat)
    if n_hat is not None:
        g += d_push * n_hat
    if c_hat is not None:
        g -= d_attraction[:, None] * c_hat  # so far g is that of all rows with this n̂, ĉ and d_attraction
        g += d_attraction[:, None] * z_hat  # radial, but without it rounding would leave of ĉ what is along ẑ
    if w_hat is not None:
        g += w_hat
    radial = tl.sum(z_hat * g, axis=1)
    return (g - z_hat * radial[:, None]) * inverse_length(norm)[:, None]


@triton.jit(do_not_specialize=["views", "batch", "first_image"])
def image_gradient_kernel(
    z_pointer,
    t_pointer,
    key_pointer,
    norm_pointer,
    centroid_pointer,
    product_pointer,
    d_total_pointer,
    d_attraction_pointer,
    dz_pointer,
    views,
    batch,
    dim,
    first_image: tl.int64,
    attraction_weight: tl.float64,
    product_weight: tl.float64,
    push_weight: tl.float64,
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
    """The gradient with respect to z of all the losses at once.

    z_pointer, t_pointer, key_pointer, norm_pointer, centroid_pointer: as `rows_forward_kernel` has read or written
        them; t is read with LEAVE_ONE_OUT alone, no key stands for no push and no centroid for no attraction.
    product_pointer: [views, batch, dim], contiguous, in the accumulator's dtype: ẑ W; None for no such loss.
    d_total_pointer: one element, the gradient of the weighted sum of the losses.
    d_attraction_pointer: [views, batch], that of |ẑ - ĉ|² beside it; None for none.
    dz_pointer: [views, batch, dim], contiguous, in z's dtype.
    attraction_weight, product_weight, push_weight: what multiplies |ẑ - ĉ|², ẑ W and <ẑ, n̂> in the weighted sum.

    One program does one image.
    """
    wait_for_last_launch(EARLY)
    ACC: tl.constexpr = norm_pointer.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_total = tl.load(d_total_pointer)
    if centroid_pointer is not None:
        centroid = tl.load(centroid_pointer + (i * dim + d), mask=d < dim, other=0.0)
    if key_pointer is not None:
        seed, step = tl.load(key_pointer), tl.load(key_pointer + 1)
        if not PER_VIEW:
            image = first_image + i + tl.zeros([1], tl.int64)
            shared = brownian_rows(seed, step, image, tl.zeros([1], tl.int32), dim, BLOCK_D).to(ACC)

    for first in tl.range(0, views, BLOCK_K, num_stages=STAGES):
        k = first + tl.arange(0, BLOCK_K)
        row = k.to(tl.int64) * batch + i
        norm = tl.load(norm_pointer + row, mask=k < views, other=1.0)
        z = load_tile(z_pointer + i * z_stride_i, k, views, z_stride_k, d, dim, z_stride_d, ACC)
        d_attraction = tl.zeros([BLOCK_K], ACC) + 2 * scalar(attraction_weight, ACC) * d_total
        if d_attraction_pointer is not None:
            d_attraction += 2 * tl.load(d_attraction_pointer + row, mask=k < views, other=0.0)
        if LEAVE_ONE_OUT:
            t = load_tile(t_pointer + i * t_stride_i, k, views, t_stride_k, d, dim, t_stride_d, ACC)
            c_hat, _ = centroid_of_others(centroid, t)
        elif centroid_pointer is not None:
            c_hat = centroid[None, :]
        else:
            c_hat = None
        if key_pointer is None:
            n_hat = None
        elif PER_VIEW:
            image = first_image + i + tl.zeros([BLOCK_K], tl.int64)
            n_hat = brownian_rows(seed, step, image, 1 + k, dim, BLOCK_D).to(ACC)
        else:
            n_hat = shared
        place, mask = offsets(row, dim, d, 1), (k < views)[:, None] & (d < dim)[None, :]
        w_hat = None
        if product_pointer is not None:
            product = tl.load(product_pointer + place, mask=mask, other=0.0)
            w_hat = scalar(product_weight, ACC) * d_total * product
        z_hat = z * (1.0 / norm)[:, None]
        d_push = scalar(push_weight, ACC) * d_total
        dz = row_gradient(z_hat, norm, c_hat, n_hat, w_hat, d_attraction, d_push)
        tl.store(dz_pointer + place, dz.to(dz_pointer.dtype.element_ty), mask=mask)


def row_losses_backward(
    d_total: Tensor,
    d_attraction: Tensor | None,
    z: Tensor,
    t: Tensor | None,
    key: Tensor | None,
    norms: Tensor,
    centroid: Tensor | None,
    z_hat: Tensor | None,
    weight: Tensor | None,
    *,
    attraction_weight: float,
    product_weight: float,
    weight_left: bool,
    push_weight: float,
    first_image: int,
    leave_one_out: bool,
    per_view: bool,
) -> Tensor:
    """dL/dz, (K, B, D), contiguous, in z's dtype, in one launch, or two with a singular value loss.

    Args:
        d_total: one element, the gradient of the weighted sum of the losses.
        d_attraction: (K, B), the gradient of each |ẑ - ĉ|² beside it; None for none.
        z: (K, B, D).
        t: (K, B, D), which leave_one_out reads again.
        key: (2,) of `row_losses`; None for no Brownian loss.
        norms: (K, B) of `row_losses`.
        centroid: (B, D) of `row_losses`.
        z_hat: (K, parts, B, w), split, of `row_losses`.
        weight: W, split, of D x D matrices, or with weight_left of B x B; None for no singular value loss.
        attraction_weight: of each |ẑ - ĉ|² in the weighted sum.
        product_weight: of ẑ W.
        weight_left: whether it is Wᵀ ẑ.
        push_weight: of each <ẑ, n̂>.
        first_image: as in `row_losses`.
        leave_one_out: as there.
        per_view: as there.
    """
    views, batch, dim = z.shape
    dz = torch.empty(z.shape, device=z.device, dtype=z.dtype)
    made = None if weight is None or z_hat is None else unit_product(z_hat, weight, dim, left=weight_left)
    with torch.cuda.device_of(z):
        image_gradient_kernel[(batch,)](
            z,
            t if leave_one_out else None,
            key,
            norms,
            centroid,
            made,
            d_total,
            d_attraction,
            dz,
            views,
            batch,
            dim,
            first_image,
            attraction_weight,
            product_weight,
            push_weight,
            *z.stride(),
            *(t.stride() if leave_one_out and t is not None else (0, 0, 0)),
            LEAVE_ONE_OUT=leave_one_out,
            PER_VIEW=per_view,
            **launch_config(views, dim, norms.element_size()),
            **early(z.device, z.numel()),
        )
    return dz
