"""Pictures of printed cloth in ten patterns: each is a swatch, and its class is the pattern printed on it.

All else varies freely within a class: the pair of colours and which of them is the ground, the scale of the print,
where it starts and how it is stretched, turned and creased, the light and the haze, and the grain. So neither
colours nor pixels tell the class, but two crops of one swatch show the same pattern at different scales, places and
exposures, which is exactly what learning from augmented views can find out.

A pattern is a signed distance function, negative on the ink, in units of its own period: one evaluation per pixel
draws it with smooth edges at any size.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASSES", "swatches"]

Array = NDArray[np.floating]

SATURATION = 0.75


def _near(x: Array) -> Array:
    """Distance to the nearest whole number."""
    return np.abs(x - np.round(x))


def _staggered(x: Array, y: Array, height: float) -> tuple[Array, Array]:
    """Place within the cell of a lattice of cells 1 wide and `height` high, every other row shifted by a half."""
    row = np.round(y / height)
    x = x + 0.5 * (row % 2)
    return x - np.round(x), y - height * row


def _blobs(x: Array, y: Array) -> Array:
    waves = np.sin(3.8 * x + 1.3 * np.sin(2.3 * y)) + np.sin(3.5 * y + 1.6 * np.sin(2.1 * x))
    return 0.16 * (waves + np.sin(2.5 * x - 2.8 * y + 1.3 * np.sin(1.7 * x + y)))


def _bricks(x: Array, y: Array) -> Array:
    u, v = _staggered(x, y, 0.6)
    return 0.08 - np.minimum(0.5 - np.abs(u), 0.3 - np.abs(v))


def _checks(x: Array, y: Array) -> Array:
    odd = (np.floor(x) + np.floor(y)) % 2
    return (1 - 2 * odd) * np.minimum(_near(x), _near(y))


def _columns(x: Array, y: Array) -> Array:
    return _near(x) - 0.25


def _diamonds(x: Array, y: Array) -> Array:
    return 1.4 * _checks(0.6 * (x + y), 0.6 * (x - y))


def _dots(x: Array, y: Array) -> Array:
    return np.hypot(*_staggered(x, y, 0.87)) - 0.3


def _rings(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(*_staggered(x, y, 0.87)) - 0.3) - 0.1


def _stripes(x: Array, y: Array) -> Array:
    return _near(y) - 0.25


def _triangles(x: Array, y: Array) -> Array:
    u, v = _staggered(x, y, 1.0)
    return np.maximum(0.9 * (np.abs(u) - 0.25 + 0.5 * v), -0.42 - v)


def _zigzag(x: Array, y: Array) -> Array:
    return 0.75 * (_near(y + _near(x)) - 0.25)


PATTERNS: dict[str, Callable[[Array, Array], Array]] = {
    "blobs": _blobs,
    "bricks": _bricks,
    "checks": _checks,
    "columns": _columns,
    "diamonds": _diamonds,
    "dots": _dots,
    "rings": _rings,
    "stripes": _stripes,
    "triangles": _triangles,
    "zigzag": _zigzag,
}
CLASSES: tuple[str, ...] = tuple(PATTERNS)


def _distance(labels: NDArray[np.int64], x: Array, y: Array) -> Array:
    """The distance of each image's own pattern at the points (x, y), all (N, S, S)."""
    distance = np.empty_like(x)
    for label, pattern in enumerate(PATTERNS.values()):
        chosen = labels == label
        distance[chosen] = pattern(x[chosen], y[chosen])
    return distance


def _rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """Hue in turns, saturation and value in [0, 1], each (N, 1, 1), to colours (N, 1, 1, 3) in [0, 1]."""
    sector = (np.array([5, 3, 1], np.float32) + 6 * hue[..., None]) % 6
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def _mix(a: Array, b: Array, share: Array) -> Array:
    return a + (b - a) * share


