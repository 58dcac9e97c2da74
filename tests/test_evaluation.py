"""Nearest neighbours, instances, linear classifiers and feature extraction."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

import msbreg.evaluation
from msbreg.evaluation import L2, _best_l2, extract_features, instance_accuracy, knn_accuracy, linear_probe
from msbreg.online_probe import OnlineProbe


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, (N, 2)."""
    radians = torch.tensor(degrees) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def clusters(count: int, classes: int = 4, dim: int = 12, spread: float = 1.0, seed: int = 0):
    """Overlapping Gaussian classes around fixed centres: features (count, dim) and labels."""
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return centres[labels] + spread * torch.randn(count, dim, generator=generator), labels


def test_knn_weighs_near_neighbours_more():
    bank, labels = at(0, 20, 22), torch.tensor([5, 9, 9])  # one near neighbour of class 5 against two of class 9
    query = at(2)
    assert knn_accuracy(bank, labels, query, torch.tensor([5]), k=3, temperature=0.01) == 1.0
    assert knn_accuracy(bank, labels, query, torch.tensor([9]), k=3, temperature=10.0) == 1.0
    assert knn_accuracy(bank, labels, query, torch.tensor([5]), k=1, temperature=10.0) == 1.0


def test_knn_weights_are_wu_et_als():
    # Class 1 wins if exp(cos 40 / T) * 2 > exp(cos 0 / T), that is below T = (1 - cos 40) / log 2 = 0.3375.
    bank, labels, query = at(0, 40, 40), torch.tensor([0, 1, 1]), at(0)
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), k=3, temperature=0.337) == 1.0
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), k=3, temperature=0.338) == 1.0


def test_knn_ignores_length_and_clips_k_to_the_bank():
    bank, labels = at(0, 90) * torch.tensor([[100.0], [0.01]]), torch.tensor([0, 1])
    assert knn_accuracy(bank, labels, 0.1 * at(80, 10), torch.tensor([1, 0]), k=50) == 1.0


def test_knn_gives_equal_votes_to_the_smallest_class():
    bank, labels = at(10, -10), torch.tensor([7, 3])
    assert knn_accuracy(bank, labels, at(0), torch.tensor([3]), k=2) == 1.0


def test_knn_is_the_same_in_chunks_and_in_half_precision(monkeypatch):
    (bank, labels), (queries, truth) = clusters(200), clusters(53, seed=1)
    whole = knn_accuracy(bank, labels, queries, truth)
    assert 0.5 < whole < 1.0
    monkeypatch.setattr(msbreg.evaluation, "SIMILARITIES_AT_ONCE", 200 * 7)
    assert knn_accuracy(bank, labels, queries, truth) == whole
    assert knn_accuracy(bank.bfloat16(), labels, queries.bfloat16(), truth) == pytest.approx(whole, abs=0.1)


def test_knn_agrees_with_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (bank, labels), (queries, truth) = clusters(300, spread=2.0), clusters(200, spread=2.0, seed=1)
    judge = neighbors.KNeighborsClassifier(
        20, metric="cosine", weights=lambda distances: torch.tensor(1 - distances).div(0.1).exp().numpy()
    )
    expected = judge.fit(bank.numpy(), labels.numpy()).score(queries.numpy(), truth.numpy())
    assert expected < 0.95
    assert knn_accuracy(bank, labels, queries, truth) == pytest.approx(expected)


def test_collapsed_and_non_finite_features_score_without_a_crash():
    labels = torch.tensor([0, 1, 2, 3])
    for value in (1.0, 0.0, float("nan"), float("inf")):
        assert 0.0 <= knn_accuracy(torch.full((4, 3), value), labels, torch.full((4, 3), value), labels) <= 0.25
        assert 0.0 <= instance_accuracy(torch.full((4, 3), value), torch.full((4, 3), value)) <= 0.25


