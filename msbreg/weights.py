"""Weights that a backbone begins with, from a file under the names of the library that defines the network."""

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from msbreg.errors import MSBRegError, is_of_memory

__all__ = ["load_weights", "take_weights"]

CLASSIFIERS = {
    "fc", "classifier", "head", "heads", "head_dist", "heads_dist", "last_linear", "classif", "aux1", "aux2",
    "AuxLogits", "aux_head",
}  # fmt: skip
"""First parts of the names of what torchvision's and timm's networks have behind the backbone, or beside it."""


def load_weights(backbone: nn.Module, path: Path) -> None:
    """Gives a backbone the weights in a file; a classifier there is passed over.

    Args:
        backbone: of `build_backbone`.
        path: a state dict, as .safetensors or as `torch.save` writes it: the backbone of another run, or what
            `state_dict()` of the same network of torchvision or timm gives.

    Raises:
        MSBRegError: the file cannot be read, holds something else, weights of another network, or numbers that are not
            finite. The backbone may have some of them then.
    """
    weights, own = read_weights(path), backbone.state_dict()
    wrong = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if not wrong:
        try:
            missing, unknown = take_weights(backbone, weights)
        except Exception as error:  # networks have rules of their own, and refuse as they like
            raise MSBRegError(f"cannot use the weights in {path} (--model.weights): {error}.") from error
        # Files from before batch normalisation counted its batches lack the count alone.
        wrong += [f"it lacks {name}" for name in missing if not name.endswith("num_batches_tracked")]
        wrong += [f"{name} is unknown here" for name in unknown if name.split(".")[0] not in CLASSIFIERS]
    if wrong:
        more = f", and {len(wrong) - 1:,} more" if len(wrong) > 1 else ""
        raise MSBRegError(
            f"the weights in {path} (--model.weights) are not those of this backbone: {wrong[0]}{more}. Give what "
            "state_dict() of the same --model.backbone and --model.stem gives."
        )
    infinite = [name for name, value in backbone.state_dict().items() if not value.isfinite().all()]
    if infinite:
        raise MSBRegError(f"the weights in {path} (--model.weights) are not finite: {infinite[0]} has NaN or infinity.")


def take_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Gives a module weights by name; returns which names it misses, and which it does not know.

    Some networks ask which version of theirs the weights are of. Those that do not say are of this one.
    """
    versioned: OrderedDict[str, Tensor] = OrderedDict(weights)
    versioned._metadata = getattr(weights, "_metadata", None) or module.state_dict()._metadata  # type: ignore[attr-defined]
    missing, unknown = module.load_state_dict(versioned, strict=False)
    return missing, unknown


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """The state dict in a file, on the CPU, read without running any code that it may carry.

    Raises:
        MSBRegError: the file cannot be read, or holds something else.
    """
    from safetensors.torch import load

    try:
        with open(path, "rb") as file:
            if path.suffix == ".safetensors":
                return load(file.read())
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged names, sizes and pickles make torch raise nearly anything
        why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no such file, or damaged"
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_of_memory(error)):
            why = "this machine's memory does not suffice"
        raise MSBRegError(f"cannot read weights from {path} (--model.weights): {why}.") from error
    if not isinstance(weights, dict) or not weights or not all(map(is_weight, weights.items())):
        raise MSBRegError(
            f"{path} (--model.weights) holds something else than a network's weights alone; of a run give "
            "backbone.safetensors, which is in its folder once it has ended, or which msbreg export writes."
        )
    return weights


def is_weight(item: tuple[object, object]) -> bool:
    """Whether it is a name and a tensor."""
    return isinstance(item[0], str) and isinstance(item[1], Tensor)
