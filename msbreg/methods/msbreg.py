"""MSBReg: views of one image attract each other, all embeddings spread out, and each gets a random push.

Moon, Buracas, Park, Kim, Canny, "An Embedding-Dynamic Approach to Self-supervised Learning", WACV 2023,
https://arxiv.org/abs/2207.03552.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msbreg.ema import ema_update
from msbreg.losses import MSBRegLoss
from msbreg.methods.encoder import Encoder
from msbreg.methods.step import StepOutput

__all__ = ["MSBReg"]


class MSBReg(nn.Module):
    """Online encoder and predictor, EMA target encoder, and the three losses between them.

    Args:
        online: the encoder that learns.
        predictor: (N, D) to (N, D) after the online projector, or None: the attraction then acts on the projector.
        criterion: the loss.
        disperse: "projector" or "predictor": whose output the two dispersive losses act on.
    """

    def __init__(
        self, online: Encoder, predictor: nn.Module | None, criterion: MSBRegLoss, *, disperse: str = "projector"
    ) -> None:
        super().__init__()
        self.online = online
        self.predictor = predictor
        self.target = copy.deepcopy(online).requires_grad_(False)
        self.criterion = criterion
        self.disperse = disperse

    def forward(self, views: Sequence[Tensor], batch: int) -> StepOutput:
        """One step's loss.

        Args:
            views: one (K_g * batch, 3, H_g, W_g) tensor per view size. The EMA network sees the first size alone
                (the whole views of multi-crop), the online network sees all.
            batch: images, B.
        """
        features, z = self.online(views, batch)  # (K, B, F), (K, B, D)
        p = z if self.predictor is None else self.predictor(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        with torch.no_grad():
            _, t = self.target(views[:1], batch)  # (K', B, D)
        out = self.criterion(p, t, embedding=z if self.disperse == "projector" else p)
        terms = {"centroid": out.centroid}
        if self.criterion.lambda_s:
            terms["singular_value"] = out.singular_value
        if self.criterion.lambda_b:
            terms["brownian"] = out.brownian
        return StepOutput(out.loss, terms, features[0].detach(), z.detach())

    def after_step(self, tau: float) -> None:
        """Moves the target encoder towards the online one; call it after each optimizer step."""
        ema_update(self.target, self.online, tau)
