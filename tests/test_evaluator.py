"""What a run is judged by: the images that vote and are asked, its baseline, and the options that it follows."""

import os
import shutil

import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")
pytest.importorskip("tqdm", reason="this needs the extra [train]")

import torch
from PIL import Image
from torch import nn

from msbreg import evaluator
from msbreg.config import Config
from msbreg.data import ImageFolder, IndexFile, Source
from msbreg.errors import DataError
from msbreg.evaluation import extract_features, knn_accuracy
from msbreg.evaluator import Evaluator

PIXELS = nn.Flatten()


@pytest.fixture
def judge():
    """Makes evaluators, which it closes."""
    made = []

    def make(train: Source, held_out: Source | None, *, timeout: float = 60.0, **options) -> Evaluator:
        config = Config()
        config.data.size, config.data.backend, config.data.timeout = 16, "torchvision", timeout
        for name, value in options.items():
            setattr(config.eval, name, value)
        made.append(Evaluator(config, train, held_out, device=torch.device("cpu"), threads=1))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def splits(swatches) -> tuple[Source, Source]:
    return ImageFolder(swatches / "train"), ImageFolder(swatches / "test")


def test_the_vote_is_of_as_many_images_and_neighbours_as_asked_for(judge, splits):
    backbone, accuracies = nn.Sequential(PIXELS, nn.LayerNorm(3 * 16**2)), set()
    for k, temperature in ((1, 0.1), (50, 0.1), (50, 10.0)):
        judged = judge(*splits, bank=90, queries=60, k=k, temperature=temperature)
        features = *extract_features(backbone, judged.bank), *extract_features(backbone, judged.queries)
        assert [len(each) for each in features] == [90, 90, 60, 60]
        accuracies.add(judged(backbone).knn)
        assert all(torch.equal(*pair) for pair in zip(judged.measured, features[2:], strict=True))
        assert judged(backbone).knn == knn_accuracy(*features, k=k, temperature=temperature)
    assert len(accuracies) == 3


def test_the_linear_probe_is_trained_where_it_is_asked_for(judge, splits):
    judged = judge(*splits, bank=40, queries=20)
    assert judged(PIXELS).linear is None and 0 < judged(PIXELS, linear=True).linear <= 1
    assert judge(*splits, bank=40, queries=20, linear=False)(PIXELS, linear=True).linear is None


def test_images_of_unknown_class_neither_vote_nor_are_asked(judge, swatches, tmp_path):
    lines = [
        f"{image}\t{image.parent.name if number % 3 else ''}"
        for number, image in enumerate(sorted((swatches / "train").rglob("*.jpg")))
    ]
    (tmp_path / "list.tsv").write_text("\n".join(lines))
    source = IndexFile(tmp_path / "list.tsv")
    assert (source.labels < 0).sum() == 80
    judged = judge(source, source)
    assert judged.task == "labels"
    for images in (judged.bank, judged.queries):
        _, labels = extract_features(PIXELS, images)
        assert len(labels) == 160 and labels.min() == 0


def test_held_out_images_are_recognised_in_views_of_them(judge, splits):
    train, held_out = (source.subset(range(10, 40)) for source in splits)
    train.labels, held_out.labels = train.labels * 0 - 1, held_out.labels * 0 - 1
    judged = judge(train, held_out)
    (bank, _), (queries, _) = (extract_features(PIXELS, images) for images in (judged.bank, judged.queries))
    alone = judge(held_out, None)
    assert judged.task == alone.task == "instances"
    assert torch.equal(bank, extract_features(PIXELS, alone.bank)[0])
    assert bank.shape == queries.shape and not torch.equal(bank, queries)
    assert 1 / 30 < judged(PIXELS).knn < 1


def test_raw_pixels_have_their_places(judge, tmp_path):
    """Two classes of the same colours, which a mean over all pixels could not tell."""
    halves = Image.new("RGB", (16, 16))
    halves.paste((255, 255, 255), (0, 0, 8, 16))
    for name, image in (("left", halves), ("right", halves.rotate(180))):
        (tmp_path / name).mkdir()
        for number in range(6):
            image.save(tmp_path / name / f"{number}.png")
    source = ImageFolder(tmp_path)
    assert judge(source, source, k=5).pixels() == 1


def test_images_that_are_not_kept_are_read_again(judge, splits, monkeypatch):
    splits = splits[0].subset([*range(240), *range(60)]), splits[1]  # of two batches, of which one could be kept
    judged = judge(*splits, bank=300, queries=60)
    kept = judged(PIXELS).knn, judged(PIXELS).knn
    monkeypatch.setattr(evaluator, "CACHE_BYTES", 4 * 3 * 16**2 * 280)  # more than the queries, less than the bank
    judged = judge(*splits, bank=300, queries=60)
    assert (judged(PIXELS).knn, judged(PIXELS).knn) == kept and kept[0] == kept[1]
    next(iter(judged.bank))
    assert len(judged.queries._kept) == 1 and not judged.bank._kept  # nor a part, which would be of no use


def test_an_image_that_stalls_ends_an_evaluation(judge, tmp_path, swatches):
    for number, image in enumerate(sorted((swatches / "train").rglob("*.jpg"))[:8]):
        shutil.copy(image, tmp_path / f"{number}.jpg")
    judged = judge(ImageFolder(tmp_path), None, timeout=0.5)
    (tmp_path / "5.jpg").unlink()
    os.mkfifo(tmp_path / "5.jpg")
    with pytest.raises(DataError, match=r"5\.jpg is still being read after 0\.5 s"):
        judged(PIXELS)
    (tmp_path / "5.jpg").write_bytes(b"")  # lets the thread that reads it end


def test_the_spectrum_of_evenly_spread_embeddings_is_flat_and_leaves_the_projector_alone(judge, splits):
    judged = judge(*splits, queries=16)
    projector = nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8, affine=False))
    nn.init.eye_(projector[0].weight)
    judged.measured = 3 * torch.cat([torch.eye(8), -torch.eye(8)]), torch.zeros(16)
    assert judged.spectrum(projector) == pytest.approx([1.0] * 8)
    assert projector.training and projector[1].num_batches_tracked == 0
    judged.measured = torch.ones(16, 8), torch.zeros(16)
    assert judged.spectrum(projector) == pytest.approx([8**0.5] + [0.0] * 7, abs=1e-3)
