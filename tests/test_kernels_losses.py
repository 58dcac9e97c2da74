"""The losses through the Triton kernels, on a GPU or in Triton's interpreter, against the float64 definitions."""

import contextlib
import inspect
import math
import os
import subprocess
import sys

import pytest
import torch
from test_losses import oracle
from test_spectral import families, gradient_error, oracle_value, value_and_gradient
from test_spectral_family import barlow, covariance
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.gradcheck import GradcheckError
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from msbreg import MSBRegLoss, kernels, linalg, ops  # noqa: E402
from msbreg.functional import (  # noqa: E402
    brownian_directions,
    brownian_loss,
    centroid_loss,
    coding_rate,
    msbreg_loss,
    nuclear_norm,
    singular_value_loss,
)
from msbreg.kernels import (  # noqa: E402
    gradient,
    gram,
    halves,
    inverse_root,
    newton_schulz,
    product,
    rows,
    tiles,
    totals,
)
from msbreg.spectral import CodingRateLoss, MMCRLoss, SVMaxLoss, covariance_energy, cross_correlation_energy  # noqa: E402

DEVICE = kernels.DEVICE_TYPE
RUNS = DEVICE == "cpu" or torch.cuda.is_available()
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(
        not RUNS, reason="Triton kernels need a GPU, or TRITON_INTERPRET=1 to run in Triton's interpreter"
    ),
]
if RUNS and DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
NOISE = {"seed": 11, "step": 5}
# The noise is made in float32, whose logarithms and cosines differ in the last digit; the interpreter cuts bfloat16 off
# where a GPU rounds it.
TOLERANCE = {F64: 2e-6, F32: 5e-5, F16: 2e-3, BF16: 8e-3}
SMOOTH = {"smoothing": 0.5, "lambda_s": 0.5}  # takes few steps of the inverse root, each of which takes long here
OPTIONS = [
    SMOOTH,
    {"leave_one_out": True, "per": "view", "spectrum": "whitening"},
    {"spectrum": "whitening", "lambda_s": 0.1, "lambda_b": -1.0},
    {"spectrum": "coding_rate", "lambda_s": 0.1, "per": "view"},
    {**SMOOTH, "leave_one_out": True, "lambda_m": 0.3},
    {"lambda_s": 0.0},
    {"lambda_b": 0.0, "per": "view", "spectrum": "whitening"},
    {"lambda_m": 0.0, "spectrum": "whitening"},
]


def gaussian(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(got, expected):
    """RMS of the difference over RMS of what is expected."""
    return ((got.to(F64) - expected).norm() / expected.norm()).item()


def losses_and_gradients(inputs, target, options):
    leaves = [z.detach().requires_grad_() for z in inputs]
    out = msbreg_loss(leaves[0], target, embedding=leaves[1] if len(leaves) > 1 else None, **NOISE, **options)
    return torch.stack(out).detach(), torch.autograd.grad(out.loss, leaves)


def oracle_and_gradients(inputs, target, options):
    leaves = [z.detach().to("cpu", F64).requires_grad_() for z in inputs]
    out = oracle(leaves[0], target.to("cpu", F64), *leaves[1:], **options)
    parts = torch.stack(out).detach()
    computed = [1.0, 1.0, options.get("lambda_s", 1) != 0, options.get("lambda_b", 1) != 0]  # no weight, no value
    return parts * torch.tensor(computed, dtype=F64), torch.autograd.grad(out[0], leaves)


def check_against_oracle(inputs, target, options):
    values, gradients = losses_and_gradients(inputs, target, options)
    expected, expected_gradients = oracle_and_gradients(inputs, target, options)
    tolerance = TOLERANCE[inputs[0].dtype]
    assert values.dtype == (F64 if inputs[0].dtype == F64 else F32)
    assert torch.allclose(values.to("cpu", F64), expected, rtol=min(tolerance, 2e-5), atol=2e-6)
    for z, got, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        assert got.dtype == z.dtype and got.shape == z.shape
        assert relative_error(got.cpu(), wanted) < tolerance


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_losses_and_gradients_equal_the_oracle(options, dtype):
    check_against_oracle([gaussian(3, 9, 5, dtype=dtype)], gaussian(3, 9, 5, seed=2, dtype=dtype), options)


@pytest.mark.parametrize("dtype", [F64, F16])
def test_other_dtypes(dtype):
    options = {"spectrum": "whitening", "lambda_s": 0.1, "leave_one_out": True}
    check_against_oracle([gaussian(2, 5, 7, dtype=dtype)], gaussian(2, 5, 7, seed=2, dtype=dtype), options)


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 7, 5)])
def test_float64_keeps_its_digits(shape):
    """All but the noise, which is float32."""
    options = {"spectrum": "whitening", "lambda_s": 0.1, "lambda_b": 0.0, "leave_one_out": True}
    inputs = [gaussian(*shape)], gaussian(*shape, seed=2)
    (values, (got,)), (expected, (wanted,)) = (
        f(*inputs, options) for f in (losses_and_gradients, oracle_and_gradients)
    )
    assert torch.allclose(values.cpu(), expected, rtol=1e-12) and relative_error(got.cpu(), wanted) < 1e-12


@pytest.mark.parametrize(
    "shape", [(1, 6, 4), (2, 1, 9), (32, 3, 2), (1, 40, 33), (2, 20, 65), (1, 2, 600), (5, 3, 2100), (2, 2, 8192)]
)
def test_odd_shapes(shape):
    views, batch, dim = shape
    target = gaussian(views + 2, batch, dim, seed=2, dtype=F32)
    check_against_oracle([gaussian(*shape, dtype=F32)], target, {"spectrum": "whitening"} if dim > 32 else SMOOTH)


def test_targets_may_be_the_embeddings_themselves():
    z = gaussian(2, 5, 7, dtype=F32).to(DEVICE)
    losses = []
    for target in (z, z.clone()):
        leaf = z.clone().requires_grad_()
        aliased = leaf if target is z else target
        loss = msbreg_loss(leaf, aliased.detach(), **NOISE).loss
        losses.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(map(torch.equal, *losses))


