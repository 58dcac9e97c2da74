import io
import itertools
import os
import random
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

from PIL import Image, ImageOps, features

from msbreg.data import (
    ImageFolder,
    IndexFile,
    TarShards,
    folders,
    images,
    open_source,
    open_split,
    reader,
    shards,
    tars,
)
from msbreg.data.images import UnreadableError, decode, probe
from msbreg.data.reader import Reader
from msbreg.errors import DataError


def encoded(size=(20, 30), kind="JPEG", mode="RGB", seed=0, **options):
    """A smooth random picture of (height, width), encoded."""
    random_values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    picture = Image.fromarray(random_values).resize(size[::-1], Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pack(path, files, kind=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1.5 if kind == tarfile.PAX_FORMAT else 1
            archive.addfile(member, io.BytesIO(data))
    return path


def test_folder_takes_images_at_any_depth_and_classes_from_the_first_level(tmp_path):
    fill(
        tmp_path,
        {
            "dog/b.JPG": b"1", "cat/deep/er/a.png": b"2", "cat/a.jpeg": b"3", "top.webp": b"4", "notes.txt": b"",
            "dog/x": b"", ".hidden/a.jpg": b"", "cat/.a.jpg": b"", "empty/readme.md": b"",
        },
    )  # fmt: skip
    source = ImageFolder(tmp_path)
    assert source.paths == ["cat/a.jpeg", "cat/deep/er/a.png", "dog/b.JPG", "top.webp"]
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 1, -1] and source.labels.dtype == np.int64
    assert [source.read(index) for index in range(len(source))] == [b"3", b"2", b"1", b"4"]
    assert source.name(2) == str(tmp_path / "dog/b.JPG")


def test_the_pictures_of_runs_among_the_images_are_none_of_them(tmp_path):
    files = {"dog/b.jpg": b"1", "cat/a.jpg": b"2", "runs/one/metrics.jsonl": b"", "runs/one/.lock": b""}
    fill(tmp_path, files | {"runs/one/curves.png": b"3", "cat/.lock": b""})
    assert ImageFolder(tmp_path).paths == ["cat/a.jpg", "dog/b.jpg"]


@pytest.mark.parametrize("names", [["a.jpg", "b.jpg"], ["images/a.jpg", "images/b.jpg"]])
def test_fewer_than_two_folders_are_no_classes(tmp_path, names):
    source = ImageFolder(fill(tmp_path, dict.fromkeys(names, b"x")))
    assert source.classes == [] and source.labels.tolist() == [-1, -1]


def test_a_link_back_up_is_not_walked_for_ever(tmp_path):
    fill(tmp_path, {"a/1.jpg": b"x", "b/2.jpg": b"x"})
    (tmp_path / "a/up").symlink_to(tmp_path)
    assert len(ImageFolder(tmp_path)) == 2


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path / "missing", "no such folder or file: .*missing"),
        (lambda path: path, "holds no images: .*[.]jpg, [.]jpeg, [.]png"),
        (lambda path: fill(path, {"a/b.txt": b"x", "c.pdf": b"x"}), "holds no images: .*[.]jpg"),
        (lambda path: fill(path, {"a.tar": b"not a tar at all"}) / "a.tar", "not a whole, uncompressed tar file"),
        (lambda path: fill(path, {"a.tar": b""}), "not a whole, uncompressed tar file"),
        (lambda path: path / "shard-{000..002}.tar", "no such shard: .*shard-000.tar"),
        (lambda path: path / "*.tar", "no such shard: .*[*].tar"),
        (lambda path: pack(path / "a.tar", {"a.txt": b"x", "._a.jpg": b"x"}), "holds no images: no member"),
        (lambda path: path / "list.txt", "no such file: .*list.txt"),
        (lambda path: fill(path, {"list.txt": b"# nothing\n\n"}) / "list.txt", "lists no images"),
        (lambda path: fill(path, {"list.csv": b"\xff\xd8\xff\x00"}) / "list.csv", "should be a text file"),
        (lambda path: fill(path, {"list.csv": b"a.jpg\nb\x00.jpg\n"}) / "list.csv", "has a NUL character"),
        (lambda path: fill(path, {"list.txt": "a.jpg".encode("utf-16-le")}) / "list.txt", "has a NUL character"),
        (lambda path: fill(path, {"list.csv": b'a.jpg\n"b.jpg\n'}) / "list.csv", "not a whole .csv file, .*quotes"),
        (lambda path: fill(path, {"list.csv": b'"' + 40_000 * b"a.jpg\n"}) / "list.csv", "not a whole .csv file"),
        (lambda path: path / "x-{005..001}.tar", "names no shards: .*rising numbers"),
    ],
)  # fmt: skip
def test_what_holds_no_images_is_said_in_one_sentence(tmp_path, make, says):
    with pytest.raises(DataError, match=says) as caught:
        open_source(make(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["a/1.parquet", "2.parquet", "x.md", "LICENSE"],
            r"2 of 3 files there end in \.parquet, whose images are",
        ),
        (["1.tar.gz", "2.tar.gz"], r"2 of 2 files there end in \.gz, which are to be unpacked"),
        (["a/1.pdf"], r"1 of 1 files there end in \.pdf$"),
    ],
)
def test_what_there_is_instead_of_images_is_said(tmp_path, names, says):
    fill(tmp_path / "folder", dict.fromkeys(names, b""))
    with pytest.raises(DataError, match=says):
        open_source(tmp_path / "folder")
    with pytest.raises(DataError, match=says):
        TarShards(pack(tmp_path / "a.tar", {name.replace("tar.", ""): b"" for name in names}))
    first = tmp_path / "folder" / names[0]
    with pytest.raises(DataError, match=rf"shard {first}(, wh.*,)? is not a whole"):
        open_source(first)


