"""An encoded image: how large it is, where every backend decodes it, and its pixels by Pillow.

Importing this ends Pillow's DecompressionBombWarning in the whole process: Python's filters know neither threads nor
who called Pillow. Images so large that Pillow refuses them (DecompressionBombError) are left out and named.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from msbreg.data.headers import PLAIN, size_of_common_jpeg

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # which comes of crops, and tells no name
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # of EXIF, no name either

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
    if size := size_of_common_jpeg(data):
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
