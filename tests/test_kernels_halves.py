"""Pairs of halves: numbers, products of matrices, and the inverse root that is made of such products."""

import functools
import math

import pytest
import torch
from test_spectral import families, tangential

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from test_kernels_losses import DEVICE, pytestmark  # noqa: E402, F401

from msbreg import linalg  # noqa: E402
from msbreg.functional import singular_value_loss  # noqa: E402
from msbreg.kernels import halves  # noqa: E402
from msbreg.kernels import inverse_root as roots  # noqa: E402
from msbreg.kernels.totals import spectral_sums  # noqa: E402
from msbreg.reference import trace_of_root  # noqa: E402

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="compiled kernels do not see a twin put in a function's place")

F64, F32, F16 = torch.float64, torch.float32, torch.float16


@triton.jit
def store_kernel(input_pointer, output_pointer, count, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(input_pointer + place, mask=place < count, other=0.0)
    halves.store_split(output_pointer + place, count, x, place < count)


def stored(x, dtype):
    """What `store_split` makes of numbers."""
    output = torch.full((2 if dtype == F16 else 1, len(x)), math.nan, device=DEVICE, dtype=dtype)
    store_kernel[(1,)](x.to(DEVICE), output, len(x), BLOCK=triton.next_power_of_2(len(x)), num_warps=1)
    return output.cpu()


def value(pair):
    return pair[0].to(F64) + pair[1].to(F64) / 2048


def test_a_pair_keeps_22_bits_and_small_numbers_to_a_fixed_place():
    exponents = torch.arange(-45, 16, dtype=F32).repeat_interleave(8)
    x = torch.exp2(exponents) * (1 + torch.rand(len(exponents), generator=torch.Generator().manual_seed(0)))
    x = torch.cat((x, -x, torch.tensor([0.0, 1.0, 65504.0])))
    error = (value(stored(x, F16)) - x.to(F64)).abs()
    assert (error <= torch.clamp(2.0**-22 * x.to(F64).abs(), min=1.5e-11)).all()
    assert error[-3:].max() == 0
    assert (value(stored(x, F16))[x.abs() > 2e-11] != 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 65520.0])
def test_what_no_half_can_hold_is_not_finite(bad):
    assert not value(stored(torch.tensor([1.0, bad]), F16))[1].isfinite()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_other_numbers_are_stored_as_they_are(dtype):
    x = torch.randn(11, dtype=dtype)
    assert torch.equal(stored(x, dtype)[0], x)


def product(x, y):
    """L R of float32 matrices (w, w), whose width 16 divides, by `step_kernel`."""
    width = len(x)
    left, right = (stored(m.flatten(), F16).view(2, width, width).to(DEVICE) for m in (x, y))
    output = torch.empty_like(left)
    config = roots.launch_config(torch.empty(1, width, width))
    tiles = triton.cdiv(width, config["BLOCK_P"])
    roots.step_kernel[(tiles, tiles, 1)](
        left, right, left, right, output, 1, width, width, 0.0, 1.0,
        EARLY=False, WHOLE=roots.all_inside(width, config), **config,
    )  # fmt: skip
    return value(output.cpu())


def inverse_root(gram, shift, floor, steps, **options):
    return roots.inverse_root(gram, spectral_sums(gram, identity=0.0, scale=1.0), shift, floor, steps, **options)[0]


def product_error(scale=1.0):
    x, y = (torch.randn(48, 48, generator=torch.Generator().manual_seed(seed)) * scale for seed in (0, 1))
    exact = x.to(F64) @ y.to(F64)
    return ((product(x, y) - exact).norm() / exact.norm()).item()


def test_products_keep_float32s_digits():
    assert product_error() < 1e-6
    assert product_error(1e-2) < 1e-6


def near_collapse(root_of):
    """The error of the singular value loss's gradient, for rows that point one way but for 1e-3, by this root."""
    m = torch.nn.functional.normalize(families(96, 48)["near_collapse"], dim=-1).to(F32)
    shift = 0.03**2 * 96 / 48
    values, vectors = torch.linalg.eigh(linalg.gram(m.to(F64)))
    exact = tangential(m, (vectors * (values + shift).rsqrt()) @ vectors.T)
    root = root_of(linalg.gram(m)[None].to(DEVICE), shift, *linalg.newton_schulz_plan(shift / 96, F32))
    return ((tangential(m, root[0].cpu()) - exact).norm() / exact.norm()).item()


def by_float32(gram, shift, floor, steps, multiply=torch.matmul):
    """The same steps in float32 on the CPU, products and all."""
    gram = gram.cpu()
    identity = torch.eye(gram.shape[-1]).expand_as(gram)
    scale = torch.linalg.matrix_norm(gram, keepdim=True) + shift
    y, z = (gram + shift * identity) / scale, identity
    for a, b in steps:
        t = a * identity + b * multiply(y, z)
        y, z = multiply(t, y), multiply(z, t)
    return z * scale.rsqrt()


