"""The members of a tar file, by what its headers say."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from msbreg.errors import DataError

__all__ = ["Member", "OddTarError", "members", "members_of_plain"]

BLOCK = 512
_READ_BYTES = 1 << 20
"""Read at a time to see that nothing but zeros follows a tar file's end; tar files that were joined have more there."""


class Member(NamedTuple):
    """A file in a tar file, or a link."""

    name: str
    offset: int
    """Where its data begins; a link has none."""
    size: int
    """Bytes of its data."""
    hard_link: str | None = None
    """What it links to."""
    symbolic: bool = False
    """Whether it is a symbolic link."""


class OddTarError(Exception):
    """What `members_of_plain` leaves to `members`, which says what is wrong or knows better."""


def members_of_plain(descriptor: int) -> Iterator[Member]:
    """What `members` yields, in a third of the time, of a whole tar file that has plain ustar headers alone.

    tarfile reads all that a header may hold, in Python, which threads do one at a time.

    Raises:
        OddTarError: from anything else on, as long names, pax headers, sparse members or damage.
        OSError: it cannot be read.
    """
    whole, offset = os.fstat(descriptor).st_size, 0
    window, begin = b"", 0
    while offset < whole:
        if len(header := window[offset - begin : offset - begin + BLOCK]) < BLOCK:
            window, begin = os.pread(descriptor, 4 * BLOCK, offset), offset  # a label and the header that follows it
            header = window[:BLOCK]
        if len(header) == BLOCK and not any(header):
            _require_zeros(descriptor, offset)
            return
        if len(header) < BLOCK or header[257:262] != b"ustar":
            raise OddTarError
        kind, size = header[156:157], _number(header[124:136])
        if sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) != _number(header[148:156]):  # its own place is blank
            raise OddTarError
        name = _text(header[:100])
        if header[345]:
            name = f"{_text(header[345:500])}/{name}"
        offset += BLOCK
        if kind == b"0":
            yield Member(name, offset, size)
            offset += -(-size // BLOCK) * BLOCK
        elif kind == b"1":
            yield Member(name, offset, size, hard_link=_text(header[157:257]))
        elif kind == b"2":
            yield Member(name, offset, size, symbolic=True)
        elif kind != b"5":  # a folder
            raise OddTarError
        if offset > whole:
            raise OddTarError
    if not whole:
        raise OddTarError


def members(path: str) -> Iterator[Member]:
    """The files and links in an uncompressed tar file of any kind, in its order, by Python's tarfile.

    Raises:
        tarfile.TarError: it is none, is cut short, or something follows its end.
        DataError: it has a sparse member.
        OSError: it cannot be read.
    """
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # which it would keep for a second pass
            if member.issparse():
                raise DataError(f"shard {path} has {member.name} as a sparse file: pack it without tar's --sparse")
            if member.isreg() or member.islnk() or member.issym():
                linked = member.linkname if member.islnk() else None
                yield Member(member.name, member.offset_data, member.size, hard_link=linked, symbolic=member.issym())
        # tarfile takes anything but a header for the end of the file, where there should be zeros alone.
        try:
            _require_zeros(tar.fileobj.fileno(), tar.offset)  # type: ignore[attr-defined]  # a file, which it opened itself
        except OddTarError as error:
            raise tarfile.ReadError(f"after its end, at byte {tar.offset:,}, something else follows") from error


def _require_zeros(descriptor: int, offset: int) -> None:
    """Raises OddTarError where anything else follows."""
    while block := os.pread(descriptor, _READ_BYTES, offset):
        if any(block):
            raise OddTarError
        offset += len(block)


def _text(field: bytes) -> str:
    return os.fsdecode(field.partition(b"\0")[0])


def _number(field: bytes) -> int:
    """Octal digits, or where the first bit is set, what follows it in base 256."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:  # below zero in base 256, too
        raise OddTarError from error