def test_a_folder_that_is_a_file(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        ImageFolder(fill(tmp_path, {"a.jpg": b"x"}) / "a.jpg")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_hold_what_a_folder_holds(tmp_path, kind):
    files = {f"{'cat' if i % 3 else 'dog'}/{i:03d}.jpg": encoded(seed=i) for i in range(9)}
    folder = ImageFolder(fill(tmp_path / "folder", files))
    (tmp_path / "shards").mkdir()
    names = list(files)
    for number in range(3):
        members = {}
        for name in names[number::3]:
            members[name] = files[name]
            members[name.replace(".jpg", ".cls")] = name[:3].encode() + b"\n"
            members[name.replace(".jpg", ".json")] = b"{}"
        pack(tmp_path / f"shards/s-{number:02d}.tar", members, kind)
    shards = open_source(tmp_path / "shards")
    assert isinstance(shards, TarShards) and shards.classes == folder.classes == ["cat", "dog"]

    def content(source):
        return {(source.name(i)[-11:], source.read(i), int(source.labels[i])) for i in range(len(source))}

    assert content(shards) == content(folder)
    for pattern in ("s-{00..02}.tar", "s-0?.tar", "s-{00,01,02}.tar"):
        other = open_source(tmp_path / "shards" / pattern)
        assert [other.name(i) for i in range(9)] == [shards.name(i) for i in range(9)]
    assert len(open_source(tmp_path / "shards/s-01.tar")) == 3


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_in_shards(tmp_path, kind):
    names = ["ü" * 30 + "/ö.jpeg", "d" * 70 + "/" + "e" * 80 + ".png"]
    names += [] if kind == tarfile.USTAR_FORMAT else ["f" * 150 + "/" + "g" * 120 + ".webp"]
    files = {name: os.urandom(512 * i + (i > 1)) for i, name in enumerate(names, start=1)}
    shards = TarShards(pack(tmp_path / "s.tar", files, kind))
    assert [shards.names[i] for i in range(len(shards))] == names
    assert [shards.read(i) for i in range(len(shards))] == list(files.values())


def test_samples_of_shards_are_grouped_by_name(tmp_path):
    files = {
        "x/1.cls": b"7",
        "x/1.jpg": b"a",
        "x/1.png": b"b",
        "y/1.jpg": b"c",
        "2.seg.png": b"d",
        "2.jpg": b"e",
        "2.cls": b"0",
    }
    shards = TarShards(pack(tmp_path / "s.tar", files))
    assert [shards.read(i) for i in range(len(shards))] == [b"a", b"c", b"e"]
    assert shards.labels.tolist() == [1, -1, 0] and shards.classes == ["0", "7"]


def test_images_with_dots_in_their_names_are_passed_over_and_said_to_be(tmp_path):
    """A sample's name ends at the first dot: what stands behind it says which part of the sample it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(TarShards(pack(tmp_path / "s.tar", {"a.jpg": b"a", "a.mask.png": b"m"}))) == 1
    with pytest.warns(UserWarning, match=r"2 such as IMG\.1\.jpg were passed over"):
        shards = TarShards(pack(tmp_path / "s.tar", {"a.jpg": b"a", "IMG.1.jpg": b"b", "IMG.2.jpg": b"c"}))
    assert len(shards) == 1
    with pytest.raises(DataError, match=r"holds no images.*; 1 such as photo\.v1\.jpg were passed over: in WebDataset"):
        TarShards(pack(tmp_path / "s.tar", {"photo.v1.jpg": b"a"}))


def test_a_shard_without_images_among_others_is_named(tmp_path):
    pack(tmp_path / "0.tar", {"a.jpg": b"a"})
    pack(tmp_path / "1.tar", {"a.npy": b"a"})
    with pytest.warns(UserWarning, match=r"1 such as .*1\.tar were passed over: these of its 2 shards hold no images"):
        assert len(TarShards(tmp_path)) == 1


def test_a_tar_file_of_tar_files_is_an_error(tmp_path):
    """As that of ImageNet's training images, beside which those for validation would be all that is trained on."""
    pack(tmp_path / "images-b.tar", {"1.jpg": b"a"})
    pack(tmp_path / "images-a.tar", {"n01.tar": b"a", "n02.tar": b"b"})
    with pytest.raises(DataError, match=r"images-a\.tar holds 2 tar files instead of images: unpack it"):
        TarShards(tmp_path)


def packed(path, *members):
    """A shard of members of any type: name and data, or name, type and what it links to."""
    with tarfile.open(path, "w") as archive:
        for name, content, *target in members:
            member = tarfile.TarInfo(name)
            if target:
                member.type, member.linkname = content, target[0]
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_hard_links_in_shards_are_what_they_link_to(tmp_path):
    path = packed(
        tmp_path / "s.tar", ("1.jpg", b"a"), ("1.cls", b"7"), ("2.jpg", tarfile.LNKTYPE, "1.jpg"),
        ("2.cls", tarfile.LNKTYPE, "1.cls"),
    )  # fmt: skip
    shards = TarShards(path)
    assert [shards.read(i) for i in range(len(shards))] == [b"a", b"a"] and shards.labels.tolist() == [0, 0]


def test_links_in_shards_that_are_not_followed_are_counted(tmp_path):
    path = packed(
        tmp_path / "s.tar", ("1.jpg", b"a"), ("2.jpg", tarfile.SYMTYPE, "1.jpg"), ("3.jpg", tarfile.LNKTYPE, "0.jpg"),
        ("4.txt", tarfile.SYMTYPE, "1.txt"),
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"2 such as 2\.jpg were passed over: they are links"):
        assert len(TarShards(path)) == 1


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_a_sparse_member_of_a_shard_is_an_error(tmp_path, kind):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.jpg")
        if kind == "pax":
            member.pax_headers = {"GNU.sparse.map": "0,512", "GNU.sparse.size": "9000", "GNU.sparse.name": "a.jpg"}
        else:
            member.type = tarfile.GNUTYPE_SPARSE
        member.size = 512
        archive.addfile(member, io.BytesIO(bytes(512)))
    with pytest.raises(DataError, match=r"has a\.jpg as a sparse file: pack it without"):
        TarShards(tmp_path / "s.tar")


def test_the_last_of_members_with_one_name_counts(tmp_path):
    """As for tar, which replaces a file by appending another one."""
    shards = TarShards(
        packed(tmp_path / "s.tar", ("1.jpg", b"a"), ("1.cls", b"7"), ("1.png", b"p"), ("1.jpg", b"b"), ("1.cls", b"8"))
    )
    assert [shards.read(i) for i in range(len(shards))] == [b"b"] and shards.classes == ["8"]


def test_unknown_labels_in_shards(tmp_path):
    files = {"a.jpg": b"", "a.cls": b"-1", "b.jpg": b"", "b.cls": b"\n", "c.jpg": b"", "c.cls": b"10", "d.jpg": b""}
    shards = TarShards(pack(tmp_path / "s.tar", {**files, "d.cls": b" 9\n"}))
    assert shards.labels.tolist() == [-1, -1, 1, 0] and shards.classes == ["9", "10"]


def test_shards_joined_to_one_file_are_an_error(tmp_path):
    one, other = (pack(tmp_path / f"{name}.tar", {f"{name}.jpg": b"x"}).read_bytes() for name in "ab")
    (tmp_path / "both.tar").write_bytes(one + bytes(3 << 20) + other)
    with pytest.raises(DataError, match="after its end, at byte 1,024, something else follows"):
        TarShards(tmp_path / "both.tar")
    (tmp_path / "padded.tar").write_bytes(one + bytes(3 << 20))
    assert len(TarShards(tmp_path / "padded.tar")) == 1


def test_an_index_file_by_windows(tmp_path):
    fill(tmp_path, {"list.csv": "a.jpg,cat\nb.jpg,dog\n".encode("utf-8-sig")})
    assert IndexFile(tmp_path / "list.csv").paths == ["a.jpg", "b.jpg"]


def test_a_shard_cut_short_is_an_error(tmp_path):
    path = pack(tmp_path / "s.tar", {"a.jpg": b"x" * 5000, "b.jpg": b"y" * 5000})
    whole = path.read_bytes()
    for length in (700, 7000, 5632 + 100, 5632 + 300):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="not a whole, uncompressed tar file"):
            TarShards(path)


