"""Multiview, singular value and Brownian losses that train image encoders without labels, and a trainer around them."""

from msbreg import functional, linalg, spectral
from msbreg.losses import BrownianLoss, CentroidLoss, MSBRegLoss, SingularValueLoss
from msbreg.spectral import CodingRateLoss, MMCRLoss, SVMaxLoss

__version__ = "0.1.0.dev0"

__all__ = [
    "BrownianLoss",
    "CentroidLoss",
    "CodingRateLoss",
    "MMCRLoss",
    "MSBRegLoss",
    "SVMaxLoss",
    "SingularValueLoss",
    "__version__",
    "functional",
    "linalg",
    "spectral",
]
