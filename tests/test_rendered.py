"""The embedded data set: whole or absent, the same for a seed, and neither trivial nor careless."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

import torch
from PIL import Image

import msbreg.data.rendered as rendered
from msbreg.data.rendered import render
from msbreg.data.swatches import CLASSES, swatches
from msbreg.errors import DataError
from msbreg.evaluation import knn_accuracy


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def draw(labels: np.ndarray, size: int = 32, seed: int = 0) -> np.ndarray:
    return swatches(labels, size=size, random=np.random.Generator(np.random.Philox(seed)))


def spread(count: int) -> np.ndarray:
    return np.arange(count) % len(CLASSES)


def test_folder_has_the_layout_that_was_asked_for(tmp_path):
    folder = render(tmp_path / "new" / "images", images=130, test_images=40, size=24)
    assert folder == tmp_path / "new" / "images"
    for split, each in (("train", 13), ("test", 4)):
        assert sorted(path.name for path in (folder / split).iterdir()) == sorted(CLASSES)
        for name in CLASSES:
            files = list((folder / split / name).iterdir())
            assert len(files) == each and all(file.suffix == ".jpg" for file in files)
    with Image.open(files[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (24, 24))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["images"]


def test_a_jpeg_holds_the_picture_of_its_class(tmp_path):
    folder = render(tmp_path / "images", images=20, test_images=10)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([0, 0])))
    pictures = swatches(spread(20), size=32, random=random)
    for number, picture in enumerate(pictures):
        with Image.open(folder / "train" / CLASSES[number % len(CLASSES)] / f"{number:05d}.jpg") as image:
            assert np.abs(np.asarray(image, float) - picture).mean() < 6


def test_same_seed_same_files_other_seed_other_files(tmp_path):
    same, again, other = (
        contents(render(tmp_path / name, images=70, test_images=70, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert same == again
    assert same.keys() == other.keys() and not set(same.values()) & set(other.values())
    assert len(set(same.values())) == 141  # no picture twice, in either split, beside the manifest


def test_complete_folder_is_returned_at_once(tmp_path, monkeypatch):
    folder = render(tmp_path / "images", images=20, test_images=10)
    before = contents(folder)
    monkeypatch.delattr(rendered, "swatches")
    assert render(str(folder), images=20, test_images=10) == folder
    assert contents(folder) == before


@pytest.mark.parametrize("change", [{"images": 30}, {"test_images": 20}, {"size": 16}, {"seed": 1}])
def test_folder_rendered_otherwise_is_replaced(tmp_path, change):
    arguments = {"images": 20, "test_images": 10, "size": 32, "seed": 0} | change
    render(tmp_path / "images", images=20, test_images=10)
    assert contents(render(tmp_path / "images", **arguments)) == contents(render(tmp_path / "new", **arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "new"]


def test_folder_that_has_lost_images_is_rendered_again(tmp_path):
    """As where caches are swept file by file."""
    folder = render(tmp_path / "images", images=20, test_images=10)
    before = contents(folder)
    for split in ("train", "test"):
        next((folder / split / "dots").iterdir()).unlink()
        assert contents(render(folder, images=20, test_images=10)) == before
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        file.unlink()
    assert contents(render(folder, images=20, test_images=10)) == before
    (folder / "train" / "dots" / "mine.jpg").write_bytes(b"")
    assert len(contents(render(folder, images=20, test_images=10))) == len(before) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "images").mkdir()
    assert len(contents(render(tmp_path / "images", images=20, test_images=10))) == 31


def test_interrupted_run_leaves_no_folder(tmp_path, monkeypatch):
    """An error in the last step before the folder is complete: what a reader sees is nothing at all."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rendered, "_put_in_place", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render(tmp_path / "images", images=20, test_images=10)
    assert not list(tmp_path.iterdir())
    render(tmp_path / "images", images=20, test_images=10)


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    folders = [".images-0123abcd", ".images-4567cdef", ".images-0123abcd-outdated", ".images-mine", ".other-0123abcd"]
    for name in folders:
        (tmp_path / name / "train").mkdir(parents=True)
        if name != ".images-4567cdef":  # another process may be at work in this one
            os.utime(tmp_path / name, (0, 0))
    folder = render(tmp_path / "images", images=20, test_images=10)
    kept = [".images-4567cdef", ".images-mine", ".other-0123abcd", "images"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    os.utime(tmp_path / ".images-4567cdef", (0, 0))
    render(folder, images=20, test_images=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept[1:]


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    finished = render(tmp_path / "first", images=20, test_images=10)
    rename = os.rename

    def overtaken(source: Path, target: Path) -> None:
        shutil.copytree(finished, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    assert contents(render(tmp_path / "second", images=20, test_images=10)) == contents(finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not a folder of rendered images"):
        render(tmp_path, images=20, test_images=10)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the rendered images to .*: Not a directory") as caught:
        render(tmp_path / "file" / "images", images=20, test_images=10)
    assert "\n" not in str(caught.value)


def test_full_disk_leaves_nothing(tmp_path, file_size_limit):
    with file_size_limit(300), pytest.raises(DataError, match="cannot write the rendered images"):
        render(tmp_path / "images", images=20, test_images=10, size=64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [8, 33, 96])
def test_pictures_have_any_size_and_use_the_whole_range(size):
    pictures = draw(spread(40), size)
    assert pictures.shape == (40, size, size, 3) and pictures.dtype == np.uint8
    assert np.ptp(pictures.reshape(40, -1), axis=1).min() > 30  # none is blank
    assert (pictures == 0).mean() < 0.1 and (pictures == 255).mean() < 0.1  # nor are they washed out


def test_a_pattern_is_the_same_at_any_resolution():
    """A swatch of twice the size, halved, is the small swatch up to its grain, which is drawn per pixel."""
    small, large = draw(spread(10), 32).astype(float), draw(spread(10), 64).astype(float)
    halved = large.reshape(10, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(halved - small).mean() < 8
    assert np.abs(halved[1:] - small[:-1]).mean() > 40


def test_colours_do_not_tell_the_class():
    """Neighbours in the mean and spread of the colours: no better than chance, 1 in 10, but for the ink's share."""
    labels = spread(2000)
    pixels = torch.from_numpy(draw(labels)).float().flatten(1, 2) / 255
    colours = torch.cat([pixels.mean(1), pixels.std(1)], 1)
    colours = (colours - colours.mean(0)) / colours.std(0)
    classes = torch.from_numpy(labels)
    assert knn_accuracy(colours[:1500], classes[:1500], colours[1500:], classes[1500:]) < 0.25


def test_pattern_tells_the_class():
    """With position, scale and light taken away by hand, classes separate; so the labels are not noise.

    The amplitudes of a swatch's Fourier spectrum do not depend on where the print starts.
    """
    labels = spread(3000)
    grey = torch.from_numpy(draw(labels)).float().mean(-1)
    grey = (grey - grey.mean((1, 2), keepdim=True)) / grey.std((1, 2), keepdim=True)
    spectrum = torch.fft.rfft2(grey).abs().flatten(1).sqrt()
    classes = torch.from_numpy(labels)
    assert knn_accuracy(spectrum[:2500], classes[:2500], spectrum[2500:], classes[2500:]) > 0.5
