"""A backbone and its projector, run over the views of a batch."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from msbreg.models import Backbone

__all__ = ["Encoder"]


class Encoder(nn.Module):
    """Views to features and embeddings.

    Args:
        backbone: (N, 3, H, W) to (N, F).
        projector: (N, F) to (N, D).
        view_chunk: views in one forward pass. With 0 all views of one size go through together. Otherwise each chunk
            is normalised by its own batch statistics (as in BYOL, whose two views are separate passes), and its
            activations are thrown away and recomputed in the backward pass: gradients stay exact, memory is one
            chunk's, and a step costs one more forward pass.
    """

    def __init__(self, backbone: Backbone, projector: nn.Module, *, view_chunk: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.view_chunk = view_chunk

    def forward(self, views: Sequence[Tensor], batch: int) -> tuple[Tensor, Tensor]:
        """Runs the networks.

        Args:
            views: one (K_g * batch, 3, H_g, W_g) tensor per view size, all images of a view before the next view.
            batch: images, B.

        Returns:
            Features (K, B, F) of the backbone and embeddings (K, B, D) of the projector.
        """
        chunks = [
            chunk for view in views for chunk in (view.split(self.view_chunk * batch) if self.view_chunk else [view])
        ]
        outputs = [self._run(chunk) for chunk in chunks]
        features = torch.cat([features for features, _ in outputs]).unflatten(0, (-1, batch))
        embeddings = torch.cat([embeddings for _, embeddings in outputs]).unflatten(0, (-1, batch))
        return features, embeddings

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.view_chunk and torch.is_grad_enabled():
            once = lambda: (contextlib.nullcontext(), running_statistics_kept(self))  # noqa: E731
            return checkpoint(self._project, images, use_reentrant=False, context_fn=once)
        return self._project(images)

    def _project(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(images)
        return features, self.projector(features)


@contextlib.contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within it, batch normalisation keeps its running statistics: recomputing must not count a batch twice."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    statistics = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in statistics]
    try:
        yield
    finally:
        # Past autograd, which counts changes: an earlier chunk's graph has saved these buffers, and needs them not.
        for buffer, value in zip(statistics, before, strict=True):
            buffer.data.copy_(value)
