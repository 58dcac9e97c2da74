"""Headers of JPEG, PNG and WebP files: which are of the usual kind, that all parsers read alike."""

from __future__ import annotations

import math
from collections.abc import Callable

from PIL import Image

__all__ = ["PLAIN", "size_of_common_jpeg"]

FRAMES = (0xC0, 0xC1, 0xC2)
"""JPEG's markers of a frame with Huffman codes, sequential or progressive, of which an image has one."""
HUFFMAN, SCAN, QUANTISATION, JFIF, PROFILE = 0xC4, 0xDA, 0xDB, 0xE0, 0xE2
ADOBE = 0xEE
"""That of what says which colours four components are; without it DALI shows black."""
OTHER_FRAMES = tuple(marker for marker in range(0xC3, 0xD0) if marker != HUFFMAN)
"""Markers of frames that hardly any program writes: lossless ones, hierarchical ones, arithmetic codes."""
COMMON = {*FRAMES, HUFFMAN, SCAN, QUANTISATION, JFIF, PROFILE, 0xDD, 0xFE}
"""Those of a file without EXIF: beside the above a restart interval and a comment."""


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


def size_of_common_jpeg(data: bytes) -> tuple[int, int] | None:
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
