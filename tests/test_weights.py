"""Weights that a backbone begins with, from files of every kind, and what is said of those that do not fit."""

import dataclasses
import pickle
import re
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="this needs the extra [train]")

import torch
import torchvision

from msbreg.config import Config
from msbreg.errors import MSBRegError
from msbreg.export import backbone_of, export_backbone
from msbreg.methods import build_method
from msbreg.models import build_backbone
from msbreg.weights import load_weights


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def random(module: torch.nn.Module) -> torch.nn.Module:
    """Every number another one than a new network has."""
    for tensor in (*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())):
        tensor.data.uniform_()
    return module


@pytest.mark.parametrize("name", ["backbone.pt", "backbone.safetensors"])
def test_what_a_run_exports_is_what_another_begins_with_in_both_networks(tmp_path, name):
    trained = random(build_backbone("convnet"))
    export_backbone(trained, tmp_path)
    config = Config()
    config.model.weights = str(tmp_path / name)
    method = build_method(config)
    assert_same(method.online.backbone.state_dict(), trained.state_dict())
    assert_same(method.target.backbone.state_dict(), trained.state_dict())


@pytest.mark.parametrize("name", ["backbone.pt", "backbone.safetensors"])
def test_timm_takes_what_a_run_exports(tmp_path, name):
    timm = pytest.importorskip("timm")
    for library in ("", "timm/"):
        trained = random(build_backbone(f"{library}resnet18"))
        export_backbone(trained, tmp_path)
        taken = timm.create_model("resnet18", checkpoint_path=str(tmp_path / name), num_classes=0)
        assert_same(taken.state_dict(), trained.state_dict())


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "googlenet", "vit_b_32", "mnasnet0_5"])
def test_weights_of_torchvision_fit_without_their_classifier(tmp_path, name):
    options = {"init_weights": False} if name == "googlenet" else {}
    whole = random(torchvision.models.get_model(name, weights=None, **options)).state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    backbone = build_backbone(name)
    load_weights(backbone, tmp_path / "weights.pth")
    assert_same(backbone.state_dict(), {own: whole[own] for own in backbone.state_dict()})


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto"])
def test_weights_of_timm_fit_without_their_classifier(tmp_path, name):
    timm = pytest.importorskip("timm")
    whole = random(timm.create_model(name)).state_dict()
    torch.save(whole, tmp_path / "weights.pth")
    backbone = build_backbone(f"timm/{name}")
    load_weights(backbone, tmp_path / "weights.pth")
    assert_same(backbone.state_dict(), {own: whole[own] for own in backbone.state_dict()})


def test_names_that_a_network_renames_itself_fit(tmp_path):
    """torchvision's file for its vision transformers has other names than its networks."""
    whole = random(torchvision.models.vit_b_32()).state_dict()
    old = type(whole)((re.sub(r"mlp\.([03])\.", lambda layer: f"mlp.linear_{1 + int(layer[1]) // 3}.", name), value)
                      for name, value in whole.items())  # fmt: skip
    assert "encoder.layers.encoder_layer_0.mlp.linear_2.weight" in old
    old._metadata = {name: {"version": 1} for name in whole._metadata}
    torch.save(old, tmp_path / "weights.pth")
    backbone = build_backbone("vit_b_32")
    load_weights(backbone, tmp_path / "weights.pth")
    assert_same(backbone.state_dict(), {own: whole[own] for own in backbone.state_dict()})


@pytest.mark.parametrize("name", ["backbone.pt", "backbone.safetensors"])
def test_an_export_without_versions_fits(tmp_path, name):
    trained = random(build_backbone("mnasnet0_5"))
    export_backbone(trained, tmp_path)
    backbone = build_backbone("mnasnet0_5")
    load_weights(backbone, tmp_path / name)
    assert_same(backbone.state_dict(), trained.state_dict())


