"""BYOL: MSBReg at two views, each compared with the other's target, without dispersion.

Grill et al., "Bootstrap your own latent", NeurIPS 2020, https://arxiv.org/abs/2006.07733. With K = 2 and the own view
left out, the centroid of the other views' targets *is* the other view's target, so the centroid loss is BYOL's
2 - 2 cos, averaged over the two directions. BYOL's code adds them up, which is twice this; lightly's loss, the mean of
-cos, is half as steep. Learning rates for SGD from there are to be doubled or halved; the steps of AdamW do
not depend on it, nor those of LARS but for biases and norms.
"""

from torch import nn

from msbreg.losses import MSBRegLoss
from msbreg.methods.encoder import Encoder
from msbreg.methods.msbreg import MSBReg

__all__ = ["BYOL"]


class BYOL(MSBReg):
    """Online encoder, predictor and EMA target encoder of BYOL.

    Args:
        online: the encoder that learns.
        predictor: (N, D) to (N, D); without one BYOL collapses.
    """

    def __init__(self, online: Encoder, predictor: nn.Module) -> None:
        super().__init__(online, predictor, MSBRegLoss(lambda_s=0.0, lambda_b=0.0, leave_one_out=True))
