"""What a training step computes: MSBReg and the relatives it is compared with, one method a file."""

import torch.distributed as dist
from torch import nn

from msbreg.config import Config
from msbreg.files import expanded
from msbreg.losses import MSBRegLoss
from msbreg.methods.byol import BYOL
from msbreg.methods.encoder import Encoder
from msbreg.methods.msbreg import MSBReg
from msbreg.methods.outputs import StepOutput
from msbreg.methods.simsiam import SimSiam
from msbreg.models import build_backbone, mlp_head
from msbreg.weights import load_weights

__all__ = ["BYOL", "Encoder", "MSBReg", "SimSiam", "StepOutput", "build_method"]


def build_method(config: Config, group: dist.ProcessGroup | None = None) -> MSBReg:
    """The networks and loss that a config names, initialised from torch's current random state, or a file's weights.

    Args:
        config: the run's options.
        group: process group whose ranks share each batch, or None for one process.

    Raises:
        MSBRegError: the backbone is unknown, or its weights cannot be read or are another network's.
    """
    backbone = build_backbone(config.model.backbone, stem=config.model.stem)
    if config.model.weights is not None:
        load_weights(backbone, expanded(config.model.weights))
    hidden, dim = config.model.hidden, config.model.dim
    projector = mlp_head(backbone.num_features, hidden, dim)
    online = Encoder(backbone, projector, view_chunk=config.model.view_chunk)
    if config.method.name == "simsiam":  # whose heads are not BYOL's
        projector.append(nn.BatchNorm1d(dim, affine=False))
        return SimSiam(online, mlp_head(dim, max(1, dim // 4), dim, bias=True))
    if config.method.name == "byol":
        return BYOL(online, mlp_head(dim, hidden, dim))
    predictor = mlp_head(dim, hidden, dim) if config.model.predictor else None
    criterion = MSBRegLoss(
        lambda_m=config.method.lambda_m,
        lambda_s=config.method.lambda_s,
        lambda_b=config.method.lambda_b,
        leave_one_out=config.method.leave_one_out,
        spectrum=config.method.spectrum,
        seed=config.run.seed,
        group=group,
    )
    return MSBReg(online, predictor, criterion, disperse=config.method.disperse)
