"""What an encoded image is: whether every backend decodes it, how large it is, and its pixels by Pillow."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # which comes of crops, and tells no name

__all__ = ["UndecodableError", "UnreadableError", "as_ppm", "decode", "probe"]

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

SIXTEEN_BITS = ("PNG", "PPM")
"""Formats of which Pillow's mode I holds 16 bits: elsewhere they are 32 or signed, and what is white is unknown."""

FRAMES = (0xC0, 0xC1, 0xC2)
"""JPEG's markers of a frame with Huffman codes, sequential or progressive, of which an image has one."""
HUFFMAN, SCAN, QUANTISATION, JFIF, PROFILE = 0xC4, 0xDA, 0xDB, 0xE0, 0xE2
ADOBE = 0xEE
"""That of what says which colours four components are; without it DALI shows black."""
OTHER_FRAMES = tuple(marker for marker in range(0xC3, 0xD0) if marker != HUFFMAN)
"""Markers of frames that hardly any program writes: lossless ones, hierarchical ones, arithmetic codes."""
COMMON = {*FRAMES, HUFFMAN, SCAN, QUANTISATION, JFIF, PROFILE, 0xDD, 0xFE}
"""Those of a file without EXIF: beside the above a restart interval and a comment."""


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


def probe(data: bytes) -> tuple[int, int] | None:
    """Height and width, read from the header alone, of a file that every backend decodes: on a CPU to the same pixels.

    That is a whole JPEG, PNG or WebP file of the usual kind, which stands upright. Of anything else, a parser of DALI's
    may think otherwise than Pillow: where it refuses an image in a batch of 32 or more, or decodes it to another size
    than the crop was drawn for, DALI 2.4 may end the process on a CPU. So Pillow decodes the rest, see `decode`.

    Returns:
        None for the rest, the damaged included.

    Raises:
        UnreadableError: it is empty or not an image.
    """
    if size := _size_of_common_jpeg(data):
        return size
    image = _open(data)
    is_plain = PLAIN.get(image.format or "")
    if is_plain is None or not is_plain(data) or _orientation(image) in UPRIGHT:
        return None
    return image.height, image.width


def decode(data: bytes | memoryview) -> Image.Image:
    """The upright image in RGB; alpha is left out, 16 bits are cut to 8.

    Raises:
        UnreadableError: it cannot be decoded, or its pixels are numbers of which nobody knows what is white.
    """
    image = _open(data)
    _load(image)
    orientation = _orientation(image)  # which a PNG file may tell after its pixels
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
        raise UnreadableError("its pixels have no known range (32 bits or signed): save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def as_ppm(image: Image.Image) -> bytes:
    """An RGB image as a PPM file, which every backend reads."""
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue()


def _open(data: bytes | memoryview) -> Image.Image:
    if not data:
        raise UnreadableError("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"it is too large: {error}") from error
    except Exception as error:  # broken headers make Pillow's parsers raise almost anything
        raise UnreadableError("it is not an image, or its header is damaged") from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as above
        raise UnreadableError(f"it cannot be decoded: {error}") from error


def _segments(data: bytes) -> list[tuple[int, bytes]] | None:
    """Marker and contents of a JPEG file's segments up to its scan; None where it is not whole, or has bytes between.

    Pillow overlooks such bytes, DALI's parser does not.
    """
    if not (data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")):
        return None
    place, found = 2, []
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1] if place + 1 < len(data) else 0
        if marker == 0xFF:  # fill bytes are allowed before a marker
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if not place + 4 <= end <= len(data):
            return None
        found.append((marker, data[place + 4 : end]))
        if marker == SCAN:
            return found
        place = end
    return None


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a JPEG file is whole, of a usual kind and in good order up to its scan."""
    return _is_plain(_segments(data))


def _is_plain(segments: list[tuple[int, bytes]] | None) -> bool:
    if segments is None:
        return False
    markers = [marker for marker, _ in segments]
    return (
        sum(marker in FRAMES for marker in markers) == 1
        and not any(marker in OTHER_FRAMES for marker in markers)
        and (ADOBE in markers or not any(marker in FRAMES and contents[5:6] == b"\4" for marker, contents in segments))
        and all(_fill(contents, _huffman) for marker, contents in segments if marker == HUFFMAN)
    )


def _size_of_common_jpeg(data: bytes) -> tuple[int, int] | None:
    """Height and width of what most JPEG files are, plain and without EXIF; None of others.

    It takes a third to a half of Pillow's time, and says nothing that Pillow would not.
    """
    segments = _segments(data)
    if not _is_plain(segments):
        return None
    size = None
    for marker, contents in segments or ():
        if marker not in COMMON:
            return None
        if marker == JFIF and not (contents.startswith(b"JFIF\0") and len(contents) >= 14):
            return None
        if marker == PROFILE and not (contents.startswith(b"ICC_PROFILE\0") and len(contents) >= 14):
            return None
        if marker == QUANTISATION and not _fill(contents, _quantisation):
            return None
        if marker in FRAMES:
            if len(contents) not in (9, 15) or contents[0] != 8 or len(contents) != 6 + 3 * contents[5]:
                return None  # not 8 bits in one or three components
            size = int.from_bytes(contents[1:3], "big"), int.from_bytes(contents[3:5], "big")
    return size if size and 0 < size[0] * size[1] <= (Image.MAX_IMAGE_PIXELS or math.inf) else None


def _fill(contents: bytes, length: Callable[[bytes, int], int]) -> bool:
    """Whether tables, each as long as it says, fill a segment."""
    place = 0
    while place < len(contents):
        place += length(contents, place)
    return place == len(contents)


def _huffman(tables: bytes, place: int) -> int:
    """A byte, 16 numbers of codes, and as many bytes as these add up to."""
    return 17 + sum(tables[place + 1 : place + 17])


def _quantisation(tables: bytes, place: int) -> int:
    """A byte, whose upper half is 0 for numbers of one byte, and 64 numbers."""
    return 129 if tables[place] >> 4 else 65


def _is_plain_png(data: bytes) -> bool:
    """Whether a PNG file is whole, of eight bits a channel at most, without EXIF, and one image alone."""
    if data[8:16] != b"\0\0\0\rIHDR" or data[24] > 8:
        return False
    place = 33
    while (kind := data[place + 4 : place + 8]) not in (b"", b"IHDR", b"eXIf", b"acTL"):
        place += 12 + int.from_bytes(data[place : place + 4], "big")
        if kind == b"IEND":
            return place <= len(data)
    return False


def _is_plain_webp(data: bytes) -> bool:
    """Whether a WebP file is whole and has one chunk alone, its pixels: no EXIF, no second frame."""
    whole, chunk = (int.from_bytes(data[place : place + 4], "little") for place in (4, 16))
    return data[12:16] in (b"VP8 ", b"VP8L") and 8 + whole <= len(data) and 12 + chunk + chunk % 2 == whole


PLAIN: dict[str, Callable[[bytes], bool]] = {
    "JPEG": _is_plain_jpeg,
    "MPO": _is_plain_jpeg,
    "PNG": _is_plain_png,
    "WEBP": _is_plain_webp,
}
"""Whether a file is of the usual kind, by Pillow's name of its format (MPO is a phone's JPEG)."""


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
