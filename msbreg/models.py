"""Networks: backbones by name, and the small perceptron that serves as projector and predictor.

Weights start from the current random state, as the library that defines the network draws them; see `msbreg.weights`
for others.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from msbreg.errors import MSBRegError

__all__ = ["Backbone", "ConvNet", "build_backbone", "mlp_head"]

TIMM = "timm/"


class Backbone(nn.Module):
    """A network without its classifier, (B, 3, H, W) to (B, F): what type checkers go by, whatever class it is of."""

    num_features: int
    """F."""


class ConvNet(Backbone):
    """A small network for CPUs: six 3x3 convolutions in three stages, then the mean over the image.

    Stages are `width`, 2 `width` and 4 `width` channels wide, two convolutions each, every one followed by batch
    normalisation and ReLU; the second and third stage halve the resolution. Weights start as He et al. (2015) propose.

    Args:
        width: channels of the first stage.

    Attributes:
        num_features: F = 4 width.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in range(3):
            out = width << stage
            for stride in (1 if stage == 0 else 2, 1):
                conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                layers += [conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                channels = out
        self.layers = nn.Sequential(*layers)
        self.num_features = channels

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) floats to (B, F); any H and W."""
        return self.layers(images).mean(dim=(2, 3))


def mlp_head(in_features: int, hidden: int, out: int, *, bias: bool = False) -> nn.Sequential:
    """Linear, batch normalisation, ReLU, Linear: projector and predictor of BYOL (Grill et al. 2020, section 3.3).

    Args:
        in_features: width of the input, (N, in_features).
        hidden: width of the hidden layer; BYOL on ImageNet: 4096.
        out: width of the output, (N, out); BYOL: 256.
        bias: of the output. BYOL's code has none: nothing shifts all embeddings alike.
    """
    return nn.Sequential(
        nn.Linear(in_features, hidden, bias=False),  # the normalisation has the bias
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out, bias=bias),
    )


def build_backbone(name: str, *, stem: str = "imagenet") -> Backbone:
    """A network without its classifier, freshly initialised.

    Args:
        name: "convnet" (`ConvNet`), a classification model of torchvision such as "resnet50", or "timm/NAME".
        stem: "imagenet" leaves the network as its library defines it; "cifar", for images of about 32 pixels, gives a
            ResNet a 3x3 first convolution of stride 1 and no max-pooling (SimCLR, Chen et al. 2020, appendix B.9).

    Returns:
        A module that maps (B, 3, H, W) to (B, F) and has the attribute `num_features` = F. Its parameters keep the
        names that the library gave them.

    Raises:
        MSBRegError: for an unknown name or stem, a stem that the network has no place for, or a missing library.
    """
    if stem not in ("imagenet", "cifar"):
        raise MSBRegError(f"expected the stem imagenet or cifar, got {stem!r}.")
    if name == "convnet":
        backbone: Backbone = ConvNet()
    elif name.startswith(TIMM):
        backbone = _timm_backbone(name.removeprefix(TIMM))
    else:
        backbone = _torchvision_backbone(name)
    if stem == "cifar":
        _use_cifar_stem(backbone, name)
    return backbone


def _torchvision_backbone(name: str) -> Backbone:
    try:
        from torchvision import models
    except ImportError as error:
        raise MSBRegError(f"the backbone {name!r} needs torchvision: pip install 'msbreg[train]'.") from error
    names = models.list_models(module=models)
    if name not in names:
        raise _unknown(name, ["convnet", *names])
    # Two families answer with several tensors while they train unless their auxiliary classifiers are off.
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    backbone = models.get_model(name, weights=None, **options)
    backbone.num_features = _remove_classifier(backbone)
    return backbone


def _timm_backbone(name: str) -> Backbone:
    try:
        import timm
    except ImportError as error:
        raise MSBRegError(f"the backbone {TIMM + name!r} needs timm: pip install 'msbreg[timm]'.") from error
    if not timm.is_model(name):
        raise _unknown(TIMM + name, [TIMM + known for known in timm.list_models()])
    try:
        backbone: Any = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except TypeError:  # not a transformer, which would take images of one size alone without it
        backbone = timm.create_model(name, pretrained=False, num_classes=0)
    backbone.num_features = backbone.head_hidden_size  # counts a last layer that some networks have after pooling
    return backbone


def _unknown(name: str, known: Sequence[str]) -> MSBRegError:
    near = difflib.get_close_matches(name, known, n=3) or difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return MSBRegError(f"there is no backbone {name!r}: expected convnet, a torchvision model or timm/NAME{hint}")


def _remove_classifier(model: nn.Module) -> int:
    """Puts an identity in the place of the last layer with weights of a torchvision model; returns its input width."""
    head_name = next(name for name in ("fc", "classifier", "heads", "head") if hasattr(model, name))
    layers = {
        f"{head_name}.{inner}".rstrip("."): layer
        for inner, layer in getattr(model, head_name).named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    path, classifier = list(layers.items())[-1]
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    return classifier.in_features if isinstance(classifier, nn.Linear) else classifier.in_channels


def _use_cifar_stem(backbone: nn.Module, name: str) -> None:
    conv = getattr(backbone, "conv1", None)
    if not isinstance(conv, nn.Conv2d) or not hasattr(backbone, "maxpool"):
        raise MSBRegError(f"the stem cifar is for ResNets, and {name} is none; leave the stem at imagenet.")
    backbone.conv1 = nn.Conv2d(3, conv.out_channels, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()
