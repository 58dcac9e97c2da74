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


START_OF_FRAME = tuple(bytes([marker]) for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
"""JPEG's markers of a frame, of which an image has one."""


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
    common = image.format in COMMON_FORMATS and not image.mode.startswith(("I", "F"))
    return Header(height, width, common and (image.format not in ("JPEG", "MPO") or _has_plain_segments(data)))


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


def _has_plain_segments(data: bytes) -> bool:
    """Whether a JPEG file's segments follow each other up to its first scan, without a byte between them.

    Pillow overlooks such bytes. DALI's parser does not, and what it refuses in a batch may end the process: of DALI 2.4
    on a CPU, in batches of 64 and more.
    """
    place, frames = 2, 0
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker == b"\xff":  # fill bytes are allowed before a marker
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        if length < 2 or place + 2 + length > len(data):
            return False
        if marker == b"\xda":
            return frames == 1
        frames += marker in START_OF_FRAME
        if marker == b"\xc4" and not _is_huffman(data[place + 4 : place + 2 + length]):
            return False
        place += 2 + length
    return False


def _is_huffman(tables: bytes) -> bool:
    """Whether a segment's Huffman tables fill it: a byte, 16 numbers of codes, and as many bytes as these add up to."""
    place = 0
    while place < len(tables):
        place += 17 + sum(tables[place + 1 : place + 17])
    return place == len(tables)


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
