"""Recipes: which views are made of an image, as data.

A recipe is a tuple of `View` blocks, one per view, so that K views need no code of their own: BYOL's two blocks in
turn, multi-crop, or the plain centre crop that evaluation uses. Both backends read the same blocks.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, Literal

from msbreg.errors import MSBRegError
from msbreg.files import expanded, read_yaml

__all__ = ["MEAN", "STD", "Recipe", "View", "byol", "cifar", "evaluation", "load_recipe", "multi_crop", "size_groups"]

MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's training images per channel, on the scale 0 to 1; the usual constants (torchvision's weights)."""
STD = (0.229, 0.224, 0.225)
"""Standard deviation that goes with `MEAN`."""

WHOLE_IMAGE_BELOW = 96
LARGEST = 1000.0
"""Of a ratio, a strength or a blur in pixels: more has no meaning, and in the end no finite pixels."""


@dataclass(frozen=True)
class View:
    """One view: where it is cut from the image and what is done to it, in this order.

    The defaults are the first block of BYOL (Grill et al. 2020, appendix B).

    Raises:
        ValueError: a field is outside its range.
    """

    size: int = 224
    """Side of the square view, pixels."""
    area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest crop, as a share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Narrowest and widest crop, width over height; drawn evenly on a log scale."""
    centre: float | None = None
    """Where set, the crop is not drawn: it is the centred square with this share of the image's shorter side."""
    interpolation: Literal["cubic", "linear"] = "cubic"
    """Filter of the resize, antialiased; BYOL: bicubic."""
    blur: float = 1.0
    """Probability of a Gaussian blur."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, pixels of the view."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed, all four together."""
    brightness: float = 0.4
    """Strength b: the factor is uniform in [max(0, 1 - b), 1 + b]."""
    contrast: float = 0.4
    """Strength, as for brightness; contrast turns about the middle grey 128."""
    saturation: float = 0.2
    """Strength, as for brightness."""
    hue: float = 0.1
    """Strength in turns of the colour circle, at most 0.5: the angle is uniform in [-360 hue, 360 hue] degrees."""
    grayscale: float = 0.2
    """Probability that all colour is taken away."""
    solarize: float = 0.0
    """Probability that values of 128 and more are inverted."""
    flip: float = 0.5
    """Probability of a flip from left to right."""

    def __post_init__(self) -> None:
        if not (isinstance(self.size, int) and _is_number(self.size) and self.size >= 1):
            raise ValueError(f"size is a number of pixels, 1 or more, not {self.size!r}")
        for name, most in (("area", 1.0), ("ratio", LARGEST), ("sigma", LARGEST)):
            if not _is_range(getattr(self, name), most):
                raise ValueError(
                    f"{name} is a range [low, high] with 0 < low <= high <= {most:g}, not {getattr(self, name)!r}"
                )
        for name in ("jitter", "grayscale", "blur", "solarize", "flip"):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1):
                raise ValueError(f"{name} is a probability, 0 to 1, not {getattr(self, name)!r}")
        for name, most in (("brightness", LARGEST), ("contrast", LARGEST), ("saturation", LARGEST), ("hue", 0.5)):
            if not (_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= most):
                raise ValueError(f"{name} is a strength, 0 to {most:g}, not {getattr(self, name)!r}")
        if self.centre is not None and not (_is_number(self.centre) and 0 < self.centre <= 1):
            raise ValueError(f"centre is a share of the shorter side, above 0 and at most 1, not {self.centre!r}")
        if self.interpolation not in ("cubic", "linear"):
            raise ValueError(f"interpolation is cubic or linear, not {self.interpolation!r}")

    @property
    def changes_colour(self) -> bool:
        """Whether any draw of this block can change colours."""
        return self.jitter > 0 or self.grayscale > 0


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_range(value: object, most: float) -> bool:
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_number, value))):
        return False
    return 0 < value[0] <= value[1] <= most


Recipe = tuple[View, ...]


def _alternate(blocks: Recipe, views: int) -> Recipe:
    """The first `views` of the blocks, repeated in turn."""
    if views < 1:
        raise ValueError(f"expected 1 view or more, got {views}")
    return tuple(blocks[view % len(blocks)] for view in range(views))


def byol(views: int = 2, size: int = 224) -> Recipe:
    """BYOL's two blocks in turn: view 0 always blurred, view 1 seldom blurred and at times solarized.

    Source: Grill et al. 2020, appendix B, table 6; lightly's and solo-learn's recipes for ImageNet agree. Brightness is
    a factor, as in theirs; in BYOL's code it is a summand, and contrast turns about each channel's mean
    (docs/decisions.md, "The colour jitter is one matrix").

    Raises:
        ValueError: fewer than one view.
    """
    return _alternate((View(size=size), View(size=size, blur=0.1, solarize=0.2)), views)


