"""Every random number of a view, drawn at once for a batch.

A draw is a pure function of (seed, sample ordinal, view): resuming, the number of processes and the number of threads
change no pixel, and both backends receive the same crop, the same colours and the same blur for the same sample.

How this differs from torchvision's transforms: crops follow RandomResizedCrop exactly (ten attempts, then the centre).
Colours do not follow ColorJitter: brightness, contrast, saturation, hue and grayscale are always applied in this order
and as one affine map of RGB, after the blur, clipped once at the end; contrast turns about 128 instead of the view's
mean grey; hue turns the chroma plane of YIQ instead of the HSV circle. NVIDIA DALI's `color_twist` makes the same
choices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from msbreg.data.recipes import Recipe, View
from msbreg.philox import WORD, philox4x32, uniforms

__all__ = ["Draw", "colour_matrices", "crop_boxes", "draw", "permutation"]

Float = NDArray[np.float64]
Integer = NDArray[np.int64]

ATTEMPTS = 10
DRAWS = 32
AREA, RATIO = slice(0, ATTEMPTS), slice(ATTEMPTS, 2 * ATTEMPTS)
TOP, LEFT, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAYSCALE, BLUR, SIGMA, SOLARIZE, FLIP = range(20, DRAWS)

AUGMENTATION = 2**31
ORDER = 2**32 - 1  # the last counter word of the order of images; as a view's it would be the 2**31st

GREY = 128.0
LUMA = np.array([0.299, 0.587, 0.114])
RGB_TO_YIQ = np.array([LUMA, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
TO_GREY = np.outer(np.ones(3), LUMA)
CHROMA = np.eye(3) - TO_GREY
QUARTER_TURN = np.linalg.inv(RGB_TO_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ RGB_TO_YIQ


class Draw(NamedTuple):
    """What was drawn for one view of B images."""

    box: NDArray[np.int32]
    """(B, 4): top, left, height and width of the crop in pixels of the upright image; inside it, never empty."""
    colour: NDArray[np.float32]
    """(B, 3, 4): the map RGB -> colour[:, :, :3] @ RGB + colour[:, :, 3] on the scale 0 to 255."""
    sigma: NDArray[np.float32]
    """(B,): standard deviation of the blur in pixels, 0 for none."""
    radius: NDArray[np.int32]
    """(B,): pixels on either side that the blur's window reaches, ceil(3 sigma), less where the view is smaller."""
    solarize: NDArray[np.bool_]
    """(B,)"""
    flip: NDArray[np.bool_]
    """(B,)"""


def permutation(count: int, *, seed: int, epoch: int) -> Integer:
    """The order of `count` images in an epoch: (count,) int64, a pure function of its arguments.

    Images are sorted by 63 random bits each, so every order is as likely as any other.
    """
    # Here and below the device is named, since `torch.set_default_device` may have set another one.
    index = torch.arange(count, device="cpu")
    epochs, zero, order = torch.tensor([epoch, 0, ORDER], device="cpu")
    words = philox4x32((index, epochs, zero, order), seed)
    return torch.argsort((words[0] << 31) | (words[1] >> 1), stable=True).numpy()


def draw(recipe: Recipe, samples: Integer, sizes: Integer, *, seed: int) -> list[Draw]:
    """Draws all parameters of a batch.

    Args:
        recipe: K views.
        samples: (B,) ordinals of the samples in the training stream, step * global batch + position.
        sizes: (B, 2) height and width of the upright images, pixels.
        seed: 64-bit seed.

    Returns:
        K draws, one per view.
    """
    u = _uniforms(samples, len(recipe), seed)
    return [_draw_view(view, u[number], sizes) for number, view in enumerate(recipe)]


