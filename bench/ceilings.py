"""What the device can do at best, measured in the same run: copy memory, multiply matrices."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timing import copies, device_round

__all__ = ["copy_rate", "level", "product_rate"]

PRODUCT_SIDE = 8192
LARGE = 2**28
"""Bytes from which on a copy is as fast as any: what is measured slower was so by chance."""


@functools.cache
def copy_rate(size: int, device: torch.device) -> float:
    """Bytes read and written a second where so many are moved, half of them each way, by the fastest of two ways."""
    count = max(1, size // 8)
    number = copies(4 * count, device)
    sources = [torch.randn(count, device=device) for _ in range(number)]
    targets = [torch.empty_like(source) for source in sources]
    pairs = list(zip(sources, targets, strict=True))
    # The driver's copy, and a kernel such as the losses have: which one is faster goes by the size.
    ways = (
        lambda: [functools.partial(t.copy_, s) for s, t in pairs],
        lambda: [functools.partial(torch.add, s, 1, out=t) for s, t in pairs],
    )
    return 8 * count / min(best(way, device) for way in ways)


def level(found: Sequence[dict[str, Any]]) -> None:
    """Gives all figures of a run that move much the best rate of a copy of any size in it."""
    best = max((info["copy_rate"] for info in found if "copy_rate" in info), default=0.0)
    for info in found:
        if "copy_rate" in info and info["bytes"] >= LARGE:
            info["copy_rate"] = best


@functools.cache
def product_rate(device: torch.device, side: int = PRODUCT_SIDE) -> float:
    """Floating-point operations a second of one large product of matrices in bfloat16."""
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * side**3 / best(lambda: [lambda: a @ b], device)


def best(make: Callable[[], list[Callable[[], object]]], device: torch.device) -> float:
    """Fewest seconds a call of 21 rounds, after 3 that do not count: what is held against it does not flatter."""
    round_, _ = device_round(make, device, waits=False)
    return min([round_() for _ in range(24)][3:])
