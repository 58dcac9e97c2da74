"""Between a source and the loader: images with their sizes, and another in the place of one that cannot be read."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msbreg.data.images import UnreadableError, as_ppm, decode, probe
from msbreg.data.source import Source
from msbreg.errors import DataError, MSBRegError

__all__ = ["Reader", "Sample"]


NAMED = 20
"""Images that are named when they are left out; of more it is said how many they are, at each power of two."""


class Sample(NamedTuple):
    """One encoded image."""

    image: int
    """Which one of the source it is."""
    data: NDArray[np.uint8]
    """(bytes,) the file, or the image as a PPM file where not every backend decodes it."""
    height: int
    """Pixels, upright."""
    width: int
    """Pixels, upright."""
    decoded: bool
    """Whether it is such a PPM file, which any backend in working order decodes."""


class Reader:
    """Reads images with their sizes, and puts another in the place of one that cannot be read. Thread-safe.

    Where to look for a substitute is drawn from the image's number, so that those of a folder that is gone are not all
    replaced by one and the same. It is a function of the source alone, so that the training stream stays one too.

    Args:
        source: the images.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.unreadable: dict[int, str] = {}
        """Why images cannot be read, by index."""
        self.news: list[str] = []
        """Sentences about images found unreadable since somebody last emptied this list."""
        self._under_way: dict[int, int] = {}  # thread to image; the read that began first comes first
        self._distrusted: set[int] = set()
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """Images that may be unreadable before it is an error."""
        return max(16, len(self.source) // 100)

    @property
    def longest(self) -> str:
        """The image whose reading has lasted longest, or the source where none is being read."""
        under_way = list(self._under_way.values())
        return self.source.name(under_way[0]) if under_way else str(self.source)

    def sample(self, index: int) -> Sample:
        """The image, or its substitute.

        Raises:
            DataError: too many images cannot be read, or all of them.
        """
        for candidate in _candidates(index, len(self.source)):
            if candidate in self.unreadable:
                continue
            try:
                return self._read(candidate)
            except UnreadableError as error:
                self._reject(candidate, str(error))
        raise DataError(f"none of the {len(self.source):,} images of {self.source} can be read: {self._example()}")

    def _read(self, index: int) -> Sample:
        data = self._bytes(index)
        size = None if index in self._distrusted else probe(data)  # each time: the file may be another one by now
        if size is not None:
            return Sample(index, np.frombuffer(data, np.uint8), *size, decoded=False)
        image = decode(data)
        return Sample(index, np.frombuffer(as_ppm(image), np.uint8), image.height, image.width, decoded=True)

    def _bytes(self, index: int) -> bytes:
        self._under_way[threading.get_ident()] = index
        try:
            data = self.source.read(index)
        except OSError as error:
            raise UnreadableError(f"it cannot be read: {error.strerror or error}") from error
        except MSBRegError:
            raise
        except Exception as error:
            name = self.source.name(index)
            raise RuntimeError(f"{name} was not read, for {type(error).__name__}: {error}") from error
        finally:
            del self._under_way[threading.get_ident()]
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(
                f"expected the encoded bytes of {self.source.name(index)} from Source.read, got {type(data).__name__}"
            )
        return bytes(data)  # which are the same ones, not a copy, where they are bytes already

    def distrust(self, index: int) -> None:
        """Takes notice that a backend could not decode an image: it is left to Pillow from now on, else given up.

        Raises:
            DataError: too many images cannot be read.
        """
        try:
            decode(self._bytes(index))
            self._distrusted.add(index)
        except UnreadableError as error:
            self._reject(index, str(error))

    def recall(self, unreadable: dict[int, str]) -> None:
        """Takes over what an earlier process found unreadable, but for images that are readable by now."""
        for index, reason in unreadable.items():
            try:
                decode(self._bytes(index))
            except UnreadableError:
                self.unreadable[index] = reason

    def _reject(self, index: int, reason: str) -> None:
        with self._lock:
            if index not in self.unreadable:
                self.unreadable[index] = reason
                count = len(self.unreadable)
                if count <= NAMED:
                    self.news.append(f"left out {self.source.name(index)}: {reason}")
                elif count.bit_count() == 1:
                    self.news.append(f"left out {count:,} images by now, such as {self.source.name(index)}: {reason}")
            if self.limit < len(self.unreadable) < len(self.source):
                raise DataError(
                    f"{len(self.unreadable):,} of the {len(self.source):,} images wanted of {self.source} cannot be "
                    f"read, which is more than the {self.limit:,} that are tolerated: {self._example()}"
                )

    def _example(self) -> str:
        index, reason = next(iter(self.unreadable.items()))
        return f"{self.source.name(index)}: {reason}"


def _candidates(index: int, images: int) -> Iterator[int]:
    """The image, then all others, in an order that is drawn from its number."""
    yield index
    stride = int(hashlib.sha256(str(index).encode()).hexdigest(), 16) % images
    while math.gcd(stride, images) > 1:  # else some would be left out
        stride += 1
    for turn in range(1, images):
        yield (index + turn * stride) % images
