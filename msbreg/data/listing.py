"""What tar shards hold, kept for the next time: a listing of millions of images takes a minute and more to make."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from msbreg.errors import MSBRegError
from msbreg.files import whole_file

__all__ = ["Listing", "listing_file", "load_listing", "save_listing"]

VERSION = 3
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
    remarks: list[str]
    """Sentences about images that were passed over."""


def listing_file(folder: Path, shards: Sequence[str]) -> Path | None:
    """Where the listing of these shards is kept: named by paths, sizes and times, so that shards that change lose it.

    A copy may have the time of modification of what it takes the place of, but not the time of change and the inode.

    To be asked before they are scanned, so that what changes meanwhile is not taken for what was scanned. None where a
    shard is not there.
    """
    try:
        status = [os.stat(shard) for shard in shards]
    except OSError:
        return None
    named = [
        (os.path.abspath(shard), one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns)
        for shard, one in zip(shards, status, strict=True)
    ]
    return folder / f"shards-{hashlib.sha256(json.dumps([VERSION, named]).encode()).hexdigest()[:32]}.npz"


def load_listing(file: Path) -> Listing | None:
    """What `save_listing` wrote, or None where there is nothing, or nothing whole."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            names, classes, remarks = (json.loads(arrays[name].tobytes()) for name in ("names", "classes", "remarks"))
            listing = Listing(names, arrays["place"], arrays["labels"], classes, remarks)
    except Exception:  # damaged zip files make zipfile and NumPy raise nearly anything
        return None
    return listing if len(names) == len(listing.place) == len(listing.labels) else None


def save_listing(file: Path, listing: Listing) -> None:
    """Writes a listing, whole or not at all; where that is impossible, it is made anew the next time."""
    names, classes, remarks = (
        np.frombuffer(json.dumps(texts).encode(), np.uint8)
        for texts in (listing.names, listing.classes, listing.remarks)
    )
    with contextlib.suppress(OSError, MSBRegError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(opened, names=names, place=listing.place, labels=listing.labels, classes=classes, remarks=remarks)
