"""The trained backbone in the two forms that other software loads."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msbreg.config import config_of
from msbreg.errors import MSBRegError
from msbreg.files import reason, whole_file
from msbreg.weights import take_weights

__all__ = ["backbone_of", "export_backbone"]


def backbone_of(state: dict[str, Any]) -> nn.Module:
    """The online backbone of a checkpoint, on the CPU, in evaluation mode."""
    from msbreg.models import build_backbone

    config = config_of(state)
    backbone = build_backbone(config.model.backbone, stem=config.model.stem)
    prefix = "online.backbone."
    weights = {name[len(prefix) :]: value for name, value in state["method"].items() if name.startswith(prefix)}
    try:
        fits = take_weights(backbone, weights) == ([], [])
    except RuntimeError:  # of shapes
        fits = False
    if not fits:
        raise MSBRegError(
            f"the checkpoint's weights do not fit a {config.model.backbone}; it was written by another version of "
            "msbreg or of the model's library."
        )
    return backbone.eval()


def export_backbone(backbone: nn.Module, folder: Path) -> list[Path]:
    """Writes backbone.safetensors and backbone.pt, whose bytes depend on the weights alone.

    Both hold the backbone's state dict under torchvision's (or timm's) own names, so that
    `torchvision.models.resnet50().load_state_dict(weights, strict=False)` misses the classifier alone. Those with the
    stem for CIFAR fit `msbreg.models.build_backbone(name, stem="cifar")`.

    Args:
        backbone: any module.
        folder: where to; made if it is missing.

    Returns:
        The two files.

    Raises:
        MSBRegError: where the folder cannot be written.
    """
    from safetensors.torch import save

    weights: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous() for name, value in backbone.state_dict().items()
    }
    files = [folder / "backbone.safetensors", folder / "backbone.pt"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(files[0]) as safetensors, whole_file(files[1]) as pickled:
            safetensors.write_bytes(save(weights, metadata={"format": "pt"}))
            torch.save(weights, pickled)
    except (OSError, MSBRegError) as error:
        raise MSBRegError(f"cannot write the backbone to {folder}: {reason(error)}.") from error
    return files
