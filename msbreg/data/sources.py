"""Where encoded images are: a folder, tar shards, an index file.

A source is a list of encoded images that can be read in any order from any thread; it knows nothing of what is in them.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import itertools
import os
import re
import tarfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import features

from msbreg.data.listing import Listing, listing_file, load_listing, save_listing
from msbreg.errors import DataError

__all__ = [
    "EXTENSIONS", "ImageFolder", "IndexFile", "Source", "Subset", "TarShards", "open_source", "open_split",
    "with_classes_of",
]  # fmt: skip

EXTENSIONS: tuple[str, ...] = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "gif", "jfif")
EXTENSIONS += ("avif",) if features.check("avif") else ()
"""Endings, in any case, by which files and tar members are taken for images."""
_ENDINGS = ", ".join(f".{ending}" for ending in EXTENSIONS)

_READ_BYTES = 1 << 20
"""Read at a time to see that nothing but zeros follows a tar file's end; tar files that were joined have more there."""

Labels = NDArray[np.int64]


class Source(ABC):
    """A list of encoded images. Reading is thread-safe."""

    labels: Labels
    """(N,) class numbers, -1 where unknown."""
    classes: list[str]
    """Names of the classes by number; empty where there are none."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image.

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
        return [_base(self.name(index)) for index in range(len(self))]

    def fingerprint(self) -> str:
        """A hash of names and labels in their order: the same for the same images, wherever they lie."""
        names = "\0".join(self.base_names()).encode("utf-8", "surrogateescape")
        return hashlib.sha256(names + self.labels.tobytes()).hexdigest()[:32]


class Subset(Source):
    """Some of the images of another source, with its class numbers."""

    def __init__(self, source: Source, indices: Sequence[int] | Labels) -> None:
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.labels, self.classes = source.labels[self.indices], source.classes

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


class _Files(Source):
    """Images that are files of their own."""

    folder: Path
    paths: list[str]
    """(N,) relative to the folder."""

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        return (self.folder / self.paths[index]).read_bytes()

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return str(self.folder / self.paths[index])

    def base_names(self) -> list[str]:
        """See `Source.base_names`."""
        return [_base(path) for path in self.paths]


class ImageFolder(_Files):
    """All images below a folder, at any depth, sorted by path; hidden files and other files are passed over.

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
        self.paths = sorted(_files_below(self.folder, EXTENSIONS))
        if not self.paths:
            raise DataError(f"{self.folder} holds no images: no file below it ends in {_ENDINGS}")
        top = [path.split("/", 1)[0] if "/" in path else None for path in self.paths]
        self.labels, self.classes = _number_classes(top)
        if len(self.classes) < 2:
            self.labels, self.classes = np.full(len(top), -1), []

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
            rows = rows[1:] if rows and _ending(rows[0][0]) not in EXTENSIONS else rows
        else:
            rows = [_split_line(line.strip()) for line in lines]
        if not rows:
            raise DataError(f"{self.path} lists no images: expected one path a line")
        self.folder, self.paths = self.path.parent, [row[0] for row in rows]
        self.labels, self.classes = _number_classes([_label(row[1]) if len(row) > 1 else None for row in rows])

    def __str__(self) -> str:
        return str(self.path)


class TarShards(Source):
    """WebDataset shards: uncompressed tar files in which members of one name and different endings form a sample.

    The headers are scanned once, at the start; images are then read at their offsets, in any order. Of a sample, its
    first image counts, and its `cls` member is the label, unknown where that is empty or -1. Samples without an image
    are passed over. Of members of one name the last counts, as for tar, and a hard link is what it links to.

    Args:
        path: one shard, a folder of shards, or a pattern with {000..127}, {a,b}, * or ?.
        cache: folder that keeps what the scan found, for the next time; None: it is not kept.

    Raises:
        DataError: nothing matches, a shard is not an uncompressed tar file, is cut short or has sparse members, or
            there is no image.
    """

    def __init__(self, path: str | Path, *, cache: Path | None = None) -> None:
        self.pattern = str(path)
        self.shards = _expand_shards(path)
        if not self.shards:
            raise DataError(f"{self.pattern} names no shards: expected tar files, or rising numbers as in {{000..127}}")
        file = None if cache is None else listing_file(cache, self.shards)
        listing = None if file is None else load_listing(file)
        if listing is None:
            listing = self._scanned()
            if file is not None:
                save_listing(file, listing)
        self.names, self.place, self.labels, self.classes, remarks = listing
        for remark in remarks:
            warnings.warn(f"{self.pattern} has more images: {remark}", stacklevel=2)

    def _scanned(self) -> Listing:
        with ThreadPoolExecutor(max_workers=min(8, len(self.shards))) as pool:
            found = list(pool.map(_scan_shard, self.shards))
        members = [(shard, *member) for shard, (inside, _, _) in enumerate(found) for member in inside]
        dotted = [name for _, names, _ in found for name in names]
        links = [name for _, _, names in found for name in names]
        remarks = [
            f"{len(names):,} such as {names[0]} were passed over: {why}"
            for names, why in (
                (dotted, "in WebDataset all that follows the first dot of a name is its ending"),
                (links, "they are links, but not hard ones to members before them"),
            )
            if names
        ]
        if not members:
            none = f"{self.pattern} holds no images: no member of its {len(self.shards)} shards ends in {_ENDINGS}"
            raise DataError("; ".join([none, *remarks]))
        shard, names, offset, size, labels = zip(*members, strict=True)
        place = np.array([shard, offset, size], dtype=np.int64).T
        return Listing(list(names), place, *_number_classes(labels), remarks)

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
        return [_base(name) for name in self.names]

    def __str__(self) -> str:
        return self.pattern


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
        shards = not any(_files_below(Path(path), EXTENSIONS)) and any(_files_below(Path(path), ("tar",)))
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


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _files_below(folder: Path, endings: tuple[str, ...]) -> Iterator[str]:
    """Paths, relative to the folder, of the files with these endings; nothing hidden, no folder twice, no run's."""

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
        if below != "." and ".lock" in files and "metrics.jsonl" in files:  # a run, whose curves.png is no image to see
            folders.clear()
            continue
        for name in files:
            if not name.startswith(".") and _ending(name) in endings:
                yield name if below == "." else f"{below}/{name}"


