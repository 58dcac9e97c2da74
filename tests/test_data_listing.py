"""What tar shards hold, kept for the next time: used as long as it is theirs, and never more than a saving of time."""

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

from msbreg.config import Config
from msbreg.data import TarShards
from msbreg.data import shards as module
from msbreg.inputs import open_images
from msbreg.processes import Processes


def pack(path: Path, names: list[str]) -> Path:
    """A shard of images with their own names for content, every other one with a label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            label = [(f"{name}.cls", f"kind \udcff{number % 2}")] if number % 2 else []
            for member, text in [(f"{name}.jpg", name), *label]:
                data = text.encode("utf-8", "surrogateescape")
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path) -> Path:
    for number in range(3):
        pack(tmp_path / f"shards/{number}.tar", [f"ü{number}/{image}\udce9" for image in range(4)])
    return tmp_path / "shards"


@pytest.fixture
def scans(monkeypatch) -> list[str]:
    """The shards that were scanned."""
    found: list[str] = []
    scan = module._scan_shard
    monkeypatch.setattr(module, "_scan_shard", lambda path: (found.append(os.path.basename(path)), scan(path))[1])
    return found


def content(source: TarShards) -> list:
    return [(source.name(i), source.read(i), int(source.labels[i])) for i in range(len(source))]


def test_shards_are_scanned_once(shards, scans, tmp_path):
    plain = TarShards(shards)
    first = TarShards(shards, cache=tmp_path / "cache")
    assert sorted(scans) == 2 * ["0.tar"] + 2 * ["1.tar"] + 2 * ["2.tar"]
    second = TarShards(shards / "{0..2}.tar", cache=tmp_path / "cache")
    assert len(scans) == 6
    assert content(plain) == content(first) == content(second) and len(plain) == 12
    assert plain.classes == first.classes == second.classes != [] and {-1, 0} <= set(second.labels.tolist())
    assert len(TarShards(shards / "1.tar", cache=tmp_path / "cache")) == 4 and len(scans) == 7


def test_shards_that_changed_are_scanned_again(shards, scans, tmp_path):
    TarShards(shards, cache=tmp_path)
    size = (shards / "1.tar").stat().st_size
    pack(shards / "1.tar", [f"ü1/another {image}\udce9" for image in range(4)])
    assert (shards / "1.tar").stat().st_size == size
    assert content(TarShards(shards, cache=tmp_path)) == content(TarShards(shards))
    assert len(scans) == 9
    assert len(list(tmp_path.glob("shards-*.npz"))) == 1  # in the place of the one before


def test_shards_that_changed_but_for_size_and_time_are_scanned_again(shards, scans, tmp_path):
    """As a tool leaves them that copies the time of modification as well."""
    status = (shards / "1.tar").stat()
    TarShards(shards, cache=tmp_path)
    pack(shards / "1.tar", [f"ü1/another {image}\udce9" for image in range(4)])
    os.utime(shards / "1.tar", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content(TarShards(shards, cache=tmp_path)) == content(TarShards(shards))
    assert len(scans) == 9


def test_images_that_are_passed_over_are_named_each_time(tmp_path, scans):
    pack(tmp_path / "0.tar", ["a", "IMG.1"])
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"0\.tar: 1 such as IMG\.1\.jpg were passed over"):
            TarShards(tmp_path / "0.tar", cache=tmp_path / "cache")
    assert scans == ["0.tar"]


DAMAGES = {
    "empty": lambda data: b"",
    "cut at its end": lambda data: data[:-30],
    "cut in its middle": lambda data: data[: len(data) // 2],
    "of another version of zip": lambda data: re.sub(rb"(PK\x01\x02..)..", b"\\1\xff\x00", data, flags=re.DOTALL),
    "no text in it": lambda data: data.replace(b'["', b"xx"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_listing_is_made_anew(shards, scans, tmp_path, damage):
    TarShards(shards, cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert content(TarShards(shards, cache=tmp_path / "cache")) == content(TarShards(shards))
    assert len(scans) == 9
    TarShards(shards, cache=tmp_path / "cache")
    assert len(scans) == 9


def test_a_listing_of_other_lengths_is_made_anew(shards, scans, tmp_path):
    TarShards(shards, cache=tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"labels": arrays["labels"][1:]})
    assert len(TarShards(shards, cache=tmp_path / "cache").labels) == 12 and len(scans) == 6


def test_a_shard_that_changes_while_it_is_scanned_is_scanned_again(shards, tmp_path, monkeypatch):
    """What was found is kept under the size and time that the shard had before."""
    scan = module._scan_shard

    def scan_and_replace(path):
        found = scan(path)
        pack(Path(path), [f"{Path(path).stem}/new {image}" for image in range(5)])
        return found

    monkeypatch.setattr(module, "_scan_shard", scan_and_replace)
    assert len(TarShards(shards, cache=tmp_path / "cache")) == 12
    monkeypatch.setattr(module, "_scan_shard", scan)
    assert content(TarShards(shards, cache=tmp_path / "cache")) == content(TarShards(shards))
    assert len(TarShards(shards, cache=tmp_path / "cache")) == 15


def test_a_full_disk_keeps_nothing_and_loses_nothing(shards, tmp_path, file_size_limit):
    with (
        file_size_limit(300),
        pytest.warns(UserWarning, match=r"cannot be kept in .*/cache \(File too large\), and is"),
    ):
        assert len(TarShards(shards, cache=tmp_path / "cache")) == 12
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"cannot be kept in .*/file \(File exists\).*: let --data\.cache be a folder"):
        assert len(TarShards(shards, cache=tmp_path / "file")) == 12


def test_a_run_keeps_the_listing_where_it_keeps_rendered_images(shards, scans, tmp_path):
    config = Config()
    config.data.path, config.data.cache = str(shards), str(tmp_path / "cache")
    for _ in range(2):
        train, _ = open_images(config, Processes("cpu"))
        assert len(train) == 12 and len(scans) == 3
