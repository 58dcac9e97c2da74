"""What every method gives back for one training step."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Embeddings", "StepOutput"]


class Embeddings(NamedTuple):
    """What the networks make of a batch, and losses compare."""

    features: Tensor
    """(K, B, F) of the backbone."""
    z: Tensor
    """(K, B, D) of the projector."""
    p: Tensor
    """(K, B, D) of the predictor; `z` itself where there is none."""
    t: Tensor
    """(K', B, D) of the targets' network, or of the projector again; no gradient."""


class StepOutput(NamedTuple):
    """The loss to minimise, and what the trainer watches."""

    loss: Tensor
    """Scalar, differentiable."""
    terms: dict[str, Tensor]
    """Named scalars for the log, detached."""
    features: Tensor
    """(B, F) backbone features of the first view, detached: the on-line linear probe's input."""
    embeddings: Tensor
    """(K, B, D) projector outputs, detached: what collapse is watched on."""
