"""SimSiam: BYOL without the EMA network; the target is the online projector itself, its gradient stopped.

Chen, He, "Exploring simple siamese representation learning", CVPR 2021, https://arxiv.org/abs/2011.10566. The loss here
is 2 - 2 cos, which is twice theirs plus a constant, so that numbers compare with the other methods.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from msbreg.functional import MSBRegOutput
from msbreg.losses import MSBRegLoss
from msbreg.methods.encoder import Encoder
from msbreg.methods.step import Embeddings, StepOutput

__all__ = ["SimSiam"]


class SimSiam(nn.Module):
    """Encoder and predictor of SimSiam.

    Args:
        online: the encoder that learns.
        predictor: (N, D) to (N, D); without one SimSiam collapses.
    """

    def __init__(self, online: Encoder, predictor: nn.Module) -> None:
        super().__init__()
        self.online = online
        self.predictor = predictor
        self.criterion = MSBRegLoss(lambda_s=0.0, lambda_b=0.0, leave_one_out=True)

    def forward(self, views: Sequence[Tensor], batch: int) -> StepOutput:
        """One step's loss; arguments as in `MSBReg.forward`."""
        embeddings = self.embed(views, batch)
        out = self.losses(embeddings)
        return StepOutput(out.loss, {"centroid": out.centroid}, embeddings.features[0].detach(), embeddings.t)

    def embed(self, views: Sequence[Tensor], batch: int) -> Embeddings:
        """Both networks, run over the views of a batch."""
        features, z = self.online(views, batch)
        return Embeddings(features, z, self.predictor(z.flatten(0, 1)).unflatten(0, z.shape[:2]), z.detach())

    def losses(self, embeddings: Embeddings) -> MSBRegOutput:
        """The attraction of a batch's predictions to the other views' projections."""
        return self.criterion(embeddings.p, embeddings.t)

    def after_step(self, tau: float) -> None:
        """Nothing moves outside the optimizer."""