def test_an_empty_shard_is_an_error(tmp_path):
    """As a download leaves that did not begin; a tar file without members has zeros in it."""
    pack(tmp_path / "0.tar", {"1.jpg": b"x"})
    (tmp_path / "1.tar").touch()
    with pytest.raises(DataError, match=r"1\.tar is not a whole, uncompressed tar file"):
        TarShards(tmp_path)


def test_a_compressed_shard_is_an_error(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    with pytest.raises(DataError, match="uncompressed tar file"):
        TarShards(tmp_path / "s.tar")


@pytest.mark.parametrize(
    ("name", "text", "labels", "classes"),
    [
        ("list.txt", "  # two\n  a/1.jpg dog\n\nmy cat.jpg cat\nb c.jpg \n", [1, 0, -1], ["cat", "dog"]),
        ("list.lst", "a/1.jpg 10\nmy cat.jpg 0\nb c.jpg 9\n", [2, 0, 1], ["0", "9", "10"]),
        ("list.txt", "a/1.jpg 10\nmy cat.jpg -1\nb c.jpg 9\n", [1, -1, 0], ["9", "10"]),
        ("list.csv", "a/1.jpg,01\nmy cat.jpg,1\nb c.jpg,001\n", [1, 2, 0], ["001", "01", "1"]),
        ("list.txt", f"a/1.jpg {5000 * '9'}\nmy cat.jpg 7\nb c.jpg 0\n", [2, 1, 0], ["0", "7", 5000 * "9"]),
        ("list.tsv", "a/1.jpg\tbig dog\nmy cat.jpg\tcat\nb c.jpg\n", [0, 1, -1], ["big dog", "cat"]),
        ("list.txt", "a/1.jpg \t big dog\nmy cat.jpg\t -1\nb c.jpg \t\n", [0, -1, -1], ["big dog"]),
        ("list.csv", "path,label\na/1.jpg, dog\nmy cat.jpg,cat\nb c.jpg,\n", [1, 0, -1], ["cat", "dog"]),
    ],
)
def test_index_files(tmp_path, name, text, labels, classes):
    fill(tmp_path, {"a/1.jpg": b"1", "my cat.jpg": b"2", "b c.jpg": b"3", name: text.encode()})
    source = open_source(tmp_path / name)
    assert isinstance(source, IndexFile)
    assert [source.read(i) for i in range(3)] == [b"1", b"2", b"3"]
    assert source.labels.tolist() == labels and source.classes == classes


def test_names_may_have_what_unicode_counts_among_line_breaks(tmp_path):
    names = ["a\u2028b.jpg", "c\x85d.jpg", "e\x0cf.jpg"]
    fill(tmp_path, {"list.txt": "".join(f"{name} 1\r\n" for name in names).encode()})
    assert IndexFile(tmp_path / "list.txt").paths == names


def test_files_of_newer_and_older_names_are_images(tmp_path):
    data = encoded()
    names = ["1.jfif", "2.avif"] if features.check("avif") else ["1.jfif"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if len(names) == 1 else "error")
        source = ImageFolder(fill(tmp_path, dict.fromkeys(["1.jfif", "2.avif"], data)))
    assert source.paths == names


def test_images_of_kinds_that_are_not_decoded_are_said_to_be_passed_over(tmp_path):
    fill(tmp_path, dict.fromkeys(["a/1.jpg", "a/IMG_2.HEIC", "b/3.nef", "b/notes.md"], encoded()))
    with pytest.warns(UserWarning, match=r"has 2 images of kinds that are not decoded, such as a/IMG_2\.HEIC"):
        assert ImageFolder(tmp_path).paths == ["a/1.jpg"]
    (tmp_path / "a/1.jpg").unlink()
    with pytest.raises(DataError, match=r"no file below it ends in .*; 2 such as a/IMG_2\.HEIC are of kinds"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("held_out", ["val", "test", "validation"])
def test_split_folders_number_classes_alike(tmp_path, held_out):
    fill(tmp_path, {"train/ant/1.jpg": b"", "train/bee/1.jpg": b"", "train/cat/1.jpg": b""})
    fill(tmp_path, {f"{held_out}/bee/1.jpg": b"", f"{held_out}/cat/1.jpg": b""})
    train, test = open_split(tmp_path)
    assert train.labels.tolist() == [0, 1, 2]
    assert test.labels.tolist() == [1, 2] and test.classes == ["ant", "bee", "cat"]


@pytest.mark.parametrize("kind", ["jpg", "tar"])
def test_a_split_further_down_is_not_trained_on_as_a_whole(tmp_path, kind):
    """As in Kaggle's copy of ImageNet."""
    data = pack(tmp_path / "some.tar", {"1.jpg": b""}).read_bytes()
    (tmp_path / "some.tar").unlink()
    fill(tmp_path, dict.fromkeys([f"Data/CLS/{name}/1.{kind}" for name in ("train", "val", "test")], data))
    with pytest.raises(
        DataError, match=r"but .*/Data/CLS has one, with val beside it: give --data\.path .*/Data/CLS, or"
    ):
        open_split(tmp_path)
    assert len(open_split(tmp_path / "Data/CLS")[1]) == 1
    (tmp_path / "Data/CLS/train").rename(tmp_path / "Data/CLS/other")
    assert len(open_split(tmp_path)[0]) == 3


@pytest.mark.parametrize("word", ["val", "valid", "validation", "test"])
def test_shards_of_a_split_may_lie_in_one_folder(tmp_path, word):
    for name, classes in (("in1k-train-0", "ab"), ("IN1k-Train-1", "c"), (f"in1k-{word}-00", "cb"), ("x_test", "a")):
        files = {f"{name}-{one}.{end}": one.encode() for one in classes for end in ("jpg", "cls")}
        pack(tmp_path / f"{name}.tar", files)
    train, held_out = open_split(tmp_path, cache=tmp_path / "cache")
    assert sorted(map(train.read, range(len(train)))) == [b"a", b"b", b"c"]
    expected = [b"b", b"c"] if word != "test" else [b"a", b"b", b"c"]
    assert sorted(map(held_out.read, range(len(held_out)))) == expected and held_out.classes == ["a", "b", "c"]
    assert str(train) == f"the train shards of {tmp_path}" and str(held_out) == f"the {word} shards of {tmp_path}"
    assert len(open_split(tmp_path / "*.tar")[0]) == 6


@pytest.mark.parametrize(
    "names", [["a-train-0", "a-train-1"], ["a-val-0", "a-val-1"], ["train-0", "a-0"], ["trainval-0", "testing-0"]]
)
def test_shards_whose_names_tell_of_nothing_held_out_are_all_for_training(tmp_path, names):
    for name in names:
        pack(tmp_path / f"{name}.tar", {f"{name}.jpg": b""})
    train, held_out = open_split(tmp_path)
    assert len(train) == 2 and held_out is None


@pytest.mark.parametrize(
    "names", [["train-0", "train-val-0", "val-0"], ["0", "val-0"], ["train", "val", "0"], ["val", "test"]]
)
def test_shards_whose_names_do_not_tell_which_are_held_out(tmp_path, names):
    for name in names:
        pack(tmp_path / f"{name}.tar", {f"{name}.jpg": b""})
    with pytest.raises(DataError, match=r"but not which: give --data\.path '.*/\*\.tar' to train on all, or patterns"):
        open_split(tmp_path)


@pytest.mark.parametrize(("labelled", "unlabelled"), [("train", "val"), ("val", "train")])
def test_a_split_may_have_classes_on_one_side_alone(tmp_path, labelled, unlabelled):
    names = [f"{labelled}/ant/1.jpg", f"{labelled}/bee/1.jpg", f"{unlabelled}/1.jpg", f"{unlabelled}/2.jpg"]
    sources = dict(zip(("train", "val"), open_split(fill(tmp_path, dict.fromkeys(names, b""))), strict=True))
    assert sources[labelled].classes == ["ant", "bee"] and sources[labelled].labels.tolist() == [0, 1]
    assert sources[unlabelled].classes == [] and sources[unlabelled].labels.tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        (("ant", "fly"), "of 2 classes, 1 of which .*/train has not, such as fly: hold out images of its classes"),
        (("0", "1"), r"2 of which .* has not, such as 0 \(one has words for classes, the other numbers\): hold out"),
    ],
)
def test_held_out_classes_without_training_images_are_an_error(tmp_path, held_out, says):
    fill(
        tmp_path,
        dict.fromkeys(["train/ant/1.jpg", "train/bee/1.jpg", *(f"val/{name}/1.jpg" for name in held_out)], b""),
    )
    with pytest.raises(DataError, match=says):
        open_split(tmp_path)


