"""What tar shards hold, kept for the next time: a listing of millions of images takes a minute and more to make."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msbreg.errors import MSBRegError
from msbreg.files import reason, whole_file

__all__ = ["Listing", "listing_file", "load_listing", "save_listing", "state_of"]

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


def listing_file(folder: Path, shards: Sequence[str]) -> Path:
    """Where the listing of shards at these places is kept: one file, however often they are staged there anew."""
    return folder / f"shards-{_hash([os.path.abspath(shard) for shard in shards])}.npz"


def state_of(shards: Sequence[str]) -> str | None:
    """A hash of the shards' sizes and times, by which a listing is known to be theirs.

    A copy may have the time of modification of what it takes the place of, but not the time of change and the inode.

    To be asked before they are scanned, so that what changes meanwhile is not taken for what was scanned. None where a
    shard is not there.
    """
    try:
        status = [os.stat(shard) for shard in shards]
    except OSError:
        return None
    return _hash([VERSION, *((one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in status)])


def _hash(value: list[Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def load_listing(file: Path, state: str) -> Listing | None:
    """What `save_listing` wrote of shards in this state, or None where there is nothing, or nothing whole."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if arrays["state"].item() != state:
                return None
            names, classes, remarks = (json.loads(arrays[name].tobytes()) for name in ("names", "classes", "remarks"))
            listing = Listing(names, arrays["place"], arrays["labels"], classes, remarks)
    except Exception:  # damaged zip files make zipfile and NumPy raise nearly anything
        return None
    return listing if len(names) == len(listing.place) == len(listing.labels) else None


def save_listing(file: Path, state: str, listing: Listing) -> None:
    """Writes a listing of shards in this state, whole or not at all: then it warns."""
    names, classes, remarks = (
        np.frombuffer(json.dumps(texts).encode(), np.uint8)
        for texts in (listing.names, listing.classes, listing.remarks)
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary, temporary.open("wb") as opened:
            np.savez(
                opened,
                state=np.array(state),
                names=names,
                place=listing.place,
                labels=listing.labels,
                classes=classes,
                remarks=remarks,
            )
    except (OSError, MSBRegError) as error:
        warnings.warn(
            f"what the shards hold cannot be kept in {file.parent} ({reason(error)}), and is listed anew each time: "
            "let --data.cache be a folder that can be written",
            stacklevel=2,
        )