def test_the_inverse_root_is_as_exact_as_with_products_of_float32():
    assert near_collapse(inverse_root) < 1.5 * near_collapse(by_float32)


def truncated(x, exponent):
    """Float64 numbers cut off, towards zero, below 2^(exponent - 24): exponent as of `torch.frexp`."""
    unit = torch.ldexp(torch.ones_like(x), exponent - 24)
    return torch.where(x == 0, x, (x / unit).trunc() * unit)


def step_of_tensor_cores(sums, x, y):
    """sums + x y, for sixteen columns of x: summands are aligned to the largest and cut off, and so is their sum.

    Two bits behind the largest one's last are kept. That fits what an H200 lost of the singular value loss at D = 2048;
    bit for bit models of several GPUs are in Khattak, Mikaitis, "Accurate models of NVIDIA tensor cores", 2025,
    https://arxiv.org/abs/2512.07004.
    """
    summands = torch.cat((x[..., :, :, None] * y[..., None, :, :], sums[..., :, None, :]), dim=-2)
    largest = torch.frexp(summands.abs().amax(-2, keepdim=True))[1]
    total = truncated(summands, largest - 2).sum(-2)
    return truncated(total, torch.frexp(total)[1])


def on_tensor_cores(x, y, part=None):
    """L R by pairs of halves, as tensor cores sum; with `part` so many columns of L at a time, and parts in float32."""
    (x, x_low), (y, y_low) = (stored(m.flatten(), F16).view(2, *m.shape).to(F64) for m in (x, y))
    sums = torch.zeros(*x.shape[:-1], y.shape[-1])
    for columns in torch.arange(x.shape[-1]).split(part or x.shape[-1]):
        high, low = torch.zeros_like(sums, dtype=F64), torch.zeros_like(sums, dtype=F64)
        for q in columns.split(16):
            high = step_of_tensor_cores(high, x[..., q], y[..., q, :])
            for left, right in ((x, y_low), (x_low, y)):
                low = step_of_tensor_cores(low, left[..., q], right[..., q, :])
        sums += (high + low / 2048).to(F32)
    return sums


def test_the_inverse_root_is_as_exact_where_tensor_cores_cut_sums_off():
    """As GPUs do, and Triton's interpreter does not."""
    exact = near_collapse(functools.partial(by_float32, multiply=on_tensor_cores))
    assert exact < 1.5 * near_collapse(by_float32)


def test_long_sums_lose_digits_on_tensor_cores_unless_they_are_made_in_parts():
    """Of a matrix near the identity, as factors of the iteration are in the end, with itself."""
    x = torch.eye(512) + 0.01 * torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    exact = (x.to(F64) @ x.to(F64))[:16, :16].diagonal()
    loss = {part: ((on_tensor_cores(x[:16], x[:, :16], part).diagonal() - exact) / exact).mean() for part in (None, 64)}
    assert loss[None] < -5e-7 and abs(loss[64]) < abs(loss[None]) / 4
    assert halves.in_parts(512) and not halves.in_parts(256)


def value_error(dim, part=None):
    """Of the singular value loss of 2 D random rows, relative, with sums as a GPU has them."""
    m = torch.randn(2 * dim, dim, generator=torch.Generator().manual_seed(0))
    m = torch.nn.functional.normalize(m, dim=-1)
    gram, shift = linalg.gram(m), 0.03**2 * 2
    s = torch.linalg.eigvalsh(linalg.gram(m.to(F64))).clamp(min=0)
    exact = ((s / 2 + 0.03**2).sqrt() - 1).square().sum()
    multiply = functools.partial(on_tensor_cores, part=part)
    root = by_float32(gram, shift, *linalg.newton_schulz_plan(shift / (2 * dim), F32), multiply=multiply)
    value = gram.trace().to(F64) / 2 + dim * (1 + 0.03**2) - 2**0.5 * trace_of_root(gram, shift, root)
    return ((value - exact) / exact).item()


def test_the_model_of_tensor_cores_loses_what_an_h200_lost_and_parts_keep_half_of_it():
    """4.5e-4 at D = 2048 there (bench/results/nvidia-h200/2026-11-27/run_gpu.md), in proportion to D."""
    error = value_error(96)
    assert 2e-4 < error * 2048 / 96 < 6e-4
    assert abs(value_error(96, part=32)) < error / 2


