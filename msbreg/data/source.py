"""What a source of images is, and what all kinds of them share.

A source is a list of encoded images that can be read in any order from any thread; it knows nothing of what is in them.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import features

from msbreg.errors import DataError
from msbreg.files import LOCK, METRICS

__all__ = [
    "ENDINGS", "EXTENSIONS", "OTHER_EXTENSIONS", "Labels", "Source", "Subset", "base_name", "class_numbers",
    "files_below", "instead_of_images", "label_of", "last_ending", "number_classes", "what_to_do",
]  # fmt: skip

EXTENSIONS: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "gif", "jfif")
EXTENSIONS += ("avif",) if features.check("avif") else ()
"""Endings, in any case, by which files and tar members are taken for images."""
OTHER_EXTENSIONS = tuple({"heic", "heif", "jxl", "avif", "cr2", "cr3", "nef", "arw", "dng"} - set(EXTENSIONS))
"""Of images that are not decoded here: phones' and cameras' own."""
ENDINGS = ", ".join(f".{ending}" for ending in EXTENSIONS)

PACKED = ("tar", "gz", "tgz", "zip", "bz2", "xz", "zst", "7z", "rar")
TABLES = ("parquet", "arrow", "tfrecord", "tfrecords", "mdb", "lmdb", "beton", "h5", "hdf5", "npy", "npz", "pkl", "rec")
"""Endings, as those of PACKED, of files that are given in the place of images."""

Labels = NDArray[np.int64]


class Source(ABC):
    """A list of encoded images, to be subclassed. Reading is thread-safe."""

    labels: Labels
    """(N,) class numbers, -1 where unknown; other integers than int64, a list or a tensor will do."""
    classes: Sequence[str] = ()
    """Names of the classes by number; empty where there are none."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image: what a file of it holds.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in a message: its path."""

    def subset(self, indices: Sequence[int] | Labels) -> Subset:
        """The images with these numbers, in this order."""
        return Subset(self, indices)

    def base_names(self) -> list[str]:
        """(N,) names without the folders that they lie in, which may move."""
        return [base_name(self.name(index)) for index in range(len(self))]

    def fingerprint(self) -> str:
        """A hash of names and labels in their order: the same for the same images, wherever they lie."""
        names = "\0".join(self.base_names()).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names + class_numbers(self).tobytes()).hexdigest()[:32]


class Subset(Source):
    """Some of the images of another source, with its class numbers."""

    def __init__(self, source: Source, indices: Sequence[int] | Labels) -> None:
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.labels, self.classes = class_numbers(source)[self.indices], source.classes

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        return self.source.read(int(self.indices[index]))

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return self.source.name(int(self.indices[index]))

    def base_names(self) -> list[str]:
        """See `Source.base_names`."""
        names = self.source.base_names()
        return [names[index] for index in self.indices.tolist()]

    def __str__(self) -> str:
        return str(self.source)


def class_numbers(source: Source) -> Labels:
    """The labels of a source, (N,) int64.

    Raises:
        TypeError: they are something else than a whole number for each image.
    """
    labels = np.asarray(source.labels)
    if labels.dtype.kind not in "iu" or labels.shape != (len(source),):
        raise TypeError(
            f"expected the labels of {source} to be {len(source):,} whole numbers, -1 where unknown, got "
            f"{labels.dtype} of shape {labels.shape}"
        )
    return labels.astype(np.int64, copy=False)


def base_name(path: str) -> str:
    """A path without its folders."""
    return path.rpartition("/")[2]


def last_ending(name: str) -> str:
    """What follows a name's last dot, in small letters."""
    return name.rpartition(".")[2].lower()


def instead_of_images(endings: Counter[str]) -> str:
    """What a message that there are no images says of the files that there are, and what to do with them.

    Args:
        endings: how many files have which.
    """
    if not endings:
        return ""
    ((ending, count),) = endings.most_common(1)
    return f"; {count:,} of {endings.total():,} files there end in .{ending}{what_to_do(ending)}"


def what_to_do(ending: str) -> str:
    """With a file that holds images but is none: advice to put behind its name, or nothing."""
    if ending in PACKED:
        return ", which are to be unpacked to tar shards without compression or to images"
    return ", whose images are to be written to files of their own or to tar shards" if ending in TABLES else ""


def files_below(folder: Path, endings: tuple[str, ...] | None) -> Iterator[str]:
    """Paths, relative to the folder, of the files with these endings, or all; nothing hidden or twice, no run's."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}") from error

    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link back up would otherwise be walked for ever
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        if below != "." and {LOCK, METRICS} <= set(files):  # a run, whose curves.png is no image to see
            continue
        for name in files:
            if not name.startswith(".") and (endings is None or last_ending(name) in endings):
                yield name if below == "." else f"{below}/{name}"


def label_of(text: str) -> str | None:
    """What stands for a label in a file, None where it is unknown."""
    return None if text in ("", "-1") else text


def number_classes(labels: Iterable[str | None]) -> tuple[Labels, list[str]]:
    """Class numbers (-1 for None) and the classes' names, sorted: as numbers where all of them are, else as words."""
    labels = list(labels)
    classes = sorted({label for label in labels if label is not None})
    if all(name.isascii() and name.isdecimal() for name in classes):
        classes.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))  # of any number of digits
    number: dict[str | None, int] = {name: index for index, name in enumerate(classes)}
    return np.array([number.get(label, -1) for label in labels], dtype=np.int64), classes