def test_a_fingerprint_is_of_names_labels_and_order_alone(tmp_path):
    def index(folder: str, *lines: str) -> IndexFile:
        return IndexFile(fill(tmp_path / folder, {"list.txt": "\n".join(lines).encode()}) / "list.txt")

    first = index("a", "x/1.jpg 0", "x/2.jpg 1")
    assert index("b", "y/z/1.jpg 0", "2.jpg 1").fingerprint() == first.fingerprint()
    others = index("c", "x/1.jpg 1", "x/2.jpg 0"), index("d", "x/2.jpg 0", "x/1.jpg 1"), index("e", "x/1.jpg 0")
    assert len({first.fingerprint(), *(other.fingerprint() for other in others)}) == 4
    assert first.subset([1]).fingerprint() == index("f", "x/0.jpg 0", "x/2.jpg 1").subset([1]).fingerprint()
    packed = TarShards(pack(tmp_path / "s.tar", {"p/1.jpg": b"", "p/1.cls": b"0", "p/2.jpg": b"", "p/2.cls": b"1"}))
    assert packed.fingerprint() == first.fingerprint()


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path, {"photos/train/0.jpg": encoded(), "photos/val/1.jpg": encoded(), "list.txt": b"photos/val/1.jpg"})
    for number in range(2):
        pack(tmp_path / f"{number}.tar", {"2.jpg": encoded()})
    lengths = {"~/photos": 2, "~/list.txt": 1, "~/0.tar": 1, "~/{0..1}.tar": 2, "~/*.tar": 2}
    assert {path: len(open_source(path)) for path in lengths} == lengths
    assert [len(source) for source in open_split("~/photos")] == [1, 1]
    with pytest.raises(DataError, match="no such folder or file: ~nobody-of-that-name/photos"):
        open_source("~nobody-of-that-name/photos")


