"""Images in tar shards."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msbreg.console import say
from msbreg.data.listing import Listing, listing_file, load_listing, save_listing, state_of
from msbreg.data.source import (
    ENDINGS,
    EXTENSIONS,
    Source,
    base_name,
    files_below,
    instead_of_images,
    label_of,
    last_ending,
    number_classes,
    what_to_do,
)
from msbreg.data.tars import Member, OddTarError, members, members_of_plain
from msbreg.errors import DataError

__all__ = ["TarShards", "words_of"]

SECONDS_UNTIL_SAID = 3.0
"""After which it is said that shards are being listed."""


class TarShards(Source):
    """WebDataset shards: uncompressed tar files in which members of one name and different endings form a sample.

    The headers are scanned once, at the start; images are then read at their offsets, in any order. Of a sample, its
    first image counts, and its `cls` member is the label, unknown where that is empty or -1. Samples without an image
    are passed over, and shards without one too, with a warning. Of members of one name the last counts, as for tar, and
    a hard link is what it links to.

    Args:
        path: one shard, a folder of shards, or a pattern with {000..127}, {a,b}, * or ?.
        cache: folder that keeps what the scan found, for the next time; None: it is not kept.
        only: part of the name of those among them that count, as `train`; None: all count.

    Raises:
        DataError: nothing matches, a shard is not an uncompressed tar file, is cut short, has sparse members or tar
            files in the place of images, or there is no image.
    """

    def __init__(self, path: str | Path, *, cache: Path | None = None, only: str | None = None) -> None:
        self.pattern = str(path) if only is None else f"the {only} shards of {path}"
        self.shards = [shard for shard in _expand_shards(path) if only is None or only in words_of(shard)]
        if not self.shards:
            raise DataError(f"{self.pattern} names no shards: expected tar files, or rising numbers as in {{000..127}}")
        file = None if cache is None else listing_file(cache, self.shards)
        state = state_of(self.shards)
        listing = None if file is None or state is None else load_listing(file, state)
        if listing is None:
            listing = self._scanned()
            if file is not None and state is not None:
                save_listing(file, state, listing)
        self.names, self.place, self.labels, self.classes, remarks = listing
        for remark in remarks:
            warnings.warn(f"{self.pattern}: {remark}", stacklevel=2)

    def _scanned(self) -> Listing:
        plural = "s" * (len(self.shards) > 1)
        said = f"listing {len(self.shards):,} shard{plural}: {self.pattern}"
        news = threading.Timer(SECONDS_UNTIL_SAID, say, (said, sys.stderr))
        news.daemon = True
        news.start()
        try:
            with ThreadPoolExecutor(max_workers=min(8, len(self.shards))) as pool:
                found = list(pool.map(_scan_shard, self.shards))
        finally:
            news.cancel()
        members = [(shard, *member) for shard, one in enumerate(found) for member in one.images]
        dotted = [name for one in found for name in one.dotted]
        links = [name for one in found for name in one.links]
        empty = [shard for shard, one in zip(self.shards, found, strict=True) if members and not one.images]
        remarks = [
            f"{len(names):,} such as {names[0]} were passed over: {why}"
            for names, why in (
                (dotted, "in WebDataset all that follows the first dot of a name is its ending"),
                (links, "they are links, but not hard ones to members before them"),
                (empty, f"these of its {len(found):,} shards hold no images"),
            )
            if names
        ]
        if not members:
            none = f"{self.pattern} holds no images: no member of its {len(self.shards)} shards ends in {ENDINGS}"
            endings = sum((one.endings for one in found), Counter[str]())
            raise DataError("; ".join([none, *remarks]) + ("" if remarks else instead_of_images(endings)))
        shard, names, offset, size, labels = zip(*members, strict=True)
        place = np.array([shard, offset, size], dtype=np.int64).T
        return Listing(list(names), place, *number_classes(labels), remarks)

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        shard, offset, size = self.place[index].tolist()
        descriptor = os.open(self.shards[shard], os.O_RDONLY)
        try:
            data = os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
        if len(data) < size:
            raise OSError("the shard has become shorter")
        return data

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return f"{self.shards[self.place[index, 0]]}:{self.names[index]}"

    def base_names(self) -> list[str]:
        """See `Source.base_names`."""
        return [base_name(name) for name in self.names]

    def __str__(self) -> str:
        return self.pattern


def words_of(shard: str) -> set[str]:
    """The words in a shard's own name, in small letters: `train` and `tar` for .../train-0001.tar."""
    return set(re.findall("[a-z]+", base_name(shard).lower()))


