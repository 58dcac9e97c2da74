"""The embedded data set: patterned paper in ten motifs, rendered here, so that a first run needs no download.

Each image is a swatch of wrapping paper, and its class is the motif printed on it: discs, squares, triangles and so on.
Everything else varies freely: the colours, how large the motifs are and how they lie, whether they are filled, outlined
or bordered, the paper beneath them with its stripes or clouds, light, shadow and noise. Neither colour nor position nor
pixels tell the class, but any two crops of one swatch show the same motif, which is what learning from augmented views
can find out.

Motifs are signed distance functions (negative inside, in units of the pattern's cell), so that one evaluation per pixel
renders a whole lattice of them, with smooth edges: the lattice's cell is found first and the distance is taken there.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msbreg.errors import DataError

__all__ = ["CLASSES", "render", "swatches"]

Array = NDArray[np.float32]

VERSION = 1  # part of the manifest: a folder rendered by another version of this file is rendered anew
MANIFEST = "rendered.json"
JPEG_QUALITY = 90
CHUNK = 256  # images rendered at once; part of the random stream, since each chunk has its own
CELLS = 8  # the cells' random numbers repeat after this many in each direction, more than a swatch shows


def _box(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    """Distance to an axis-parallel rectangle around the origin."""
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _fold(x: Array, y: Array, sectors: int) -> tuple[Array, Array]:
    """Turns every point into the sector around the upward axis, whose distance then stands for all `sectors`."""
    width = 2 * math.pi / sectors
    angle = np.arctan2(x, y)
    angle -= width * np.round(angle / width)
    radius = np.hypot(x, y)
    return radius * np.sin(angle), radius * np.cos(angle)


def _disc(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.30


def _square(x: Array, y: Array) -> Array:
    return _box(x, y, 0.27, 0.27)


def _triangle(x: Array, y: Array) -> Array:
    _, height = _fold(x, y, 3)
    return height - 0.20


def _cross(x: Array, y: Array) -> Array:
    return np.minimum(_box(x, y, 0.38, 0.115), _box(x, y, 0.115, 0.38))


def _star(x: Array, y: Array) -> Array:
    side, height = _fold(x, y, 5)
    tip, notch = 0.43, 0.19
    # The edge runs from the tip (0, tip) to the notch, half a sector away.
    notch_x, notch_y = notch * math.sin(math.pi / 5), notch * math.cos(math.pi / 5)
    length = math.hypot(tip - notch_y, notch_x)
    return (np.abs(side) * (tip - notch_y) + (height - tip) * notch_x) / length


def _heart(x: Array, y: Array) -> Array:
    # A square standing on its corner, and a disc over each of its two upper edges.
    diagonal = math.sqrt(0.5)
    half, y = 0.19, y + 0.07
    u, v = (x + y) * diagonal, (y - x) * diagonal
    lobes = np.minimum(np.hypot(u - half, v), np.hypot(u, v - half)) - half
    return np.minimum(_box(u, v, half, half), lobes)


def _moon(x: Array, y: Array) -> Array:
    return np.maximum(np.hypot(x, y) - 0.38, 0.31 - np.hypot(x - 0.17, y - 0.05))


def _drop(x: Array, y: Array) -> Array:
    diagonal = math.sqrt(0.5)
    radius, y = 0.25, y + 0.07
    u, v = (x + y) * diagonal, (y - x) * diagonal
    return np.minimum(np.hypot(u, v) - radius, _box(u - radius / 2, v - radius / 2, radius / 2, radius / 2))


def _flower(x: Array, y: Array) -> Array:
    side, height = _fold(x, y, 5)
    return np.minimum(np.hypot(side, height - 0.24), np.hypot(x, y) * 0.9) - 0.15


def _arrow(x: Array, y: Array) -> Array:
    head = np.maximum((np.abs(x) + y - 0.42) * math.sqrt(0.5), 0.02 - y)
    return np.minimum(head, _box(x, y + 0.19, 0.10, 0.23))


MOTIFS: dict[str, Callable[[Array, Array], Array]] = {
    "arrow": _arrow,
    "cross": _cross,
    "disc": _disc,
    "drop": _drop,
    "flower": _flower,
    "heart": _heart,
    "moon": _moon,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLASSES: tuple[str, ...] = tuple(MOTIFS)


def _distance(labels: NDArray[np.int64], x: Array, y: Array) -> Array:
    """Each image's own motif's distance at (x, y), all (N, S, S)."""
    distance = np.empty_like(x)
    for label, motif in enumerate(MOTIFS.values()):
        chosen = labels == label
        distance[chosen] = motif(x[chosen], y[chosen])
    return distance


def _from_hsv(hue: Array, saturation: Array, value: Array) -> Array:
    """Colours in [0, 1] with a last dimension of three."""
    sector = (np.array([5.0, 3.0, 1.0], np.float32) + 6 * hue[..., None]) % 6
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def _waves(random: np.random.Generator, images: int, x: Array, y: Array, frequency: float) -> Array:
    """A soft random field in [-1, 1], (N, S, S): the mean of four plane waves of at most `frequency` cycles a side."""
    field = np.zeros((images, *x.shape[-2:]), np.float32)
    for _ in range(4):
        a, b = (random.uniform(-frequency, frequency, (images, 1, 1)).astype(np.float32) for _ in range(2))
        phase = random.uniform(0, 1, (images, 1, 1)).astype(np.float32)
        field += np.sin(2 * math.pi * (a * x + b * y + phase)) / 4
    return field


def swatches(labels: NDArray[np.int64], *, size: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Renders one swatch per label.

    Args:
        labels: (N,) int64, indices into `CLASSES`.
        size: side of an image in pixels.
        random: where every other property is drawn from.

    Returns:
        (N, size, size, 3) uint8, RGB.
    """
    images = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Array:
        return random.uniform(low, high, (images, *(shape or (1, 1)))).astype(np.float32)

    def mix(a: Array, b: Array, share: Array) -> Array:
        return a + (b - a) * share

    centres = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    page_x, page_y = np.meshgrid(centres, centres)  # (S, S), in [-1/2, 1/2]

    # The page, seen a little askew and curled, then laid out in cells: `cells` of them on a side.
    cells = np.exp(uniform(math.log(1.6), math.log(3.4)))
    turn, stretch, curl = uniform(0, 2 * math.pi), np.exp(uniform(-0.18, 0.18)), uniform(0, 0.03)
    x = page_x + curl * _waves(random, images, page_x, page_y, 1.5)
    y = page_y + curl * _waves(random, images, page_x, page_y, 1.5)
    x, y = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    x, y = x * cells * stretch + uniform(0, CELLS), y * cells / stretch + uniform(0, CELLS)
    row = np.floor(y)
    x += uniform(0, 1) * row  # every row shifted against the last: lattices of all angles
    column = np.floor(x)
    x, y = x - column - 0.5, y - row - 0.5
    cell = ((row % CELLS) * CELLS + column % CELLS).astype(np.int64).reshape(images, -1)

    def per_cell(values: Array) -> Array:
        return np.take_along_axis(values, cell, 1).reshape(x.shape)

    # Within its cell each motif is turned, moved and scaled: by its own amount where `order` is 0, alike where it is 1.
    order = (uniform(0, 1, 1) < 0.5).astype(np.float32)
    angle = per_cell(uniform(0, 2 * math.pi, 1) + (1 - order) * uniform(-math.pi, math.pi, CELLS**2))
    scale = per_cell(uniform(0.9, 1.15, 1) * (1 + (1 - order) * uniform(-0.2, 0.1, CELLS**2)))
    x = x - per_cell(0.06 * uniform(-1, 1, CELLS**2))
    y = y - per_cell(0.06 * uniform(-1, 1, CELLS**2))
    x, y = (np.cos(angle) * x - np.sin(angle) * y) / scale, (np.sin(angle) * x + np.cos(angle) * y) / scale
    distance = _distance(labels, x, y) * scale
    pixel = cells / size

    # Colours: the paper's, and two inks that differ from it in lightness or clearly in hue.
    paper_value = uniform(0.15, 1.0)
    paper_hue, paper_saturation = uniform(0, 1), uniform(0.05, 0.7)
    lighter = paper_value < uniform(0.4, 0.75)
    ink_value = np.where(lighter, paper_value + uniform(0.3, 0.6), paper_value - uniform(0.3, 0.6)).clip(0.05, 1)
    ink_saturation = uniform(0.2, 0.95)
    ink_hue = paper_hue + uniform(0.15, 0.85)
    paper = _from_hsv(paper_hue, paper_saturation, paper_value)
    ink = _from_hsv(ink_hue, ink_saturation, ink_value)
    other_ink = _from_hsv(ink_hue + uniform(-0.25, 0.25), ink_saturation, (ink_value + uniform(-0.12, 0.12)).clip(0, 1))

    # The paper has clouds, and on half of the swatches stripes.
    clouds = _waves(random, images, page_x, page_y, 2.5)
    tilt, period = uniform(0, math.pi), uniform(4, 11)
    stripes = np.sin(2 * math.pi * period * (np.cos(tilt) * page_x + np.sin(tilt) * page_y))
    striped = (uniform(0, 1) < 0.5) * uniform(0.04, 0.16)
    canvas = paper * (1 + uniform(0.1, 0.45) * clouds + striped * np.clip(2 * stripes, -1, 1))[..., None]

    # Motifs are filled, outlined, or filled with a border of the other ink.
    style = uniform(0, 1)
    line = np.maximum(uniform(0.05, 0.09), 0.8 * pixel)
    outlined, bordered = style < 0.25, style > 0.7
    shape = np.where(outlined, np.abs(distance + line / 2) - line / 2, distance)
    coverage = np.clip(0.5 - shape / pixel, 0, 1)[..., None]
    inner = np.clip(0.5 - (distance + line) / pixel, 0, 1)
    second = per_cell((uniform(0, 1, CELLS**2) < 0.5).astype(np.float32))
    share = np.where(bordered, inner, second * (uniform(0, 1) < 0.6))[..., None]
    fill = mix(ink, other_ink, share)

    shadow = np.clip(0.5 - distance / (4 * pixel), 0, 1) * uniform(0, 0.5)
    canvas = mix(canvas * (1 - shadow[..., None]), fill, coverage)

    # Light from one side, a soft stain, and grain.
    sun = uniform(0, 2 * math.pi)
    light = 1 + uniform(0, 0.5) * (np.cos(sun) * page_x + np.sin(sun) * page_y)
    light = light + uniform(0, 0.25) * _waves(random, images, page_x, page_y, 1.5)
    grain = uniform(0.005, 0.05)[..., None] * random.standard_normal(canvas.shape, np.float32)
    return ((canvas * light[..., None] + grain).clip(0, 1) * 255 + 0.5).astype(np.uint8)
