"""What `msbreg bench`, `msbreg eval` and dry runs have measured, as a file for programs."""

import os
import platform
import shlex
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import msbreg
from msbreg.config import Config, flatten
from msbreg.files import write_json
from msbreg.machine import usable_cores

__all__ = ["keep_findings"]

PACKAGES = ("triton", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "timm")


def keep_findings(file: Path, config: Config, device: torch.device, figures: dict[str, Any]) -> None:
    """Writes figures as JSON, with what was measured and on what; of absolute paths the last part alone.

    Args:
        file: where to; its folder is there.
        config: of the run; options that are not the default's are written.
        device: where its networks were.
        figures: by names that end in their units.

    Raises:
        MSBRegError: it cannot be written.
    """
    defaults = flatten(Config())
    options = {name: value for name, value in flatten(config).items() if value != defaults[name]}
    installed = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    result = {
        "command": shlex.join(["msbreg", *map(_without_folder, sys.argv[1:])]),
        "date": date.today().isoformat(),
        "versions": {
            "msbreg": msbreg.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: installed[name] for name in PACKAGES if name in installed},
        },
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cores": usable_cores(),
        "options": {name: _without_folder(value) for name, value in options.items()},
        "figures": figures,
    }
    write_json(file, result)


def _without_folder(value: Any) -> Any:
    """A value, or a word of the command line, which may be --OPTION=VALUE."""
    if not isinstance(value, str):
        return value
    option, equals, path = value.partition("=") if value.startswith("--") else ("", "", value)
    return option + equals + (Path(path).name if os.path.isabs(os.path.expanduser(path)) else path)
