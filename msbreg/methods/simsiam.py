"""SimSiam: BYOL without the EMA network; the target is the online projector itself, its gradient stopped.

Chen, He, "Exploring simple siamese representation learning", CVPR 2021, https://arxiv.org/abs/2011.10566. The loss here
is 2 - 2 cos, which is twice theirs plus a constant, so that numbers compare with the other methods.
"""

from torch import nn

from msbreg.losses import MSBRegLoss
from msbreg.methods.encoder import Encoder
from msbreg.methods.msbreg import MSBReg

__all__ = ["SimSiam"]


class SimSiam(MSBReg):
    """Encoder and predictor of SimSiam.

    Args:
        online: the encoder that learns.
        predictor: (N, D) to (N, D); without one SimSiam collapses.
    """

    def __init__(self, online: Encoder, predictor: nn.Module) -> None:
        super().__init__(online, predictor, MSBRegLoss(lambda_s=0.0, lambda_b=0.0, leave_one_out=True), ema=False)
