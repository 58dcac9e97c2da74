"""Multiview, singular value and Brownian losses that train image encoders without labels, and a trainer around them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

MODULES = {"losses", "functional", "linalg", "spectral"}
HOMES = {
    "BrownianLoss": "losses",
    "CentroidLoss": "losses",
    "MSBRegLoss": "losses",
    "SingularValueLoss": "losses",
    "CodingRateLoss": "spectral",
    "MMCRLoss": "spectral",
    "SVMaxLoss": "spectral",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Loads torch, which takes seconds, when it is needed: the command line has signals to hear first."""
        if name in MODULES:
            return import_module(f"msbreg.{name}")
        if name not in HOMES:
            raise AttributeError(f"module 'msbreg' has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"msbreg.{HOMES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
