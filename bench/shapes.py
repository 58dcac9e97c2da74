"""Which shapes are timed, and which are left out for which provider, with the reason."""

import argparse
import itertools
import os
from typing import NamedTuple

import torch
from providers import Provider

__all__ = [
    "ALL",
    "SETS",
    "SMALL",
    "TARGETS",
    "Shape",
    "inputs",
    "left_out",
    "one_shape",
    "oracle_decomposition",
    "parse",
]


class Shape(NamedTuple):
    """(K, B, D): views, images, dimensions."""

    views: int
    batch: int
    dim: int

    def __str__(self) -> str:
        return f"{self.views}x{self.batch}x{self.dim}"

    @property
    def size(self) -> int:
        """Numbers in z."""
        return self.views * self.batch * self.dim

    @property
    def side(self) -> int:
        """Side of the smaller Gram matrix."""
        return min(self.batch, self.dim)

    @property
    def work(self) -> float:
        """Multiplications and additions of one product with each view's Gram matrix."""
        return float(self.size) * self.side


SMALL = (Shape(8, 512, 256), Shape(2, 256, 128))
"""A minute or two on two CPU cores."""
TARGETS = (Shape(8, 512, 256), Shape(8, 4096, 2048))
"""Where the project says what it wants to reach: a usual size, and one that moves more than 250 MB."""
ALL = tuple(
    Shape(*shape) for shape in itertools.product((2, 4, 8, 16), (256, 512, 2048, 4096), (128, 256, 512, 2048, 8192))
)
SETS = {"small": SMALL, "targets": TARGETS, "all": ALL}

# Work above which one call takes on the order of ten seconds, by the device and the decomposition that is in it. On a
# GPU torch's SVD goes through the matrices one by one; its eigh is batched.
LIMITS = {"cpu": {"svd": 1e9, "eigh": 4e9, None: 1e11}, "cuda": {"svd": 4e9, "eigh": 3e11, None: float("inf")}}
BYTES_PER_NUMBER = 80
"""Of memory for each number of z: the float64 oracle with its intermediates, about ten tensors."""


def parse(text: str) -> tuple[Shape, ...]:
    """The name of a set, or shapes as in `8x512x256,2x256x128`; raises ValueError on anything else."""
    if text in SETS:
        return SETS[text]
    shapes = []
    for part in text.split(","):
        numbers = part.split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"expected {', '.join(SETS)} or shapes KxBxD such as 8x512x256,2x256x128, got {text!r}")
        shapes.append(Shape(*map(int, numbers)))
    return tuple(shapes)


def one_shape(text: str) -> Shape:
    """The `type` of an option that is K x B x D."""
    try:
        (shape,) = parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected one shape KxBxD such as 8x512x256, got {text}") from None
    return shape


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """z and t, (K, B, D): views that scatter around their image, of full rank, as in training that goes well."""
    generator = torch.Generator(device).manual_seed(seed)

    def normals(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    image = normals(shape.batch, shape.dim)
    z, t = ((image + 0.5 * normals(*shape)).to(dtype) for _ in range(2))
    return z.requires_grad_(), t


def oracle_decomposition(shape: Shape, device: torch.device) -> str:
    """`"svd"` where the float64 oracle can afford it, `"eigh"` of the Gram matrix elsewhere."""
    return "svd" if shape.work <= LIMITS[device.type]["svd"] else "eigh"


def left_out(shape: Shape, provider: Provider, device: torch.device) -> str | None:
    """Why a provider is not timed at a shape, or None."""
    if provider.missing:
        return f"{provider.name} needs {provider.needs}: pip install {provider.needs}"
    if provider.views and (shape.views < provider.views or shape.batch < 2):
        return f"{provider.name} takes {provider.views} views of two images at least"
    memory, needed = device_memory(device), BYTES_PER_NUMBER * shape.size
    if needed > memory:
        return f"{shape} needs {needed / 1e9:.0f} GB with its float64 oracle, and there are {memory / 1e9:.0f}"
    limits, work = LIMITS[device.type], shape.work
    if provider.terms in ("all", "spectral") and work > limits["eigh"]:
        return f"{shape} would take its float64 oracle minutes"
    if provider.name == "lightly_mmcr":
        # Its SVD of (B, 2K, D) makes full D x D matrices.
        work, needed = 2.0 * shape.size * shape.dim, 4 * shape.batch * shape.dim**2
        if 2 * needed > memory:
            return f"{provider.name} makes {needed / 1e9:.0f} GB of singular vectors at {shape}"
    if work > limits[provider.decomposition]:
        return f"{provider.name} would take minutes at {shape}"
    return None


def device_memory(device: torch.device) -> int:
    """Bytes of memory of the GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
