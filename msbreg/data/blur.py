"""The Gaussian blur of a view: its window, and what a CPU does without DALI."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["gaussian_blur", "gaussian_window"]


def gaussian_window(sigma: float, radius: int) -> NDArray[np.float32]:
    """The window of DALI's `fn.gaussian_blur`, (2 radius + 1,), which adds up to 1; radius 0 does not ask for sigma."""
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2) if radius else np.ones(1)
    return (weights / weights.sum()).astype(np.float32)


def gaussian_blur(pixels: NDArray[np.uint8], sigma: float, radius: int) -> NDArray[np.uint8]:
    """Separable Gaussian blur of (H, W, 3) bytes with a window of 2 radius + 1 pixels, mirrored about border pixels.

    In numpy, because torch's convolution would start a team of threads inside every thread of a pool.
    """
    weights = gaussian_window(sigma, radius)[radius:]
    x = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="reflect").astype(np.float32)
    for axis in (0, 1):
        x = x.swapaxes(0, axis)
        length = x.shape[0] - 2 * radius
        total = weights[0] * x[radius : radius + length]
        for offset in range(1, radius + 1):
            before = x[radius - offset : radius - offset + length]
            total += weights[offset] * (before + x[radius + offset : radius + offset + length])
        x = total.swapaxes(0, axis)
    return (x + 0.5).astype(np.uint8)
