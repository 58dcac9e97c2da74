"""`msbreg.data.pixelwise`: one pass over the bytes of crops does what the loader's operators do one after another."""

import numpy as np
import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")
pytest.importorskip("torchvision", reason="this needs the extra [train]")

import torch
from PIL import Image

from msbreg import kernels
from msbreg.data import ImageFolder, View, ViewLoader, byol, cifar, evaluation, multi_crop, pixelwise
from msbreg.data.draws import Draw, colour_matrices
from msbreg.data.pixels import joined_views, normalisation, packed, pixelwise_plain
from msbreg.data.recipes import STD
from msbreg.data.torchvision_backend import make_view

try:
    import nvidia.dali  # noqa: F401

    BACKENDS = ["dali", "torchvision"]
except ImportError:
    BACKENDS = ["torchvision"]

LEVEL = 1 / (255 * min(STD))
"""The largest step of a normalised value that one level of 255 makes."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
interprets = pytest.mark.skipif(
    DEVICE.type != kernels.DEVICE_TYPE, reason="needs a GPU, or TRITON_INTERPRET=1, which runs kernels without one"
)


def crops_and_draw(count=6, size=(37, 37)):
    """Bytes by chance, and a draw of colours; two in three are solarized or flipped or both."""
    random = np.random.default_rng(0)
    crops = random.integers(0, 256, (count, *size, 3), np.uint8)
    box = np.tile(np.array([0, 0, *size], np.int32), (count, 1))
    colour = colour_matrices(View(), random.uniform(0, 1, (32, count)))
    none = np.zeros(count, np.int32)
    return crops, Draw(box, colour, none.astype(np.float32), none, np.arange(count) % 2 == 1, np.arange(count) % 3 == 1)


def arguments(count=6, size=(37, 37), device="cpu"):
    crops, draw = crops_and_draw(count, size)
    return [torch.from_numpy(values).to(device) for values in (crops, draw.colour, draw.solarize, draw.flip)]


def expected(crops, colour, solarize, flip):
    return pixelwise_plain(crops, colour, solarize, flip, *normalisation()).permute(0, 3, 1, 2)


def near(result, truth, *, least=0.9999):
    """Where two round a colour differently they are a level apart, and far where solarize then inverts one alone."""
    error = (result.float() - truth.float()).abs()
    return (error < 1.01 * LEVEL).double().mean() >= least and error.mean() < 4e-3


def test_plain_torch_does_what_the_loader_does():
    crops, draw = crops_and_draw()
    out = np.empty((*crops.shape,), np.float32)
    for number in range(len(crops)):
        make_view(Image.fromarray(crops[number]), View(size=37), draw, number, out[number])
    truth = torch.from_numpy(out).permute(0, 3, 1, 2)
    given = arguments()
    assert near(expected(*given), truth)
    for place, change in ((1, lambda c: 1.05 * c), (2, torch.logical_not), (3, torch.logical_not)):
        wrong = [change(value) if number == place else value for number, value in enumerate(given)]
        assert not near(expected(*wrong), truth)


@interprets
@pytest.mark.gpu
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(37, 37), (1, 1), (40, 64)], ids=str)
def test_the_kernel_is_plain_torch(size, dtype):
    given = arguments(size=size, device=DEVICE)
    result = pixelwise(*given, dtype=dtype)
    assert result.dtype == dtype and result.shape == (6, 3, *size)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert near(result, expected(*given))
    # The interpreter truncates to bfloat16, where a GPU rounds.
    most = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    assert ((result.float() - expected(*given)).abs() > most).double().mean() < 1e-3


@interprets
@pytest.mark.gpu
@pytest.mark.interpreter
def test_the_kernel_takes_any_strides():
    crops, colour, solarize, flip = arguments(device=DEVICE)
    truth = pixelwise(crops, colour, solarize, flip, dtype=torch.float32)
    planar = crops.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    every_other = torch.stack([crops, 255 - crops], dim=2)[:, :, 0]
    halves = [value.half() for value in (solarize, flip)]
    table = torch.cat([colour.flatten(1), solarize[:, None], flip[:, None]], dim=1)
    transposed = colour.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (
        (planar, colour, solarize, flip),
        (every_other, colour, solarize, flip),
        (crops, table[:, :12].unflatten(1, (3, 4)), table[:, 12], table[:, 13]),
        (crops, transposed, solarize, flip),
        (crops, colour, *halves),
    ):
        assert torch.equal(pixelwise(*given, dtype=torch.float32), truth)


@interprets
@pytest.mark.gpu
@pytest.mark.interpreter
def test_the_kernel_writes_all_of_its_views_and_no_others():
    given = arguments(device=DEVICE)
    out = torch.full((8, 3, 37, 37), float("nan"), device=DEVICE).contiguous(memory_format=torch.channels_last)
    assert pixelwise(*given, out=out[1:7]).data_ptr() == out[1].data_ptr()
    assert out[1:7].isfinite().all() and out[[0, 7]].isnan().all()
    assert torch.equal(out[1:7], pixelwise(*given, dtype=torch.float32))


@pytest.mark.interpreter
def test_none_make_none():
    assert pixelwise(*(value[:0] for value in arguments(device=DEVICE))).shape == (0, 3, 37, 37)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("scale", "values", "solarize", "expected"),
    [
        (2.0, [0, 100, 200], 0, [0, 200, 255]),
        (2.0, [0, 100, 200], 1, [0, 55, 0]),  # clipped first
        (-1.0, [0, 100, 200], 0, [0, 0, 0]),
        (0.5, [3, 4, 7], 0, [2, 2, 4]),  # rounded
        (1.0, [127, 128, 255], 1, [127, 127, 0]),
        (0.5, [254, 255, 253], 1, [127, 127, 127]),  # rounded first
    ],
)
def test_colours_are_rounded_and_clipped_and_then_solarized(scale, values, solarize, expected):
    crops = torch.tensor(values, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 1, 3)
    colour = torch.cat([scale * torch.eye(3), torch.zeros(3, 1)], dim=1).expand(3, 3, 4)
    options = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "dtype": torch.float32}
    views = pixelwise(crops, colour, torch.full((3,), solarize), torch.zeros(3), **options)
    assert views[:, 0, 0, 0].round(decimals=3).tolist() == expected


OK = arguments(count=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: OK[0].float()}, TypeError, r"crops in uint8 and colour in float32, got torch\.float32"),
        ({1: OK[1].double()}, TypeError, r"got torch\.uint8 and torch\.float64"),
        ({0: OK[0].permute(0, 3, 1, 2)}, ValueError, r"crops of shape \(N, H, W, 3\), got \(2, 3, 37, 37\)"),
        ({1: OK[1][:1]}, ValueError, r"colour of shape \(2, 3, 4\) on cpu, got \(1, 3, 4\)"),
        ({2: OK[2][:, None]}, ValueError, r"solarize of shape \(2,\)"),
        ({3: OK[3].to("meta")}, ValueError, r"flip of shape \(2,\) on cpu, got \(2,\) on meta"),
        ({"out": torch.empty(2, 37, 37, 3)}, ValueError, r"out of shape \(2, 3, 37, 37\)"),
        ({"out": torch.empty(2, 3, 37, 37)}, ValueError, r"out in channels_last, got strides"),
        ({"dtype": torch.uint8}, TypeError, r"views of a floating dtype, not torch\.uint8"),
    ],
)
def test_bad_input_gets_a_sentence(change, error, message):
    given = [change.get(place, value) for place, value in enumerate(OK)]
    with pytest.raises(error, match=message):
        pixelwise(*given, **{name: value for name, value in change.items() if isinstance(name, str)})


def test_views_of_a_size_are_joined_view_by_view():
    (crops, first), (_, second) = crops_and_draw(), crops_and_draw()
    second = second._replace(solarize=~second.solarize, colour=0.5 * second.colour)
    drawn = torch.from_numpy(packed([first, second]))
    assert drawn.shape == (6, 2, 16) and drawn.dtype == torch.float32
    crops = torch.from_numpy(crops)
    views = joined_views([crops, 255 - crops], drawn.unbind(1), torch.float32)
    assert views.is_contiguous(memory_format=torch.channels_last)
    for number, (bytes_, draw) in enumerate(((crops, first), (255 - crops, second))):
        alone = [torch.from_numpy(values) for values in (draw.colour, draw.solarize, draw.flip)]
        assert torch.equal(views[6 * number :][:6], pixelwise(bytes_, *alone, dtype=torch.float32))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for number in range(8):
        values = Image.fromarray(random.integers(0, 256, (5, 5, 3), np.uint8))
        values.resize((60 + 5 * number, 90 - 5 * number), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return ImageFolder(folder)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "recipe",
    [byol(3, 40), cifar(2, 32), multi_crop(2, 3, size=48, local_size=24), evaluation(32)],
    ids=["byol", "cifar", "multi-crop", "evaluation"],
)
def test_a_loader_whose_backend_ends_with_crops_makes_the_same_views(pictures, backend, recipe):
    """As on a GPU; here on the CPU, the copy to the device aside."""
    batches = []
    for ends_with_crops in (False, True):
        loader = ViewLoader(pictures, recipe, 4, backend=backend, threads=2, dtype=torch.float32)
        loader._backend._ends_with_crops = ends_with_crops
        batches.append(list(loader.batches(0, 5)))
        loader.close()
    for ours, theirs in zip(*batches, strict=True):
        assert torch.equal(ours.index, theirs.index)
        assert len(ours.views) == len(theirs.views)
        for one, other in zip(ours.views, theirs.views, strict=True):
            assert one.shape == other.shape and one.stride() == other.stride()
            assert near(one, other, least=0.999)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_come_in_the_dtype_that_is_asked_for(pictures, backend):
    with pytest.raises(ValueError, match=r"a floating dtype for views, got torch\.uint8"):
        ViewLoader(pictures, cifar(2, 24), 4, backend=backend, dtype=torch.uint8)
    streams = []
    for dtype in (None, torch.bfloat16):
        loader = ViewLoader(pictures, cifar(2, 24), 4, backend=backend, threads=1, dtype=dtype)
        streams.append(next(loader.batches()).views[0])
        loader.close()
    assert [views.dtype for views in streams] == [torch.float32, torch.bfloat16]
    assert torch.equal(streams[0].bfloat16(), streams[1])
