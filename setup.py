"""Packaging: `kernels/` beside `msbreg/` in the repository becomes `msbreg.kernels` when installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
RUFF = "ruff==0.17.6"  # the same in .pre-commit-config.yaml: releases differ in what they ask for
MYPY = "mypy==2.4.1"  # for the same reason


def version() -> str:
    """`__version__` of msbreg/__init__.py, read as text: importing it would need torch."""
    found = re.search(
        r'^__version__ = "(.+)"$', (ROOT / "msbreg/__init__.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    if found is None:
        raise RuntimeError('msbreg/__init__.py has no line __version__ = "..."')
    return found.group(1)


TENSORBOARD = "tensorboard>=2.18"

TRAIN = [
    "jsonargparse[signatures]>=4.40",
    "matplotlib>=3.7",
    "numpy>=1.24",
    "nvidia-dali-cuda130>=2.2; platform_system == 'Linux'",
    "Pillow>=11.3",
    "PyYAML>=6",
    "safetensors>=0.4",
    "torchvision>=0.24",
    "tqdm>=4.65",
]

setup(
    name="msbreg",
    version=version(),
    description="Self-supervised image encoders by MSBReg: K-view attraction, spectral and Brownian dispersion",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=[*find_packages(include=["msbreg", "msbreg.*"]), "msbreg.kernels"],
    package_dir={"msbreg": "msbreg", "msbreg.kernels": "kernels"},
    package_data={"msbreg": ["configs/*.yaml", "py.typed"]},
    python_requires=">=3.10",
    # torch alone, for those who drop the losses into another trainer; its CUDA wheels bring their version of Triton.
    install_requires=["torch>=2.9"],
    extras_require={
        "train": TRAIN,
        "timm": ["timm>=1.0.7"],
        "tensorboard": [TENSORBOARD],
        # setuptools builds the package in a test without network; Triton is named for torch wheels that lack it.
        "test": [
            "numpy>=1.24",
            "pytest>=8",
            "pytest-benchmark>=5.3",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.5",
            "scikit-learn>=1.3",
            "setuptools>=77",
            TENSORBOARD,
            "timm>=1.0.7",
            "triton>=3.5; platform_system == 'Linux'",
        ],
        # lightly is timed too where it is installed; it brings a dozen packages, so that it is left to its users.
        "bench": ["matplotlib>=3.7", "pytest>=8", "pytest-benchmark>=5.3", "torchvision>=0.24"],
        "dev": [RUFF, MYPY, "numpy>=1.24", "pre-commit>=3.5", "setuptools>=77"],
    },
    entry_points={"console_scripts": ["msbreg = msbreg.__main__:run"]},
)