def test_a_checkpoints_backbone_is_found_whatever_its_network_asks():
    config = Config()
    config.model.backbone, config.method.name = "mnasnet0_5", "simsiam"
    method = random(build_method(config))
    state = {"config": dataclasses.asdict(config), "method": dict(method.state_dict())}
    backbone = backbone_of(state)
    assert_same(backbone.state_dict(), method.online.backbone.state_dict())
    assert not any(part.training for part in backbone.modules())
    del state["method"]["online.backbone.layers.0.weight"]
    with pytest.raises(MSBRegError, match="do not fit a mnasnet0_5"):
        backbone_of(state)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_too_little_memory_is_not_taken_for_damage(tmp_path, monkeypatch, name):
    def load(*args, **kwargs):
        raise MemoryError if name.endswith("safetensors") else RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr("safetensors.torch.load", load)
    (tmp_path / name).touch()
    with pytest.raises(MSBRegError, match="this machine's memory does not suffice"):
        load_weights(build_backbone("convnet"), tmp_path / name)


def test_files_from_before_batches_were_counted_fit(tmp_path):
    whole = random(torchvision.models.resnet18()).state_dict()
    old = {name: value for name, value in whole.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    backbone = build_backbone("resnet18")
    load_weights(backbone, tmp_path / "weights.pth")
    assert_same({name: backbone.state_dict()[name] for name in old if name[:2] != "fc"},
                {name: value for name, value in old.items() if name[:2] != "fc"})  # fmt: skip


class Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_what_does_not_fit_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    backbone = build_backbone("convnet")
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    torch.save({name: value for name, value in state.items() if name != "layers.0.weight"}, "lacking.pt")
    torch.save({f"module.{name}": value for name, value in state.items()}, "prefixed.pt")
    torch.save(state | {"layers.0.weight": torch.zeros(16, 3, 7, 7)}, "stem.pt")
    torch.save(state | {"layers.99.weight": torch.zeros(1)}, "longer.pt")
    torch.save(state | {"layers.0.weight": torch.full((16, 3, 3, 3), torch.nan)}, "nan.pt")
    torch.save({0: torch.zeros(1)}, "number.pt")
    torch.save({"step": 3, "method": state}, "checkpoint.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({}, "empty.pt")
    torch.save(Code(), "code.pt")
    Path("pickled.pt").write_bytes(pickle.dumps(Code(), protocol=2))
    Path("text.pt").write_text("weights")
    Path("text.safetensors").write_text("weights")
    Path("nothing.pt").touch()
    Path("nothing.safetensors").touch()
    Path("folder").mkdir()
    export_backbone(backbone, tmp_path)
    for name in ("backbone.pt", "backbone.safetensors"):
        Path(f"cut_{name}").write_bytes(Path(name).read_bytes()[:-5000])
    said = {}
    for name in (
        "lacking.pt", "prefixed.pt", "stem.pt", "longer.pt", "nan.pt", "number.pt", "checkpoint.pt", "tensor.pt",
        "empty.pt", "code.pt",
        "pickled.pt", "text.pt", "text.safetensors", "nothing.pt", "nothing.safetensors", "folder", "missing.pt",
        "missing.safetensors", "cut_backbone.pt", "cut_backbone.safetensors",
    ):  # fmt: skip
        with pytest.raises(MSBRegError, match=name) as refused:
            load_weights(backbone, Path(name))
        said[name] = str(refused.value)
    assert ": it lacks layers.0.weight. Give what" in said["lacking.pt"]
    assert ": it lacks layers.0.weight, and 65 more" in said["prefixed.pt"]
    assert "layers.0.weight is (16, 3, 7, 7) there and (16, 3, 3, 3) here." in said["stem.pt"]
    assert ": layers.99.weight is unknown here." in said["longer.pt"]
    assert "are not finite: layers.0.weight has NaN or infinity." in said["nan.pt"]
    for name in ("number.pt", "checkpoint.pt", "tensor.pt", "empty.pt"):
        assert "holds something else than a network's weights alone" in said[name]
    for name in ("missing.pt", "missing.safetensors"):
        assert "(--model.weights): No such file or directory." in said[name], said[name]
    assert "(--model.weights): Is a directory." in said["folder"]
    for name in said:
        if name.split(".")[0] in ("code", "pickled", "text", "nothing", "cut_backbone"):
            assert "it is no such file, or damaged" in said[name], said[name]
    assert not Path("executed").exists()