def test_instances_match_their_own_row(monkeypatch):
    monkeypatch.setattr(msbreg.evaluation, "SIMILARITIES_AT_ONCE", 8)
    gallery = at(0, 90, 180, 270)
    assert instance_accuracy(gallery, at(10, 80, 190, 260)) == 1.0
    assert instance_accuracy(gallery, at(10, 80, 260, 190)) == 0.5
    assert instance_accuracy(gallery, gallery.roll(1, 0)) == 0.0


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((0, 3), (0,), (2, 3), (2,)), "bank of shape"),
        (((2, 3), (2,), (2, 3, 1), (2,)), "queries of shape"),
        (((2, 3), (2,), (2, 4), (2,)), "got 3 .* and 4"),
        (((2, 3), (3,), (2, 3), (2,)), "expected 2 bank labels"),
        (((2, 3), (2,), (2, 3), (1,)), "expected 2 query labels"),
    ],
)
@pytest.mark.parametrize("score", [knn_accuracy, linear_probe])
def test_shapes_that_do_not_fit_are_refused(score, shapes, words):
    bank, bank_labels, queries, query_labels = shapes
    with pytest.raises(ValueError, match=words):
        score(
            torch.zeros(bank), torch.zeros(bank_labels).long(), torch.zeros(queries), torch.zeros(query_labels).long()
        )


def test_other_bad_arguments_are_refused():
    features, labels = at(0, 90), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="k=0"):
        knn_accuracy(features, labels, features, labels, k=0)
    with pytest.raises(ValueError, match="temperature=0"):
        knn_accuracy(features, labels, features, labels, temperature=0.0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        instance_accuracy(features, features[:1])


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_the_linear_probe_agrees_with_scikit_learn(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    (bank, labels), (queries, truth) = clusters(400, spread=2.5), clusters(500, spread=2.5, seed=1)
    scale = torch.logspace(-3, 3, bank.shape[1])  # standardisation takes it out again
    mean, std = bank.mean(0), bank.std(0, correction=0)
    judge = linear_model.LogisticRegression(C=1 / (l2 * len(bank)), max_iter=1000, tol=1e-8)
    judge.fit(((bank - mean) / std).numpy(), labels.numpy())
    expected = judge.score(((queries - mean) / std).numpy(), truth.numpy())
    assert 0.5 < expected < 0.95
    accuracy = linear_probe(bank * scale, labels, queries * scale, truth, l2=l2)
    assert accuracy == pytest.approx(expected, abs=0.0041)  # two queries of 500 on the border
    assert linear_probe(bank * scale, labels, queries * scale, truth, l2=l2) == accuracy


def test_the_weight_decay_is_chosen_on_rows_that_are_held_out():
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(4000, 200, generator=random)  # of which one feature tells the class, nine times of ten
    told = torch.where(torch.rand(4000, generator=random) < 0.9, noise[:, 0] > 0, noise[:, 0] <= 0).long()
    few = noise[:1000], told[:1000], noise[1000:], told[1000:]
    assert linear_probe(*few) == linear_probe(*few, l2=0.1) > linear_probe(*few, l2=1e-6) + 0.01
    line = torch.rand(2000, 1, generator=random)  # in ten stretches, which only large weights tell apart
    many = line[:1000], (10 * line[:1000, 0]).long(), line[1000:], (10 * line[1000:, 0]).long()
    assert linear_probe(*many) > linear_probe(*many, l2=0.1) + 0.3


def test_of_weight_decays_that_do_equally_well_the_largest_is_chosen():
    apart = torch.tensor([[-1.0], [1.0]]).repeat(25, 1)
    assert _best_l2(apart, torch.arange(50) % 2, 20) == max(L2)


def test_the_linear_probe_takes_constant_features_gaps_in_labels_and_unknown_classes():
    bank, labels = torch.tensor([[1.0, 5.0], [2.0, 5.0], [8.0, 5.0], [9.0, 5.0]]), torch.tensor([2, 2, 11, 11])
    queries, truth = torch.tensor([[0.0, 5.0], [10.0, 7.0], [10.0, 5.0]]), torch.tensor([2, 11, 4])
    assert linear_probe(bank, labels, queries, truth) == pytest.approx(2 / 3)


class Batch(NamedTuple):
    views: tuple[torch.Tensor, ...]
    labels: torch.Tensor


def test_features_come_from_evaluation_mode_which_is_left_as_it_was():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    backbone = nn.Sequential(*layers)
    images, labels = torch.randn(10, 3, 8, 8), torch.arange(10)
    batches = [Batch((images[i : i + 4].half(), torch.zeros(1)), labels[i : i + 4]) for i in (0, 4, 8)]
    statistics = backbone[1].running_mean.clone()

    features, found = extract_features(backbone, batches)

    assert torch.equal(found, labels)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, backbone.eval()(images.half().float()).detach())
    assert torch.equal(backbone[1].running_mean, statistics)


@pytest.mark.parametrize("worst", [3.4e38, math.inf, math.nan])
def test_the_linear_probe_takes_features_of_a_network_gone_astray(worst):
    bank, labels = clusters(60, seed=1)
    bank[0, 0], bank[1:, 0] = worst, -worst  # whose difference overflows
    assert 0 <= linear_probe(bank, labels, bank, labels) <= 1
    assert linear_probe(1e30 * clusters(60, seed=1)[0], labels, 1e30 * clusters(60, seed=1)[0], labels) == 1


def test_modes_come_back_part_by_part_even_after_an_error():
    backbone = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(3, 3)))
    backbone[1].eval()
    modes = [part.training for part in backbone.modules()]
    with pytest.raises(RuntimeError):
        extract_features(backbone, [Batch((torch.zeros(1, 5),), torch.zeros(1))])
    assert [part.training for part in backbone.modules()] == modes
    assert True in modes
    assert False in modes