def test_without_a_split_everything_is_for_training(tmp_path):
    train, test = open_split(fill(tmp_path, {"a/1.jpg": b"", "b/1.jpg": b""}))
    assert len(train) == 2 and test is None


def test_subset_keeps_labels_and_classes(tmp_path):
    source = ImageFolder(fill(tmp_path, {"a/1.jpg": b"1", "b/2.jpg": b"2", "b/3.jpg": b"3"}))
    subset = source.subset([2, 0]).subset(np.array([1, 0]))
    assert [subset.read(i) for i in range(2)] == [b"1", b"3"]
    assert subset.labels.tolist() == [0, 1] and subset.classes == ["a", "b"] and subset.name(1) == source.name(2)


@pytest.mark.parametrize("length", [0, 1, folders.PIECE - 1, folders.PIECE, 2 * folders.PIECE + 1])
def test_files_of_all_lengths_are_read_whole(tmp_path, length):
    contents = random.Random(length).randbytes(length)
    assert ImageFolder(fill(tmp_path, {"1.jpg": contents})).read(0) == contents


USUAL_KINDS = ["JPEG", "PNG", "WEBP"]


@pytest.mark.parametrize("kind", [*USUAL_KINDS, "BMP", "TIFF", "PPM", "GIF", "JPEG2000"])
def test_probe_tells_the_size_of_what_every_backend_decodes(kind):
    assert probe(encoded((20, 30), kind)) == ((20, 30) if kind in USUAL_KINDS else None)


def tables_at(data: bytes) -> int:
    """Where a JPEG file's Huffman tables begin."""
    return data.index(b"\xff\xc4")


def scan_at(data: bytes) -> int:
    """Where its scan begins."""
    return data.index(b"\xff\xda")


ODD_JPEG = {
    "bytes between segments": lambda data: data[: tables_at(data)] + bytes(3) + data[tables_at(data) :],
    "a length too small": lambda data: data[: tables_at(data) + 2] + b"\0\5" + data[tables_at(data) + 4 :],
    "tables of no codes": lambda data: data[: tables_at(data) + 5] + bytes(16) + data[tables_at(data) + 21 :],
    "a scan shorter than its length": lambda data: data[: scan_at(data) + 2] + b"\0\1" + data[scan_at(data) + 4 :],
    "two frames": lambda data: data[:2] + data[data.index(b"\xff\xc0") : tables_at(data)] + data[2:],
}