def test_a_separate_embedding_has_the_dispersion():
    inputs = [gaussian(3, 9, 5, dtype=F32), gaussian(3, 9, 7, seed=1, dtype=F32)]
    check_against_oracle(inputs, gaussian(4, 9, 5, seed=2, dtype=F32), SMOOTH)
    alone = {"lambda_s": 0.0, "lambda_b": 0.0}
    check_against_oracle(inputs[:1], gaussian(4, 9, 5, seed=2, dtype=F32), alone)


LAYOUTS = {
    "transposed": lambda z: z.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "batch first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "every second number": lambda z: torch.stack((z, -z), dim=-1)[..., 0],
    "a slice at an offset": lambda z: torch.nn.functional.pad(z, (1, 2, 3, 1, 1, 0))[1:, 3:-1, 1:-2],
    "one row for all": lambda z: z[:, :1].expand(z.shape),
    "a list of views": lambda z: list(z),
    "a minus yet to come": lambda z: torch.complex(torch.zeros_like(z), -z).conj().imag,
}


@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 9, 6), {"spectrum": "whitening", "lambda_s": 0.1}), ((2, 3, 2), {"lambda_s": 0.0, "lambda_b": 0.0})],
    ids=["by view", "by image"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, shape, options):
    """By programs that have rows of one view and by those that have an image's; targets are laid out otherwise."""
    z, t = gaussian(*shape, dtype=F32), gaussian(*shape, seed=2, dtype=F32)
    names = list(LAYOUTS)
    laid, laid_target = LAYOUTS[layout](z), LAYOUTS[names[names.index(layout) - 1]](t)
    plain, plain_target = (torch.stack(x) if isinstance(x, list) else x.contiguous() for x in (laid, laid_target))
    options = {"leave_one_out": True, **options}
    values, (gradient,) = losses_and_gradients([plain], plain_target, options)
    if isinstance(laid, list):
        leaves = [view.clone().requires_grad_() for view in laid]
        out = msbreg_loss(leaves, laid_target, **NOISE, **options)
        got = torch.stack(torch.autograd.grad(out.loss, leaves))
    else:
        leaf = laid.detach().requires_grad_()
        out = msbreg_loss(leaf, laid_target, **NOISE, **options)
        (got,) = torch.autograd.grad(out.loss, leaf)
    # Bit for bit in the interpreter; a compiler may share a row among threads otherwise, and sums in another order.
    rounding = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(torch.stack(out).detach(), values, **rounding)
    torch.testing.assert_close(got, gradient, **rounding)


@pytest.mark.parametrize(
    "noise",
    [
        {"seed": 0.5, "step": 0},
        {"seed": 0, "step": torch.tensor(3.0)},
        {"seed": 0, "step": torch.tensor([3, 4])},
        {"seed": torch.tensor(1, dtype=torch.int32), "step": 0},
        {**NOISE, "first_image": 1.5},
        {**NOISE, "first_image": torch.tensor(3)},
    ],
)
def test_noise_of_no_integer_is_refused(noise):
    z = gaussian(2, 4, 3, dtype=F32)
    with pytest.raises(TypeError, match=r"(seed|step|first_image) to be"):
        msbreg_loss(z, z, **noise)


@pytest.mark.parametrize("loss", [nuclear_norm, singular_value_loss])
def test_more_matrices_than_a_grid_can_number_are_refused(loss):
    with pytest.raises(ValueError, match="at most 32,767 matrices at once, got 32,768"):
        loss(torch.zeros(2**15, 3, 2, device=DEVICE), solver="newton_schulz")
    ops._check_count(torch.empty(2**15 - 1, 3, 2))


FAMILIES = list(families(4, 4))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(24, 8), (6, 12), (1, 8)])
def test_spectrum_families(name, shape):
    z = families(*shape)[name].to(F32)
    for spectrum in ("nuclear", "whitening", "coding_rate"):
        loss = lambda z: singular_value_loss(z, spectrum=spectrum, solver="newton_schulz")  # noqa: B023, E731
        value, got = value_and_gradient(loss, z.to(DEVICE))
        expected, expected_gradient = value_and_gradient(lambda z: oracle_value(z, spectrum), z.to(F64))  # noqa: B023
        assert value.item() == pytest.approx(expected.item(), rel=2e-5, abs=2e-5)
        tolerance = {"near_collapse": 2e-2, "rank_deficient": 5e-3, "collapsed": 5e-3, "duplicates": 1e-3}
        assert gradient_error(z, got.cpu(), expected_gradient) < tolerance.get(name, 5e-4)


def test_kernels_lose_no_more_digits_than_torch_does():
    """At a size where they matter: the same iteration in plain torch, in float32, against float64."""
    z = families(96, 48)["power_law"].to(DEVICE, F32)
    _, expected = value_and_gradient(lambda z: oracle_value(z, "nuclear"), z.to("cpu", F64))
    _, got = value_and_gradient(lambda z: singular_value_loss(z, solver="newton_schulz"), z)
    _, plain = value_and_gradient(lambda z: singular_value_loss(z, solver="eigh"), z)
    errors = [gradient_error(z.cpu(), gradient.cpu(), expected) for gradient in (got, plain)]
    assert errors[0] < 3 * errors[1] + 1e-5


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 3, 2), {"smoothing": 1.0}),
        ((2, 2, 2), {"spectrum": "whitening", "per": "view", "leave_one_out": True}),
    ],
)
def test_gradcheck(shape, options):
    z, t = gaussian(*shape).requires_grad_(), gaussian(*shape, seed=1)
    loss = lambda z: msbreg_loss(z, t, lambda_s=0.7, **NOISE, **options).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, (z,))
    each = lambda z: centroid_loss(z, t, leave_one_out=shape[0] > 1, reduction="none")  # noqa: E731
    assert torch.autograd.gradcheck(each, (z,))


