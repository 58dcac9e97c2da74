"""What options of several scripts take: numbers, names, and the device."""

import argparse
import math
import sys
from collections.abc import Collection, Sequence

import torch

__all__ = ["above_zero", "add_device", "limit", "listed", "not_negative", "positive", "the_gpu"]


def positive(text: str) -> int:
    """The `type` of an option that counts."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def above_zero(text: str) -> float:
    """The `type` of an option that is a time or a rate."""
    if not 0 < number_in(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return float(text)


def not_negative(text: str) -> float:
    """The `type` of an option that is a time at the least."""
    if not 0 <= number_in(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return float(text)


def limit(text: str) -> float:
    """The `type` of an option that is a time at the most, which may be infinite."""
    if not number_in(text) >= 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return float(text)


def number_in(text: str) -> float:
    """NaN where there is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def listed(parser: argparse.ArgumentParser, words: Sequence[str], known: Collection[str]) -> list[str]:
    """What --providers names, with commas or spaces between them."""
    found = list(dict.fromkeys(" ".join(words).replace(",", " ").split()))
    if wrong := [name for name in found if name not in known] or ([] if found else ["none"]):
        parser.error(f"--providers: expected some of {', '.join(known)}, got {wrong[0]}")
    return found


def add_device(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Adds --device, which has that meaning and is cpu or cuda."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    text = f"{meaning}; default: cuda where there is a GPU, here {default}"
    parser.add_argument("--device", type=device, metavar="{cpu,cuda}", default=default, help=text)


def device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here")
    return text


def the_gpu(script: str) -> torch.device:
    """The GPU, or the end of a script that measures nothing else."""
    if not torch.cuda.is_available():
        sys.exit(f"{script} measures a GPU, and torch finds none here; msbreg doctor says what it finds.")
    return torch.device("cuda")
