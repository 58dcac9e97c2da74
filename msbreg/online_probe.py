"""A linear classifier that trains beside the encoder."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from msbreg.precision import full_precision

__all__ = ["OnlineProbe"]


class OnlineProbe(nn.Module):
    """A linear classifier that trains beside the encoder, on features it cannot change: accuracy while training runs.

    Each row is standardised first, so that the probe keeps up with features whose scale moves; then comes one step of
    Adam a batch. The optimizer's state is part of `state_dict`.

    Args:
        num_features: F.
        num_classes: C.
        lr: Adam's learning rate; our default.
        group: process group that shares each batch; None for one process.
    """

    def __init__(
        self, num_features: int, num_classes: int, *, lr: float = 1e-3, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.group = group
        self._optimizer = torch.optim.Adam([self.weight, self.bias], lr)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) features of any floating dtype to (B, C) logits in float32; no gradient reaches the features."""
        with full_precision(features):
            x = features.detach().float()
            return layer_norm(x, x.shape[1:]) @ self.weight.T + self.bias

    @torch.enable_grad()
    def learn(self, features: Tensor, labels: Tensor) -> None:
        """Takes one step on a batch.

        Args:
            features: (B, F).
            labels: (B,) int64; rows with a negative label are passed over.
        """
        loss = cross_entropy(self(features), labels.clamp(min=-1), ignore_index=-1, reduction="sum")
        parameters = (self.weight, self.bias)
        known, gradients = (labels >= 0).sum(), torch.autograd.grad(loss, parameters)
        if self.group is not None:  # whose other processes may know more labels, or fewer
            for summed in (known, *gradients):
                dist.all_reduce(summed, group=self.group)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / known.clamp(min=1)
        self._optimizer.step()

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Top-1 accuracy in [0, 1] on features (N, F) and labels (N,) as `evaluation.extract_features` gives them."""
        return (self(features).argmax(dim=1) == labels).double().mean().item()

    def get_extra_state(self) -> dict[str, Any]:
        """The optimizer's part of `state_dict`."""
        return self._optimizer.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores what `get_extra_state` gave."""
        self._optimizer.load_state_dict(state)