@pytest.mark.parametrize("shape", [(2, 3, 2), (2, 2, 3)])
def test_gradients_are_multiplied_by_those_that_come_in(shape):
    z, t = gaussian(*shape, dtype=F32).requires_grad_(), gaussian(*shape, seed=1, dtype=F32)
    loss = msbreg_loss(z, t, spectrum="whitening", lambda_s=0.1, **NOISE).loss
    once, thrice = (torch.autograd.grad(factor * loss, z, retain_graph=True)[0] for factor in (1, 3))
    assert torch.allclose(thrice, 3 * once, rtol=1e-5, atol=1e-7)


def test_each_rows_gradient_is_its_own_beside_that_of_the_sum():
    """However the incoming gradient lies in memory; `expand` makes one number of it, as a sum does."""
    z, t, seed = gaussian(2, 4, 3, dtype=F32).requires_grad_(), gaussian(2, 4, 3, dtype=F32, seed=1), torch.tensor(3)
    options = {"first_image": 0, "leave_one_out": True, "per_view": False, "smoothing": 0.0, "group": None}
    options |= {"weights": (0.5, 0.1, 1.0), "spectrum": "whitening", "each": True}
    total, _, each = ops.losses(z, t, seed.to(DEVICE), seed.to(DEVICE), **options)
    alone = centroid_loss(z, t, leave_one_out=True, reduction="none")
    for weights in (gaussian(4, 2, dtype=F32).T, torch.full((), 0.3, device=DEVICE).expand(2, 4)):
        calls = ((total, None), (alone, weights.contiguous()), ((total, each), (None, weights)))
        by_sum, by_row, both = (torch.autograd.grad(a, z, b, retain_graph=True)[0] for a, b in calls)
        assert torch.allclose(by_sum + by_row, both, rtol=1e-5, atol=1e-7)


def test_parts_are_what_their_functions_give():
    z, t = gaussian(3, 7, 5, dtype=F32), gaussian(3, 7, 5, seed=1, dtype=F32)
    whole = msbreg_loss(z, t, spectrum="whitening", **NOISE)
    # A compiler makes other programs of the same kernel where there is less to compute, and sums in another order.
    exactly = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(whole.centroid, centroid_loss(z, t), **exactly)
    torch.testing.assert_close(whole.singular_value, singular_value_loss(z, spectrum="whitening"), **exactly)
    torch.testing.assert_close(whole.brownian, brownian_loss(z, **NOISE), **exactly)
    assert whole.loss.item() == pytest.approx(
        (whole.centroid + 0.004 * whole.singular_value + 0.5 * whole.brownian).item(), rel=1e-6
    )
    each = centroid_loss(z, t, reduction="none")
    assert each.shape == (3, 7) and each.mean().item() == pytest.approx(whole.centroid.item(), rel=1e-6)
    assert not whole.centroid.requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_rows_alone(bad):
    z, t = gaussian(2, 6, 4, dtype=F32), gaussian(2, 6, 4, seed=1, dtype=F32)
    z[1, 2, 3] = bad
    leaf = z.requires_grad_()
    losses = centroid_loss(leaf, t, reduction="none")
    (got,) = torch.autograd.grad(losses.sum(), leaf)
    assert losses.isnan().nonzero().tolist() == [[1, 2]]
    assert got.isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert centroid_loss(z, t).isnan() and centroid_loss(z, t, leave_one_out=True).isnan()
    assert singular_value_loss(z, smoothing=1.0).isnan() and msbreg_loss(z, t, smoothing=1.0, **NOISE).loss.isnan()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_zero_rows_have_no_gradient_and_huge_ones_no_overflow(dtype):
    t = gaussian(2, 6, 4, seed=1, dtype=dtype)
    z = gaussian(2, 6, 4, dtype=dtype)
    z[0, 1] = 0
    values, (got,) = losses_and_gradients([z], t, SMOOTH)
    assert values.isfinite().all() and got.isfinite().all() and got[0, 1].count_nonzero() == 0
    largest = max(z.abs().max().item(), t.abs().max().item())
    for times in (1e30 if dtype == F32 else 1e200, 0.99 * torch.finfo(dtype).max / largest):  # |z| overflows itself
        huge, (got,) = losses_and_gradients([times * z], t * times, SMOOTH)
        assert torch.allclose(huge, values, rtol=1e-5) and got.isfinite().all()


@pytest.mark.parametrize("size", [1e-13, 1e-18, 1e-20])
def test_rows_too_short_to_have_a_direction_count_as_zero(size):
    z = gaussian(1, 24, 8, dtype=F32)
    for smoothing in (0.0, 0.03):
        zero, short = (losses_and_gradients([times * z], z, {"smoothing": smoothing}) for times in (0.0, size))
        assert torch.equal(short[0], zero[0]) and zero[0].isfinite().all()
        assert not short[1][0].any()


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 0.0])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_views_that_agree_lose_no_more_than_the_last_digits_of_one(apart, leave_one_out):
    """The sum |ẑ|² + |ĉ|² - 2 <ẑ, ĉ> cancels where ẑ is close to ĉ, to what float32 has of 1; never below zero."""
    image = gaussian(1, 9, 33)
    z, t = ((image + apart * gaussian(4, 9, 33, seed=seed)).to(F32) for seed in (1, 2))
    options = {"lambda_s": 0.0, "lambda_b": 0.0, "leave_one_out": leave_one_out}
    values, (got,) = losses_and_gradients([z], t, options)
    expected, (wanted,) = oracle_and_gradients([z], t, options)
    assert values[1] >= 0 and abs(values[1].item() - expected[1].item()) < 4e-7
    # A row's gradient is 2 / (K B |z|) times the tangential part of ẑ - ĉ, of unit rows that each are rounded.
    error = (got.cpu() - wanted) * z.cpu().norm(dim=-1, keepdim=True) * 36 / 2
    assert error.norm(dim=-1).max() < 1.5e-7
    assert (error * z.cpu()).sum(-1).abs().max() / z.norm(dim=-1).min().item() < 4e-8
    each = centroid_loss(z, t, leave_one_out=leave_one_out, reduction="none")
    exact = centroid_loss(z.cpu().to(F64), t.cpu().to(F64), leave_one_out=leave_one_out, reduction="none")
    assert torch.allclose(each.cpu().to(F64), exact, rtol=1e-3, atol=1e-11)