@pytest.mark.parametrize("odd", ODD_JPEG)
def test_a_jpeg_with_an_odd_header_is_left_to_pillow(odd):
    """In a large batch DALI's parser would end the process."""
    data = ODD_JPEG[odd](encoded((20, 30)))
    assert probe(encoded((20, 30))) == (20, 30)
    assert probe(data) is None


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"quality": 100, "subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_the_usual_kinds_of_jpeg_are_for_every_backend(mode, options):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encoded((20, 30)))).convert(mode).save(buffer, "JPEG", **options)
    data = buffer.getvalue()
    assert probe(data) == probe(data[: tables_at(data)] + b"\xff\xff" + data[tables_at(data) :]) == (20, 30)


def mutants(count: int) -> Iterator[bytes]:
    """JPEG files with a few bytes of their headers changed, left out or put in."""
    draws, files = random.Random(0), []
    kinds = {}, {"progressive": True}, {"restart_marker_rows": 1}, {"icc_profile": bytes(9)}, {"comment": b"a comment"}
    for mode, options in itertools.product(("RGB", "L"), kinds):
        buffer = io.BytesIO()
        Image.effect_noise((30, 20), 50).convert(mode).save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    for _ in range(count):
        data = bytearray(draws.choice(files))
        for _ in range(draws.choice((1, 1, 2))):
            place = draws.randrange(data.index(b"\xff\xda") + 14)
            new = [draws.choice((0, 1, 8, 0xC0, 0xDB, 0xE1, 0xFF, draws.randrange(256)))] * draws.choice((0, 1, 1, 65))
            data[place : place + draws.randrange(2)] = bytes(new)
            if b"\xff\xda" not in data:
                break
        yield bytes(data)


def with_segments() -> Iterator[bytes]:
    """JPEG files with one more segment: of every kind, empty, short, or of contents that parsers look for.

    And some with a frame that is too short or too long.
    """
    whole = encoded((20, 30))
    frame = whole.index(b"\xff\xc0")
    for length in range(20):
        contents = whole[frame + 4 : frame + 4 + length]
        yield whole[: frame + 2] + bytes((0, 2 + length)) + contents + whole[tables_at(whole) :]
    for marker in range(0xC0, 0xFF):
        for contents in (b"", b"\0", b"\x08", b"JFIF\0", b"ICC_PROFILE\0", b"MPF\0", b"Exif\0\0", bytes(17), bytes(65)):
            yield whole[:2] + bytes((0xFF, marker, 0, 2 + len(contents))) + contents + whole[2:]


def test_the_quick_look_at_a_jpeg_says_what_pillow_says(monkeypatch):
    quick = images.size_of_common_jpeg
    monkeypatch.setattr(images, "size_of_common_jpeg", lambda data: None)
    files = itertools.chain(mutants(4000), with_segments())
    seen = [(size, probe(data)) for data in files if (size := quick(data))]
    assert len(seen) > 500 and len(set(seen)) > 5
    assert all(one == other for one, other in seen)


def test_pillow_warns_of_no_large_image_that_is_used():
    """It comes again with each crop, and names no file. In a process of its own, since pytest has other filters."""
    code = """if True:
        from PIL import Image
        from msbreg.data.images import decode
        Image.MAX_IMAGE_PIXELS = 500
        Image.new("RGB", (30, 20)).save("large.png")
        assert decode(open("large.png", "rb").read()).crop((0, 0, 30, 20)).size == (30, 20)
    """
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_pillow_does_not_warn_of_damaged_exif():
    """On every rank, and without the file's name."""
    entry = struct.pack(">IHHHII", 8, 1, 0x10F, 2, 9999, 99) + bytes(4)  # a text that would lie behind the file's end
    data = JPEG[:2] + segment(b"MM\0*" + entry) + JPEG[2:]
    code = "import sys; from msbreg.data.images import decode; print(decode(sys.stdin.buffer.read()).size)"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stdout == b"(30, 20)\n" and done.stderr == b"", done.stderr


def test_rare_kinds_are_left_to_pillow():
    """DALI's parser refuses WebP files with EXIF, which in a large batch would end the process, and rounds 16 bits."""
    deep = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(7)))
    assert probe(PNG[:8] + chunk(b"IHDR", deep) + pixels + chunk(b"IEND", b"")) is None
    one = encoded((20, 30), "PNG")
    animated = chunk(b"acTL", struct.pack(">II", 1, 0))  # of which DALI shows another frame, and fails in one
    assert probe(one) == (20, 30) and probe(one[:33] + animated + one[33:]) is None
    cmyk = io.BytesIO()
    Image.new("CMYK", (30, 20)).save(cmyk, "JPEG")
    data = cmyk.getvalue()
    assert probe(data) == (20, 30) and data[2:4] == b"\xff\xee"
    assert probe(data[:2] + data[18:]) is None  # without Adobe's marker it is black to DALI
    assert probe(encoded((20, 30), "WEBP", lossless=True)) == (20, 30)
    assert probe(encoded((20, 30), "WEBP", lossless=True, exif=exif(1))) is None
    second = Image.new("RGB", (30, 20))
    assert probe(encoded((20, 30), "WEBP", save_all=True, append_images=[second])) is None


def test_a_webp_chunk_of_odd_length_is_filled_up():
    files = [encoded((20, 30), "WEBP", seed=seed, lossless=True) for seed in range(20)]
    assert {data[16] % 2 for data in files} == {0, 1}
    assert [probe(data) for data in files] == 20 * [(20, 30)]


