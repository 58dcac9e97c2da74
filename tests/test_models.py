"""Backbones by name, the stem for small images, and the perceptron."""

import pytest

pytest.importorskip("torchvision", reason="this needs the extra [train]")

import torch
import torchvision
from torch import nn

from msbreg.config import Config
from msbreg.errors import MSBRegError
from msbreg.models import ConvNet, build_backbone, mlp_head
from msbreg.preflight import require_sizes


def features(backbone: nn.Module, side: int) -> torch.Tensor:
    with torch.no_grad():
        return backbone(torch.randn(2, 3, side, side))


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("convnet", 64),
        ("resnet18", 512),  # fc
        ("shufflenet_v2_x0_5", 1024),
        ("googlenet", 1024),  # auxiliary classifiers
        ("mobilenet_v3_small", 1024),  # classifier: the layers before the last stay
        ("squeezenet1_1", 512),  # a convolution classifies
        ("regnet_y_400mf", 440),
        ("swin_t", 768),  # head
        ("vit_b_32", 768),  # heads
        ("timm/resnet18", 512),
        ("timm/mobilenetv3_small_050", 1024),  # a last layer after pooling
    ],
)
def test_a_backbone_maps_images_to_num_features(name, width):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = build_backbone(name)
    side = 224 if "vit" in name else 64
    assert backbone.training
    assert features(backbone, side).shape == (2, width)
    assert backbone.num_features == width


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_weights_go_back_into_torchvisions_model(stem):
    weights = build_backbone("resnet18", stem=stem).state_dict()
    whole = torchvision.models.resnet18()
    if stem == "cifar":
        whole.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    missing, unexpected = whole.load_state_dict(weights, strict=False)
    assert missing == ["fc.weight", "fc.bias"]
    assert unexpected == []


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "timm/resnet18"])
def test_the_cifar_stem_keeps_the_resolution(name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    sides = []
    for stem in ("imagenet", "cifar"):
        backbone = build_backbone(name, stem=stem)
        backbone.layer4.register_forward_hook(lambda layer, inputs, output: sides.append(output.shape[-1]))
        features(backbone, 32)
    assert sides == [1, 4]


def test_the_convnet_halves_the_resolution_twice_and_takes_its_width():
    network = ConvNet(width=8)
    sides = []
    for layer in network.layers:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, inputs, output: sides.append(tuple(output.shape[1:])))
    assert features(network, 20).shape == (2, 32)
    assert sides == [(8, 20, 20), (8, 20, 20), (16, 10, 10), (16, 10, 10), (32, 5, 5), (32, 5, 5)]


def test_channels_last_gives_the_same_features():
    torch.manual_seed(0)
    network = ConvNet(width=8).eval()
    images = torch.randn(4, 3, 16, 16)
    expected = network(images)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images.contiguous(memory_format=torch.channels_last)), expected)


def test_one_seed_gives_one_network():
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks.append(build_backbone("convnet").state_dict())
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


@pytest.mark.parametrize(
    ("name", "stem", "words"),
    [
        ("resnet81", "imagenet", "did you mean .*resnet18"),
        ("timm/resnet5O", "imagenet", "did you mean .*timm/resnet50"),
        ("fcn_resnet50", "imagenet", "there is no backbone 'fcn_resnet50'"),  # torchvision has it, for segmentation
        ("squeezenet1_1", "cifar", "the stem cifar is for ResNets, and squeezenet1_1 is none"),
        ("convnet", "cifar", "convnet is none"),
        ("resnet18", "small", "got 'small'"),
    ],
)
def test_what_cannot_be_built_is_explained(name, stem, words):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(MSBRegError, match=words):
        build_backbone(name, stem=stem)


def config_of(name: str, size: int) -> Config:
    config = Config()
    config.model.backbone, config.data.size = name, size
    return config


def test_timms_transformers_take_views_of_several_sizes():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = build_backbone("timm/vit_tiny_patch16_224").eval()
    assert [backbone(torch.zeros(1, 3, size, size)).shape for size in (224, 96)] == 2 * [(1, 192)]
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    plain.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(backbone(images), plain(images))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("vit_b_32", 32, r"Wrong image height! Expected 224 but got 32!"),
        ("squeezenet1_1", 16, r"Output size is too small"),
        ("timm/vit_tiny_patch16_224", 20, r"Input height \(20\) should be divisible by patch size \(16\)"),
    ],
)
def test_a_size_that_the_network_does_not_take_is_one_sentence(name, size, words):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    backbone = build_backbone(name)
    with pytest.raises(
        MSBRegError, match=f"{name} does not take images of {size} pixels .*{words}.*use another"
    ) as caught:
        require_sizes(backbone, config_of(name, size))
    assert "\n" not in str(caught.value)


class Fixed(nn.Module):
    """A network that takes one size alone, and says nothing of it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] != self.size:
            raise AssertionError
        return images.mean(dim=(2, 3))


@pytest.mark.parametrize(("size", "refused"), [(16, 24), (24, 16), (20, 16)])
def test_every_size_of_a_run_is_tried(tmp_path, size, refused):
    """Both of the views', and that of the images for evaluation."""
    (tmp_path / "sizes.yaml").write_text("- {size: 16}\n- {size: 24}\n")
    config = config_of("fixed", 24)
    config.data.recipe = str(tmp_path / "sizes.yaml")
    with pytest.raises(MSBRegError, match=f"does not take images of {refused} pixels \\(AssertionError\\)"):
        require_sizes(Fixed(size), config)
    config.data.recipe, config.data.size = "cifar", 16
    require_sizes(Fixed(16), config)


def test_trying_a_size_changes_nothing():
    backbone = build_backbone("resnet18")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    random = torch.get_rng_state()
    require_sizes(backbone, config_of("resnet18", 32))
    assert backbone.training and all(layer.training for layer in backbone.modules())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_the_head_is_linear_norm_relu_linear():
    head = mlp_head(6, 10, 4)
    assert head(torch.randn(3, 6)).shape == (3, 4)
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert head[0].out_features == 10
    assert head[3].bias is None