def test_noise_does_not_depend_on_how_images_are_split():
    z = gaussian(2, 4, 6, dtype=F32).requires_grad_()
    for per in ("image", "view"):
        whole = brownian_loss(z, per=per, **NOISE)
        mean = sum(brownian_loss(z[:, i : i + 2], per=per, first_image=i, **NOISE) for i in (0, 2)) / 2
        assert whole.item() == pytest.approx(mean.item(), rel=1e-6)
        assert torch.allclose(*(torch.autograd.grad(value, z)[0] for value in (whole, mean)), atol=1e-8)
        assert whole.item() != brownian_loss(z, per=per, seed=11, step=6).item()


def test_results_are_the_same_bit_for_bit_at_every_run():
    z, t = gaussian(3, 9, 5, dtype=F32), gaussian(3, 9, 5, seed=1, dtype=F32)
    first, second = (losses_and_gradients([z], t, {"per": "view", **SMOOTH}) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][0], second[1][0])


@pytest.mark.parametrize(
    ("shape", "options"),
    [((3, 20, 18), SMOOTH), ((3, 4, 3), {"leave_one_out": True, "per": "view", "spectrum": "whitening"})],
)
def test_blocks_change_nothing_but_rounding(shape, options, monkeypatch):
    z, t = gaussian(*shape, dtype=F32), gaussian(*shape, seed=1, dtype=F32)
    values, (got,) = losses_and_gradients([z], t, options)
    common = {"num_warps": 1, "enable_fp_fusion": True}
    for module in (rows, gradient):
        monkeypatch.setattr(
            module, "launch_config", lambda *sizes, **_: {"BLOCK_K": 2, "BLOCK_D": 32, "STAGES": 2} | common
        )
    square = {"BLOCK_P": 16, "BLOCK_Q": 16} | common
    monkeypatch.setattr(gram, "in_parts", lambda length: True)
    monkeypatch.setattr(gram, "unit_launch_config", lambda *sizes: square)
    monkeypatch.setattr(inverse_root, "launch_config", lambda *sizes: square | {"IN_PARTS": True})
    monkeypatch.setattr(
        product, "unit_launch_config", lambda *sizes: {"BLOCK_I": 16, "BLOCK_D": 16, "BLOCK_Q": 16} | common
    )
    other, (other_gradient,) = losses_and_gradients([z], t, options)
    assert torch.allclose(values, other, rtol=3e-6, atol=1e-7)  # terms of the spectral loss cancel
    assert torch.allclose(got, other_gradient, rtol=1e-4, atol=1e-7)


def poisoned(make):
    def made(*args, **options):
        tensor = make(*args, **options)
        return tensor.fill_(math.nan if tensor.is_floating_point() else -(2**62))

    return made


def test_every_output_is_written(monkeypatch):
    """Memory that torch.empty hands out holds NaN here, and the losses come out as always."""
    z, t = gaussian(3, 9, 5, dtype=F32), gaussian(3, 9, 5, seed=1, dtype=F32)
    wide = z[:, :3], t[:, :3]  # more dimensions than rows: the product from the other side
    cases = [*((z, t, options) for options in OPTIONS[:3]), (*wide, OPTIONS[1]), (*wide, OPTIONS[4])]
    expected = [losses_and_gradients([z], t, options) for z, t, options in cases]
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    assert torch.empty(2).isnan().all()
    for (z, t, options), (values, (wanted,)) in zip(cases, expected, strict=True):
        got_values, (got,) = losses_and_gradients([z], t, options)
        assert torch.equal(got_values, values) and torch.equal(got, wanted)


def test_modules_keep_their_step_and_may_advance_it_before_the_backward_pass():
    z, t = gaussian(2, 6, 4, dtype=F32).requires_grad_(), gaussian(2, 6, 4, seed=1, dtype=F32)
    criterion = MSBRegLoss(seed=3, spectrum="whitening").to(DEVICE)
    out = criterion(z, t)
    assert criterion.step.item() == 1
    (got,) = torch.autograd.grad(out.loss, z)
    (expected,) = torch.autograd.grad(msbreg_loss(z, t, spectrum="whitening", seed=3, step=0).loss, z)
    assert torch.equal(got, expected)


def test_checkpoints_recompute_the_same():
    """Which lets saved tensors be asked for once."""
    z, t = gaussian(2, 6, 4, dtype=F32).requires_grad_(), gaussian(2, 6, 4, seed=1, dtype=F32)
    for loss in (
        lambda z: MSBRegLoss(spectrum="whitening").to(DEVICE)(z, t, step=3).loss,
        lambda z: centroid_loss(z, t),
        lambda z: singular_value_loss(z, spectrum="whitening"),
        lambda z: brownian_loss(z, **NOISE),
        lambda z: coding_rate(z).sum(),
    ):
        (expected,) = torch.autograd.grad(loss(z), z)
        (got,) = torch.autograd.grad(checkpoint(loss, z, use_reentrant=False), z)
        assert torch.equal(got, expected)


