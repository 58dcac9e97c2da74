"""DALI and its torchvision twin make the same views from the same draws; and each step is what it says it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")
pytest.importorskip("torchvision", reason="this needs the extra [train]")

import torch
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F  # noqa: N812

from msbreg.data import ImageFolder, View, ViewLoader, byol, cifar, evaluation, multi_crop, open_source
from msbreg.data.blur import gaussian_blur
from msbreg.data.draws import draw
from msbreg.data.recipes import MEAN, STD
from msbreg.data.torchvision_backend import make_view

try:
    import nvidia.dali as dali
except ImportError:
    dali = None

needs_dali = pytest.mark.skipif(dali is None, reason="DALI is not installed")

MEAN_TOLERANCE = 0.6
"""Mean absolute difference of an image's views, in units of 1/255. Photographs differ by 0.2 on average: a rounding or
two, and the resize's border (DALI's filter sees a few pixels beyond the crop, torchvision's does not)."""


def photo_like(seed, size=(120, 160), mode="RGB"):
    """Smooth colours with hard-edged discs on them, (height, width)."""
    random = np.random.default_rng(seed)
    height, width = size
    values = random.integers(0, 256, (5, 5, 3), np.uint8)
    pixels = np.array(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))
    y, x = np.mgrid[:height, :width]
    for _ in range(6):
        inside = (y - random.uniform(0, height)) ** 2 + (x - random.uniform(0, width)) ** 2 < random.uniform(8, 40) ** 2
        pixels[inside] = random.integers(0, 256, 3)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(16):
        photo_like(number, (100 + 9 * number, 230 - 9 * number)).save(folder / f"{number:02d}.jpg", quality=90)
    return ImageFolder(folder)