def cifar(views: int = 2, size: int = 32) -> Recipe:
    """BYOL's two blocks for small images: without blur, which at 32 pixels leaves little to see.

    Source: solo-learn, scripts/pretrain/cifar/augmentations/asymmetric.yaml, as used by its byol.yaml.

    Raises:
        ValueError: fewer than one view.
    """
    return _alternate((View(size=size, blur=0.0), View(size=size, blur=0.0, solarize=0.2)), views)


def multi_crop(global_views: int = 2, local_views: int = 6, *, size: int = 224, local_size: int = 96) -> Recipe:
    """Large views of most of the image and small, cheap views of its parts, with BYOL's colours in turn.

    Source of sizes and areas: SwAV (Caron et al. 2020), 2 x 224 + 6 x 96 pixels, areas .14 to 1 and .05 to .14.

    Raises:
        ValueError: fewer than one view of either kind.
    """
    large = (View(size=size, area=(0.14, 1.0)), View(size=size, area=(0.14, 1.0), blur=0.1, solarize=0.2))
    small = (
        View(size=local_size, area=(0.05, 0.14)),
        View(size=local_size, area=(0.05, 0.14), blur=0.1, solarize=0.2),
    )
    return _alternate(large, global_views) + _alternate(small, local_views)


def evaluation(size: int) -> Recipe:
    """One view without augmentation: a centred square, resized.

    From 96 pixels on the square has 0.875 = 224/256 of the shorter side, the usual ImageNet evaluation; smaller views,
    whose images are small and filled by their object, take the whole shorter side.

    Raises:
        ValueError: size below 1.
    """
    centre = 0.875 if size >= WHOLE_IMAGE_BELOW else 1.0
    return (View(size=size, centre=centre, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0, flip=0.0),)


def load_recipe(name: str, views: int, size: int) -> Recipe:
    """A recipe by name or from a YAML file.

    Args:
        name: `byol`, `cifar`, `multi_crop` (two large views, the rest small ones), `auto` (`cifar` for views below 96
            pixels, else `byol`), or the path of a YAML file: a list of at most `views` blocks whose keys are the
            fields of `View`, repeated in turn. A block without `size` takes the argument's.
        views: K.
        size: side of a view (multi_crop: of a large view; the small ones have 3/7 of it), pixels.

    Raises:
        MSBRegError: no such recipe or file, a block that is not one, or more blocks than views.
    """
    if name == "auto":
        name = "cifar" if size < WHOLE_IMAGE_BELOW else "byol"
    if name == "byol":
        return byol(views, size)
    if name == "cifar":
        return cifar(views, size)
    if name == "multi_crop":
        if views < 3:
            raise MSBRegError(
                f"--data.recipe multi_crop has two large views and at least one small one, not {views} in all: set "
                "--data.views to 3 or more."
            )
        return multi_crop(2, views - 2, size=size, local_size=max(1, round(size * 3 / 7)))
    path = expanded(name)
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise MSBRegError(f"no recipe is called {name}: use byol, cifar, multi_crop, auto or a .yaml file")
    blocks = _read_blocks(path, size)
    if len(blocks) > views:
        raise MSBRegError(
            f"recipe {path} has {len(blocks)} blocks, of which --data.views {views} would leave out "
            f"{len(blocks) - views}: set --data.views to {len(blocks)} or more, or take blocks out."
        )
    return _alternate(blocks, views)


def _read_blocks(path: Path, size: int) -> Recipe:
    import yaml

    try:
        content = read_yaml(path)
    except OSError as error:
        raise MSBRegError(f"recipe {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MSBRegError(f"recipe {path} is not YAML: {error}") from error
    if not isinstance(content, list) or not content:
        raise MSBRegError(f"recipe {path} should be a list of blocks, one per view, not {type(content).__name__}")
    known = [field.name for field in fields(View)]
    blocks = []
    for number, block in enumerate(content, start=1):
        if not isinstance(block, dict):
            raise MSBRegError(f"{path}, block {number}: expected field: value pairs, not {block!r}")
        unknown = sorted(str(key) for key in block if key not in known)
        if unknown:
            raise MSBRegError(f"{path}, block {number}: no field is called {unknown[0]}; there are {', '.join(known)}")
        values: dict[str, Any] = {"size": size}
        values |= {key: _plain(value) for key, value in block.items()}
        try:
            blocks.append(View(**values))
        except (TypeError, ValueError) as error:
            raise MSBRegError(f"{path}, block {number}: {error}") from error
    return tuple(blocks)


def _plain(value: Any) -> Any:
    """What a block's value means: a list is a range, and 1e-1, which YAML 1.1 takes for text, a number."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
            return int(number) if number.is_integer() else number
    return value


def size_groups(recipe: Recipe) -> list[list[int]]:
    """Numbers of the views that share a size, by order of first appearance: one tensor of a batch each."""
    groups: dict[int, list[int]] = {}
    for number, view in enumerate(recipe):
        groups.setdefault(view.size, []).append(number)
    return list(groups.values())