def exif(orientation: int, kind: int = 3) -> bytes:
    """EXIF with an orientation: a SHORT, as it should be, or of another type (1 BYTE, 4 LONG)."""
    value = orientation.to_bytes({1: 1, 3: 2, 4: 4}[kind], "big").ljust(4, b"\0")
    return b"MM\0*" + struct.pack(">IHHHI", 8, 1, 0x112, kind, 1) + value + bytes(4)


def segment(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 8) + b"Exif\0\0" + content


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


JPEG, PNG = encoded((20, 30)), encoded((20, 30), "PNG")
TURNED = {
    "a byte": JPEG[:2] + segment(exif(6, 1)) + JPEG[2:],
    "a long": JPEG[:2] + segment(exif(6, 4)) + JPEG[2:],
    "two segments, the first turned": JPEG[:2] + segment(exif(6)) + segment(exif(1)) + JPEG[2:],
    "two segments, the second turned": JPEG[:2] + segment(exif(1)) + segment(exif(6)) + JPEG[2:],
    "before a PNG's pixels": PNG[:33] + chunk(b"eXIf", exif(6)) + PNG[33:],
    "behind a PNG's pixels": PNG[:-12] + chunk(b"eXIf", exif(6)) + PNG[-12:],
    "with a JPEG's prefix in a PNG": PNG[:33] + chunk(b"eXIf", b"Exif\0\0" + exif(6)) + PNG[33:],
}


