"""Held-out accuracy of a frozen backbone: what the trainer measures as it goes, and `msbreg eval` afterwards."""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from msbreg.config import Config
from msbreg.data import Batch, Source, ViewLoader, evaluation
from msbreg.data.recipes import Recipe, View
from msbreg.evaluation import evaluation_mode, extract_features, instance_accuracy, knn_accuracy, linear_probe
from msbreg.inputs import LABELLED_IMAGES_A_CLASS, has_labels, recipe_of
from msbreg.linalg import singular_values

__all__ = ["TASKS", "Evaluator", "GivenUpError"]

TASKS = {"labels": "kNN top-1", "instances": "image recognised again"}
"""What `Evaluator.task` is called in tables and plots."""

INSTANCES = 1000
CACHE_BYTES = 2**30  # CIFAR-10 fits
SPECTRUM_IMAGES = 512


@dataclass
class Accuracy:
    """Shares of right answers, 0 to 1; linear is None where it was not asked for or there are no labels."""

    knn: float
    linear: float | None = None


class GivenUpError(Exception):
    """A signal came while images were evaluated."""


class Evaluator:
    """Weighted kNN and linear probe on features of images without augmentation.

    With labels, a bank of training images votes on held-out ones. Without them (or with too few images a class to vote)
    the task is to recognise an image again: each query is an augmented view, the bank holds the images themselves, and
    only the same image counts as right.

    Args:
        config: the run's options.
        train: training images.
        held_out: images that are not trained on, or None: then the task is to recognise training images.
        device: where features are computed.
        threads: decoding threads.
        view: how images are cut and coloured that are to be recognised again, at `data.size`; None: as the recipe's
            first view.
        stop: once it holds something, evaluations end with a GivenUpError before their next batch.

    Attributes:
        task: "labels" or "instances".
        protocol: the task, its options and a hash of the images' names and labels: figures of another one are not to be
            compared.
        measured: features (N, F) of the queries by the backbone that was measured last, and their labels (N,).
    """

    measured: tuple[Tensor, Tensor]

    def __init__(
        self,
        config: Config,
        train: Source,
        held_out: Source | None,
        *,
        device: torch.device,
        threads: int,
        view: View | None = None,
        stop: Sequence[int] = (),
    ) -> None:
        self.device = device
        self.k, self.temperature = config.eval.k, config.eval.temperature
        votes, asked = has_labels(train), held_out is not None and has_labels(held_out, a_class=1)
        self.task = "labels" if votes and asked else "instances"
        if held_out is not None and votes != asked:
            few = f"{len(held_out):,} held-out" if votes else f"{len(train):,} training"
            fewer = "" if votes else f", or of fewer than {LABELLED_IMAGES_A_CLASS} images a class"
            warnings.warn(
                f"images are recognised again instead of classified: the {few} images have labels of fewer than two "
                f"classes{fewer}.",
                stacklevel=2,
            )
        plain = evaluation(config.data.size)

        def images(source: Source, most: int, views: Recipe = plain) -> Images:
            usable = np.flatnonzero(np.asarray(source.labels) >= 0) if self.task == "labels" else np.arange(len(source))
            chosen = np.random.Generator(np.random.Philox(0)).permutation(usable)[:most]
            loader = ViewLoader(
                source.subset(np.sort(chosen)),
                views,
                min(256, len(chosen)),
                shuffle=False,
                device=device,
                dtype=torch.float32,
                backend=config.data.backend,
                threads=threads,
                timeout=config.data.timeout,
            )
            return Images(loader, device, stop, config.data.size)

        if held_out is not None and self.task == "labels":
            self.bank, self.queries = images(train, config.eval.bank), images(held_out, config.eval.queries)
        else:
            source, most = train if held_out is None else held_out, min(INSTANCES, config.eval.queries)
            view = replace(view or recipe_of(config)[0], size=config.data.size)  # pixels are compared too
            self.bank, self.queries = images(source, most), images(source, most, (view,))
        self.linear = config.eval.linear and self.task == "labels"
        vote = f", {self.k} neighbours at {self.temperature:g}" if self.task == "labels" else ""
        bank, queries = (f"{len(one.source)} {one.source.fingerprint()[:8]}" for one in (self.bank, self.queries))
        self.protocol = f"{self.task}{vote}, bank {bank}, queries {queries}"

    def pixels(self) -> float:
        """kNN accuracy of the pixels themselves, averaged down to 32 x 32 where the images are larger."""
        return self._score(nn.Sequential(Shrink(32), nn.Flatten()), linear=False).knn

    def __call__(self, backbone: nn.Module, *, linear: bool = False) -> Accuracy:
        """Accuracy of a backbone, which is left in the mode it came in."""
        return self._score(backbone, linear=linear and self.linear)

    def _score(self, backbone: nn.Module, *, linear: bool) -> Accuracy:
        bank, bank_labels = extract_features(backbone, self.bank)
        queries, query_labels = self.measured = extract_features(backbone, self.queries)
        if self.task == "instances":
            return Accuracy(instance_accuracy(bank, queries))
        knn = knn_accuracy(bank, bank_labels, queries, query_labels, k=self.k, temperature=self.temperature)
        return Accuracy(knn, linear_probe(bank, bank_labels, queries, query_labels) if linear else None)

    @torch.no_grad()
    def spectrum(self, projector: nn.Module) -> list[float]:
        """Singular values of the unit-norm embeddings of held-out images, over those of a flat spectrum (all 1).

        Args:
            projector: features (N, F) of the backbone that was measured last to embeddings (N, D); it is left in the
                mode it came in.
        """
        queries, _ = self.measured
        features = queries[:: max(1, len(queries) // SPECTRUM_IMAGES)]
        with evaluation_mode(projector):
            rows = torch.nn.functional.normalize(projector(features).float(), dim=-1)
        count, dim = rows.shape
        return (singular_values(rows) * math.sqrt(min(count, dim) / count)).tolist()

    def close(self) -> None:
        """Frees the pipelines."""
        self.bank.loader.close()
        self.queries.loader.close()


class Images:
    """The batches of a loader on the device, kept in memory after the first pass where all of them together are small.

    Args:
        loader: of images of one size.
        device: where the batches go.
        stop: see `Evaluator`.
        size: pixels of an image's side.
    """

    def __init__(self, loader: ViewLoader, device: torch.device, stop: Sequence[int], size: int) -> None:
        self.loader, self.source, self.device, self.stop = loader, loader.source, device, stop
        self._small = len(loader.source) * 3 * size**2 * torch.float32.itemsize <= CACHE_BYTES
        self._kept: list[Batch] = []
        self._whole = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._kept if self._whole else self._read():
            if self.stop:
                raise GivenUpError
            yield batch

    def _read(self) -> Iterator[Batch]:
        self._kept = []
        for batch in self.loader.batches():
            moved = batch._replace(
                views=tuple(view.to(self.device) for view in batch.views),
                labels=batch.labels.to(self.device),
            )
            if self._small:
                self._kept.append(moved)
            yield moved
        self._whole = self._small


class Shrink(nn.Module):
    """Averages images down to at most `side` x `side`."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 3, h, w)."""
        return adaptive_avg_pool2d(images, (min(self.side, images.shape[-2]), min(self.side, images.shape[-1])))