def test_inputs_are_left_alone_and_no_grad_is_heeded():
    z, t = gaussian(2, 6, 4, dtype=F32).requires_grad_(), gaussian(2, 6, 4, seed=1, dtype=F32).requires_grad_()
    before = z.detach().clone(), t.detach().clone()
    loss = msbreg_loss(z, t, spectrum="whitening", **NOISE).loss
    loss.backward()
    assert torch.equal(z, before[0]) and torch.equal(t, before[1]) and t.grad is None
    once = z.grad.clone()
    msbreg_loss(z, t, spectrum="whitening", **NOISE).loss.backward()
    assert torch.equal(z.grad, 2 * once)  # accumulated
    with torch.no_grad():
        assert not msbreg_loss(z, t, spectrum="whitening", **NOISE).loss.requires_grad


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_changes_nothing(dtype):
    z, t = gaussian(2, 9, 5, dtype=F32), gaussian(2, 9, 5, seed=1, dtype=F32)
    for options in (SMOOTH, {"spectrum": "coding_rate"}):
        expected = losses_and_gradients([z], t, options)
        with torch.autocast(DEVICE, dtype):
            got = losses_and_gradients([z], t, options)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1][0], expected[1][0])


def test_operators_keep_torchs_rules():
    z, t = gaussian(2, 6, 4, dtype=F32).requires_grad_(), gaussian(3, 6, 4, seed=1, dtype=F32)
    wide = gaussian(5, 4, 2, dtype=F16).permute(2, 1, 0).requires_grad_()
    seed, step = torch.tensor(1, device=DEVICE), torch.tensor(2, device=DEVICE)
    for args in (
        (z, t, seed, step, 3, False, True, True, [1.0, 0.1, 0.5], "whitening", 0.03, None),
        (wide, None, None, None, 0, False, False, False, [0.0, 1.0, 0.0], "nuclear", 1.0, None),
    ):
        torch.library.opcheck(torch.ops.msbreg.losses.default, args)
        total, _, _, *saved = torch.ops.msbreg.losses(*args)
        torch.library.opcheck(
            torch.ops.msbreg.losses_backward.default,
            (torch.ones_like(total), None, args[0].detach(), None, *(x.detach() for x in saved), *args[4:7], *args[8:]),
        )


@pytest.mark.parametrize("spectrum", ["nuclear", "coding_rate"])
def test_fake_tensors_launch_nothing(spectrum):
    """As where memory is estimated before there is any."""
    with FakeTensorMode(), torch.device(DEVICE):
        z, criterion = torch.empty(2, 6, 4, requires_grad=True), MSBRegLoss(spectrum=spectrum)
        (criterion(z, torch.empty(2, 6, 4)).loss + MMCRLoss()(z) + CodingRateLoss()(z)).backward()
    assert z.grad.shape == z.shape and z.grad.device.type == DEVICE


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    z, t = gaussian(2, 6, 4, dtype=F32).requires_grad_(), gaussian(2, 6, 4, seed=1, dtype=F32)
    integers = torch.tensor(11, device=DEVICE), torch.tensor(5, device=DEVICE)

    def loss(z, t, seed, step):
        return msbreg_loss(2 * z, t, seed=seed, step=step, spectrum="whitening").loss

    compiled = torch.compile(loss, fullgraph=True, backend=backend)(z, t, *integers)
    eager = loss(z, t, *integers)
    assert torch.allclose(compiled, eager)
    assert torch.allclose(*(torch.autograd.grad(value, z)[0] for value in (compiled, eager)))


needs_graphs = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")