@pytest.mark.parametrize("turned", TURNED)
def test_an_orientation_that_parsers_read_differently_is_read_by_one_alone(turned):
    """DALI's would give the image another size than its crops are drawn for, and read outside of it."""
    data = TURNED[turned]
    seen = probe(data) or decode(data).size[::-1]
    assert seen == decode(data).size[::-1]
    if "byte" not in turned and "second" not in turned:  # of which Pillow makes nothing
        assert probe(data) is None and seen == (30, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_come_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded((20, 30), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert probe(data) in (None, upright.size[::-1])
    assert np.array_equal(np.asarray(decode(data)), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_damaged_image():
    data = encoded((20, 30), exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert probe(data) == (20, 30)
    assert decode(data).size == (30, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_cut_short_anywhere_is_unreadable(kind):
    whole = encoded((60, 80), kind)
    last = len(whole) - (40 if kind == "PNG" else 1)  # a PNG's checksums and end marker follow its last pixel
    for length in [0, 1, 10, *random.Random(0).sample(range(20, last), 20), last]:
        with pytest.raises(UnreadableError):
            probe(whole[:length]) or decode(whole[:length])


def test_bytes_after_the_end_do_no_harm():
    assert decode(encoded((20, 30)) + b"camera's own data").size == (30, 20)


def test_sixteen_bits_are_cut_to_eight_and_alpha_is_left_out():
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    assert probe(buffer.getvalue()) is None
    assert np.array_equal(np.asarray(decode(buffer.getvalue()))[..., 0], grey >> 8)

    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    assert np.array_equal(np.asarray(decode(buffer.getvalue())), colours[..., :3])


def saved(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_of_an_unknown_range_are_not_taken_for_black(dtype):
    with pytest.raises(UnreadableError, match="no known range"):
        decode(saved(np.full((20, 30), 200, dtype), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_sixteen_bits(kind):
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    assert np.array_equal(np.asarray(decode(saved(grey, kind)))[..., 1], grey >> 8)


def test_an_image_too_large_for_pillow_is_called_so(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UnreadableError, match=r"too large: .*600 pixels"):
        probe(encoded((20, 30)))


def test_a_file_that_is_replaced_has_its_own_size(tmp_path):
    """With the size that it had at the first reading, crops would lie outside of it."""
    reader = Reader(ImageFolder(fill(tmp_path, {"1.jpg": encoded((60, 80))})))
    assert reader.sample(0)[2:4] == (60, 80)
    fill(tmp_path, {"1.jpg": encoded((20, 30), "BMP")})
    assert reader.sample(0)[2:] == (20, 30, True)
    fill(tmp_path, {"1.jpg": encoded((30, 20))})
    assert reader.sample(0)[2:] == (30, 20, False)


def test_reader_puts_a_readable_image_in_place_of_a_bad_one(tmp_path):
    good = {f"{i:02d}.jpg": encoded((20 + i, 30), seed=i) for i in range(12)}
    bad = {"03.jpg": b"text", "04.jpg": b"", "11.jpg": good["11.jpg"][:500]}
    source = ImageFolder(fill(tmp_path, {**good, **bad}))
    expected = {3: 8, 4: 6, 11: 0}
    for order in (range(12), reversed(range(12))):
        reader = Reader(source)
        for index in order:
            sample = reader.sample(index)
            assert sample.image == expected.get(index, index)
            assert (sample.height, sample.width) == (20 + sample.image, 30)
            assert sample.data.tobytes() == good[f"{sample.image:02d}.jpg"]
        assert sorted(reader.unreadable) == [3, 4, 11]
        assert "not an image" in reader.unreadable[3] and "empty" in reader.unreadable[4]
        assert len(reader.news) == 3 and all(str(tmp_path) in news for news in reader.news)


def test_a_block_of_bad_images_is_replaced_by_many(tmp_path):
    """As where a class's folder is gone: in the stream one image would have the place of all."""
    fill(tmp_path, {f"{i:04d}.jpg": b"" if 400 <= i < 440 else JPEG for i in range(4000)})
    reader = Reader(ImageFolder(tmp_path))
    substitutes = [reader.sample(index).image for index in range(400, 440)]
    assert len(set(substitutes)) >= 38 and not set(substitutes) & set(range(400, 440))
    assert len([news for news in reader.news if "left out /" in news]) == 20
    assert len(reader.news) == 21 and reader.news[20].startswith("left out 32 images by now, such as /")


@pytest.mark.parametrize("images", [1, 2, 3, 12, 30, 97])
def test_every_image_may_be_a_substitute(images):
    for index in range(images):
        candidates = [*reader._candidates(index, images)]
        assert candidates[0] == index and sorted(candidates) == [*range(images)]


def test_a_file_that_vanishes_is_unreadable(tmp_path):
    source = ImageFolder(fill(tmp_path, {"1.jpg": encoded(), "2.jpg": encoded()}))
    (tmp_path / "1.jpg").unlink()
    reader = Reader(source)
    assert reader.sample(0).image == 1
    assert "No such file" in reader.unreadable[0]


def test_too_many_unreadable_images_are_an_error(tmp_path):
    reader = Reader(ImageFolder(fill(tmp_path, {f"{i:03d}.jpg": encoded() if i % 2 else b"x" for i in range(60)})))
    assert reader.limit == 16
    for index in range(32):
        reader.sample(index)
    with pytest.raises(DataError, match=r"17 of the 60 images wanted of .* cannot be read, which is more than the 16"):
        reader.sample(32)


@pytest.mark.parametrize("count", [1, 5, 16, 17, 18, 40])
def test_only_unreadable_images_are_an_error(tmp_path, count):
    reader = Reader(ImageFolder(fill(tmp_path, {f"{i:03d}.jpg": b"x" for i in range(count)})))
    with pytest.raises(DataError, match=r"none of the|cannot be read"):
        reader.sample(count // 2)


def test_one_percent_may_be_unreadable(tmp_path):
    reader = Reader(ImageFolder(fill(tmp_path, {f"{i:04d}.jpg": b"" for i in range(2500)})))
    assert reader.limit == 25


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_plain_headers_say_to_us_what_they_say_to_tarfile(tmp_path, kind):
    path = tmp_path / "s.tar"
    names = [
        "1.jpg",
        "ü/" + "d" * 60 + "/2.jpg",
        "e" * 40 + "/" + "f" * 59 + ("/3.jpg" if kind == 0 else ""),
        "g\udce9",
    ]
    with tarfile.open(path, "w", format=kind) as archive:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 511 * number
            archive.addfile(member, io.BytesIO(bytes(member.size)))
        for name, what in (("h", tarfile.LNKTYPE), ("s", tarfile.SYMTYPE), ("d", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = what, names[0]
            archive.addfile(member)
    with path.open("rb") as file:
        found = list(tars.members_of_plain(file.fileno()))
    assert found == list(tars.members(str(path))) and [member.name for member in found] == [*names, "h", "s"]


@pytest.mark.parametrize("place", [0, 100, 124, 148, 156, 257, 345, 511, 1024 + 5, 3 * 1024])
def test_headers_that_are_not_plain_are_left_to_tarfile(tmp_path, place):
    """Damage to any byte of one: what tarfile makes of it counts, and shards of other kinds are not listed by us."""
    path = pack(tmp_path / "s.tar", {"1.jpg": b"a", "2.jpg": b"b", "3.jpg": b"c"})
    data = bytearray(path.read_bytes())
    data[place] ^= 0x11
    path.write_bytes(bytes(data))
    with path.open("rb") as file, pytest.raises(tars.OddTarError):
        list(tars.members_of_plain(file.fileno()))
    with pytest.raises(DataError, match="not a whole, uncompressed tar file"):
        TarShards(path)


def test_a_listing_that_takes_long_is_announced(tmp_path, monkeypatch, capfd):
    path, scan = pack(tmp_path / "s.tar", {"1.jpg": b"a"}), shards._scan_shard
    TarShards(path)
    monkeypatch.setattr(shards, "SECONDS_UNTIL_SAID", 0.01)
    monkeypatch.setattr(shards, "_scan_shard", lambda path: (time.sleep(0.5), scan(path))[1])
    assert capfd.readouterr().err == ""
    TarShards(path)
    assert capfd.readouterr().err == f"listing 1 shard: {path}\n"


def with_size_field(path, place, field):
    """Rewrites a tar header's size field and checksum."""
    content = bytearray(path.read_bytes())
    content[place + 124 : place + 136] = field
    content[place + 148 : place + 156] = b" " * 8
    content[place + 148 : place + 156] = b"%06o\0 " % sum(content[place : place + 512])
    path.write_bytes(bytes(content))
    return path


def test_sizes_beyond_eight_gibibytes_in_gnu_shards(tmp_path):
    """GNU tar writes them in base 256; here a small one."""
    data = encoded()
    path = with_size_field(pack(tmp_path / "s.tar", {"a.jpg": data}), 0, b"\x80" + len(data).to_bytes(11, "big"))
    assert TarShards(path).read(0) == data


def test_sizes_beyond_eight_gibibytes_in_pax_shards(tmp_path):
    """Pax shards keep them in a header of their own, which counts; here a small one."""
    data = encoded()
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("a.jpg")
        member.size, member.pax_headers = len(data), {"size": str(len(data))}
        archive.addfile(member, io.BytesIO(data))
    assert TarShards(with_size_field(tmp_path / "s.tar", 1024, b"0" * 11 + b"\0")).read(0) == data
