"""SimSiam: BYOL without the EMA network and with other heads; the target is the projector itself, its gradient stopped.

Chen, He, "Exploring simple siamese representation learning", CVPR 2021, https://arxiv.org/abs/2011.10566, and its code,
https://github.com/facebookresearch/simsiam (commit a7bc177). Taken from there (builder.py, main_simsiam.py): batch
normalisation without scale and shift at the projector's end, a predictor with a hidden layer of D / 4 and a bias at its
end, and the predictor's constant learning rate (`--fix-pred-lr`). Not taken: the projector's third layer, which it has
on ImageNet and not on CIFAR-10 (appendix D), D = 2048, residual blocks that begin at zero, and weight decay of biases
and normalisation. The loss here is 2 - 2 cos, which is twice theirs plus a constant, so that numbers compare with the
other methods.
"""

from torch import nn

from msbreg.losses import MSBRegLoss
from msbreg.methods.encoder import Encoder
from msbreg.methods.msbreg import MSBReg

__all__ = ["SimSiam"]


class SimSiam(MSBReg):
    """Encoder and predictor of SimSiam.

    Args:
        online: the encoder that learns; its projector ends in batch normalisation without scale and shift.
        predictor: (N, D) to (N, D), with a narrower hidden layer; without one SimSiam collapses.
    """

    predictor: nn.Module

    def __init__(self, online: Encoder, predictor: nn.Module) -> None:
        super().__init__(online, predictor, MSBRegLoss(lambda_s=0.0, lambda_b=0.0, leave_one_out=True), ema=False)

    def constant_rate(self) -> set[str]:
        """Names of the predictor's parameters: its rate does not fall, so that it keeps up with the embeddings."""
        return {f"predictor.{name}" for name, _ in self.predictor.named_parameters()}
