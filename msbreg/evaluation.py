"""How good frozen features are: nearest neighbours, matching of instances, and a linear classifier."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

__all__ = ["evaluation_mode", "extract_features", "instance_accuracy", "knn_accuracy", "linear_probe"]

SIMILARITIES_AT_ONCE = 2**25  # 128 MiB in fp32
L2 = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Weight decays of a linear probe. For 5,000 images of CIFAR-10 with 1,024 features each, of k-means of patches, 1e-2
was best, and 1e-3 worse by four points; for 50,000 it was the other way round, by two (by hand)."""
NO_CLASS = -100
VOTE_UNIT = 2**40  # votes are counted in whole parts of this, so that their sum does not depend on the order


class LabelledBatch(Protocol):
    """What a loader for evaluation yields."""

    @property
    def views(self) -> Sequence[Tensor]:
        """The first one holds the images, (B, 3, H, W)."""

    @property
    def labels(self) -> Tensor:
        """(B,) int64."""


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts every part of a module into evaluation mode, and afterwards each back into the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def extract_features(backbone: nn.Module, loader: Iterable[LabelledBatch]) -> tuple[Tensor, Tensor]:
    """Features of every image of a loader, in evaluation mode; each part's mode is restored afterwards.

    Args:
        backbone: (B, 3, H, W) to (B, F). Images are brought to the device and dtype of its parameters, if it has any.
            `nn.Flatten()` gives the pixels themselves, the usual floor of comparison.
        loader: batches with the images in `views[0]` and int64 class numbers (B,) in `labels`.

    Returns:
        Features (N, F) in float32 and labels (N,), on the backbone's device, in the loader's order.

    Raises:
        ValueError: where the loader yields no batch.
    """
    parameter = next(backbone.parameters(), None)
    features, labels = [], []
    with evaluation_mode(backbone):
        for batch in loader:
            images = batch.views[0]
            if parameter is not None:
                images = images.to(parameter.device, parameter.dtype, non_blocking=True)
            features.append(backbone(images).float())
            labels.append(batch.labels.to(images.device))
    if not features:
        raise ValueError("expected a loader with at least one batch, got an empty one")
    return torch.cat(features), torch.cat(labels)


def _check_features(bank: Tensor, queries: Tensor) -> None:
    for name, features in (("bank", bank), ("queries", queries)):
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(f"expected {name} of shape (N, F) with N > 0, got {tuple(features.shape)}")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"expected features of one width, got {bank.shape[1]} (bank) and {queries.shape[1]} (queries)")