def test_pixels_are_features_too_and_an_empty_loader_is_refused():
    images = torch.randn(3, 3, 2, 2)
    features, _ = extract_features(nn.Flatten(), [Batch((images,), torch.zeros(3))])
    assert torch.equal(features, images.flatten(1))
    assert extract_features(nn.Flatten(), [Batch((images.half(),), torch.zeros(3))])[0].dtype == torch.float32
    with pytest.raises(ValueError, match="empty"):
        extract_features(nn.Flatten(), [])


def train_probe(probe: OnlineProbe, steps: range, rows: slice = slice(None), known: int = 64) -> None:
    for step in steps:
        features, labels = clusters(64, seed=step)
        probe.learn(features[rows], labels.where(torch.arange(64) < known, -1)[rows])


def test_the_online_probe_learns_what_is_linearly_there():
    features, labels = clusters(500, seed=1000)
    probe = OnlineProbe(12, 4, lr=0.01)
    assert probe.accuracy(features, labels) == pytest.approx((labels == 0).double().mean().item())
    train_probe(probe, range(100))
    assert probe.accuracy(features, labels) > 0.9


def test_the_online_probe_sends_no_gradient_to_the_features_and_skips_unknown_labels():
    features, labels = clusters(32)
    features.requires_grad_(True)
    probe, known_only = OnlineProbe(12, 4), OnlineProbe(12, 4)
    probe.learn(features, torch.where(torch.arange(32) < 16, labels, -1))
    known_only.learn(features[:16], labels[:16])
    assert features.grad is None
    torch.testing.assert_close(probe.weight, known_only.weight)
    probe.learn(features, torch.full((32,), -1))
    assert probe.weight.isfinite().all()
    probe(features).square().sum().backward()
    assert features.grad is None


def test_the_online_probe_takes_half_precision_and_computes_in_float32():
    features, labels = clusters(32)
    probe, twin = OnlineProbe(12, 4), OnlineProbe(12, 4)
    probe.learn(features.bfloat16(), labels)
    twin.learn(features.bfloat16().float(), labels)
    assert torch.equal(probe.weight, twin.weight)
    with torch.autocast("cpu", torch.bfloat16):
        logits = probe(features)
    assert logits.dtype == torch.float32 and torch.equal(logits, twin(features))


def test_the_online_probe_resumes_bit_for_bit(tmp_path):
    undisturbed, first, second = (OnlineProbe(12, 4) for _ in range(3))
    train_probe(undisturbed, range(6))
    train_probe(first, range(3))
    torch.save(first.state_dict(), tmp_path / "probe.pt")
    second.load_state_dict(torch.load(tmp_path / "probe.pt", weights_only=True))
    train_probe(second, range(3, 6))
    assert torch.equal(second.weight, undisturbed.weight)
    assert torch.equal(second.bias, undisturbed.bias)


def train_on_a_half(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    probe = OnlineProbe(12, 4, group=dist.group.WORLD)
    train_probe(probe, range(3), slice(32 * rank, 32 * rank + 32), known=40)
    torch.save((probe.weight.detach(), probe.weight.grad), folder / f"{rank}.pt")
    del probe  # which has the group, whose threads must have ended when the interpreter does
    dist.destroy_process_group()


def test_two_processes_train_the_online_probe_of_one(free_port, tmp_path):
    """Though one of them knows fewer labels than the other."""
    alone = OnlineProbe(12, 4)
    train_probe(alone, range(3), known=40)
    multiprocessing.spawn(train_on_a_half, (free_port, tmp_path), nprocs=2)
    (first, gradient), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone.weight.detach())
    torch.testing.assert_close(gradient, alone.weight.grad)  # to whose size Adam is blind