class _Draw:
    """Random properties of a chunk of images: one number each, (N, 1, 1) float32."""

    def __init__(self, images: int, random: np.random.Generator) -> None:
        self.images = images
        self.random = random

    def uniform(self, low: float, high: float) -> Array:
        return self.random.uniform(low, high, (self.images, 1, 1)).astype(np.float32)

    def chance(self, probability: float) -> NDArray[np.bool_]:
        return self.uniform(0, 1) < probability

    def field(self, x: Array, y: Array, frequency: float) -> Array:
        """A soft field in [-1, 1], (N, S, S): the mean of four plane waves of up to `frequency` cycles per axis."""
        waves = np.zeros((self.images, *x.shape), np.float32)
        for _ in range(4):
            across, down = self.uniform(-frequency, frequency), self.uniform(-frequency, frequency)
            waves += 0.25 * np.sin(2 * math.pi * (across * x + down * y + self.uniform(0, 1)))
        return waves


def _print(draw: _Draw, labels: NDArray[np.int64], x: Array, y: Array) -> Array:
    """How much of each pixel is inked, (N, S, S) in [0, 1]: the pattern laid on the cloth, which is seen askew."""
    size = x.shape[-1]
    crease, turn = draw.uniform(0.01, 0.06), draw.uniform(-0.25, 0.25)
    periods, stretch = np.exp(draw.uniform(math.log(2.6), math.log(5.4))), np.exp(draw.uniform(-0.15, 0.15))
    u, v = x + crease * draw.field(x, y, 1.5), y + crease * draw.field(x, y, 1.5)
    u, v = np.cos(turn) * u - np.sin(turn) * v, np.sin(turn) * u + np.cos(turn) * v
    u, v = u * periods * stretch + draw.uniform(0, 100), v * periods / stretch + draw.uniform(0, 100)
    boldness = draw.uniform(-0.06, 0.06)
    return np.clip(0.5 - (_distance(labels, u, v) - boldness) * size / periods, 0, 1)


def _dye(draw: _Draw) -> tuple[Array, Array]:
    """Colours of ground and ink, (N, 1, 1, 3): one deep and one pale, of one hue or of opposite ones."""
    hue = draw.uniform(0, 1)
    opposite = draw.uniform(-0.1, 0.1) + 0.5 * draw.chance(0.4)
    deep = _rgb(hue, SATURATION * draw.uniform(0.3, 1), draw.uniform(0.08, 0.45))
    pale = _rgb(hue + opposite, SATURATION * draw.uniform(0, 0.9), draw.uniform(0.65, 1))
    swapped = draw.chance(0.5)[..., None]
    return np.where(swapped, deep, pale), np.where(swapped, pale, deep)


def _expose(draw: _Draw, cloth: Array, x: Array, y: Array) -> Array:
    """The photograph of the cloth, (N, S, S, 3): light from one side, soft folds, haze, exposure and grain."""
    sun = draw.uniform(0, 2 * math.pi)
    light = 1 + draw.uniform(0, 1) * (np.cos(sun) * x + np.sin(sun) * y)
    light += draw.uniform(0, 0.5) * draw.field(x, y, 1.2)
    haze, grey = draw.uniform(0, 0.3)[..., None], draw.uniform(0.2, 0.8)[..., None]
    picture = _mix(cloth * light[..., None], grey, haze) * draw.uniform(0.75, 1.15)[..., None]
    grain = draw.uniform(0.005, 0.04)[..., None]
    return picture + grain * draw.random.standard_normal(cloth.shape, np.float32)


def swatches(labels: NDArray[np.int64], *, size: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Renders one swatch per label.

    Args:
        labels: (N,) int64, indices into `CLASSES`.
        size: S, side of an image in pixels.
        random: where every property but the pattern is drawn from.

    Returns:
        (N, S, S, 3) uint8, RGB.
    """
    draw = _Draw(len(labels), random)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = np.meshgrid(centres, centres)  # (S, S), in (-1/2, 1/2)
    ink_share = _print(draw, labels, x, y)[..., None]
    ground, ink = _dye(draw)
    clouds = 1 + draw.uniform(0.05, 0.35) * draw.field(x, y, 2.5)
    picture = _expose(draw, _mix(ground * clouds[..., None], ink, ink_share), x, y)
    return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