def _uniforms(samples: Integer, views: int, seed: int) -> Float:
    """(K, DRAWS, B) numbers in the open interval (0, 1)."""
    sample = torch.from_numpy(samples)
    block = torch.arange(DRAWS // 4, device="cpu").view(1, -1, 1)
    view = AUGMENTATION + torch.arange(views, device="cpu").view(-1, 1, 1)
    words = philox4x32((block, sample & WORD, sample >> 32, view), seed)
    return torch.stack(uniforms(words), dim=2).flatten(1, 2).double().numpy()


def _draw_view(view: View, u: Float, sizes: Integer) -> Draw:
    sigma = np.where(u[BLUR] < view.blur, _between(view.sigma, u[SIGMA]), 0.0)
    return Draw(
        box=crop_boxes(view, u, sizes),
        colour=colour_matrices(view, u),
        sigma=sigma.astype(np.float32),
        radius=np.minimum(np.ceil(3 * sigma), view.size - 1).astype(np.int32),
        solarize=u[SOLARIZE] < view.solarize,
        flip=u[FLIP] < view.flip,
    )


def _between(bounds: tuple[float, float], u: Float) -> Float:
    return bounds[0] + (bounds[1] - bounds[0]) * u


def crop_boxes(view: View, u: Float, sizes: Integer) -> NDArray[np.int32]:
    """Crops by torchvision's RandomResizedCrop: ten attempts at an area and a ratio, else the largest centred crop.

    Args:
        view: its `area` and `ratio`, or its `centre`, which takes the place of the draw.
        u: (DRAWS, B) numbers in (0, 1).
        sizes: (B, 2) height and width of the images, pixels.

    Returns:
        (B, 4) top, left, height, width, pixels.
    """
    height, width = sizes.T
    if view.centre is not None:
        side = np.maximum(1, np.rint(view.centre * np.minimum(height, width)))
        return np.stack([(height - side) // 2, (width - side) // 2, side, side], axis=1).astype(np.int32)

    area = height * width * _between(view.area, u[AREA])  # (ATTEMPTS, B)
    ratio = np.exp(_between((math.log(view.ratio[0]), math.log(view.ratio[1])), u[RATIO]))
    heights, widths = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    found, attempt, image = fits.any(axis=0), fits.argmax(axis=0), np.arange(len(sizes))
    crop_height = np.where(
        found, heights[attempt, image], np.maximum(1, np.minimum(height, np.rint(width / view.ratio[0])))
    )
    crop_width = np.where(
        found, widths[attempt, image], np.maximum(1, np.minimum(width, np.rint(height * view.ratio[1])))
    )
    top = np.where(found, np.floor(u[TOP] * (height - crop_height + 1)), (height - crop_height) // 2)
    left = np.where(found, np.floor(u[LEFT] * (width - crop_width + 1)), (width - crop_width) // 2)
    return np.stack([top, left, crop_height, crop_width], axis=1).astype(np.int32)


def colour_matrices(view: View, u: Float) -> NDArray[np.float32]:
    """Brightness b, contrast c, saturation s and hue angle h as one map of RGB (values 0 to 255).

    With l the row of luma weights, 1 l the projection to grey, P = I - 1 l the chroma and Q its turn by 90 degrees in
    the IQ plane, RGB becomes

        c b (1 l + s cos(h) P + s sin(h) Q) RGB + 128 (1 - c),

    and grayscale is s = 0.

    Args:
        view: probabilities and strengths.
        u: (DRAWS, B) numbers in (0, 1).

    Returns:
        (B, 3, 4)
    """
    jitter = u[JITTER] < view.jitter

    def factor(strength: float, number: int) -> Float:
        return np.where(jitter, _between((max(0.0, 1 - strength), 1 + strength), u[number]), 1.0)

    brightness, contrast = factor(view.brightness, BRIGHTNESS), factor(view.contrast, CONTRAST)
    saturation = np.where(u[GRAYSCALE] < view.grayscale, 0.0, factor(view.saturation, SATURATION))
    angle = np.where(jitter, 2 * math.pi * _between((-view.hue, view.hue), u[HUE]), 0.0)

    def column(values: Float) -> Float:
        return values[:, None, None]

    chroma = column(saturation * np.cos(angle)) * CHROMA + column(saturation * np.sin(angle)) * QUARTER_TURN
    linear = column(contrast * brightness) * (TO_GREY + chroma)
    offset = np.broadcast_to(column(GREY * (1 - contrast)), (len(contrast), 3, 1))
    return np.concatenate([linear, offset], axis=2).astype(np.float32)
