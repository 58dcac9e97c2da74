"""The noise kernel against its torch twin, on a GPU or in Triton's interpreter."""

import math
import os
from dataclasses import replace

import pytest
import torch

from msbreg.noise import brownian_directions, plain_directions
from msbreg.philox import philox4x32

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from msbreg.kernels import philox as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
NO_DEVICE = not INTERPRETED and not torch.cuda.is_available()


def runs_kernels(test):
    """Marks a test that launches kernels."""
    reason = "Triton kernels need a GPU, or TRITON_INTERPRET=1 to run in Triton's interpreter"
    if not INTERPRETED and not NO_DEVICE:
        test = pytest.mark.gpu(test)
    return pytest.mark.interpreter(pytest.mark.skipif(NO_DEVICE, reason=reason)(test))


def on_device(value: int) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


@triton.jit
def store_words(output, seed, step, first_image, stream, first_quad, IMAGES: tl.constexpr, QUADS: tl.constexpr):
    """Writes the words of IMAGES x QUADS counters to output [4, IMAGES, QUADS] as int64."""
    i, q = tl.arange(0, IMAGES), tl.arange(0, QUADS)
    images, streams = tl.load(first_image) + i.to(tl.int64), stream + tl.zeros([IMAGES], tl.int32)
    w0, w1, w2, w3 = kernels.brownian_words(tl.load(seed), tl.load(step), images, streams, first_quad + q)
    place = output + i[:, None] * QUADS + q[None, :]
    tl.store(place, w0.to(tl.int64))
    tl.store(place + IMAGES * QUADS, w1.to(tl.int64))
    tl.store(place + 2 * IMAGES * QUADS, w2.to(tl.int64))
    tl.store(place + 3 * IMAGES * QUADS, w3.to(tl.int64))


@runs_kernels
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 0x1234_5678_9ABC_DEF0, -1])
@pytest.mark.parametrize(("step", "first_image"), [(0, 0), (12, 1000), (2**32 - 1, 2**32 - 2), (3 + 2**32, 5 + 2**33)])
@pytest.mark.parametrize("stream", [0, 3])
def test_words_equal_those_of_torch_bit_for_bit(seed, step, first_image, stream):
    output = torch.full((4, 4, 8), -1, device=DEVICE)
    store_words[(1,)](
        output, on_device(seed), on_device(step), on_device(first_image), stream, 3, IMAGES=4, QUADS=8,
        enable_fp_fusion=True,
    )  # fmt: skip
    quad = torch.arange(3, 11)
    image = ((torch.arange(4) + first_image) % 2**32)[:, None]
    expected = philox4x32((quad, image, torch.tensor(step % 2**32), torch.tensor(stream)), seed)
    torch.testing.assert_close(output.cpu(), torch.stack(expected), rtol=0, atol=0)


@runs_kernels
@pytest.mark.parametrize("dim", [1, 2, 7, 64, 130, 1000])
@pytest.mark.parametrize("batch", [1, 9])
@pytest.mark.parametrize("views", [None, 1, 3])
def test_directions_are_those_of_torch(batch, dim, views):
    seed, step, options = 0x1234_5678_9ABC_DEF0, 41, {"first_image": 6, "views": views}
    rows = kernels.brownian_directions(batch, dim, seed=on_device(seed), step=on_device(step), **options)
    expected = plain_directions(batch, dim, seed, step, **options)
    assert rows.shape == expected.shape
    ulp = torch.finfo(torch.float32).eps
    torch.testing.assert_close(rows.cpu(), expected, rtol=8 * ulp, atol=2 * ulp)
    assert rows.is_contiguous()
    assert torch.equal(brownian_directions(batch, dim, seed=seed, step=step, device=DEVICE, **options), rows)


@runs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_other_dtypes_are_the_same_directions_rounded(dtype, tolerance):
    rows = kernels.brownian_directions(5, 130, seed=on_device(1), step=on_device(2), dtype=dtype)
    assert rows.dtype == dtype
    # The interpreter cuts bfloat16 off where a GPU rounds it, hence a whole unit in the last place.
    torch.testing.assert_close(rows.cpu().double(), plain_directions(5, 130, 1, 2).double(), rtol=tolerance, atol=1e-7)