def pixels(views):
    """Normalised views back on the scale 0 to 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return 255 * (views.float().cpu() * std + mean)


def views_of(source, recipe, backend, *, device="cpu", seed=0, step=0):
    loader = ViewLoader(
        source, recipe, len(source), backend=backend, device=device, threads=1, seed=seed, shuffle=len(recipe) > 1
    )
    try:
        return [pixels(views) for views in next(loader.batches(step)).views]
    finally:
        loader.close()


def difference(ours, theirs):
    """The largest mean absolute difference of a view, in units of 1/255."""
    return max(float((a - b).abs().flatten(1).mean(1).max()) for a, b in zip(ours, theirs, strict=True))


RECIPES = {
    "byol-224": byol(2, 224),
    "byol-64": byol(4, 64),
    "cifar-32": cifar(3, 32),
    "multi-crop": multi_crop(2, 2, size=96, local_size=40),
    "evaluation-96": evaluation(96),
    "evaluation-32": evaluation(32),
    "linear": (View(size=48, interpolation="linear", blur=0), View(size=48, interpolation="linear")),
}


@needs_dali
@pytest.mark.parametrize("name", RECIPES)
def test_dali_and_torchvision_make_the_same_views(pictures, name):
    recipe = RECIPES[name]
    assert difference(views_of(pictures, recipe, "dali"), views_of(pictures, recipe, "torchvision")) < MEAN_TOLERANCE


@needs_dali
def test_dali_and_torchvision_make_the_same_views_of_photographs():
    photos = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos.tar"
    if not photos.exists():
        pytest.skip(f"there are no photographs at {photos}")
    source = open_source(photos).subset(range(0, 120, 5))
    recipe = byol(2, 112)
    assert difference(views_of(source, recipe, "dali"), views_of(source, recipe, "torchvision")) < MEAN_TOLERANCE


@needs_dali
@pytest.mark.parametrize(
    "change",
    [
        {"interpolation": "linear"}, {"sigma": (0.3, 2.4)}, {"brightness": 0.43}, {"contrast": 0.45}, {"hue": 0.12},
        {"saturation": 0.4}, {"area": (0.09, 1.0)}, {"ratio": (0.73, 1.36)}, {"flip": 0.0}, {"solarize": 0.0},
        {"grayscale": 0.0}, {"jitter": 0.0}, {"blur": 0.0},
    ],
)  # fmt: skip
def test_the_comparison_notices_a_recipe_that_differs_a_little(pictures, change):
    recipe = tuple(replace(view, solarize=0.5, blur=1.0 if "sigma" in change else 0.5) for view in byol(4, 64))
    other = tuple(replace(view, **change) for view in recipe)
    assert difference(views_of(pictures, recipe, "dali"), views_of(pictures, other, "torchvision")) > MEAN_TOLERANCE


def kinds():
    """Good images of many kinds, by file name."""
    picture = photo_like(0)
    alpha = picture.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    grey16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    transparent = picture.quantize(32)
    return {
        "rgb.jpg": (picture, {}), "grey.jpg": (picture.convert("L"), {}), "cmyk.jpg": (picture.convert("CMYK"), {}),
        "progressive.jpg": (picture, {"progressive": True}), "full-chroma.jpg": (picture, {"subsampling": 0}),
        "phone.jpg": (picture, {"exif": exif}), "phone.png": (picture, {"exif": exif}), "rgb.png": (picture, {}),
        "grey.png": (picture.convert("L"), {}), "black-white.png": (picture.convert("1", dither=Image.Dither.NONE), {}),
        "palette.png": (picture.quantize(64), {}), "transparent-palette.png": (transparent, {"transparency": 3}),
        "alpha.png": (alpha, {}), "grey-alpha.png": (alpha.convert("LA"), {}), "sixteen-bits.png": (grey16, {}),
        "alpha.webp": (alpha, {"lossless": True}), "lossy.webp": (picture, {}),
        "palette.gif": (picture.quantize(64), {}),
        "rgb.bmp": (picture, {}), "rgb.tif": (picture, {}), "rgb.ppm": (picture, {}), "rgb.jp2": (picture, {}),
    }  # fmt: skip


@needs_dali
@pytest.mark.filterwarnings("error")
def test_every_kind_of_image_looks_the_same_in_both(tmp_path):
    images = kinds()
    for name, (image, options) in images.items():
        image.save(tmp_path / name, **options)
    source = ImageFolder(tmp_path)
    assert len(source) == len(images)
    plain = [views_of(source, evaluation(64), backend)[0] for backend in ("dali", "torchvision")]
    for place, (ours, theirs) in enumerate(zip(*plain, strict=True)):
        assert float((ours - theirs).abs().mean()) < 0.3, source.name(place)
    recipe = byol(2, 48)
    assert difference(views_of(source, recipe, "dali"), views_of(source, recipe, "torchvision")) < MEAN_TOLERANCE


@pytest.mark.parametrize("name", ["rgb.jpg", "alpha.png", "phone.jpg", "sixteen-bits.png", "grey.jpg", "rgb.jp2"])
@pytest.mark.parametrize("backend", ["torchvision", pytest.param("dali", marks=needs_dali)])
def test_views_show_the_image_that_pillow_shows(tmp_path, name, backend):
    image, options = kinds()[name]
    image.save(tmp_path / name, **options)
    if name == "sixteen-bits.png":
        expected = Image.fromarray((np.asarray(image) // 257).astype(np.uint8)).convert("RGB")
    else:
        expected = ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB")
    expected = ImageOps.fit(expected, (64, 64), Image.Resampling.BICUBIC)
    view = views_of(ImageFolder(tmp_path), evaluation(64), backend)[0][0]
    assert np.abs(view.permute(1, 2, 0).numpy() - np.asarray(expected)).mean() < 0.6


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_the_twins_blur_is_torchvisions(sigma):
    image, radius = np.asarray(photo_like(0)), int(np.ceil(3 * sigma))
    expected = F.gaussian_blur(F.to_image(Image.fromarray(image)), [2 * radius + 1] * 2, [sigma] * 2)
    error = gaussian_blur(image, sigma, radius).astype(int) - expected.permute(1, 2, 0).numpy()
    assert np.abs(error).max() <= 1 and np.abs(error).mean() < 0.01


def one_view(image, view, **parts):
    """The twin's view of an image, pixels (3, size, size), with some parts of the draw replaced."""
    drawn = draw((view,), np.arange(1), np.array([image.size[::-1]]), seed=0)[0]
    out = np.empty((view.size, view.size, 3), np.float32)
    make_view(image, view, drawn._replace(**{name: np.array([part]) for name, part in parts.items()}), 0, out)
    return pixels(torch.from_numpy(out).permute(2, 0, 1))


def test_the_twins_crop_is_torchvisions():
    image, view = photo_like(1), replace(evaluation(50)[0], centre=None)
    expected = F.resized_crop(F.to_image(image), 10, 20, 70, 90, [50, 50], InterpolationMode.BICUBIC, antialias=True)
    assert (one_view(image, view, box=[10, 20, 70, 90]) - expected).abs().max() <= 1.01


def colour_map(**strengths):
    """The affine colour map of a view in which one strength is drawn and the others are still."""
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "jitter": 1.0, "grayscale": 0.0}
    return draw((View(**{**still, **strengths}),), np.arange(1), np.array([[64, 64]]), seed=4)[0].colour[0]


