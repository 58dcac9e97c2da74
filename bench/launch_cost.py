"""What each kernel's programs load, store and multiply: a formula for each, of a launch's arguments.

`cost.py` has what a call costs whoever computes it; this is what these kernels make of it, tiles that several programs
read counted as often as they are read. Nothing here needs triton or torch: a tensor is whatever has `numel()` and
`element_size()`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["Cost", "h200_seconds", "of"]

COPY = 4.3e12
"""Bytes a second: a large copy, measured on an H200; 4.8e12 is what its data sheet says."""
LAUNCH = 2.5e-6
"""Seconds from one kernel's begin to the next's, at least, where launches begin early: 20 for small matrices take an
H200 54.7 µs (`results/nvidia-h200/2026-11-28/early.json`, 8 x 128)."""
TF32 = 495e12
"""Operations a second of an H200's tensor cores, dense, as its data sheet has them."""
FP16 = 989e12
FP64 = 67e12
PRODUCTS = 3
"""Of TF32, or of halves, for one of float32."""


class Cost(NamedTuple):
    """Of one launch."""

    loaded: int
    """Bytes that all programs load together, from memory or from a cache."""
    stored: int
    minimal: int
    """Bytes of the tensors that it reads or writes, each once."""
    flops: int
    """Of products of whole tiles in float32 or float64, padding included: two for each multiplication."""
    half_flops: int = 0
    """Of products of halves."""


def of(kernel: str, arguments: Mapping[str, Any]) -> Cost:
    """The cost of a launch of the kernel of that name with these arguments, by name."""
    loaded, stored, *flops = FORMULAS[kernel](**arguments)
    tensors = {name: value for name, value in arguments.items() if hasattr(value, "element_size")}
    for name in unread(kernel, arguments):
        tensors.pop(name, None)
    places = {tensor.data_ptr(): size(tensor) for tensor in tensors.values()}
    return Cost(loaded, stored, sum(places.values()), *flops)


