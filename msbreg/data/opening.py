"""Which source a path stands for: a folder, tar shards, an index file."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

import numpy as np

from msbreg.data.folders import ImageFolder, IndexFile
from msbreg.data.shards import TarShards, words_of
from msbreg.data.source import EXTENSIONS, Source, class_numbers, files_below
from msbreg.errors import DataError
from msbreg.files import expanded

__all__ = ["open_source", "open_split", "with_classes_of"]

HELD_OUT = ("val", "valid", "validation", "test")
"""Names of folders and of shards beside `train`, the first of which that is there is held out."""


def open_source(path: str | Path, *, cache: Path | None = None) -> Source:
    """Images by what the path is: a folder of images or of tar shards, a shard or a pattern of shards, an index file.

    Args:
        path: where the images are, ~ included.
        cache: see `TarShards`.

    Raises:
        DataError: there is nothing there, or nothing that holds images.
    """
    path = text = os.path.expanduser(str(path))
    if os.path.isdir(path):
        if any(files_below(Path(path), EXTENSIONS)):
            if any(name.lower().endswith(".tar") for name in os.listdir(path)):
                warnings.warn(
                    f"{path} holds images, so that tar shards beside them are passed over: give {path}/*.tar for these",
                    stacklevel=2,
                )
            return ImageFolder(path)
        return TarShards(path, cache=cache) if any(files_below(Path(path), ("tar",))) else ImageFolder(path)
    if text.lower().endswith((".txt", ".csv", ".tsv", ".lst")):
        return IndexFile(path)
    if os.path.exists(path) or re.search(r"[*?{\[]", text):
        return TarShards(path, cache=cache)
    raise DataError(f"no such folder or file: {text}")


def open_split(path: str | Path, *, cache: Path | None = None) -> tuple[Source, Source | None]:
    """Training images, and held-out images where they lie beside them.

    A folder with `train` in it is a split one, and one of `val`, `valid`, `validation` and `test` beside it has the
    held-out images, in capitals or not; so it is with the words in the names of tar shards in one folder. Of anything
    else all images are for training. Class numbers of the held-out images are those of the training images.

    Raises:
        DataError: as from `open_source`, the held-out images have a class that the training images lack, the names of
            shards do not tell which of them are held out, or it is a folder further down that is split.
    """
    path = expanded(str(path))
    folders = {below.name.lower(): below for below in sorted(_folders_in(path))}  # of two, the lower case
    if "train" not in folders:
        if word := _held_out_shards(path):
            train: Source = TarShards(path, cache=cache, only="train")
            return train, with_classes_of(train, TarShards(path, cache=cache, only=word))
        source = open_source(path, cache=cache)
        _refuse_split_below(path, source)
        return source, None
    train = open_source(folders["train"], cache=cache)
    for name in HELD_OUT:
        if name in folders:
            return train, with_classes_of(train, open_source(folders[name], cache=cache))
    unused = [name for name, below in folders.items() if name != "train" and any(files_below(below, EXTENSIONS))]
    if unused:
        warnings.warn(
            f"{path} has a folder train, whose images alone are used, and not those in {', '.join(unused)}; if train "
            "is a class, give its folder another name",
            stacklevel=2,
        )
    return train, None


def _held_out_shards(folder: Path) -> str | None:
    """The word in the names of a folder's shards that are held out beside those called `train`; None: it has none."""
    if not folder.is_dir() or any(files_below(folder, EXTENSIONS)):
        return None
    examples: dict[str, str] = {}  # of names with one of the words, and with none or several
    for shard in sorted(files_below(folder, ("tar",))):
        words = words_of(shard) & {"train", *HELD_OUT}
        examples.setdefault(words.pop() if len(words) == 1 else "", shard)
    held_out = [word for word in HELD_OUT if word in examples]
    if not held_out or len(examples) == 1:
        return None
    if "train" not in examples or "" in examples:
        raise DataError(
            f"the shards of {folder} are called {' and '.join(examples.values())}, by which some seem to be held out, "
            f"but not which: give --data.path '{folder}/*.tar' to train on all, or patterns of both, as in --data.path "
            f"'{folder}/train*.tar' --data.eval_path '{folder}/{held_out[0]}*.tar'"
        )
    return held_out[0]


def _refuse_split_below(folder: Path, source: Source) -> None:
    """Raises DataError where images lie in folders `train` and `val`, or another of these, that are not at the top."""
    if isinstance(source, ImageFolder):
        files = source.paths
    elif isinstance(source, TarShards) and folder.is_dir():
        files = [os.path.relpath(shard, folder) for shard in source.shards]
    else:
        return
    inside: dict[str, set[str]] = {}  # names of folders, by the folder that they lie in
    for below in {file.rpartition("/")[0] for file in files}:
        names = below.split("/")
        for depth, name in enumerate(names):
            inside.setdefault("/".join(names[:depth]), set()).add(name.lower())
    for above, found in sorted(inside.items()):
        held_out = [name for name in HELD_OUT if name in found]
        if "train" in found and held_out:
            raise DataError(
                f"{folder} has no folder train, but {folder / above} has one, with {held_out[0]} beside it: give "
                f"--data.path {folder / above}, or an index file of the images where all are to be trained on"
            )


def _folders_in(path: Path) -> list[Path]:
    """Those that are not hidden; none in what is no folder, or cannot be listed."""
    try:
        return [below for below in path.iterdir() if below.is_dir() and not below.name.startswith(".")]
    except OSError:
        return []


def with_classes_of(train: Source, held_out: Source) -> Source:
    """The held-out images with the class numbers of the training images, matched by the classes' names.

    Raises:
        DataError: the held-out images have a class that the training images lack.
    """
    if train.classes and held_out.classes:
        number = {name: index for index, name in enumerate(train.classes)}
        unknown = [name for name in held_out.classes if name not in number]
        if unknown:
            kinds = ["numbers" if all(map(str.isdecimal, one.classes)) else "words" for one in (train, held_out)]
            hint = f" (one has {kinds[0]} for classes, the other {kinds[1]})" if len(set(kinds)) > 1 else ""
            raise DataError(
                f"{held_out} has images of {len(held_out.classes):,} classes, {len(unknown):,} of which {train} has "
                f"not, such as {unknown[0]}{hint}: hold out images of its classes (--data.eval_path), or none "
                "(--data.eval_path none), and afterwards give msbreg eval a --data.path to labelled ones"
            )
        numbers = np.array([number[name] for name in held_out.classes])
        labels = class_numbers(held_out)
        held_out.labels = np.where(labels >= 0, numbers[labels], -1)
        held_out.classes = train.classes
    return held_out
