"""`bench/pixels.py`: the kernel does to bytes what the package's pipeline does."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

import torch

pytest.importorskip("triton")

import pixels

from msbreg import kernels
from msbreg.data import View
from msbreg.data.draws import Draw

BENCH = Path(__file__).resolve().parents[1] / "bench"

CPU = torch.device("cpu")
NORMAL = torch.tensor([pixels.SCALE, pixels.SHIFT])
interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton kernels without a GPU")
compiled = pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter does not compile")


@pytest.fixture
def views() -> pixels.Views:
    views = pixels.random_views(6, 37, CPU)
    solarize, flip = torch.tensor([0, 1] * 3, dtype=torch.bool), torch.tensor([0, 0, 1] * 2, dtype=torch.bool)
    return views._replace(solarize=solarize, flip=flip)


def plain(views):
    return pixels.plain([views], NORMAL, torch.float32)


def by_the_package(views):
    """The same by the package's backend without DALI, which a test holds against DALI."""
    from PIL import Image

    from msbreg.data.torchvision_backend import make_view

    count, size = views.bytes.shape[:2]
    none = np.zeros(count, np.float32)
    whole = np.tile(np.array([0, 0, size, size], np.int32), (count, 1))
    draws = Draw(whole, views.colour.numpy(), none, none.astype(np.int32), views.solarize.numpy(), views.flip.numpy())
    out = np.empty((count, size, size, 3), np.float32)
    for number in range(count):
        make_view(Image.fromarray(views.bytes[number].numpy()), View(size=size), draws, number, out[number])
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def test_plain_torch_is_the_packages_pipeline(views):
    expected = by_the_package(views)
    assert pixels.refusal(plain(views), expected) is None
    for change in ({"flip": ~views.flip}, {"solarize": ~views.solarize}, {"colour": 1.05 * views.colour}):
        assert "off by more" in pixels.refusal(plain(views._replace(**change)), expected)


@interpreted
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_is_plain_torch(views, dtype):
    result = pixels.pixels(
        [pixels.Views(*(each[:2] for each in views)), pixels.Views(*(each[2:] for each in views))], dtype
    )
    assert result.dtype == dtype and result.shape == (6, 3, 37, 37)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert pixels.refusal(result, plain(views)) is None
    assert (result.float() - plain(views)).abs().mean() < 4e-3


@compiled
def test_the_kernel_compiles():
    import compile_report as report

    views = pixels.Views(
        torch.empty(2, 224, 224, 3, dtype=torch.uint8), torch.empty(2, 3, 4), *torch.empty(2, 2, dtype=torch.bool)
    )
    (launch,) = report.recorded(lambda: pixels.pixels([views], torch.bfloat16))
    row = report.compiled(launch, report.target_of("90"))
    assert row.kernel == "pixels_kernel" and row.spilled_bytes == 0
    assert not [fault for fault in row.faults if "32 bits" in fault or "compile" in fault]


@compiled
@pytest.mark.slow
def test_the_harness_measures_what_it_has_checked(monkeypatch, views):
    monkeypatch.setattr(pixels, "pixels", lambda parts, dtype: pixels.plain(parts, NORMAL, dtype))
    rows = pixels.measure(views, torch.bfloat16, seconds=0, rounds=2)
    assert [row["way"] for row in rows] == ["kernel", "torch", "torch compiled", "joining and cast alone"]
    assert all(0 < row["microseconds_a_view"]["min"] <= row["microseconds_a_view"]["max"] for row in rows)
    monkeypatch.setattr(pixels, "pixels", lambda parts, dtype: -pixels.plain(parts, NORMAL, dtype))
    with pytest.raises(SystemExit, match=r"kernel: .* are off by more"):
        pixels.measure(views, torch.bfloat16, seconds=0, rounds=1)


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, BENCH / "pixels.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "measures a GPU, and torch finds none here" in done.stderr
