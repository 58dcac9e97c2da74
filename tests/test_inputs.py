"""Which images a run trains and is judged on, and which of them each process has."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="this needs the extra [train]")

from msbreg.config import Config, with_absolute_paths
from msbreg.data import ImageFolder, open_source, open_split
from msbreg.errors import MSBRegError
from msbreg.files import expanded
from msbreg.inputs import has_labels, input_dtype, open_images, open_loader, set_aside, share_of_batch
from msbreg.processes import Processes


def test_without_a_home_folder_images_are_still_found(config, swatches, monkeypatch):
    def homeless(path):
        if str(path).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return path

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    config.data.path = str(swatches)
    assert len(open_images(config, Processes("cpu"))[0]) == 240
    config.data.path = None
    with pytest.raises(MSBRegError, match=r"no home folder for a cache; set --data\.cache or XDG_CACHE_HOME"):
        open_images(config, Processes("cpu"))


@pytest.fixture
def config() -> Config:
    config = Config()
    config.data.size, config.data.batch_size, config.data.backend, config.data.threads = 16, 32, "torchvision", 1
    return config


def test_a_batch_that_cannot_be_shared_evenly_is_refused(config):
    processes = Processes("cpu")
    processes.world = 4
    assert share_of_batch(config, processes) == 8
    processes.world = 5
    with pytest.raises(MSBRegError, match="32 images over all processes, which 5 processes cannot share evenly"):
        share_of_batch(config, processes)


def test_the_seed_orders_the_images(config, swatches):
    def order(seed: int) -> list[int]:
        config.run.seed = seed
        loader = open_loader(config, Processes("cpu"), ImageFolder(swatches / "train"))
        try:
            return next(loader.batches(stop=1)).index.tolist()
        finally:
            loader.close()

    assert order(0) == order(0) != order(1)


@pytest.mark.parametrize(("precision", "dtype"), [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_views_come_in_what_the_networks_take(config, swatches, precision, dtype):
    config.model.precision = precision
    loader = open_loader(config, Processes("cpu"), ImageFolder(swatches / "train"))
    assert next(loader.batches(stop=1)).views[0].dtype == loader.dtype == dtype
    loader.close()


def test_a_gpu_computes_in_bfloat16_unless_asked_otherwise(config):
    processes = Processes("cpu")
    processes.device = torch.device("cuda")
    assert input_dtype(config, processes) == torch.bfloat16
    config.model.precision = "fp32"
    assert input_dtype(config, processes) == torch.float32


@pytest.mark.parametrize(
    ("labels", "votes"),
    [
        ([0, 1] * 4, True),
        ([0, 0, 0, 0, 0, 0, 0, 1], True),  # four a class on average
        ([0, 1] * 3 + [0], False),
        ([0] * 8, False),
        ([-1] * 8 + [0] * 8, False),
        ([-1] * 8 + [0, 1] * 4, True),
        ([-1] * 8, False),
    ],
)
def test_labels_vote_where_two_classes_have_enough(labels, votes):
    assert has_labels(SimpleNamespace(labels=np.array(labels))) is votes


def test_images_set_aside_are_not_trained_on(swatches):
    source = ImageFolder(swatches / "train")
    train, held_out = ([part.name(index) for index in range(len(part))] for part in set_aside(source, 24))
    assert (len(train), len(held_out)) == (216, 24)
    assert sorted(train + held_out) == [source.name(index) for index in range(240)]


def test_only_labelled_images_are_set_aside():
    source = SimpleNamespace(labels=np.where(np.arange(100) % 5, -1, np.arange(100) % 2), subset=lambda part: part)
    train, held_out = set_aside(source, 7)
    assert len(held_out) == 7 and (source.labels[held_out] >= 0).all()
    assert sorted([*train, *held_out]) == [*range(100)]


def test_as_many_are_set_aside_as_are_asked_for_and_a_run_keeps_them(config, swatches):
    """Of another number of queries, too: the images that it is trained on may not change."""
    config.data.path = str(swatches / "train")

    def opened(queries: int, trained_on: int | None = None):
        config.eval.queries = queries
        train, held_out = open_images(config, Processes("cpu"), trained_on=trained_on)
        return len(train), train.fingerprint(), held_out and held_out.fingerprint()

    few, tenth = opened(10), opened(1000)
    assert few[0] == 230 and tenth[0] == 216
    assert opened(1000, trained_on=230) == opened(3, trained_on=230) == few
    assert opened(10, trained_on=216) == tenth
    assert opened(10, trained_on=240)[::2] == (240, None)
    assert (
        opened(10, trained_on=200) == opened(10, trained_on=500) == few
    )  # of other images, which is for others to say


def test_no_images_are_held_out_where_none_are_wanted(config, swatches):
    config.data.eval_path = "none"
    for folder in (swatches, swatches / "train"):
        config.data.path = str(folder)
        train, held_out = open_images(config, Processes("cpu"))
        assert len(train) == 240 and held_out is None
    assert with_absolute_paths(config).data.eval_path == "none"


def test_held_out_images_without_classes_are_refused_where_others_have_them(config, tmp_path, swatches):
    """As those of ImageNet are unpacked from their tar file: nothing would be classified in the whole run."""
    names = [f"train/{'ab'[index % 2]}/{index}.jpg" for index in range(12)] + ["val/1.jpg", "val/2.jpg"]
    config.data.path = linked(tmp_path, names, swatches)
    with pytest.raises(
        MSBRegError, match=r"/val has no classes, but .*/train has 2: sort it into a folder for each, or"
    ):
        open_images(config, Processes("cpu"))
    (tmp_path / "val.txt").write_text("val/1.jpg\ta\nval/2.jpg\tb\n")
    config.data.eval_path = str(tmp_path / "val.txt")
    assert open_images(config, Processes("cpu"))[1].labels.tolist() == [0, 1]


def linked(folder: Path, names: list[str], swatches: Path) -> str:
    """A folder with images under these names."""
    for name, image in zip(names, sorted((swatches / "train").rglob("*.jpg")), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(image)
    return str(folder)


def test_images_without_labels_are_all_trained_on(config, tmp_path, swatches):
    config.data.path = linked(tmp_path, [f"{index}.jpg" for index in range(40)], swatches)
    train, held_out = open_images(config, Processes("cpu"))
    assert len(train) == 40 and held_out is None


def test_classes_of_held_out_images_are_matched_by_name(config, tmp_path, swatches):
    names = [f"{'abc'[index % 3]}/{index}.jpg" for index in range(12)]
    config.data.path = linked(tmp_path / "train", names, swatches)
    config.data.eval_path = linked(tmp_path / "others", ["b/1.jpg", "c/1.jpg"], swatches)
    train, held_out = open_images(config, Processes("cpu"))
    assert train.classes == ["a", "b", "c"] and held_out.labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("folders", "classes", "held_out"),
    [
        (["train/a", "train/b", "val/a"], ["a", "b"], 4),
        (["Train/a", "Train/b", "Test/b"], ["a", "b"], 4),
        (["train/a", "train/b", "valid/a", "test/b", "test/a"], ["a", "b"], 4),
        (["train/a", "train/b"], ["a", "b"], 0),
    ],
)
def test_folders_of_a_split_have_their_usual_names(tmp_path, swatches, folders, classes, held_out):
    linked(tmp_path, [f"{folder}/{number}.jpg" for number in range(4) for folder in folders], swatches)
    (tmp_path / "notes").mkdir()
    train, other = open_split(tmp_path)
    assert train.classes == classes and (0 if other is None else len(other)) == held_out
    assert len(train) == 4 * len(classes)


def test_a_class_called_train_does_not_hide_the_others_in_silence(tmp_path, swatches):
    linked(tmp_path, ["train/1.jpg", "bus/1.jpg", "car/1.jpg"], swatches)
    with pytest.warns(
        UserWarning, match="train, whose images alone are used, and not those in bus, car; if train is a"
    ):
        assert len(open_split(tmp_path)[0]) == 1


def test_shards_beside_images_are_not_passed_over_in_silence(tmp_path, swatches):
    linked(tmp_path, ["preview.jpg"], swatches)
    (tmp_path / "shard.tar").touch()
    with pytest.warns(UserWarning, match=r"tar shards beside them are passed over: give .*/\*\.tar for these"):
        assert len(open_source(tmp_path)) == 1


def test_somebody_unknown_has_no_home(config):
    config.data.path = "~nobody-of-this-name/images"
    with pytest.raises(MSBRegError, match="no such folder or file: ~nobody-of-this-name/images"):
        open_images(config, Processes("cpu"))
    assert str(expanded("~nobody-of-this-name/x")) == "~nobody-of-this-name/x"
