"""The embedded data set: printed cloth in ten patterns, rendered here, so that a first run needs no download."""

import contextlib
import glob
import io
import json
import os
import shutil
import time
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msbreg.data.swatches import CLASSES, swatches
from msbreg.errors import DataError

__all__ = ["IMAGES", "render"]

MANIFEST = "rendered.json"
VERSION = 1  # part of the manifest: raise it when the pictures change, and old folders are rendered anew
JPEG_QUALITY = 90
CHUNK = 64  # images rendered at a time; the stream of random numbers depends on it
A_DAY = 86_400.0  # seconds; rendering takes minutes at the most

IMAGES, TEST_IMAGES = 5000, 2000
"""Sized so that rendering takes seconds, and an epoch on a CPU too."""


def render(
    folder: str | Path, *, images: int = IMAGES, test_images: int = TEST_IMAGES, size: int = 32, seed: int = 0
) -> Path:
    """Renders the data set as JPEG files `train/CLASS/NUMBER.jpg` and `test/CLASS/NUMBER.jpg`, classes in equal parts.

    The same arguments give the same pictures. A folder that is already complete is returned at once; one rendered with
    other arguments, or from which files have been removed, as where caches are swept, is replaced. The folder appears
    whole or not at all: files are written beside it and the finished folder is renamed.

    Args:
        folder: where to; its parents are made.
        images: training images.
        test_images: held-out images, drawn from a stream of their own.
        size: side of an image in pixels.
        seed: a whole number, 0 or more.

    Returns:
        The folder.

    Raises:
        DataError: where the folder cannot be written, or exists and holds something else.
    """
    folder = Path(folder)
    _sweep(folder)
    manifest = {"version": VERSION, "images": images, "test_images": test_images, "size": size, "seed": seed}
    if _is_whole(folder, manifest):
        return folder
    if folder.exists() and not (_manifest_of(folder) or _is_empty(folder)):
        raise DataError(f"{folder} is not a folder of rendered images and is left as it is; choose another place")
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        for stream, (split, count) in enumerate({"train": images, "test": test_images}.items()):
            random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream])))
            _write_split(partial / split, count, size, random)
        (partial / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        _put_in_place(partial, folder, manifest)
    except OSError as error:
        raise DataError(f"cannot write the rendered images to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _sweep(folder: Path) -> None:
    """Removes what killed processes left beside the folder; what is young may be at work still."""
    with contextlib.suppress(OSError):  # another process may sweep too
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}-{8 * '[0-9a-f]'}*"):
            if time.time() - leftover.stat().st_mtime > A_DAY:
                shutil.rmtree(leftover, ignore_errors=True)


def _manifest_of(folder: Path) -> dict[str, int] | None:
    """What a finished folder was rendered from; None where there is no such folder."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_empty(folder: Path) -> bool:
    """Whether it is a folder without a file in it, at whatever depth."""
    return folder.is_dir() and all(path.is_dir() for path in folder.rglob("*"))


def _is_whole(folder: Path, manifest: dict[str, int]) -> bool:
    """Whether the folder has all that was rendered with these arguments."""
    there = manifest["images"] + manifest["test_images"]
    return _manifest_of(folder) == manifest and sum(1 for _ in folder.glob("*/*/*.jpg")) >= there


def _write_split(folder: Path, count: int, size: int, random: np.random.Generator) -> None:
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for start in range(0, count, CHUNK):
        labels = np.arange(start, min(start + CHUNK, count)) % len(CLASSES)
        for offset, picture in enumerate(swatches(labels, size=size, random=random)):
            (folder / CLASSES[labels[offset]] / f"{start + offset:05d}.jpg").write_bytes(_jpeg(picture))


def _jpeg(picture: NDArray[np.uint8]) -> bytes:
    encoded = io.BytesIO()  # not to the file itself: Pillow lets a write pass that a full disk cut short
    # Colour at full resolution (subsampling 0): halving it would smear prints of a few pixels.
    Image.fromarray(picture).save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return encoded.getvalue()


def _put_in_place(partial: Path, folder: Path, manifest: dict[str, int]) -> None:
    if folder.exists() and not _is_whole(folder, manifest):
        outdated = partial.with_name(partial.name + "-outdated")
        os.rename(folder, outdated)
        shutil.rmtree(outdated, ignore_errors=True)
    try:
        os.rename(partial, folder)
    except OSError:
        # Another process may have finished the same folder in the meantime; its pictures are these.
        if not _is_whole(folder, manifest):
            raise
