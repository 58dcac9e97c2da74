"""Which source a path stands for: a folder, tar shards, an index file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from msbreg.data.folders import ImageFolder, IndexFile
from msbreg.data.shards import TarShards
from msbreg.data.source import EXTENSIONS, Source, files_below
from msbreg.errors import DataError

__all__ = ["open_source", "open_split", "with_classes_of"]


def open_source(path: str | Path, *, cache: Path | None = None) -> Source:
    """Images by what the path is: a folder of images or of tar shards, a shard or a pattern of shards, an index file.

    Args:
        path: where the images are.
        cache: see `TarShards`.

    Raises:
        DataError: there is nothing there, or nothing that holds images.
    """
    text = str(path)
    if os.path.isdir(path):
        shards = not any(files_below(Path(path), EXTENSIONS)) and any(files_below(Path(path), ("tar",)))
        return TarShards(path, cache=cache) if shards else ImageFolder(path)
    if text.lower().endswith((".txt", ".csv", ".tsv", ".lst")):
        return IndexFile(path)
    if os.path.exists(path) or re.search(r"[*?{\[]", text):
        return TarShards(path, cache=cache)
    raise DataError(f"no such folder or file: {text}")


def open_split(path: str | Path, *, cache: Path | None = None) -> tuple[Source, Source | None]:
    """Training images, and held-out images where they lie beside them.

    A folder with `train` and one of `val`, `validation` and `test` in it is a split one; of anything else all images
    are for training. Class numbers of the held-out images are those of the training images.

    Raises:
        DataError: as from `open_source`, or the held-out images have a class that the training images lack.
    """
    folder = Path(path)
    if not (folder / "train").is_dir():
        return open_source(path, cache=cache), None
    train = open_source(folder / "train", cache=cache)
    for name in ("val", "validation", "test"):
        if (folder / name).is_dir():
            return train, with_classes_of(train, open_source(folder / name, cache=cache))
    return train, None


def with_classes_of(train: Source, held_out: Source) -> Source:
    """The held-out images with the class numbers of the training images, matched by the classes' names.

    Raises:
        DataError: the held-out images have a class that the training images lack.
    """
    if train.classes and held_out.classes:
        unknown = [name for name in held_out.classes if name not in train.classes]
        if unknown:
            raise DataError(
                f"{held_out} has images of class {unknown[0]}, which {train} has not. Where its folders are no "
                "classes, leave out --data.eval_path, and afterwards give msbreg eval a --data.path to labelled images"
            )
        numbers = np.array([train.classes.index(name) for name in held_out.classes])
        held_out.labels = np.where(held_out.labels >= 0, numbers[held_out.labels], -1)
        held_out.classes = train.classes
    return held_out