def test_brightness_saturation_and_grayscale_are_torchvisions():
    image = photo_like(2)
    flat = np.asarray(image).reshape(-1, 3)

    def mapped(colour):
        return (flat @ colour[:, :3].T + colour[:, 3]).round().clip(0, 255).reshape(*image.size[::-1], 3)

    colour = colour_map(brightness=0.5)
    expected = F.adjust_brightness(F.to_image(image), float(colour[0, 0]))
    assert abs(colour[0, 0] - 1) > 0.05 and np.abs(mapped(colour) - expected.permute(1, 2, 0).numpy()).max() <= 1

    colour = colour_map(saturation=0.5)
    factor = float(colour[0, 0] - colour[1, 0])  # row 0 has s + (1 - s) l, row 1 has (1 - s) l
    expected = F.adjust_saturation(F.to_image(image), factor)
    assert abs(factor - 1) > 0.05 and np.abs(mapped(colour) - expected.permute(1, 2, 0).numpy()).max() <= 1

    expected = F.rgb_to_grayscale(F.to_image(image), num_output_channels=3)
    assert np.abs(mapped(colour_map(grayscale=1.0)) - expected.permute(1, 2, 0).numpy()).max() <= 1


@needs_dali
@pytest.mark.parametrize("strength", ["brightness", "contrast", "saturation", "hue"])
def test_colours_are_those_of_dalis_color_twist(strength):
    from nvidia.dali import Pipeline, fn, types

    image = np.asarray(photo_like(3))
    colour = colour_map(**{strength: 0.4})
    linear = colour[:, :3].astype(float)
    hue = float(np.degrees(np.arctan2(*_chroma_turn(linear))))
    arguments = {
        "brightness": {"brightness": linear[0].sum()},
        "contrast": {"contrast": linear[0].sum()},
        "saturation": {"saturation": linear[0, 0] - linear[1, 0]},
        "hue": {"hue": hue},
    }[strength]
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        x = fn.external_source(name="x", layout="HWC", dtype=types.UINT8)
        pipeline.set_outputs(fn.color_twist(x, **{name: float(value) for name, value in arguments.items()}))
    expected = pipeline.run(x=[image])[0].at(0).astype(float)
    ours = (image.reshape(-1, 3) @ colour[:, :3].T + colour[:, 3]).round().clip(0, 255).reshape(image.shape)
    assert np.abs(expected - image).mean() > 2
    assert np.abs(ours - expected).mean() < 0.5 and np.abs(ours - expected).max() <= 3


def _chroma_turn(linear):
    """Sine and cosine of the turn of the IQ plane in a map of RGB."""
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
    turned = to_yiq @ linear @ np.linalg.inv(to_yiq)
    return turned[1, 2], turned[1, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("backend", ["torchvision", pytest.param("dali", marks=needs_dali)])
def test_views_made_on_a_gpu_are_those_made_on_the_cpu(pictures, backend, dtype):
    """While the GPU lags behind, too: the backends may not take back what a kernel has yet to read."""
    recipe = (*byol(2, 64), View(size=32))
    ours = ViewLoader(pictures, recipe, 8, device="cuda", backend=backend, threads=2, dtype=dtype)
    batches = []
    for batch in ours.batches(0, 12):
        batches.append(batch)
        torch.cuda._sleep(50_000_000)  # cycles
    ours.close()
    views = [views for batch in batches for views in batch.views]
    assert all(each.dtype == (dtype or torch.float16) and each.is_cuda for each in views)
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in views)
    theirs = ViewLoader(pictures, recipe, 8, device="cpu", backend="torchvision", threads=2)
    for batch, expected in zip(batches, theirs.batches(0, 12), strict=True):
        assert torch.equal(batch.index, expected.index)
        ours_pixels, their_pixels = ([pixels(views) for views in each.views] for each in (batch, expected))
        # nvJPEG rounds its own way; the other's crops are the same bytes.
        assert difference(ours_pixels, their_pixels) < (1.5 if backend == "dali" else MEAN_TOLERANCE)
    theirs.close()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torchvision", pytest.param("dali", marks=needs_dali)])
def test_one_view_of_a_short_last_batch_comes_from_a_gpu(pictures, backend):
    batches = []
    for device in ("cuda", "cpu"):
        loader = ViewLoader(pictures, evaluation(32), 6, shuffle=False, device=device, backend=backend, threads=2)
        batches.append(list(loader.batches()))
        loader.close()
    assert [len(batch.index) for batch in batches[0]] == [6, 6, 4]
    for ours, theirs in zip(*batches, strict=True):
        assert difference([pixels(ours.views[0])], [pixels(theirs.views[0])]) < 1.5
