"""`msbreg doctor`: versions, devices, what is usable here, and why what is not is not."""

import importlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

import msbreg
from msbreg import kernels
from msbreg.functional import centroid_loss
from msbreg.machine import usable_cores
from msbreg.reference import centroids, unit_rows

__all__ = ["report"]

OPTIONAL = {
    "torchvision": ("torchvision", "most backbones and the torchvision backend", "pip install 'msbreg[train]'"),
    "nvidia.dali": ("nvidia-dali-cuda130", "the DALI backend", "pip install 'msbreg[train]'"),
    "jsonargparse": ("jsonargparse", "all commands but doctor", "pip install 'msbreg[train]'"),
    "tqdm": ("tqdm", "training", "pip install 'msbreg[train]'"),
    "matplotlib": ("matplotlib", "curves.png", "pip install 'msbreg[train]'"),
    "safetensors": ("safetensors", "exported backbones", "pip install 'msbreg[train]'"),
    "triton": ("triton", "the fused kernels", "it comes with torch's CUDA builds"),
    "timm": ("timm", "--model.backbone timm/NAME", "pip install timm"),
    "tensorboard": ("tensorboard", "--run.tensorboard", "pip install tensorboard"),
}


def report() -> str:
    """The whole report, as text."""
    lines = [
        f"msbreg {msbreg.__version__}",
        f"python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}",
    ]
    lines += [_package(module, *facts) for module, facts in OPTIONAL.items()]
    lines += ["", f"CPU: {usable_cores()} cores for this process, {torch.get_num_threads()} threads of torch"]
    lines += _gpus()
    free = shutil.disk_usage(".").free / 2**30
    lines += ["", f"disk: {free:.1f} GiB free in the current folder"]
    if "WORLD_SIZE" in os.environ:
        lines.append(f"torchrun: rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}")
    return "\n".join(lines)


def _package(module: str, distribution: str, serves: str, remedy: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{module}: not usable ({error}); needed for {serves}: {remedy}"
    except Exception as error:  # a broken installation may raise anything, and saying so is this command's job
        return f"{module}: installed, but fails to import ({type(error).__name__}: {error}); needed for {serves}"
    for name in (distribution, distribution.replace("cuda130", "cuda120")):
        try:
            return f"{module} {version(name)}: {serves}"
        except PackageNotFoundError:
            continue
    return f"{module}: {serves}"


def _gpus() -> list[str]:
    if torch.version.cuda is None and torch.version.hip is None:
        return ["GPU: none usable: this build of torch is for CPUs alone; networks, losses and data run on the CPU"]
    if not torch.cuda.is_available():
        return [
            "GPU: none usable: torch finds no driver or no device (does `nvidia-smi` list one, and is "
            "CUDA_VISIBLE_DEVICES right?); networks, losses and data run on the CPU"
        ]
    lines = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {facts.name}, compute capability {facts.major}.{facts.minor}, "
            f"{facts.total_memory / 2**30:.0f} GiB, bf16 {'yes' if facts.major >= 8 else 'slow'}, "
            + _kernels(torch.device("cuda", index))
        )
    return lines


def _kernels(device: torch.device) -> str:
    """Whether Triton can compile and run a kernel of ours there: it needs a C compiler, and a folder for its cache."""
    if device.type != kernels.DEVICE_TYPE:
        return "losses in plain torch, since there is no Triton"
    x = torch.linspace(-1, 1, 48).sin().view(2, 3, 8)
    y = x.flip(2)
    try:
        loss = centroid_loss(x.to(device), y.to(device))
    except Exception as error:  # as above
        first_line = str(error).strip().partition("\n")[0]
        return f"the fused kernels fail ({type(error).__name__}: {first_line})"
    x_hat, centroid = unit_rows(x)[0], centroids(y, leave_one_out=False)
    expected = (x_hat - centroid).square().sum(-1).mean()
    return "the fused kernels run" if torch.allclose(loss.cpu(), expected, atol=1e-5) else "the fused kernels are wrong"
