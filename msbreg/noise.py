"""The random directions of the Brownian loss: a function of (seed, step, image) and of nothing else."""

import operator

import torch
from torch import Tensor

from msbreg import kernels
from msbreg.philox import WORD, normals, philox4x32

__all__ = ["as_int", "brownian_directions", "check_noise", "integer_on", "plain_directions"]


def brownian_directions(
    batch: int,
    dim: int,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    first_image: int = 0,
    views: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Directions distributed evenly over the unit sphere, one for each image (or view) of a batch.

    Standard normals from Philox4x32-10 (see `msbreg.philox` for the counter), divided by their norm. A row depends on
    the seed, the step, its image's number and its view alone, so any split of a batch over calls, processes or blocks
    gives the same rows. CPUs and GPUs may differ in the last digit, where their logarithms and cosines do. On a GPU
    they are drawn in one launch, except where `torch.compile` traces the call.

    Args:
        batch: images, B.
        dim: numbers in a row, D.
        seed: 64-bit key; an int, or a zero-dimensional int64 tensor, which is not read by the host.
        step: training step, of which the lower 32 bits count; as `seed`.
        first_image: number of the batch's first image among those of all processes: rank * B.
        views: None for one direction an image, or K for independent directions for each of K views.
        device: where to make them; None: torch's default device.
        dtype: of the result. The arithmetic is float32 whatever it is.

    Returns:
        (batch, dim), or (views, batch, dim).

    Raises:
        ValueError: batch, dim or views below 1, a seed, step or first image beyond 64 bits.
        TypeError: a seed or step that is neither an int nor a zero-dimensional int64 tensor, a first image that is no
            int, or a dtype that is not floating point.
    """
    if min(batch, dim, 1 if views is None else views) < 1:
        raise ValueError(f"expected batch, dim and views of at least 1, got {batch}, {dim} and {views}")
    if not dtype.is_floating_point:
        raise TypeError(f"expected a floating-point dtype, got {dtype}")
    check_noise(seed, step, first_image)
    where = torch.get_default_device() if device is None else torch.device(device)
    plain = torch.compiler.is_compiling() or dim > kernels.MAX_DIM
    if plain or where.type != kernels.DEVICE_TYPE:
        return plain_directions(batch, dim, seed, step, first_image, views, device, dtype)
    from msbreg.kernels import philox  # needs triton

    return philox.brownian_directions(
        as_int(batch),
        as_int(dim),
        seed=integer_on(where, seed),
        step=integer_on(where, step),
        first_image=as_int(first_image),
        views=None if views is None else as_int(views),
        dtype=dtype,
    )


def plain_directions(
    batch: int,
    dim: int,
    seed: int | Tensor,
    step: int | Tensor,
    first_image: int = 0,
    views: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`brownian_directions` in plain torch on any device, its arguments taken as they come."""
    quad = torch.arange((dim + 3) // 4, device=device)
    image = (torch.arange(batch, device=device) + first_image) & WORD
    stream = torch.arange(1, views + 1, device=device) if views else torch.zeros(1, dtype=torch.int64, device=device)
    # Tensors: torch.compile gives numbers that change a symbol, and its C++ has no & for these.
    seed, step = (integer_on(quad.device, value) for value in (seed, step))
    words = philox4x32((quad, image[:, None], step & WORD, stream[:, None, None]), seed)
    n = torch.stack(normals(words), dim=-1).flatten(-2)[..., :dim]  # (views or 1, B, D)
    # In float64 a sum rounds to the same float32 in any order, here or in a kernel, save once in 1e8 rows.
    n = n / torch.linalg.vector_norm(n, dim=-1, keepdim=True, dtype=torch.float64).to(torch.float32)
    return (n if views else n[0]).to(dtype)


def integer_on(device: torch.device, value: int | Tensor) -> Tensor:
    """A zero-dimensional int64 tensor there."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=device.type != "cpu")  # a CPU would read it before it has come
    return torch.full((), value, dtype=torch.int64, device=device)


def as_int(value: int) -> int:
    """One of NumPy's integers as Python's, which alone a kernel takes."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def check_noise(seed: int | Tensor, step: int | Tensor, first_image: int) -> None:
    """Raises TypeError for a seed or step that is no int or int64 scalar, or a first image that is no int.

    ValueError for one of them beyond 64 bits.
    """
    for name, value in (("seed", seed), ("step", step)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.dim() != 0:
                raise TypeError(
                    f"expected {name} to be a zero-dimensional int64 tensor, got {value.dtype} of shape "
                    f"{tuple(value.shape)}"
                )
        elif not _is_integer(value):
            raise TypeError(f"expected {name} to be an int or an int64 tensor, got {type(value).__name__}")
    if isinstance(first_image, Tensor) or not _is_integer(first_image):
        raise TypeError(f"expected first_image to be an int, got {type(first_image).__name__}")
    for name, value in (("seed", seed), ("step", step), ("first_image", first_image)):
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise ValueError(f"expected {name} to be an int of 64 bits, got {value}")


def _is_integer(value: object) -> bool:
    """Whether it is an int, or has the value of one, as NumPy's integers have."""
    if isinstance(value, (int, torch.SymInt)):
        return True
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
