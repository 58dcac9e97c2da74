"""Images in files of their own: a folder of them, or an index file with their paths."""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from msbreg.data.source import (
    ENDINGS,
    EXTENSIONS,
    OTHER_EXTENSIONS,
    Source,
    base_name,
    files_below,
    instead_of_images,
    label_of,
    last_ending,
    number_classes,
)
from msbreg.errors import DataError

__all__ = ["ImageFolder", "IndexFile"]

PIECE = 1 << 17
"""Bytes that are read at a time: as most photographs have no more, and memory for more is taken anew for each."""


class _Files(Source):
    """Images that are files of their own."""

    folder: Path
    paths: list[str]
    """(N,) relative to the folder."""

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        # Half the time of `Path.read_bytes`, and of its calls of the operating system.
        descriptor = os.open(os.path.join(self.folder, self.paths[index]), os.O_RDONLY)
        try:
            parts = list(iter(lambda: os.read(descriptor, PIECE), b""))
        finally:
            os.close(descriptor)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return str(self.folder / self.paths[index])

    def base_names(self) -> list[str]:
        """See `Source.base_names`."""
        return [base_name(path) for path in self.paths]


class ImageFolder(_Files):
    """All images below a folder, at any depth, sorted by path; hidden files and other files are passed over.

    Images of kinds that are not decoded are passed over with a warning.

    The first-level folders are the classes where there are two or more of them; images outside them, and all images
    where there are fewer, have the label -1. Links are followed.

    Args:
        folder: where to look.

    Raises:
        DataError: no such folder, it cannot be listed, or there is no image below it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{folder} is not a folder" if self.folder.exists() else f"no such folder: {folder}")
        found = sorted(files_below(self.folder, EXTENSIONS + OTHER_EXTENSIONS))
        self.paths = [path for path in found if last_ending(path) in EXTENSIONS]
        others = [path for path in found if last_ending(path) in OTHER_EXTENSIONS]
        if not self.paths:
            instead = f"; {len(others):,} such as {others[0]} are of kinds that are not decoded" if others else ""
            endings = Counter(last_ending(path) for path in files_below(self.folder, None) if "." in base_name(path))
            instead = instead or instead_of_images(endings)
            raise DataError(f"{self.folder} holds no images: no file below it ends in {ENDINGS}{instead}")
        top = [path.split("/", 1)[0] if "/" in path else None for path in self.paths]
        self.labels, self.classes = number_classes(top)
        if len(self.classes) < 2:
            self.labels, self.classes = np.full(len(top), -1), []
        if others:
            warnings.warn(
                f"{self.folder} has {len(others):,} images of kinds that are not decoded, such as {others[0]}, "
                "which are passed over: convert them to be trained on",
                stacklevel=2,
            )

    def __str__(self) -> str:
        return str(self.folder)


class IndexFile(_Files):
    """Images listed in a text file, one a line: a path, relative to the file's folder, and perhaps a label.

    In a .csv file a comma lies between them, and a first line without an image's ending is a heading; elsewhere a tab,
    or the last blank of a line that does not end like an image. Empty lines and those that begin with # do not count.
    A label that is empty or -1 is unknown.

    Args:
        path: the text file.

    Raises:
        DataError: no such file, it is not text, or no image is listed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            text = self.path.read_text(encoding="utf-8-sig")  # Windows marks UTF-8 as such
        except FileNotFoundError as error:
            raise DataError(f"no such file: {self.path}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path} should be a text file with one image path a line: {error}") from error
        if "\0" in text:  # which no path has
            raise DataError(f"{self.path} should be a text file with one image path a line, but has a NUL character")
        # Not by `splitlines`: names may have characters that Unicode counts among line breaks.
        lines = [line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#")]
        if self.path.suffix.lower() == ".csv":
            try:
                rows = [[field.strip() for field in row] for row in csv.reader(lines, strict=True)]
            except csv.Error as error:
                raise DataError(f"{self.path} is not a whole .csv file, see its quotes: {error}") from error
            rows = rows[1:] if rows and last_ending(rows[0][0]) not in EXTENSIONS else rows
        else:
            rows = [_split_line(line.strip()) for line in lines]
        if not rows:
            raise DataError(f"{self.path} lists no images: expected one path a line")
        self.folder, self.paths = self.path.parent, [row[0] for row in rows]
        self.labels, self.classes = number_classes([label_of(row[1]) if len(row) > 1 else None for row in rows])

    def __str__(self) -> str:
        return str(self.path)


def _split_line(line: str) -> list[str]:
    """A line of a plain list into path and perhaps label."""
    if "\t" in line:
        return [field.strip() for field in line.split("\t")]
    return [line] if last_ending(line) in EXTENSIONS else line.rsplit(None, 1)
