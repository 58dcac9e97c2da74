"""What a view's pixels go through one by one, after its crop and blur: colours, solarize, flip, normalisation, cast.

On a GPU that is one Triton kernel, which reads bytes and writes what a network takes. It needs no loader of ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msbreg import kernels
from msbreg.data.draws import Draw
from msbreg.data.recipes import MEAN, STD

__all__ = ["joined_views", "normalisation", "packed", "pixelwise", "pixelwise_plain"]

Channels = tuple[float, float, float]


def pixelwise(
    crops: Tensor,
    colour: Tensor,
    solarize: Tensor,
    flip: Tensor,
    *,
    mean: Channels = MEAN,
    std: Channels = STD,
    dtype: torch.dtype = torch.float16,
    out: Tensor | None = None,
) -> Tensor:
    """Views from crops: colours, solarize, flip from left to right, normalisation and cast; on a GPU in one pass.

    What a recipe draws for these, `msbreg.data.draws.draw` gives; a blur would come before.

    Args:
        crops: (N, H, W, 3) uint8, any strides: `images.permute(0, 2, 3, 1)` for images (N, 3, H, W).
        colour: (N, 3, 4) float32, on the scale 0 to 255: RGB becomes colour[:, :, :3] RGB + colour[:, :, 3], clipped
            and rounded to bytes.
        solarize: (N,) whether values of 128 and more are inverted: bool, or numbers, 0 for no.
        flip: (N,) whether the view is mirrored; as `solarize`.
        mean: of the three channels, on the scale 0 to 1; default: ImageNet's.
        std: the same.
        dtype: of the views, floating.
        out: where to write them: a result's shape, in channels_last; its dtype then counts.

    Returns:
        (N, 3, H, W), channels_last: (x / 255 - mean) / std.

    Raises:
        TypeError: a dtype is another one.
        ValueError: a shape or device does not fit, or `out` is not channels_last.
    """
    if crops.dtype != torch.uint8 or colour.dtype != torch.float32:
        raise TypeError(f"expected crops in uint8 and colour in float32, got {crops.dtype} and {colour.dtype}")
    if crops.dim() != 4 or crops.shape[3] != 3:
        raise ValueError(f"expected crops of shape (N, H, W, 3), got {tuple(crops.shape)}")
    count, height, width, _ = crops.shape
    if out is None:
        out = torch.empty(
            (count, 3, height, width), dtype=dtype, device=crops.device, memory_format=torch.channels_last
        )
    if not out.is_floating_point():
        raise TypeError(f"expected views of a floating dtype, not {out.dtype}")
    shapes = {"colour": (count, 3, 4), "solarize": (count,), "flip": (count,), "out": (count, 3, height, width)}
    for (name, shape), tensor in zip(shapes.items(), (colour, solarize, flip, out), strict=True):
        if tensor.shape != shape or tensor.device != crops.device:
            raise ValueError(
                f"expected {name} of shape {shape} on {crops.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
    if not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"expected out in channels_last, got strides {out.stride()}")

    scale, shift = normalisation(mean, std)
    last = out.permute(0, 2, 3, 1)
    if crops.device.type == kernels.DEVICE_TYPE:
        from msbreg.kernels.pixels import pixelwise as launch

        colour = colour if colour.stride()[1:] == (4, 1) else colour.contiguous()
        launch(crops, colour, solarize, flip, last, scale=scale, shift=shift)
    else:
        last.copy_(pixelwise_plain(crops, colour, solarize, flip, scale, shift))
    return out


def normalisation(mean: Channels = MEAN, std: Channels = STD) -> tuple[Channels, Channels]:
    """Scale and shift of each channel that normalise a byte."""
    scale, shift = zip(
        *((1 / (255 * float(s)), -float(m) / float(s)) for m, s in zip(mean, std, strict=True)), strict=True
    )
    return scale, shift


def pixelwise_plain(
    crops: Tensor, colour: Tensor, solarize: Tensor, flip: Tensor, scale: Channels, shift: Channels
) -> Tensor:
    """What the kernel of `pixelwise` computes, in plain torch: (N, H, W, 3) float32."""
    mirrored, inverted = ((asked != 0)[:, None, None] for asked in (flip, solarize))  # (N, 1, 1)
    red, green, blue = torch.where(mirrored[..., None], crops.flip(2), crops).float().unbind(3)
    channels = []
    for channel in range(3):
        row = colour[:, channel, :, None, None].unbind(1)  # 4 of (N, 1, 1)
        x = (row[0] * red + row[1] * green) + (row[2] * blue + row[3])
        x = (x.clamp(0, 255) + 0.5).floor()
        x = torch.where(inverted & (x >= 128), 255 - x, x)
        channels.append(scale[channel] * x + shift[channel])
    return torch.stack(channels, dim=3)


def packed(draws: Sequence[Draw]) -> NDArray[np.float32]:
    """What `joined_views` needs of K draws, in one array (B, K, 16) that goes to the device in one copy.

    Twelve numbers of colours, solarize, flip, and two zeros, so that each row begins at 16 bytes: Triton would compile
    the kernel once more for those that do not.
    """
    rows = np.zeros((len(draws[0].flip), len(draws), 16), np.float32)
    for number, draw in enumerate(draws):
        rows[:, number, :12] = draw.colour.reshape(-1, 12)
        rows[:, number, 12], rows[:, number, 13] = draw.solarize, draw.flip
    return rows


def joined_views(crops: Sequence[Tensor], drawn: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The views of one size, joined.

    Args:
        crops: (B, H, W, 3) uint8 for each of K_g views.
        drawn: (B, 16) for each, from `packed`.
        dtype: of the result.

    Returns:
        (K_g B, 3, H, W), channels_last, normalised by ImageNet's mean and standard deviation.
    """
    count, height, width, _ = crops[0].shape
    views = torch.empty(
        (len(crops) * count, 3, height, width), dtype=dtype, device=crops[0].device, memory_format=torch.channels_last
    )
    for crop, numbers, out in zip(crops, drawn, views.split(count), strict=True):
        pixelwise(crop, numbers[:, :12].unflatten(1, (3, 4)), numbers[:, 12], numbers[:, 13], out=out)
    return views