def unread(kernel: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Tensors that are passed but not loaded or stored: those for sums without sums, and what is for atomics alone."""
    if kernel == "last_step_kernel" and arguments["sums_pointer"] is None:
        return ("gram_pointer",)
    return ("counter_pointer",) if kernel == "root_kernel" else ()


def h200_seconds(launches: int, moved: int, flops: int, half_flops: int = 0, *, double: bool = False) -> float:
    """The time that a call takes at least: its launches, and the longer of its copying and its multiplying.

    Args:
        launches: how many.
        moved: bytes of the call's inputs and outputs, each once; all else may stay in the cache.
        flops: of its matrix products in float32 or float64.
        half_flops: of its products of halves.
        double: whether flops are in float64, not in float32 by TF32.
    """
    multiplying = (flops / FP64 if double else PRODUCTS * flops / TF32) + half_flops / FP16
    return launches * LAUNCH + max(moved / COPY, multiplying)


def rows_forward(
    *, z_pointer, t_pointer, seed_pointer, norm_pointer, z_hat_pointer, centroid_pointer, attraction_pointer,
    image_sums_pointer, key_pointer, views, target_views, batch, dim, LEAVE_ONE_OUT, **_: Any,
) -> tuple[int, int, int]:  # fmt: skip
    """Each row once, with leave_one_out the targets twice, and the noise's seed and step by each image."""
    acc = norm_pointer.element_size()
    loaded = views * batch * dim * z_pointer.element_size()
    stored = views * batch * acc + size(z_hat_pointer)
    if t_pointer is not None:
        loaded += (1 + LEAVE_ONE_OUT) * target_views * batch * dim * t_pointer.element_size()
        stored += batch * dim * acc
    if seed_pointer is not None:
        loaded += 16 * batch
    stored += size(attraction_pointer) + size(image_sums_pointer) + size(key_pointer)
    return loaded, stored, 0


def image_gradient(
    *, z_pointer, t_pointer, key_pointer, norm_pointer, centroid_pointer, product_pointer, d_total_pointer,
    d_attraction_pointer, dz_pointer, views, batch, dim, LEAVE_ONE_OUT, PER_VIEW, BLOCK_K, **_: Any,
) -> tuple[int, int, int]:  # fmt: skip
    """Each row once."""
    loaded = size(norm_pointer) + batch * d_total_pointer.element_size() + size(d_attraction_pointer)
    loaded += views * batch * dim * z_pointer.element_size() + size(centroid_pointer) + size(product_pointer)
    if LEAVE_ONE_OUT:
        loaded += views * batch * dim * t_pointer.element_size()
    if key_pointer is not None:
        loaded += 16 * batch * (cdiv(views, BLOCK_K) if PER_VIEW else 1)
    return loaded, size(dz_pointer), 0


def gram(
    *, z_pointer, gram_pointer, batch, dim, side, ROWS, BLOCK_P, BLOCK_Q, **_: Any
) -> tuple[int, int, int]:  # fmt: skip
    """With T tiles a side, each is a factor of T + 1 of the lower triangle's T (T + 1) / 2 products."""
    views, tiles = gram_pointer.numel() // side**2, cdiv(side, BLOCK_P)
    inner, programs = (dim if ROWS else batch), views * tiles * (tiles + 1) // 2
    loaded = views * (tiles + 1) * side * inner * z_pointer.element_size()
    return loaded, size(gram_pointer), 2 * programs * BLOCK_P**2 * BLOCK_Q * cdiv(inner, BLOCK_Q)


def unit_gram(
    *, z_hat_pointer, gram_pointer, squares_pointer, batch, dim, width, ROWS, BLOCK_P, BLOCK_Q, **_: Any
) -> tuple[int, ...]:
    """As `gram`, of all parts of the split matrices, and what fills up their width."""
    side, inner = (batch, width) if ROWS else (dim, batch)
    filled = batch if ROWS else width
    views, tiles, parts = gram_pointer.numel() // side**2, cdiv(side, BLOCK_P), parts_of(z_hat_pointer)
    across = min(tiles * BLOCK_P, filled)  # tiles end with the side, and loads with the width
    loaded = views * (tiles + 1) * across * inner * parts * z_hat_pointer.element_size()
    flops = views * tiles * (tiles + 1) * BLOCK_P**2 * BLOCK_Q * cdiv(inner, BLOCK_Q)
    return loaded, size(gram_pointer) + size(squares_pointer), *by_parts(parts, flops)


def split(*, matrix_pointer, split_pointer, **_: Any) -> tuple[int, int, int]:
    """Each once."""
    return size(matrix_pointer), size(split_pointer), 0


def first_factors(
    *, gram_pointer, squares_pointer, a_pointer, t_pointer, root_scale_pointer, side, width, count, BLOCK, **_: Any
) -> tuple[int, int, int]:  # fmt: skip
    """G once, and |G|² by each tile."""
    views, tiles = gram_pointer.numel() // side**2, cdiv(width, BLOCK)
    loaded = size(gram_pointer) + views * tiles**2 * count * squares_pointer.element_size()
    return loaded, size(a_pointer) + size(t_pointer) + size(root_scale_pointer), 0


def step(*, left_pointer, output_pointer, width, BLOCK_P, BLOCK_Q, **_: Any) -> tuple[int, ...]:
    """Of each product, both factors by each of the tiles of a side."""
    parts, tiles = parts_of(left_pointer), cdiv(width, BLOCK_P)
    products = output_pointer.numel() // (parts * width**2)
    loaded = products * 2 * tiles * parts * width**2 * left_pointer.element_size()
    flops = 2 * products * tiles**2 * BLOCK_P**2 * BLOCK_Q * cdiv(width, BLOCK_Q)
    return loaded, size(output_pointer), *by_parts(parts, flops)


def last_step(
    *, left_pointer, root_scale_pointer, gram_pointer, output_pointer, sums_pointer, width, BLOCK_P,
    BLOCK_Q, **_: Any,
) -> tuple[int, ...]:  # fmt: skip
    """As `step`; a scale by each tile, and for the sums G once."""
    views, parts, tiles = root_scale_pointer.numel(), parts_of(left_pointer), cdiv(width, BLOCK_P)
    loaded = views * 2 * tiles * parts * width**2 * left_pointer.element_size()
    loaded += tiles**2 * size(root_scale_pointer) + (0 if sums_pointer is None else size(gram_pointer))
    flops = 2 * views * tiles**2 * BLOCK_P**2 * BLOCK_Q * cdiv(width, BLOCK_Q)
    return loaded, size(output_pointer) + size(sums_pointer), *by_parts(parts, flops)


def root(
    *, gram_pointer, squares_pointer, work_pointer, output_pointer, sums_pointer, views, members, width, count, steps,
    BLOCK_P, BLOCK_Q, **_: Any,
) -> tuple[int, ...]:  # fmt: skip
    """As all of a sequence together."""
    parts, tiles, products = parts_of(work_pointer), cdiv(width, BLOCK_P), views * (3 * steps - 3)
    matrix = parts * width**2 * work_pointer.element_size()
    loaded = size(gram_pointer) * (1 if sums_pointer is None else 2) + products * 2 * tiles * matrix
    loaded += views * members * (count * squares_pointer.element_size() + 16 * steps)
    stored = (2 * views + products - views) * matrix + size(output_pointer) + size(sums_pointer)
    return loaded, stored, *by_parts(parts, 2 * products * tiles**2 * BLOCK_P**2 * BLOCK_Q * cdiv(width, BLOCK_Q))


def product(
    *, z_pointer, weight_pointer, output_pointer, batch, dim, side, WEIGHT_LEFT, BLOCK_I, BLOCK_D, BLOCK_Q, **_: Any
) -> tuple[int, int, int]:
    """Rows of the left factor by each tile of columns, columns of the right one by each tile of rows."""
    views = output_pointer.numel() // (batch * dim)
    down, across = cdiv(batch, BLOCK_I), cdiv(dim, BLOCK_D)
    z, w = z_pointer.element_size() * batch * dim, weight_pointer.element_size() * side**2
    left, right = (w, z) if WEIGHT_LEFT else (z, w)
    loaded = views * (across * left + down * right)
    return loaded, size(output_pointer), 2 * views * down * across * BLOCK_I * BLOCK_D * BLOCK_Q * cdiv(side, BLOCK_Q)


def unit_product(
    *, z_hat_pointer, weight_pointer, output_pointer, batch, dim, width, weight_width, WEIGHT_LEFT, BLOCK_I, BLOCK_D,
    BLOCK_Q, **_: Any,
) -> tuple[int, ...]:  # fmt: skip
    """As `product`, of all parts of the split matrices, and what fills up their width."""
    views, parts = output_pointer.numel() // (batch * dim), parts_of(z_hat_pointer)
    down, across = cdiv(batch, BLOCK_I), cdiv(dim, BLOCK_D)
    inner, columns = (batch if WEIGHT_LEFT else width), min(across * BLOCK_D, width)
    rows, left = batch, inner
    if WEIGHT_LEFT:
        rows, left = (min(weight_width, block * cdiv(batch, block)) for block in (BLOCK_I, BLOCK_Q))
    numbers = across * rows * left + down * inner * columns
    flops = 2 * views * down * across * BLOCK_I * BLOCK_D * BLOCK_Q * cdiv(inner, BLOCK_Q)
    return views * parts * numbers * z_hat_pointer.element_size(), size(output_pointer), *by_parts(parts, flops)


def spectral_sums(*, gram_pointer, sums_pointer, **_: Any) -> tuple[int, int, int]:
    """Each matrix once."""
    return size(gram_pointer), size(sums_pointer), 0


def totals(*, image_sums_pointer, spectral_pointer, total_pointer, terms_pointer, **_: Any) -> tuple[int, int, int]:
    """Each sum once."""
    return size(image_sums_pointer) + size(spectral_pointer), size(total_pointer) + size(terms_pointer), 0


def brownian_directions(*, output_pointer, seed_pointer, views, batch, BLOCK_ROWS, **_: Any) -> tuple[int, int, int]:
    """The seed and the step by each program."""
    return 16 * cdiv(views * batch, BLOCK_ROWS), size(output_pointer), 0


def pixelwise(
    *, crops_pointer, colour_pointer, solarize_pointer, flip_pointer, output_pointer, pixels, BLOCK, **_: Any
) -> tuple[int, int, int]:  # fmt: skip
    """Each byte once, and what is drawn for an image by each of its programs."""
    drawn = size(colour_pointer) + size(solarize_pointer) + size(flip_pointer)
    return size(crops_pointer) + cdiv(pixels, BLOCK) * drawn, size(output_pointer), 0


FORMULAS: dict[str, Callable[..., tuple[int, ...]]] = {
    f"{formula.__name__}_kernel": formula
    for formula in (
        rows_forward, image_gradient, gram, unit_gram, split, first_factors, step, last_step, root, product,
        unit_product, spectral_sums, totals, brownian_directions, pixelwise,
    )
}  # fmt: skip
"""Bytes loaded, bytes stored, operations, and where there are any, operations on halves."""


def parts_of(tensor: Any) -> int:
    """Of a split matrix: halves are in pairs."""
    return 2 if tensor.element_size() == 2 else 1


def by_parts(parts: int, flops: int) -> tuple[int, int]:
    """Operations of a product of split matrices in float32 or float64, and in halves."""
    return (flops, 0) if parts == 1 else (0, PRODUCTS * flops)


def size(tensor: Any) -> int:
    """Bytes of a tensor, or 0 of None."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def cdiv(a: int, b: int) -> int:
    return math.ceil(a / b)
