"""What the device can do at best, measured in the same run: copy memory, multiply matrices, train a ResNet-50."""

import functools
import math
import time
from collections.abc import Callable

import torch
from timing import copies, device_round

from msbreg.machine import synchronize

__all__ = ["copy_rate", "product_rate", "resnet_seconds_per_image"]

PRODUCT_SIDE = 8192
IMAGES = 256
IMAGE_SIZE = 224


@functools.cache
def copy_rate(size_class: int, device: torch.device) -> float:
    """Bytes read and written a second by copies that move 2^size_class bytes, half of them each way."""
    half = 2 ** (size_class - 1)
    number = copies(half, device)
    sources = [torch.randint(256, (half,), dtype=torch.uint8, device=device) for _ in range(number)]
    targets = [torch.empty_like(source) for source in sources]

    def make() -> list[Callable[[], object]]:
        return [functools.partial(t.copy_, s) for s, t in zip(sources, targets, strict=True)]

    return 2 * half / best(make, device)


def size_class(size: int) -> int:
    """The power of two nearest to a number of bytes, as an exponent."""
    return round(math.log2(size))


@functools.cache
def product_rate(precision: str, device: torch.device, side: int = PRODUCT_SIDE) -> float:
    """Floating-point operations a second of one large product of matrices in `"float32"`, `"tf32"` or `"bfloat16"`."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return 2 * side**3 / best(lambda: [lambda: a @ b], device)
    finally:
        torch.set_float32_matmul_precision(before)


def best(make: Callable[[], list[Callable[[], object]]], device: torch.device) -> float:
    """Fewest seconds a call of 21 rounds, after 3 that do not count: what is held against it does not flatter."""
    round_, _ = device_round(make, device, waits=False)
    return min([round_() for _ in range(24)][3:])


@functools.cache
def resnet_seconds_per_image(device: torch.device, images: int = IMAGES, size: int = IMAGE_SIZE) -> float:
    """Of a training step of torchvision's ResNet-50 alone: bfloat16 autocast, channels_last, SGD, random images.

    Without target network, heads and loading: a step of MSBReg is longer, and the loss a smaller share of it.
    """
    from torchvision.models import resnet50

    model = resnet50().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(images, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(x).square().mean()
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    synchronize(device)
    began, steps = time.perf_counter(), 5
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / (steps * images)
