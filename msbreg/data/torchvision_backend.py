"""The same views by Pillow and torchvision, for machines without DALI, and to check DALI's by.

It receives the same draws as DALI, so that the two differ by rounding and by the resize's border alone: torchvision
cuts the crop out before it resizes, DALI's filter looks a few pixels beyond the crop.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812

from msbreg.data.draws import Draw
from msbreg.data.images import UndecodableError, UnreadableError, decode
from msbreg.data.recipes import MEAN, STD, Recipe, View, size_groups

__all__ = ["TorchvisionBackend", "gaussian_blur", "make_view"]

SCALE = np.array([1 / (255 * std) for std in STD], np.float32)
SHIFT = np.array([-mean / std for mean, std in zip(MEAN, STD, strict=True)], np.float32)
INTERPOLATION = {"cubic": InterpolationMode.BICUBIC, "linear": InterpolationMode.BILINEAR}


class _Pending(NamedTuple):
    """A batch under way."""

    images: list[Future]
    tensors: tuple[Tensor, ...]
    """One (K_g, B, H_g, W_g, 3) float32 tensor per view size, which the threads fill."""


class TorchvisionBackend:
    """Makes views of batches of encoded images in a pool of threads; see `DaliBackend`, whose methods these are.

    Args:
        recipe: K views.
        device: where the views lie; they are made on the CPU.
        threads: threads of the pool.
    """

    def __init__(self, recipe: Recipe, device: torch.device, threads: int) -> None:
        self.recipe, self.device = recipe, device
        self._groups = size_groups(recipe)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
        self._pending: deque[_Pending] = deque()

    def submit(self, encoded: list[NDArray[np.uint8]], draws: list[Draw]) -> None:
        """See `DaliBackend.submit`."""
        pinned = self.device.type == "cuda"
        tensors = []
        for group in self._groups:
            size = self.recipe[group[0]].size
            tensors.append(torch.empty((len(group), len(encoded), size, size, 3), pin_memory=pinned))
        arrays = [tensor.numpy() for tensor in tensors]

        def work(position: int) -> None:
            image = decode(encoded[position].data)
            for group, array in zip(self._groups, arrays, strict=True):
                for place, number in enumerate(group):
                    make_view(image, self.recipe[number], draws[number], position, array[place, position])

        images = [self._pool.submit(work, position) for position in range(len(encoded))]
        self._pending.append(_Pending(images, tuple(tensors)))

    def receive(self) -> tuple[Tensor, ...]:
        """See `DaliBackend.receive`."""
        batch = self._pending.popleft()
        errors = {position: image.exception() for position, image in enumerate(batch.images)}
        undecodable = [position for position, error in errors.items() if isinstance(error, UnreadableError)]
        if undecodable:
            self.discard()
            raise UndecodableError(undecodable)
        for image in batch.images:
            image.result()
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        # To the GPU as they are: torch casts before it copies, which would be on the CPU, to memory that is not pinned.
        return tuple(
            tensor.flatten(0, 1).to(self.device, non_blocking=True).to(dtype).permute(0, 3, 1, 2)
            for tensor in batch.tensors
        )

    def discard(self) -> None:
        """See `DaliBackend.discard`."""
        for batch in self._pending:
            for image in batch.images:
                image.cancel()
        self._pending.clear()

    def close(self) -> None:
        """Ends the threads."""
        self.discard()
        self._pool.shutdown()


def make_view(image: Image.Image, view: View, draw: Draw, position: int, out: NDArray[np.float32]) -> None:
    """Writes one view of one image.

    Args:
        image: upright, RGB.
        view: the block of the recipe.
        draw: what was drawn for this view of the whole batch.
        position: of the image in the batch.
        out: (size, size, 3), receives the normalised view.
    """
    top, left, height, width = draw.box[position].tolist()
    interpolation = INTERPOLATION[view.interpolation]
    image = F.resized_crop(image, top, left, height, width, [view.size, view.size], interpolation)
    if view.changes_colour:
        image = image.convert("RGB", tuple(draw.colour[position].ravel().tolist()))
    if draw.flip[position]:
        image = F.horizontal_flip(image)
    pixels = np.asarray(image)
    if draw.radius[position]:
        pixels = gaussian_blur(pixels, float(draw.sigma[position]), int(draw.radius[position]))
    if draw.solarize[position]:
        pixels = np.where(pixels >= 128, 255 - pixels, pixels)
    np.multiply(pixels, SCALE, out=out)
    out += SHIFT


def gaussian_blur(pixels: NDArray[np.uint8], sigma: float, radius: int) -> NDArray[np.uint8]:
    """Separable Gaussian blur of (H, W, 3) bytes with a window of 2 radius + 1 pixels, mirrored about border pixels.

    In numpy, because torch's convolution would start a team of threads inside every thread of the pool.
    """
    offsets = np.arange(radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / (2 * weights.sum() - weights[0])).astype(np.float32)
    x = np.pad(pixels, ((radius, radius), (radius, radius), (0, 0)), mode="reflect").astype(np.float32)
    for axis in (0, 1):
        x = x.swapaxes(0, axis)
        length = x.shape[0] - 2 * radius
        total = weights[0] * x[radius : radius + length]
        for offset, weight in zip(offsets[1:], weights[1:], strict=True):
            before = x[radius - offset : radius - offset + length]
            total += weight * (before + x[radius + offset : radius + offset + length])
        x = total.swapaxes(0, axis)
    return (x + 0.5).astype(np.uint8)