def recorded(call):
    """A CUDA graph of a call and of its gradient, and what the call returned."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call().backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = call()
        value.backward()
    return graph, value


@needs_graphs
@pytest.mark.parametrize("spectrum", ["nuclear", "whitening", "coding_rate"])
def test_a_cuda_graph_draws_new_noise_at_every_replay(spectrum):
    z, t = gaussian(4, 64, 32, dtype=F32).requires_grad_(), gaussian(4, 64, 32, seed=1, dtype=F32)
    criterion = MSBRegLoss(seed=3, spectrum=spectrum).to(DEVICE)
    z.grad = torch.zeros_like(z)
    graph, value = recorded(lambda: criterion(z, t).loss)
    for step in (7, 8):
        criterion.step.fill_(step)
        z.grad.zero_()
        graph.replay()
        leaf = z.detach().requires_grad_()
        expected = msbreg_loss(leaf, t, seed=3, step=step, spectrum=spectrum)
        assert torch.equal(value.detach(), expected.loss.detach())
        assert torch.equal(z.grad, torch.autograd.grad(expected.loss, leaf)[0])
        assert criterion.step.item() == step + 1


@needs_graphs
@pytest.mark.parametrize(
    "loss",
    [MMCRLoss(), SVMaxLoss(), CodingRateLoss(), lambda z: covariance_energy(z).sum()],
    ids=["mmcr", "svmax", "coding rate", "covariance"],
)
@pytest.mark.parametrize("shape", [(2, 64, 32), (2, 32, 64)])
def test_the_spectral_family_records_in_cuda_graphs(loss, shape):
    z = gaussian(*shape, dtype=F32).requires_grad_()
    z.grad = torch.zeros_like(z)
    graph, value = recorded(lambda: loss(z))
    with torch.no_grad():
        z.copy_(gaussian(*shape, seed=1, dtype=F32))
    z.grad.zero_()
    graph.replay()
    leaf = z.detach().requires_grad_()
    expected = loss(leaf)
    assert torch.equal(value.detach(), expected.detach())
    assert torch.equal(z.grad, torch.autograd.grad(expected, leaf)[0])


@triton.jit
def store_offsets(output_pointer, stride, WIDE: tl.constexpr):
    """Writes the offsets of four rows, `stride` apart, to output [4], int64."""
    r = tl.arange(0, 4)
    place = tiles.offsets(r, stride, tl.zeros([1], tl.int32), 1) if WIDE else r[:, None] * stride
    tl.store(output_pointer + r[:, None], place.to(tl.int64))


def test_offsets_do_not_overflow():
    expected = [0, 2**30, 2**31, 3 * 2**30]
    for wide in (True, False):
        output = torch.zeros(4, dtype=torch.int64, device=DEVICE)
        store_offsets[(1,)](output, 2**30, WIDE=wide, num_warps=1, enable_fp_fusion=True)
        assert (output.tolist() == expected) == wide  # the twin in int32 overflows


@pytest.mark.timeout(100)  # the plan of the steps, traced with symbols, would not come to an end
def test_the_nuclear_norm_compiles_for_all_batches_in_one_graph():
    torch._dynamo.reset()
    norm = lambda z: nuclear_norm(z, smoothing=0.5)  # noqa: E731
    compiled = torch.compile(norm, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (5, 7):
        z = gaussian(1, batch, 4, dtype=F32).requires_grad_()
        values = compiled(z), norm(z)
        gradients = (torch.autograd.grad(value.sum(), z)[0] for value in values)
        assert torch.allclose(*values) and torch.allclose(*gradients)


@pytest.mark.parametrize("options", [{"leave_one_out": True, "spectrum": "whitening"}, {"lambda_s": 0.0}])
def test_second_derivatives_are_refused_and_targets_may_be_of_inference_mode(options):
    x, weight = gaussian(2, 4, 3).requires_grad_(), gaussian(3, 3, seed=1).requires_grad_()
    with torch.inference_mode():
        t = gaussian(2, 4, 3, seed=2)
    loss = msbreg_loss(x @ weight, t, **NOISE, **options).loss
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    assert gradient.norm() > 0
    for ask in (lambda penalty: torch.autograd.grad(penalty, weight, retain_graph=True), torch.Tensor.backward):
        with pytest.raises(RuntimeError, match="got a second one"):
            ask(gradient.square().sum())


def test_too_wide_rows_go_the_plain_way(monkeypatch):
    z, t = gaussian(2, 4, 12, dtype=F32), gaussian(2, 4, 12, seed=1, dtype=F32)
    expected = losses_and_gradients([z], t, {"spectrum": "whitening"})
    monkeypatch.setattr(kernels, "MAX_DIM", 8)
    monkeypatch.setattr(ops, "losses", None)
    got = losses_and_gradients([z], t, {"spectrum": "whitening"})
    assert torch.allclose(got[0], expected[0], rtol=1e-5) and torch.allclose(got[1][0], expected[1][0], atol=1e-6)


@triton.jit
def careless_unit(x):
    """Twin of `unit` without its guard against short rows."""
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    return x / norm[:, None], norm, norm / norm


@triton.jit
def careless_load(pointer, rows, row_count, row_stride, columns, column_count, column_stride, ACC: tl.constexpr):
    """Twin of `load_tile` that does not mask columns."""
    mask = (rows < row_count)[:, None] & (columns >= 0)[None, :]
    return tl.load(pointer + tiles.offsets(rows, row_stride, columns, column_stride), mask=mask, other=0.0).to(ACC)


@triton.jit
def careless_gradient(z_hat, norm, c_hat, n_hat, w_hat, attraction, push):
    """Twin of `row_gradient` that leaves the radial part."""
    g = attraction[:, None] * (z_hat - c_hat)
    if n_hat is not None:
        g += push * n_hat
    if w_hat is not None:
        g += w_hat
    return g / norm[:, None]


@triton.jit
def careless_centroid(total, t):
    """Twin of `centroid_of_others` that leaves the view itself in."""
    c_hat, _, length = tiles.unit(tl.zeros_like(t) + total[None, :])
    return c_hat, length


@triton.jit
def careless_noise(seed, step, images, streams, dim, BLOCK_D: tl.constexpr):
    """Twin of `brownian_rows` with the same row for each image."""
    return rows_noise(seed, step, images * 0, streams, dim, BLOCK_D)


rows_noise = rows.brownian_rows


@triton.jit
def careless_affine(x, rows, columns, side, identity, scale):
    """Twin of `affine` without the identity."""
    return scale * x


@triton.jit
def careless_strides(pointer, rows, row_count, row_stride, columns, column_count, column_stride, ACC: tl.constexpr):
    """Twin of `load_tile` that takes the numbers of a row to lie side by side."""
    mask = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(pointer + tiles.offsets(rows, row_stride, columns, 1), mask=mask, other=0.0).to(ACC)


@triton.jit
def careless_store(pointer, low, x, mask):
    """Twin of `store_split` that stores nothing."""


TWINS = {
    "zero rows": (careless_unit, "unit", [rows], test_zero_rows_have_no_gradient_and_huge_ones_no_overflow, (F32,)),
    "masks": (careless_load, "load_tile", [rows], test_losses_and_gradients_equal_the_oracle, (SMOOTH, F32)),
    "projection": (
        careless_gradient, "row_gradient", [gradient], test_losses_and_gradients_equal_the_oracle, (SMOOTH, F32),
    ),
    "leave one out": (
        careless_centroid, "centroid_of_others", [rows, gradient], test_losses_and_gradients_equal_the_oracle,
        ({"leave_one_out": True, "lambda_s": 0.0}, F32),
    ),
    "images' noise": (
        careless_noise, "brownian_rows", [rows, gradient], test_losses_and_gradients_equal_the_oracle, (SMOOTH, F32),
    ),
    "inverse root": (
        careless_affine, "affine", [newton_schulz], test_losses_and_gradients_equal_the_oracle,
        (SMOOTH, F32),
    ),
    "strides": (
        careless_strides, "load_tile", [rows, gradient], test_layouts,
        ("every second number", (2, 3, 2), {"lambda_s": 0.0, "lambda_b": 0.0}),
    ),
    "derivative": (
        careless_gradient, "row_gradient", [gradient], test_gradcheck, ((1, 2, 2), {"spectrum": "whitening"}),
    ),
}  # fmt: skip


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled kernels do not see a twin put in a function's place")
@pytest.mark.parametrize("name", TWINS)
def test_checks_catch_broken_twins(name, monkeypatch):
    twin, place, modules, check, arguments = TWINS[name]
    check(*arguments)
    for module in modules:
        monkeypatch.setattr(module, place, twin)
    with pytest.raises((AssertionError, GradcheckError)):
        check(*arguments)


@pytest.mark.skipif(DEVICE != "cpu", reason="compiled kernels do not see a twin put in a function's place")
def test_the_check_of_outputs_catches_one_that_is_not_written(monkeypatch):
    monkeypatch.setattr(newton_schulz, "store_split", careless_store)
    with pytest.raises(AssertionError):
        test_every_output_is_written(monkeypatch)


PROCESSES = """
import os, sys
import torch, torch.distributed as dist, torch.multiprocessing as mp
from msbreg import MSBRegLoss

