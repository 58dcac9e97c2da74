"""Weights that a backbone begins with, from a file under the names of the library that defines the network."""

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from msbreg.errors import MSBRegError

__all__ = ["load_weights"]

CLASSIFIERS = {"fc", "classifier", "head", "heads", "head_dist", "last_linear", "aux1", "aux2", "AuxLogits"}
"""First parts of the names of what torchvision's and timm's networks have behind the backbone, or beside it."""


def load_weights(backbone: nn.Module, path: Path) -> None:
    """Gives a backbone the weights in a file; a classifier there is passed over.

    Args:
        backbone: of `build_backbone`.
        path: a state dict, as .safetensors or as `torch.save` writes it: the backbone of another run, or weights of the
            same network from torchvision or timm.

    Raises:
        MSBRegError: the file cannot be read, holds something else, or weights of another network.
    """
    weights, own = read_weights(path), backbone.state_dict()
    # Files from before batch normalisation counted its batches lack the count alone.
    wrong = [f"it lacks {name}" for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    wrong += [
        f"{name} is unknown here" for name in weights if name not in own and name.split(".")[0] not in CLASSIFIERS
    ]
    if wrong:
        more = f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        raise MSBRegError(
            f"the weights in {path} (--model.weights) are not those of this backbone: {wrong[0]}{more}. Give those of "
            "the same --model.backbone and --model.stem, under the names of its library."
        )
    backbone.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU, read without running any code that it may carry.

    Raises:
        MSBRegError: the file cannot be read, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        with open(path, "rb") as file:
            if path.suffix == ".safetensors":
                return load(file.read())
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no such file, or damaged"
        raise MSBRegError(f"cannot read weights from {path} (--model.weights): {why}.") from error
    if isinstance(weights, dict) and weights and all(isinstance(value, Tensor) for value in weights.values()):
        return weights
    raise MSBRegError(
        f"{path} (--model.weights) holds something else than a network's weights alone; of a run give "
        "backbone.safetensors, which is in its folder once it has ended, or which msbreg export writes."
    )
