"""What an encoded image is: its size as told by its header, whether it is whole, and its pixels by Pillow."""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

__all__ = ["Header", "UndecodableError", "UnreadableError", "as_ppm", "decode", "probe"]

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by its EXIF orientation."""

COMMON_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
"""Pillow's names of the formats that DALI decodes too, to the same pixels on a CPU (MPO is a phone's JPEG)."""


class UnreadableError(Exception):
    """An image that cannot be decoded; its text is the reason."""


class UndecodableError(Exception):
    """A backend could not decode some images of a batch.

    Args:
        positions: where in the batch they are.
    """

    def __init__(self, positions: list[int]) -> None:
        super().__init__(f"images {positions} of the batch cannot be decoded")
        self.positions = positions


class Header(NamedTuple):
    """What the loader must know of an image before it is decoded."""

    height: int
    """Pixels, upright."""
    width: int
    """Pixels, upright."""
    common: bool
    """Whether every backend decodes it alike; else it is handed on as a PPM file, see `as_ppm`."""


def probe(data: bytes) -> Header:
    """Reads the header. Images without their format's end marker are decoded whole, to see whether that works.

    Raises:
        UnreadableError: it is empty, not an image, or cut short.
    """
    image = _open(data)
    if not _is_complete(data, image.format):
        _load(image)
    width, height = image.size
    if 5 <= _orientation(image) <= 8:
        width, height = height, width
    return Header(height, width, image.format in COMMON_FORMATS and not image.mode.startswith(("I", "F")))


def decode(data: bytes | memoryview) -> Image.Image:
    """The upright image in RGB; alpha is left out, 16 bits are cut to 8.

    Raises:
        UnreadableError: it cannot be decoded.
    """
    image = _open(data)
    orientation = _orientation(image)
    _load(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def as_ppm(data: bytes) -> bytes:
    """The decoded image as a PPM file, which every backend reads.

    Raises:
        UnreadableError: it cannot be decoded.
    """
    buffer = io.BytesIO()
    decode(data).save(buffer, "PPM")
    return buffer.getvalue()


def _open(data: bytes | memoryview) -> Image.Image:
    if not data:
        raise UnreadableError("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except Exception as error:  # broken headers make Pillow's parsers raise almost anything
        raise UnreadableError("it is not an image, or its header is damaged") from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as above
        raise UnreadableError(f"it cannot be decoded: {error}") from error


def _is_complete(data: bytes, kind: str | None) -> bool:
    """Whether the data end as a whole file of this kind does; False where that cannot be told."""
    if kind in ("JPEG", "MPO"):
        return data.endswith(b"\xff\xd9")
    if kind == "PNG":
        return data.endswith(b"IEND\xaeB`\x82")
    if kind == "WEBP":
        return len(data) >= 8 + int.from_bytes(data[4:8], "little")
    return False


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none. TIFF: Pillow turns the image itself when it decodes it."""
    if "exif" not in image.info or image.format == "TIFF":
        return 1
    exif = Image.Exif()
    try:
        exif.load(image.info["exif"])
        return int(exif.get(ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF says nothing about orientation, and nothing about the image
        return 1