def _expand_shards(path: str | Path) -> list[str]:
    """The shards that a path or pattern names, sorted as written."""
    text = str(path)
    if os.path.isdir(path):
        return [os.path.join(text, name) for name in sorted(files_below(Path(path), ("tar",)))]
    if os.path.exists(path):
        return [text]
    shards = []
    for expanded in _expand_braces(text):
        matches = sorted(glob.glob(expanded))
        if not matches:
            raise DataError(f"no such shard: {expanded}" + (f" (from {text})" if expanded != text else ""))
        shards += matches
    return shards


def _expand_braces(text: str) -> list[str]:
    """The shell's {000..127} and {a,b}, any number of them."""
    parts = re.split(r"\{([^{}]*)\}", text)
    choices = [[part] for part in parts]
    for place in range(1, len(parts), 2):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", parts[place])
        if span:
            first, last = span.groups()
            choices[place] = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        else:
            choices[place] = parts[place].split(",")
    return ["".join(choice) for choice in itertools.product(*choices)]


class _Scanned(NamedTuple):
    """What a shard holds."""

    images: list[tuple[str, int, int, str | None]]
    """Name, offset, size and label of every sample's first image, in the shard's order."""
    dotted: list[str]
    """Names of images in samples that have none, since what follows the first dot is not an image's ending alone."""
    links: list[str]
    """Names of links that are not followed."""
    endings: Counter[str]
    """How many members end so."""


def _scan_shard(path: str) -> _Scanned:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return _scan(path, descriptor, members_of_plain(descriptor))
        except OddTarError:
            return _scan(path, descriptor, members(path))
        finally:
            os.close(descriptor)
    except tarfile.TarError as error:
        instead = "" if path.lower().endswith(".tar") else what_to_do(last_ending(path))
        raise DataError(
            f"shard {path}{instead and instead + ','} is not a whole, uncompressed tar file: {error}"
        ) from error
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from error


def _scan(path: str, descriptor: int, inside: Iterable[Member]) -> _Scanned:
    places: dict[str, tuple[int, int]] = {}
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str | None] = {}
    dotted: list[tuple[str, str]] = []
    links: list[str] = []
    endings: Counter[str] = Counter()
    for member in inside:
        name = member.name
        if member.hard_link in places:
            places[name] = places[member.hard_link]
        elif member.hard_link is None and not member.symbolic:
            places[name] = (member.offset, member.size)
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        key, ending = f"{folder}/{stem}", ending.lower()
        if not stem:  # hidden
            continue
        if ending:
            endings[last_ending(ending)] += 1
        if member.symbolic or name not in places:
            links += [name] * (ending in EXTENSIONS)
        elif ending in EXTENSIONS and (key not in images or images[key][0] == name):
            images[key] = (name, *places[name])
        elif last_ending(ending) in EXTENSIONS:
            dotted.append((key, name))
        elif ending == "cls":
            offset, size = places[name]
            labels[key] = label_of(os.pread(descriptor, size, offset).decode("utf-8", "replace").strip())
    if not images and endings["tar"]:
        raise DataError(
            f"shard {path} holds {endings['tar']:,} tar files instead of images: unpack it, and where each of them is "
            "a class, as ImageNet's are, these too, each into a folder of its own inside a folder train"
        )
    passed_over = [name for key, name in dotted if key not in images]
    return _Scanned([(*image, labels.get(key)) for key, image in images.items()], passed_over, links, endings)