@pytest.mark.skipif(DEVICE != "cuda", reason="only tensor cores cut sums off")
@pytest.mark.parametrize("shape", [(1, 512, 256), (1, 1024, 512), (1, 4096, 2048)])
def test_values_keep_their_digits_at_all_sizes(shape):
    z = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    c = min(shape[1:]) / shape[1]
    unit = torch.nn.functional.normalize(z.to(F64), dim=-1)
    s = torch.linalg.eigvalsh(linalg.gram(unit)).clamp(min=0)
    exact = ((c * s + 0.03**2).sqrt() - 1).square().sum()
    assert singular_value_loss(z).item() == pytest.approx(exact.item(), rel=1e-4)


@triton.jit
def unscaled(x):
    """Twin of `halves` whose low falls among float16's smallest numbers before it is scaled."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)).to(tl.float16).to(tl.float32) * halves.SCALE).to(tl.float16)


@triton.jit
def highs_alone(x):
    """Twin of `halves` that keeps eleven bits."""
    return x.to(tl.float16), tl.zeros_like(x).to(tl.float16)


@interpreted
@pytest.mark.parametrize("twin", [unscaled, highs_alone], ids=["unscaled", "highs_alone"])
def test_checks_catch_broken_twins(monkeypatch, twin):
    monkeypatch.setattr(halves, "halves", twin)
    for check in (
        test_a_pair_keeps_22_bits_and_small_numbers_to_a_fixed_place,
        test_products_keep_float32s_digits,
        test_the_inverse_root_is_as_exact_as_with_products_of_float32,
    ):
        with pytest.raises(AssertionError):
            check()


@pytest.mark.parametrize("smallest", [0.0, 1e-9, 1.0, 1e6, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_there_are_two_steps_or_more(smallest, dtype):
    assert len(linalg.newton_schulz_plan(smallest, dtype)[1]) >= 2  # what `inverse_root` asks for


@interpreted
def test_on_amd_numbers_stay_as_they_are(monkeypatch):
    """Its MI200 takes small halves for zero."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    numbers = halves.empty_split(torch.zeros(2), (5, 2), 20, 20, square=True)
    assert numbers.shape == (5, 2, 1, 32, 32) and numbers.dtype == F32
    assert near_collapse(inverse_root) < 1.5 * near_collapse(by_float32)


def test_widths_that_16_does_not_divide_are_filled_up_with_nothing(monkeypatch):
    """Whatever memory held before: what is beyond the side is written, as zero, before it is read."""
    gram = linalg.gram(torch.randn(2, 40, 21, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    plan = (0.1, *linalg.newton_schulz_plan(0.1 / 40, F32))
    expected = inverse_root(gram, *plan)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *shape, **rest: new_empty(*shape, **rest).fill_(math.nan))
    assert torch.equal(inverse_root(gram, *plan), expected)
    values, vectors = torch.linalg.eigh(gram.to("cpu", F64))
    exact = (vectors * (values + 0.1).rsqrt()[:, None]) @ vectors.mT
    assert torch.allclose(expected.to("cpu", F64), exact, rtol=1e-4, atol=1e-5)


def test_each_view_has_the_shift_or_what_the_floor_makes_it():
    rows = torch.randn(2, 30, 9, generator=torch.Generator().manual_seed(0))
    gram = linalg.gram(rows * torch.tensor([1.0, 10.0])[:, None, None])
    floor, size = 0.2, torch.linalg.matrix_norm(gram.to(F64))
    shift = 10 * floor * size[0].item()
    root = inverse_root(gram.to(DEVICE), shift, floor, linalg.newton_schulz_steps(floor / (1 + floor), F32))
    values, vectors = torch.linalg.eigh(gram.to(F64))
    h = torch.stack((torch.tensor(shift, dtype=F64), floor * size[1]))[:, None]
    exact = (vectors * (values + h).rsqrt()[:, None]) @ vectors.mT
    assert torch.allclose(root.to("cpu", F64), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 60, 40), F32), ((2, 90, 70), F32), ((1, 80, 64), F32), ((1, 40, 21), F64)]
)
@pytest.mark.parametrize("weights", [None, (0.3, -2.0)])
def test_one_launch_gives_the_bits_of_the_sequence(shape, dtype, weights):
    rows = shape[1]
    m = torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype), dim=-1
    )
    gram = linalg.gram(m).to(DEVICE)
    squares = spectral_sums(gram, identity=0.0, scale=1.0)
    plan = (0.5, *linalg.newton_schulz_plan(0.5 / rows, dtype))
    (root, sums), (other, other_sums) = (
        roots.inverse_root(gram, squares, *plan, weights=weights, at_once=at_once) for at_once in (False, True)
    )
    assert torch.equal(root, other)
    if weights is None:
        assert sums is None and other_sums is None
    else:
        torch.testing.assert_close(sums.sum(1), other_sums.sum(1), rtol=1e-12, atol=1e-10)


def test_coefficients_are_made_on_the_cpu_whatever_the_default_device():
    roots.coefficients.cache_clear()
    torch.set_default_device("meta")
    try:
        made = roots.coefficients(((1.5, -0.5), (1.6, -0.6)))
    finally:
        torch.set_default_device(None)
        roots.coefficients.cache_clear()
    assert made.device.type == "cpu" and made.tolist() == [[1.5, -0.5], [1.6, -0.6]]


