"""MSBReg: views of one image attract each other, all embeddings spread out, and each gets a random push.

Moon, Buracas, Park, Kim, Canny, "An Embedding-Dynamic Approach to Self-supervised Learning", WACV 2023,
https://arxiv.org/abs/2207.03552.
"""

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msbreg.ema import ema_update
from msbreg.functional import MSBRegOutput
from msbreg.losses import MSBRegLoss
from msbreg.methods.encoder import Encoder
from msbreg.methods.outputs import Embeddings, StepOutput

__all__ = ["MSBReg"]


class MSBReg(nn.Module):
    """Online encoder and predictor, EMA target encoder, and the three losses between them.

    Args:
        online: the encoder that learns.
        predictor: (N, D) to (N, D) after the online projector, or None: the attraction then acts on the projector.
        criterion: the loss.
        disperse: "projector" or "predictor": whose output the two dispersive losses act on.
        ema: whether targets are by an encoder that follows the online one; else they are the online projector's own,
            its gradient stopped.
    """

    def __init__(
        self,
        online: Encoder,
        predictor: nn.Module | None,
        criterion: MSBRegLoss,
        *,
        disperse: Literal["projector", "predictor"] = "projector",
        ema: bool = True,
    ) -> None:
        super().__init__()
        self.online = online
        self.predictor = predictor
        self.target = copy.deepcopy(online).requires_grad_(False) if ema else None
        self.criterion = criterion
        self.disperse = disperse
        self._followers: tuple[tuple[nn.Parameter, ...], tuple[nn.Parameter, ...]] | None = None
        self.train()

    def train(self, mode: bool = True) -> "MSBReg":
        """As for any module, but the target drops nothing: of it only batch normalisation is ever in training mode.

        Targets normalised by their own batch are BYOL's, whose ResNet has nothing else that training mode changes.
        Dropout and stochastic depth, which other backbones have, would make the target of an image another one each
        time.
        """
        super().train(mode)
        if self.target is not None:
            self.target.eval()
            for layer in self.target.modules():
                if isinstance(layer, _BatchNorm):
                    layer.training = mode  # not that of its parts: timm's may hold an activation and dropout
        return self

    def forward(self, views: Sequence[Tensor], batch: int) -> StepOutput:
        """One step's loss.

        Args:
            views: one (K_g * batch, 3, H_g, W_g) tensor per view size. The EMA network sees the first size alone
                (the whole views of multi-crop), the online network sees all.
            batch: images, B.
        """
        embeddings = self.embed(views, batch)
        out = self.losses(embeddings)
        terms = {"centroid": out.centroid}
        if self.criterion.lambda_s:
            terms["singular_value"] = out.singular_value
        if self.criterion.lambda_b:
            terms["brownian"] = out.brownian
        return StepOutput(out.loss, terms, embeddings.features[0].detach(), embeddings.z.detach())

    def embed(self, views: Sequence[Tensor], batch: int) -> Embeddings:
        """All networks, run over the views of a batch; arguments as in `forward`."""
        features, z = self.online(views, batch)
        p = z if self.predictor is None else self.predictor(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        if self.target is None:
            return Embeddings(features, z, p, z.detach())
        with torch.no_grad():
            _, t = self.target(views[:1], batch)
        return Embeddings(features, z, p, t)

    def losses(self, embeddings: Embeddings) -> MSBRegOutput:
        """The three losses of a batch's embeddings."""
        _, z, p, t = embeddings
        return self.criterion(p, t, embedding=z if self.disperse == "projector" else p)

    def after_step(self, tau: float) -> None:
        """Moves the target encoder towards the online one; call it after each optimizer step."""
        if self.target is None:
            return
        if self._followers is None:  # not before: moving a module to a device may make its parameters anew
            self._followers = tuple(self.target.parameters()), tuple(self.online.parameters())
        ema_update(*self._followers, tau)