def _split_line(line: str) -> list[str]:
    """A line of a plain list into path and perhaps label."""
    if "\t" in line:
        return [field.strip() for field in line.split("\t")]
    return [line] if _ending(line) in EXTENSIONS else line.rsplit(None, 1)


def _label(text: str) -> str | None:
    """What stands for a label in a file, None where it is unknown."""
    return None if text in ("", "-1") else text


def _number_classes(labels: Iterable[str | None]) -> tuple[Labels, list[str]]:
    """Class numbers (-1 for None) and the classes' names, sorted: as numbers where all of them are, else as words."""
    labels = list(labels)
    classes = sorted({label for label in labels if label is not None})
    if all(name.isascii() and name.isdecimal() for name in classes):
        classes.sort(key=lambda name: (len(name.lstrip("0")), name.lstrip("0")))  # of any number of digits
    number: dict[str | None, int] = {name: index for index, name in enumerate(classes)}
    return np.array([number.get(label, -1) for label in labels], dtype=np.int64), classes


def _expand_shards(path: str | Path) -> list[str]:
    """The shards that a path or pattern names, sorted as written."""
    text = str(path)
    if os.path.isdir(path):
        return [os.path.join(text, name) for name in sorted(_files_below(Path(path), ("tar",)))]
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


def _scan_shard(path: str) -> tuple[list[tuple[str, int, int, str | None]], list[str], list[str]]:
    """Name, offset, size and label of every sample's first image, in the shard's order.

    And the names of images in samples that have none, since what follows the first dot is not an image's ending alone;
    and those of links that are not followed.
    """
    places: dict[str, tuple[int, int]] = {}
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str | None] = {}
    dotted: list[tuple[str, str]] = []
    links: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # which it would keep for a second pass
                if member.issparse():
                    raise DataError(f"shard {path} has {member.name} as a sparse file: pack it without tar's --sparse")
                if member.isreg():
                    places[member.name] = (member.offset_data, member.size)
                elif member.islnk() and member.linkname in places:
                    places[member.name] = places[member.linkname]
                elif not member.issym() and not member.islnk():  # a folder
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                key, ending = f"{folder}/{stem}", ending.lower()
                if not stem:  # hidden
                    continue
                if member.issym() or member.name not in places:
                    links += [member.name] * (ending in EXTENSIONS)
                elif ending in EXTENSIONS and (key not in images or images[key][0] == member.name):
                    images[key] = (member.name, *places[member.name])
                elif _ending(ending) in EXTENSIONS:
                    dotted.append((key, member.name))
                elif ending == "cls":
                    offset, size = places[member.name]
                    tar.fileobj.seek(offset)
                    labels[key] = _label(tar.fileobj.read(size).decode("utf-8", "replace").strip())
            # tarfile takes anything but a header for the end of the file, where there should be zeros alone.
            tar.fileobj.seek(tar.offset)
            while block := tar.fileobj.read(_READ_BYTES):
                if any(block):
                    raise tarfile.ReadError(f"after its end, at byte {tar.offset:,}, something else follows")
    except tarfile.TarError as error:
        raise DataError(f"shard {path} is not a whole, uncompressed tar file: {error}") from error
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from error
    passed_over = [name for key, name in dotted if key not in images]
    return [(*image, labels.get(key)) for key, image in images.items()], passed_over, links