def _check_labels(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> None:
    for name, features, labels in (("bank", bank, bank_labels), ("query", queries, query_labels)):
        if labels.shape != features.shape[:1]:
            raise ValueError(f"expected {len(features)} {name} labels, got shape {tuple(labels.shape)}")


def _similarities(bank: Tensor, queries: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cosine similarities (rows, N) of a few queries at a time with the whole bank, and which queries they are."""
    bank, queries = normalize(bank.float(), dim=1), normalize(queries.float(), dim=1)
    rows = max(1, SIMILARITIES_AT_ONCE // len(bank))
    for start in range(0, len(queries), rows):
        chunk = slice(start, start + rows)
        yield chunk, queries[chunk] @ bank.T


@torch.no_grad()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, *, k: int = 20, temperature: float = 0.1
) -> float:
    """Share of queries whose class wins the vote of their k nearest rows of the bank.

    A neighbour at cosine similarity s votes with weight exp(s / temperature) (Wu et al., CVPR 2018,
    https://arxiv.org/abs/1805.01978, section 3.4). Equal votes go to the class with the smallest number. Which of
    several equally near rows are among the k is `torch.topk`'s choice, the same each time on one device.

    Args:
        bank: (N, F) features of the labelled images; any floating dtype, any device, not necessarily normalised.
        bank_labels: (N,) int64.
        queries: (M, F) features of the images to classify, on the bank's device.
        query_labels: (M,) int64.
        k: neighbours that vote; all of the bank where it has fewer. 200 is usual on ImageNet, 20 on small sets.
        temperature: sharpness of the weights; 0.1 is usual (Wu et al.: 0.07).

    Returns:
        Top-1 accuracy in [0, 1].

    Raises:
        ValueError: for shapes that do not fit together, k < 1, or a temperature that is not above 0.
    """
    _check_features(bank, queries)
    _check_labels(bank, bank_labels, queries, query_labels)
    if k < 1 or not temperature > 0:
        raise ValueError(f"expected k >= 1 and temperature > 0, got k={k} and temperature={temperature}")
    classes, numbers = bank_labels.to(bank.device).unique(return_inverse=True)
    query_labels = query_labels.to(bank.device)
    correct = torch.zeros((), dtype=torch.int64, device=bank.device)
    for chunk, similarities in _similarities(bank, queries):
        near, neighbours = similarities.topk(min(k, len(bank)), dim=1)  # (rows, k), the nearest first
        weights = torch.exp((near - near[:, :1]).double() / temperature)  # the nearest has 1; only ratios count
        votes = torch.zeros(len(near), len(classes), dtype=torch.int64, device=bank.device)
        votes.scatter_add_(1, numbers[neighbours], (weights * VOTE_UNIT).long())
        correct += (classes[votes.argmax(dim=1)] == query_labels[chunk]).sum()
    return correct.item() / len(queries)


@torch.no_grad()
def instance_accuracy(gallery: Tensor, queries: Tensor) -> float:
    """Share of queries whose nearest row of the gallery is their own: needs no labels.

    Args:
        gallery: (N, F) features, one row an image; any floating dtype and device.
        queries: (N, F) features of other views of the same images in the same order, on the gallery's device.

    Returns:
        Accuracy in [0, 1]; 1 / N for features that are all alike.

    Raises:
        ValueError: for shapes other than (N, F) twice.
    """
    _check_features(gallery, queries)
    if len(gallery) != len(queries):
        raise ValueError(f"expected one query a gallery row, got {len(queries)} and {len(gallery)}")
    own = torch.arange(len(queries), device=gallery.device)
    correct = torch.zeros((), dtype=torch.int64, device=gallery.device)
    for chunk, similarities in _similarities(gallery, queries):
        correct += (similarities.argmax(dim=1) == own[chunk]).sum()
    return correct.item() / len(queries)


def linear_probe(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    l2: float | None = None,
    iterations: int = 200,
) -> float:
    """Top-1 accuracy of multinomial logistic regression on frozen features.

    Features are standardised by the bank's mean and standard deviation, and those that are not finite count as 0. The
    classifier minimises mean cross-entropy plus l2 / 2 times the squared weights (not the biases) by full-batch L-BFGS
    with a strong Wolfe line search from zero, so that there is no learning rate to choose and no randomness;
    scikit-learn's `LogisticRegression(C=1 / (l2 * N))` solves the same problem. It holds N x F and about
    4 N x C floats beside its arguments.

    Args:
        bank: (N, F) training features; any floating dtype and device.
        bank_labels: (N,) int64.
        queries: (M, F) features to classify, on the bank's device.
        query_labels: (M,) int64; a class that the bank lacks counts as an error.
        l2: weight decay. None: of 0.1, 0.01 and so on down to 1e-6 the last before a classifier of four fifths of the
            bank does no better on the others (every fifth row).
        iterations: L-BFGS iterations at the most, for each l2.

    Returns:
        Top-1 accuracy on the queries, in [0, 1].

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _check_features(bank, queries)
    _check_labels(bank, bank_labels, queries, query_labels)
    classes, numbers = bank_labels.to(bank.device).unique(return_inverse=True)
    with torch.no_grad():
        bank, queries = (features.float().nan_to_num(0.0, 0.0, 0.0) for features in (bank, queries))
        largest = bank.abs().amax(dim=0)  # of each feature, so that no square overflows
        largest = torch.where(largest > 0, largest, 1.0)
        x, x_query = bank.div_(largest), queries.div_(largest)
        std, mean = torch.std_mean(x, dim=0, correction=0)
        scale = torch.where(std > 0, 1 / std, 0.0)
        for features in (x, x_query):
            features.sub_(mean).mul_(scale)
    if l2 is None:
        l2 = _best_l2(x, numbers, iterations)
    weight, bias = _logistic_regression(x, numbers, l2, iterations)
    with torch.no_grad():
        predicted = classes[(x_query @ weight.T + bias).argmax(dim=1)]
        return (predicted == query_labels.to(bank.device)).double().mean().item()


def _best_l2(x: Tensor, numbers: Tensor, iterations: int) -> float:
    """The weight decay of `linear_probe` for standardised features x, (N, F), of classes 0 to C - 1, (N,)."""
    held = torch.arange(len(x), device=x.device) % 5 == 4
    others = numbers.masked_fill(held, NO_CLASS)
    best, most = L2[0], -1
    for l2 in L2:
        weight, bias = _logistic_regression(x, others, l2, iterations)
        right = int(((x @ weight.T + bias).argmax(dim=1) == numbers)[held].sum())
        if right <= most:
            break
        best, most = l2, right
    return best


def _logistic_regression(x: Tensor, numbers: Tensor, l2: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Weights (C, F) and biases (C,) for features (N, F) of classes 0 to C - 1, (N,), or NO_CLASS: left out."""
    classes = int(numbers.max()) + 1
    weight = torch.zeros(classes, x.shape[1], device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(x @ weight.T + bias, numbers, ignore_index=NO_CLASS) + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return weight.detach(), bias.detach()