def inputs():
    draw = lambda seed: torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draw(0), draw(1)

def loss_and_gradient(z, t, group, spectrum):
    criterion = MSBRegLoss(lambda_s=0.3, spectrum=spectrum, smoothing=1.0, group=group)
    z = z.clone().requires_grad_()
    out = criterion(z, t)
    out.loss.backward()
    return torch.stack(out).detach(), z.grad

def work(rank, path):
    dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=2)
    for spectrum in ("nuclear", "whitening"):
        z, t = (x.chunk(2, dim=1)[rank] for x in inputs())
        values, gradient = loss_and_gradient(z, t, dist.group.WORLD, spectrum)
        gathered = [torch.zeros_like(gradient) for _ in range(2)]
        dist.all_gather(gathered, gradient)
        dist.all_reduce(values)
        if rank == 0:
            torch.save((values / 2, torch.cat(gathered, dim=1) / 2), path + spectrum)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
    for spectrum in ("nuclear", "whitening"):
        got = torch.load(sys.argv[1] + spectrum)
        expected = loss_and_gradient(*inputs(), None, spectrum)
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    print("equal")
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="two processes need two GPUs; in the interpreter they share a CPU")
def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, script, tmp_path / "store"], env=os.environ, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr


@pytest.mark.parametrize("spectrum", ["nuclear", "whitening", "coding_rate"])
def test_the_larger_gram_matrix_which_processes_sum_has_the_same_loss(spectrum):
    z = torch.nn.functional.normalize(gaussian(1, 4, 7), dim=-1)
    values = []
    for smaller in (True, False):
        g = gram.gram(z, smaller=smaller)
        loss = ops.Spectral(spectrum, 0.5, 1, 4, 7, g.shape[-1], 1)
        squares = totals.spectral_sums(g, identity=0.0, scale=1.0)
        values.append(loss.sums(g, squares)[0].sum().item() + loss.constant)
    assert values[0] == pytest.approx(values[1], rel=1e-9)


@pytest.mark.parametrize("spectrum", ["nuclear", "whitening", "coding_rate"])
def test_weights_that_halves_could_not_hold_are_scaled(spectrum, monkeypatch):
    """Those of more rows, or fewer for their dimensions, than a test can have; their gradient is as always."""
    for count, dim in ((10**7, 64), (1, 16384)):
        spectral = ops.Spectral(spectrum, 0.03, 1, count, dim, dim, 1)
        most = {"nuclear": 1.0, "whitening": count, "coding_rate": dim / (0.2 * count)}[spectrum]
        assert spectral.scale * most <= halves.LARGEST and spectral.scale <= 1
    inputs = [gaussian(2, 9, 5, dtype=F32)], gaussian(2, 9, 5, seed=2, dtype=F32), {**SMOOTH, "spectrum": spectrum}
    _, (expected,) = losses_and_gradients(*inputs)
    monkeypatch.setattr(ops, "LARGEST", 2.0)
    assert (ops.Spectral(spectrum, 0.5, 2, 9, 5, 5, 1).scale == 1) == (spectrum == "nuclear")
    _, (got,) = losses_and_gradients(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_every_kernel_says_what_its_pointers_are():
    for module in (rows, gradient, halves, product, gram, inverse_root, totals):
        kernels_here = [value for name, value in vars(module).items() if name.endswith("_kernel")]
        assert kernels_here
        for kernel in kernels_here:
            pointers = [name for name in inspect.signature(kernel.fn).parameters if name.endswith("_pointer")]
            assert all(name in kernel.fn.__doc__ for name in pointers), kernel.fn.__name__


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 12)])
def test_nuclear_norm_and_coding_rate(shape):
    m = gaussian(*shape, dtype=F32).requires_grad_()
    exact = m.detach().to("cpu", F64).requires_grad_()
    s = torch.linalg.svdvals(exact)
    for got, expected in (
        (nuclear_norm(m, smoothing=0.3, solver="newton_schulz"), torch.sqrt(s**2 + 0.3**2).sum(-1)),
        (coding_rate(m), 0.5 * torch.log(1 + shape[2] / (0.2 * shape[1]) * s**2).sum(-1)),
    ):
        assert torch.allclose(got.detach().to("cpu", F64), expected.detach(), rtol=1e-5)
        (gradient,) = torch.autograd.grad(got.sum(), m)
        (wanted,) = torch.autograd.grad(expected.sum(), exact, retain_graph=True)
        assert relative_error(gradient.cpu(), wanted) < 1e-4


@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 12)])
def test_energies(shape):
    """VICReg's and Barlow Twins' on the smaller side, against their definitions."""
    m = gaussian(*shape, dtype=F32).requires_grad_()
    exact = m.detach().to("cpu", F64).requires_grad_()
    for got, expected in (
        (covariance_energy(m).sum(), sum(covariance(x) for x in exact)),
        (sum(cross_correlation_energy(*m)), barlow(*exact).sum()),
    ):
        assert got.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(got, m)
        (wanted,) = torch.autograd.grad(expected, exact)
        assert relative_error(gradient.cpu(), wanted) < 1e-5


@pytest.mark.parametrize(("rows", "dim"), [(12, 5), (5, 12), (24, 64)])
def test_nuclear_norm_without_smoothing_takes_no_heed_of_what_is_zero(rows, dim):
    m = gaussian(2, rows, 2, dtype=F32) @ gaussian(2, 2, dim, seed=1, dtype=F32)
    m[1] = 0
    norms = nuclear_norm(m.requires_grad_(), solver="newton_schulz")
    (gradient,) = torch.autograd.grad(norms.sum(), m)
    u, s, vt = torch.linalg.svd(m[0].detach().to("cpu", F64), full_matrices=False)
    assert norms[0].item() == pytest.approx(s.sum().item(), rel=1e-3) and norms[1] == 0
    assert relative_error(gradient[0].cpu(), u[:, :2] @ vt[:2]) < 2e-3 and not gradient[1].any()


