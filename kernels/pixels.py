"""What data augmentation does to pixels one by one, in one pass: colours, solarize, flip, normalisation, cast."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from msbreg.kernels.tiles import cdiv, scalar

__all__ = ["pixelwise", "pixelwise_kernel"]


@triton.jit
def pixelwise_kernel(
    crops_pointer,
    colour_pointer,
    solarize_pointer,
    flip_pointer,
    output_pointer,
    pixels,
    WIDTH: tl.constexpr,
    image_stride,
    row_stride,
    column_stride,
    channel_stride,
    colour_stride,
    solarize_stride,
    flip_stride,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A byte x of a channel c becomes SCALE[c] x' + SHIFT[c], where x' is what colours and solarize make of it.

    crops_pointer: [images, height, width, 3], any strides, uint8; pixels: height * width;
        WIDTH: width, a constant, since each pixel is divided by it.
    colour_pointer: [images, 3, 4], float32, the last two dimensions contiguous: RGB becomes
        colour[:, :3] RGB + colour[:, 3], rounded to bytes.
    solarize_pointer, flip_pointer: [images]; where they are not 0, values of 128 and more are inverted, and rows are
        read from right to left.
    output_pointer: [images, height, width, 3], contiguous, any floating dtype.

    One program makes BLOCK pixels of one image.
    """
    blocks = tl.cdiv(pixels, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    place = first.to(tl.int32) + tl.arange(0, BLOCK)
    inside = place < pixels
    row, column = place // WIDTH, place % WIDTH
    mirrored = tl.load(flip_pointer + image * flip_stride) != 0
    column = tl.where(mirrored, WIDTH - 1 - column, column)
    source = crops_pointer + image * image_stride
    source += row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    to_green = scalar(channel_stride, tl.int64)
    red = tl.load(source, mask=inside, other=0).to(tl.float32)
    green = tl.load(source + to_green, mask=inside, other=0).to(tl.float32)
    blue = tl.load(source + 2 * to_green, mask=inside, other=0).to(tl.float32)
    least_inverted = tl.where(tl.load(solarize_pointer + image * solarize_stride) != 0, 128.0, 256.0)
    colour = colour_pointer + image * colour_stride
    for channel in tl.static_range(3):
        x = tl.load(colour + 4 * channel) * red + tl.load(colour + 4 * channel + 1) * green
        x += tl.load(colour + 4 * channel + 2) * blue + tl.load(colour + 4 * channel + 3)
        x = tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0) + 0.5)
        x = tl.where(x >= least_inverted, 255.0 - x, x)
        x = SCALE[channel] * x + SHIFT[channel]
        target = output_pointer + (3 * (image * pixels + place) + channel)
        tl.store(target, x.to(output_pointer.dtype.element_ty), mask=inside)


def pixelwise(
    crops: Tensor,
    colour: Tensor,
    solarize: Tensor,
    flip: Tensor,
    output: Tensor,
    *,
    scale: tuple[float, float, float],
    shift: tuple[float, float, float],
) -> None:
    """Writes what one launch makes of a batch of bytes.

    Args:
        crops: (N, H, W, 3) uint8, any strides.
        colour: (N, 3, 4) float32, the last two dimensions contiguous.
        solarize: (N,) any dtype; 0 for no.
        flip: as `solarize`.
        output: (N, H, W, 3), contiguous, any floating dtype.
        scale: of the three channels; see the kernel.
        shift: the same.
    """
    images, height, width, _ = crops.shape
    if crops.numel() == 0:
        return
    block = 1024
    with torch.cuda.device_of(output):
        pixelwise_kernel[(images * cdiv(height * width, block),)](
            crops, colour, solarize, flip, output, height * width, width, *crops.stride(), colour.stride(0),
            solarize.stride(0), flip.stride(0), SCALE=scale, SHIFT=shift, BLOCK=block, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
