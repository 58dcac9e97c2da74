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

from msbreg.data.blur import gaussian_blur
from msbreg.data.draws import Draw
from msbreg.data.images import UndecodableError, UnreadableError, decode
from msbreg.data.pixels import joined_views, normalisation, packed
from msbreg.data.recipes import Recipe, View, size_groups

__all__ = ["TorchvisionBackend", "make_crop", "make_view"]

SCALE, SHIFT = (np.array(values, np.float32) for values in normalisation())
INTERPOLATION = {"cubic": InterpolationMode.BICUBIC, "linear": InterpolationMode.BILINEAR}


class _Pending(NamedTuple):
    """A batch under way."""

    images: list[Future]
    tensors: tuple[Tensor, ...]
    """One (K_g, B, H_g, W_g, 3) tensor per view size, which the threads fill: views in float32, or crops in bytes."""
    drawn: Tensor | None
    """(B, K, 16) what `pixelwise` is to do to crops."""


class TorchvisionBackend:
    """Makes views of batches of encoded images in a pool of threads; see `DaliBackend`, whose methods these are.

    Args:
        recipe: K views.
        device: where the views lie; they are cropped and blurred on the CPU, and a GPU does the rest itself.
        threads: threads of the pool.
        dtype: of the views.
    """

    def __init__(self, recipe: Recipe, device: torch.device, threads: int, dtype: torch.dtype) -> None:
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self._ends_with_crops = device.type == "cuda"
        self._groups = size_groups(recipe)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
        self._pending: deque[_Pending] = deque()

    def submit(self, encoded: list[NDArray[np.uint8]], draws: list[Draw]) -> None:
        """See `DaliBackend.submit`."""
        pinned = self.device.type == "cuda"
        dtype = torch.uint8 if self._ends_with_crops else torch.float32
        tensors = []
        for group in self._groups:
            size = self.recipe[group[0]].size
            shape = (len(group), len(encoded), size, size, 3)
            tensors.append(torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned))
        drawn = None
        if self._ends_with_crops:
            drawn = torch.from_numpy(packed(draws))
            drawn = drawn.pin_memory() if pinned else drawn
        arrays = [tensor.numpy() for tensor in tensors]

        def work(position: int) -> None:
            image = decode(encoded[position].data)
            for group, array in zip(self._groups, arrays, strict=True):
                for place, number in enumerate(group):
                    view, draw, out = self.recipe[number], draws[number], array[place, position]
                    if self._ends_with_crops:
                        out[...] = make_crop(image, view, draw, position)
                    else:
                        make_view(image, view, draw, position, out)

        images = [self._pool.submit(work, position) for position in range(len(encoded))]
        self._pending.append(_Pending(images, tuple(tensors), drawn))

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
        if batch.drawn is None:
            return tuple(tensor.flatten(0, 1).permute(0, 3, 1, 2).to(self.dtype) for tensor in batch.tensors)
        drawn = batch.drawn.to(self.device, non_blocking=True).unbind(1)  # K of (B, 16)
        return tuple(
            joined_views(
                tensor.to(self.device, non_blocking=True).unbind(0), [drawn[number] for number in group], self.dtype
            )
            for group, tensor in zip(self._groups, batch.tensors, strict=True)
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


def make_crop(image: Image.Image, view: View, draw: Draw, position: int) -> Image.Image:
    """The crop of an image that a view shows, resized and blurred.

    Args:
        image: upright, RGB.
        view: the block of the recipe.
        draw: what was drawn for this view of the whole batch.
        position: of the image in the batch.
    """
    top, left, height, width = draw.box[position].tolist()
    interpolation = INTERPOLATION[view.interpolation]
    crop = F.resized_crop(image, top, left, height, width, [view.size, view.size], interpolation)
    if draw.radius[position]:
        blurred = gaussian_blur(np.asarray(crop), float(draw.sigma[position]), int(draw.radius[position]))
        crop = Image.fromarray(blurred)
    return crop


def make_view(image: Image.Image, view: View, draw: Draw, position: int, out: NDArray[np.float32]) -> None:
    """Writes one view of one image.

    Args:
        image: as the others, see `make_crop`.
        view: the same.
        draw: the same.
        position: the same.
        out: (size, size, 3), receives the normalised view.
    """
    image = make_crop(image, view, draw, position)
    if view.changes_colour:
        image = image.convert("RGB", tuple(draw.colour[position].ravel().tolist()))
    if draw.flip[position]:
        image = F.horizontal_flip(image)
    pixels = np.asarray(image)
    if draw.solarize[position]:
        pixels = np.where(pixels >= 128, 255 - pixels, pixels)
    np.multiply(pixels, SCALE, out=out)
    out += SHIFT