@pytest.mark.parametrize("size", [1e-21, 1e-18, 1e17])
def test_nuclear_norm_of_matrices_whose_scale_no_float32_holds(size):
    m = gaussian(1, 32, 16, dtype=F32)
    (norm,) = nuclear_norm(size * m, solver="newton_schulz")
    assert norm.item() == pytest.approx(size * torch.linalg.matrix_norm(m, "nuc").item(), rel=1e-3)


def test_of_less_than_full_rank_the_root_is_taken_on_the_side_where_it_is_exact():
    """Of fewer rows than dimensions; multiplied on the other side it is wrong by 1e-3."""
    z = gaussian(1, 24, 2, dtype=F32) @ gaussian(1, 2, 64, seed=1, dtype=F32)
    _, (gradient,) = losses_and_gradients([z], z, {"lambda_m": 0, "lambda_s": 1, "lambda_b": 0})
    _, (expected,) = losses_and_gradients([z.double()], z.double(), {"lambda_m": 0, "lambda_s": 1, "lambda_b": 0})
    assert relative_error(gradient.cpu(), expected.cpu()) < 4e-4


@pytest.mark.parametrize(
    "shape",
    [(2, 40, 70), (1, 75, 70), (1, 64, 128), (1, 128, 64), (1, 128, 70), (1, 70, 128), (1, 64, 70), (2, 32, 64)],
)
def test_matrices_of_several_tiles(shape):
    """Gram matrices of both sides, and products from both sides, of rows whose numbers do not lie side by side."""
    z = gaussian(*reversed(shape), dtype=F32).permute(2, 1, 0)
    exact, dim = z.to("cpu", F64), shape[2]
    unit = torch.nn.functional.normalize(exact, dim=-1)
    numbers = rows.row_losses(z, want_z_hat=True).z_hat
    for smaller in (True, False):
        g = gram.gram(z, smaller=smaller)
        expected = linalg.gram(exact, smaller=smaller)
        assert torch.allclose(g.to("cpu", F64), expected, atol=1e-4)
        assert torch.allclose(product.product(z, g).to("cpu", F64), linalg.multiply(exact, expected), atol=1e-2)
        g, squares = gram.unit_gram(numbers, dim, smaller=smaller)
        made = product.unit_product(numbers, halves.split(g, 0.5), dim, left=g.shape[-1] != dim)
        expected = linalg.gram(unit, smaller=smaller)
        assert torch.allclose(g.to("cpu", F64), expected, atol=1e-6)
        assert torch.allclose(squares.sum(1).cpu(), expected.square().sum((1, 2)), rtol=1e-6)
        assert torch.allclose(made.to("cpu", F64), linalg.multiply(unit, expected) / 2, atol=1e-5)


@pytest.mark.parametrize("count", [1, 1024, 2500])
def test_sums_over_more_numbers_than_a_block_are_of_all(count):
    images, spectral = gaussian(2, count), gaussian(count, seed=1)
    options = {"views": 2, "weights": (1.0, 2.0, 3.0), "spectral_constant": 0.5, "dtype": F64, "device": images.device}
    total, parts = totals.totals(images, spectral, **options)
    expected = torch.stack((images[0].mean() / 2, spectral.sum() / 2 + 0.5, images[1].mean() / 2))
    assert torch.allclose(parts, expected, rtol=1e-12, atol=1e-12)
    assert total.item() == pytest.approx((expected[0] + 2 * expected[1] + 3 * expected[2]).item(), rel=1e-12)


@pytest.mark.skipif(DEVICE != "cpu", reason="only Triton's interpreter has its launches watched")
def test_every_launch_is_made_on_the_device_of_its_tensors(monkeypatch):
    """Which Triton does not see to: it launches on torch's current device, wherever the tensors are."""
    from triton.runtime.interpreter import GridExecutor

    chosen, launched = [], set()
    launch = GridExecutor.__call__

    @contextlib.contextmanager
    def device_of(tensor):
        chosen.append(tensor)
        yield
        chosen.pop()

    def launching(self, *args, **options):
        assert chosen and chosen[-1].device.type == DEVICE, self.fn.__name__
        launched.add(self.fn.__name__.removesuffix("_kernel"))
        return launch(self, *args, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", launching)
    for shape in ((1, 3, 2), (1, 2, 3)):
        losses_and_gradients([gaussian(*shape, dtype=F32)], gaussian(*shape, seed=1, dtype=F32), {"smoothing": 3.0})
    brownian_directions(2, 3, **NOISE, device=DEVICE)
    coding_rate(gaussian(3, 2, dtype=F32).requires_grad_()).backward()
    singular_value_loss(gaussian(3, 2, dtype=F32), spectrum="whitening")
    expected = {"brownian_directions", "first_factors", "gram", "image_gradient", "product", "rows_forward"}
    expected |= {"spectral_sums", "last_step", "step", "split", "totals", "unit_gram", "unit_product"}
    assert launched == expected


def test_matrix_operators_keep_torchs_rules():
    matrix = gaussian(2, 6, 4, dtype=F32)
    for operator, args in (
        (torch.ops.msbreg.gram, (matrix, True)),
        (torch.ops.msbreg.gram, (matrix.mT, True)),
        (torch.ops.msbreg.multiply, (matrix, gaussian(2, 4, 4, dtype=F32))),
        (torch.ops.msbreg.newton_schulz, (torch.eye(4, device=DEVICE).repeat(2, 1, 1), 3.0, 4.0)),
        (torch.ops.msbreg.newton_schulz, (torch.eye(4, device=DEVICE).repeat(2, 1, 1), 3.0, None)),
    ):
        torch.library.opcheck(operator.default, args)
