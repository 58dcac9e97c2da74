"""What `msbreg doctor` says of the kernels on a device."""

import pytest
import torch

from msbreg import doctor, kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_doctor_names_versions_and_devices(capsys):
    pytest.importorskip("jsonargparse", reason="this needs the extra [train]")
    from msbreg.cli import main

    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert f"torch {torch.__version__}" in report and "GPU" in report and "nvidia.dali" in report


@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.skipif(DEVICE.type != kernels.DEVICE_TYPE, reason="needs a GPU, or TRITON_INTERPRET=1")
def test_kernels_that_run_are_said_to():
    assert doctor._kernels(DEVICE) == "the fused kernels run"


def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    def launch(*_):
        raise RuntimeError("Failed to find C compiler. Please specify via CC.\nand more")

    monkeypatch.setattr(kernels, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(doctor, "centroid_loss", launch)
    why = "the fused kernels fail (RuntimeError: Failed to find C compiler. Please specify via CC.)"
    assert doctor._kernels(torch.device("cpu")) == why
    monkeypatch.setattr(doctor, "centroid_loss", lambda *_: torch.tensor(0.5))
    assert doctor._kernels(torch.device("cpu")) == "the fused kernels are wrong"


def test_a_gpu_without_triton_computes_in_plain_torch(monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE_TYPE", None)
    assert "plain torch" in doctor._kernels(torch.device("cpu"))
