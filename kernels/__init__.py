"""msbreg's GPU kernels: Triton functions and their launchers, which know torch and triton and nothing of msbreg.

Importing this package needs neither triton nor a GPU; importing one of its modules needs triton.
"""

import importlib.util
import os

__all__ = ["DEVICE_TYPE", "MAX_DIM"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE_TYPE = ("cpu" if INTERPRETED else "cuda") if importlib.util.find_spec("triton") else None
"""The type of device that the kernels run on: `"cuda"`; `"cpu"` in Triton's interpreter, which TRITON_INTERPRET=1 turns
on for good when triton is imported; None without triton."""
MAX_DIM = 16384
"""Numbers in the widest row that a program holds in its registers."""