@pytest.mark.parametrize("views", [1, 3])
def test_members_share_the_views_whatever_their_number(monkeypatch, views):
    """As many programs as fit; more views than programs come one after another, more tiles than members too."""
    m = torch.randn(views, 90, 70, generator=torch.Generator().manual_seed(0))
    gram = linalg.gram(torch.nn.functional.normalize(m, dim=-1)).to(DEVICE)
    plan = (0.5, *linalg.newton_schulz_plan(0.5 / 90, F32))
    expected = inverse_root(gram, *plan, at_once=False)
    for programs in (1, 2) if DEVICE == "cpu" else (1, 2, 7, 40):
        if DEVICE == "cpu" and programs > views:
            continue  # members of one view would wait for each other: the interpreter runs them one after another
        monkeypatch.setattr(roots, "processors", lambda device, programs=programs: programs)
        assert torch.equal(inverse_root(gram, *plan, at_once=True), expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="programs that do not wait give wrong results on a GPU alone")
def test_one_launch_and_the_sequence_are_the_same_at_every_run():
    """On a GPU, whose programs run at the same time, those of launches that begin early too.

    With a broken barrier, or without waiting for the last launch, some would read what is not there yet.
    """
    m = torch.nn.functional.normalize(torch.randn(2, 8, 512, 256, device=DEVICE), dim=-1)
    first, second = (linalg.gram(each) for each in m)
    plan = (0.5, *linalg.newton_schulz_plan(0.5 / 512, F32))
    expected = [inverse_root(gram, *plan, at_once=False) for gram in (first, second)]
    for _ in range(50):
        for gram, root in zip((first, second), expected, strict=True):
            assert torch.equal(inverse_root(gram, *plan, at_once=True), root)
            assert torch.equal(inverse_root(gram, *plan, at_once=False), root)


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU's launches are recorded in CUDA graphs")
def test_a_graph_records_the_sequence_and_gives_the_bits_of_one_launch():
    gram = linalg.gram(torch.nn.functional.normalize(torch.randn(2, 100, 70, device=DEVICE), dim=-1))
    plan = (0.5, *linalg.newton_schulz_plan(0.5 / 100, F32))
    expected = inverse_root(gram, *plan)
    inverse_root(gram, *plan, at_once=False)
    torch.cuda.synchronize()
    with pytest.MonkeyPatch.context() as patch, torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        patch.setattr(roots, "one_launch", None)
        root = inverse_root(gram, *plan)
    root.zero_()
    graph.replay()
    assert torch.equal(root, expected)


@pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has the choice")
@pytest.mark.parametrize(("views", "side"), [(2, 70), (2, 1024)])
def test_small_matrices_are_one_launch_and_large_ones_a_sequence(monkeypatch, views, side):
    gram = torch.eye(side, device=DEVICE).repeat(views, 1, 1)
    plan = (0.5, *linalg.newton_schulz_plan(0.5, F32))
    few = gram.numel() < roots.FEW and halves.ample_shared_memory(gram.device)
    monkeypatch.setattr(roots, "sequence" if few else "one_launch", None)
    assert inverse_root(gram, *plan).isfinite().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
def test_a_compiled_loss_may_be_recorded_at_its_first_call():
    """What a call keeps must not be in the memory of a graph."""
    torch._dynamo.reset()
    roots.coefficients.cache_clear()
    z = torch.randn(2, 64, 32, device=DEVICE)
    compiled = torch.compile(singular_value_loss, mode="reduce-overhead", fullgraph=True)
    expected = singular_value_loss(z)
    for _ in range(4):
        torch.testing.assert_close(compiled(z).clone(), expected)


def test_weights_of_any_size_come_within_what_halves_hold():
    x = torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(0), dtype=F32).to(DEVICE) * 1e5
    scale = halves.LARGEST / 5e5
    made = halves.split(x, scale)
    assert made.shape == (2, 2, 32, 32) and made[..., 20:, :].count_nonzero() == made[..., 20:].count_nonzero() == 0
    back = torch.stack([value(each.cpu()) for each in made])[:, :20, :20] / scale
    assert torch.allclose(back, x.to("cpu", F64), rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize(("shared", "expected"), [(227 << 10, 64), (163 << 10, 16), (99 << 10, 16), (64 << 10, 16)])
def test_tiles_are_as_deep_as_shared_memory_allows(monkeypatch, shared, expected):
    monkeypatch.setattr(halves, "shared_memory", lambda device: shared)
    assert halves.depth(128, 128, torch.zeros(1)) == expected
    assert halves.STAGES * 256 * expected * 4 <= shared
