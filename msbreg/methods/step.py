"""What every method gives back for one training step."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["StepOutput"]


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
