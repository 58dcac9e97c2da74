"""The gradient of the three losses with respect to the embeddings, in one pass that writes one tensor.

The noise is drawn again from its counters. The singular value loss adds ẑ W, a matrix product: for rows of up to
`FUSED_DIM` numbers it is made where it is used, in registers, by a program that has some rows of one view; of wider
rows a program holds too few for what it reads of W, and they have it from memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.philox import brownian_rows
from msbreg.kernels.product import product
from msbreg.kernels.rows import centroid_of_others, tile
from msbreg.kernels.tiles import EPS, load_tile, offsets, precision, unit

__all__ = ["image_gradient_kernel", "row_gradient", "row_losses_backward", "view_gradient_kernel"]

FUSED_DIM = 256


@triton.jit
def row_gradient(g, z_hat, norm, c_hat, n_hat, attraction, push):
    """dL/dz = (g - ẑ <ẑ, g>) / |z|, [R, D], of g plus the gradients of the centroid and Brownian losses.

    g, z_hat, c_hat, n_hat: [R, D], or [1, D] for the last two, or None. norm, attraction: [R]. push: a scalar.
    """
    if c_hat is not None:
        g += attraction[:, None] * (z_hat - c_hat)
    if n_hat is not None:
        g += push * n_hat
    radial = tl.sum(z_hat * g, axis=1)
    return (g - z_hat * radial[:, None]) * tl.where(norm <= EPS, 0.0, 1.0 / norm)[:, None]


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
    ACC: tl.constexpr = norm_pointer.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    d_total = tl.load(d_total_pointer)
    if centroid_pointer is not None:
        total = tl.load(centroid_pointer + (i * dim + d), mask=d < dim, other=0.0)
    if key_pointer is not None:
        seed, step = tl.load(key_pointer), tl.load(key_pointer + 1)
        if not PER_VIEW:
            image = first_image + i + tl.zeros([1], tl.int64)
            shared = brownian_rows(seed, step, image, tl.zeros([1], tl.int32), dim, BLOCK_D).to(ACC)

    for first in range(0, views, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        row = k.to(tl.int64) * batch + i
        norm = tl.load(norm_pointer + row, mask=k < views, other=1.0)
        z = load_tile(z_pointer + i * z_stride_i, k, views, z_stride_k, d, dim, z_stride_d, ACC)
        attraction = tl.zeros([BLOCK_K], ACC) + 2 * tl.full([], attraction_weight, ACC) * d_total
        if d_attraction_pointer is not None:
            attraction += 2 * tl.load(d_attraction_pointer + row, mask=k < views, other=0.0)
        if LEAVE_ONE_OUT:
            t = load_tile(t_pointer + i * t_stride_i, k, views, t_stride_k, d, dim, t_stride_d, ACC)
            c_hat = centroid_of_others(total, t, k, views)
        elif centroid_pointer is not None:
            c_hat = total[None, :]
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
        g = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        if product_pointer is not None:
            g += tl.full([], product_weight, ACC) * d_total * tl.load(product_pointer + place, mask=mask, other=0.0)
        dz = row_gradient(g, z / norm[:, None], norm, c_hat, n_hat, attraction, tl.full([], push_weight, ACC) * d_total)
        tl.store(dz_pointer + place, dz.to(dz_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["views", "batch", "first_image"])
def view_gradient_kernel(
    z_pointer,
    t_pointer,
    key_pointer,
    norm_pointer,
    centroid_pointer,
    weight_pointer,
    d_total_pointer,
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
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """As `image_gradient_kernel`, with the product ẑ W made here.

    weight_pointer: [views, dim, dim], W, contiguous, in the accumulator's dtype.

    One program does BLOCK_I images of one view.
    """
    ACC: tl.constexpr = norm_pointer.dtype.element_ty
    k = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    d = tl.arange(0, BLOCK_D)
    d_total = tl.load(d_total_pointer)
    norm = tl.load(norm_pointer + k * batch + i, mask=i < batch, other=1.0)
    z_view = z_pointer + k * z_stride_k
    w_view = weight_pointer + k * dim * dim

    g = tl.zeros([BLOCK_I, BLOCK_D], ACC)
    for first in range(0, dim, BLOCK_Q):
        q = first + tl.arange(0, BLOCK_Q)
        z_part = load_tile(z_view, i, batch, z_stride_i, q, dim, z_stride_d, ACC) / norm[:, None]
        w = load_tile(w_view, q, dim, dim, d, dim, 1, ACC)
        g = tl.dot(z_part, w, g, input_precision=PRECISION, out_dtype=ACC)
    g *= tl.full([], product_weight, ACC) * d_total
    if key_pointer is not None:  # before anything else is held beside g: the noise takes the most registers
        stream = tl.zeros([BLOCK_I], tl.int32) + ((1 + k).to(tl.int32) if PER_VIEW else 0)
        n_hat = brownian_rows(tl.load(key_pointer), tl.load(key_pointer + 1), first_image + i, stream, dim, BLOCK_D)
        g += tl.full([], push_weight, ACC) * d_total * n_hat.to(ACC)

    z_hat = load_tile(z_view, i, batch, z_stride_i, d, dim, z_stride_d, ACC) / norm[:, None]
    if centroid_pointer is None:
        c_hat = None
    elif LEAVE_ONE_OUT:
        t_hat, _ = unit(load_tile(t_pointer + k * t_stride_k, i, batch, t_stride_i, d, dim, t_stride_d, ACC))
        c_hat, _ = unit((load_tile(centroid_pointer, i, batch, dim, d, dim, 1, ACC) - t_hat) / (views - 1))
    else:
        c_hat = load_tile(centroid_pointer, i, batch, dim, d, dim, 1, ACC)
    attraction = tl.zeros([BLOCK_I], ACC) + 2 * tl.full([], attraction_weight, ACC) * d_total
    dz = row_gradient(g, z_hat, norm, c_hat, None, attraction, None)
    mask = (i < batch)[:, None] & (d < dim)[None, :]
    place = offsets(k * batch + i, dim, d, 1)
    tl.store(dz_pointer + place, dz.to(dz_pointer.dtype.element_ty), mask=mask)


def row_losses_backward(
    d_total: Tensor,
    d_attraction: Tensor | None,
    z: Tensor,
    t: Tensor | None,
    key: Tensor | None,
    norms: Tensor,
    centroid: Tensor | None,
    weight: Tensor | None,
    *,
    attraction_weight: float,
    product_weight: float,
    push_weight: float,
    first_image: int,
    leave_one_out: bool,
    per_view: bool,
) -> Tensor:
    """dL/dz, (K, B, D), contiguous, in z's dtype, in one launch, or two where ẑ W goes through memory.

    Args:
        d_total: one element, the gradient of the weighted sum of the losses.
        d_attraction: (K, B), the gradient of each |ẑ - ĉ|² beside it; None for none.
        z: (K, B, D).
        t: (K, B, D), which leave_one_out reads again.
        key: (2,) of `row_losses`; None for no Brownian loss.
        norms: (K, B) of `row_losses`.
        centroid: (B, D) of `row_losses`.
        weight: W, (K, D, D), or (K, B, B) for W ẑ, in the accumulator's dtype; None for no singular value loss.
        attraction_weight: of each |ẑ - ĉ|² in the weighted sum.
        product_weight: of ẑ W.
        push_weight: of each <ẑ, n̂>.
        first_image: as in `row_losses`.
        leave_one_out: as there.
        per_view: as there.
    """
    views, batch, dim = z.shape
    dz = torch.empty(z.shape, device=z.device, dtype=z.dtype)
    t_strides = t.stride() if leave_one_out and t is not None else (0, 0, 0)
    sizes = (views, batch, dim, first_image, attraction_weight, product_weight, push_weight, *z.stride(), *t_strides)
    options = {"LEAVE_ONE_OUT": leave_one_out, "PER_VIEW": per_view}
    rows = (z, t if leave_one_out else None, key, norms, centroid)
    with torch.cuda.device_of(z):
        if weight is not None and weight.shape[-1] == dim <= FUSED_DIM and d_attraction is None:
            config = fused_tile(dim, weight.element_size())
            grid = (triton.cdiv(batch, config["BLOCK_I"]), views)
            view_gradient_kernel[grid](
                *rows, weight, d_total, dz, *sizes, PRECISION=precision(norms.dtype), **options, **config
            )
        else:
            made = None if weight is None else product(z, norms, weight)
            image_gradient_kernel[(batch,)](
                *rows, made, d_total, d_attraction, dz, *sizes, **options, **tile(views, dim)
            )
    return dz


def fused_tile(dim: int, itemsize: int) -> dict[str, int | bool]:
    """The block sizes and warps for a fused product: 8192 float32 sums, 32 a thread, or half as many in float64."""
    double = itemsize == 8
    block_d = max(16, triton.next_power_of_2(dim))
    block_i = min(64, max(16, 8192 // (itemsize // 4) // block_d))  # `dot` takes 16 or more
    return {
        "BLOCK_I": block_i,
        "BLOCK_D": block_d,
        "BLOCK_Q": min(16 if double else 32, block_d),
        "num_warps": max(1, block_i * block_d // (512 if double else 1024)),
        "enable_fp_fusion": True,
    }
