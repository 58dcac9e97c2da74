"""What tar shards hold, kept for the next time: a listing of millions of images takes a minute and more to make."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Listing", "keep", "kept"]

VERSION = 1
"""Of what a listing is made of, and by which rules: another one is not read."""


class Listing(NamedTuple):
    """The N images of some shards."""

    names: list[str]
    """(N,) of the tar members."""
    place: NDArray[np.int64]
    """(N, 3): which shard, offset in it, bytes."""
    labels: NDArray[np.int64]
    """(N,) class numbers, -1 where unknown."""
    classes: list[str]
    """Names of the classes by number."""


def kept(folder: Path, shards: Sequence[str]) -> Listing | None:
    """What `keep` wrote of these shards, unless one has another size or time by now; None where it cannot be read."""
    try:
        with np.load(_file(folder, shards), allow_pickle=False) as file:
            names, classes = (json.loads(file[name].tobytes()) for name in ("names", "classes"))
            listing = Listing(names, file["place"], file["labels"], classes)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return listing if len(names) == len(listing.place) == len(listing.labels) else None


def keep(folder: Path, shards: Sequence[str], listing: Listing) -> None:
    """Writes a listing, whole or not at all; where that is impossible, it is made anew the next time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = _file(folder, shards)
        beside = target.with_suffix(f".{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                names, classes = (_packed(texts) for texts in (listing.names, listing.classes))
                np.savez(file, names=names, place=listing.place, labels=listing.labels, classes=classes)
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError:
        pass


def _packed(texts: list[str]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(texts).encode(), np.uint8)


def _file(folder: Path, shards: Sequence[str]) -> Path:
    """Named by what would change if the shards did."""
    status = [os.stat(shard) for shard in shards]
    named = [(os.path.abspath(shard), one.st_size, one.st_mtime_ns) for shard, one in zip(shards, status, strict=True)]
    return folder / f"shards-{hashlib.sha256(json.dumps([VERSION, named]).encode()).hexdigest()[:32]}.npz"