@runs_kernels
def test_neither_block_sizes_nor_the_split_over_calls_change_a_row(monkeypatch):
    seed, step = on_device(3), on_device(4)
    whole = kernels.brownian_directions(10, 130, seed=seed, step=step, views=2)
    part = kernels.brownian_directions(3, 130, seed=seed, step=step, first_image=7, views=2)
    assert torch.equal(whole[:, 7:], part)
    default = kernels.launch_config(130)
    for rows, columns in ((1, 256), (2, 512), (16, 256)):
        other = default | {"BLOCK_ROWS": rows, "BLOCK_D": columns}
        monkeypatch.setattr(kernels, "launch_config", lambda dim, other=other: other)
        assert torch.equal(kernels.brownian_directions(10, 130, seed=seed, step=step, views=2), whole)


@runs_kernels
@pytest.mark.parametrize(("batch", "dim"), [(9, 7), (3, 130)])
def test_all_of_the_output_is_written_and_nothing_else(batch, dim):
    memory = torch.full((batch + 8, dim), torch.nan, device=DEVICE)
    kernels.brownian_directions_kernel[(triton.cdiv(batch, 8),)](
        memory, on_device(1), on_device(2), 1, batch, dim, 0, 0, BLOCK_ROWS=8, BLOCK_D=256, enable_fp_fusion=True
    )
    written = memory.isfinite().cpu()
    assert written[:batch].all()
    assert not written[batch:].any()


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton kernels without a GPU")
@pytest.mark.interpreter
@pytest.mark.parametrize("seed", [0, -1, 0x1234_5678_9ABC_DEF0])
def test_tritons_debug_mode_finds_no_overflow(seed, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    options = {"seed": on_device(seed), "step": on_device(2**32 + 1), "first_image": 2**33}
    expected = kernels.brownian_directions(3, 130, **options)
    monkeypatch.setattr(interpreter_builder, "options", replace(interpreter_builder.options, debug=True))
    assert torch.equal(kernels.brownian_directions(3, 130, **options), expected)


@triton.jit
def store_normals(words, output, BLOCK: tl.constexpr):
    """Writes the radius, cosine and sine of BLOCK words a program to output [3, programs * BLOCK]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = kernels.uniform(tl.load(words + place).to(tl.uint32))
    cosine, sine = kernels.cosine_and_sine(u)
    row = tl.num_programs(0) * BLOCK
    tl.store(output + place, kernels.radius(u))
    tl.store(output + row + place, cosine)
    tl.store(output + 2 * row + place, sine)


@runs_kernels
def test_radius_cosine_and_sine_are_as_exact_as_their_docstrings_say():
    """At all of the smallest and largest words, all near quarter turns, and words between."""
    ends = torch.arange(2**14)
    near = torch.cat([quarter * 2**30 + (ends - 2**13) * 512 for quarter in (1, 2, 3)])
    spread = torch.randint(2**32, (2**17 - 5 * 2**14,), generator=torch.Generator().manual_seed(0))
    words = torch.cat([ends * 512, 2**32 - 1 - ends * 512, near, spread])
    assert words.numel() == 2**17
    output = torch.zeros(3, 2**17, device=DEVICE)
    store_normals[(2**5,)](words.to(DEVICE), output, BLOCK=2**12, enable_fp_fusion=True)
    u = ((words >> 9).double() + 0.5) / 2**23
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * u
    got = output.cpu().double()
    assert ((got[0] - radius) / radius).abs().max() < 2e-7
    assert torch.maximum((got[1] - angle.cos()).abs(), (got[2] - angle.sin()).abs()).max() < 1.2e-7


@triton.jit
def store_squares(rows, output, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Writes the squared lengths of rows [ROWS, COLUMNS] to output [ROWS]."""
    i = tl.arange(0, ROWS)
    place = i[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(output + i, kernels.row_squares(tl.load(rows + place)))


@runs_kernels
def test_squared_lengths_are_rounded_once():
    """To the one float32 that is nearest, whichever way a GPU shares a row's numbers among its threads."""
    rows = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    output = torch.zeros(32, device=DEVICE)
    store_squares[(1,)](rows.to(DEVICE), output, ROWS=32, COLUMNS=256, enable_fp_fusion=True)
    assert torch.equal(output.cpu(), rows.double().square().sum(1).float())
