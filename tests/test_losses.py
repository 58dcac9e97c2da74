import copy
import doctest
import inspect
import math
import operator
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import msbreg
from msbreg import (
    BrownianLoss,
    CentroidLoss,
    CodingRateLoss,
    MMCRLoss,
    MSBRegLoss,
    SingularValueLoss,
    SVMaxLoss,
    functional,
    losses,
    plain,
    reference,
)
from msbreg.functional import brownian_loss, centroid_loss, msbreg_loss, singular_value_loss
from msbreg.noise import plain_directions
from msbreg.spectral import covariance_energy, cross_correlation_energy

F64, F32 = torch.float64, torch.float32
NOISE = {"seed": 11, "step": 5}


def gaussian(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit(z):
    return normalize(z, dim=-1)


def oracle(online, target, embedding=None, *, lambda_m=1.0, lambda_s=0.004, lambda_b=0.5, leave_one_out=False,
           spectrum="nuclear", smoothing=0.03, per="image"):  # fmt: skip
    """The three losses by their definitions: eager torch, autograd through a singular value decomposition."""
    y = online if embedding is None else embedding
    views, n, d = y.shape
    r = min(n, d)
    t = unit(target)
    if leave_one_out:
        c = torch.stack([unit(t[[j for j in range(len(t)) if j != k]].mean(0)) for k in range(len(online))])
    else:
        c = unit(t.mean(0)).expand_as(online)
    centroid = (2 - 2 * (unit(online) * c).sum(-1)).mean()
    s = torch.linalg.svdvals(unit(y)) * math.sqrt(r / n)
    f = {
        "nuclear": (torch.sqrt(s**2 + smoothing**2) - 1) ** 2,
        "whitening": (s**2 - 1) ** 2,
        "coding_rate": -0.5 * torch.log(1 + d / (r * 0.2) * s**2),
    }[spectrum]
    singular = f.sum(-1).mean()
    directions = plain_directions(n, d, **NOISE, dtype=y.dtype, views=views if per == "view" else None)
    brownian = (unit(y) * directions).sum(-1).mean()
    return lambda_m * centroid + lambda_s * singular + lambda_b * brownian, centroid, singular, brownian


OPTIONS = [
    {},
    {"leave_one_out": True},
    {"per": "view"},
    {"spectrum": "whitening", "lambda_s": 0.1, "lambda_b": -1.0},
    {"spectrum": "coding_rate", "lambda_s": 0.1, "leave_one_out": True, "per": "view"},
    {"smoothing": 0.2, "lambda_s": 1.0},
    {"lambda_m": 0.3},
    {"lambda_m": 0.0, "leave_one_out": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(4, 12, 7), (2, 5, 9), (3, 1, 4)])
@pytest.mark.parametrize("separate", [False, True])
def test_loss_and_gradients_equal_the_oracle(options, shape, separate):
    views, batch, dim = shape
    inputs = [gaussian(*shape), gaussian(views, batch, dim + 2, seed=1)][: 1 + separate]
    # The embedding has another width, and L_S and L_B with it; targets are as many only where they are matched.
    target = gaussian(views if options.get("leave_one_out") else views + 1, batch, dim, seed=2)

    def gradients(loss):
        leaves = [z.clone().requires_grad_() for z in inputs]
        out = loss(leaves[0], target, *leaves[1:])
        return out, torch.autograd.grad(out[0], leaves)

    out, got = gradients(lambda z, t, y=None: msbreg_loss(z, t, embedding=y, **NOISE, **options))
    parts, expected = gradients(lambda z, t, y=None: oracle(z, t, y, **options))
    assert torch.allclose(torch.stack(out), torch.stack(parts), rtol=1e-10, atol=1e-10)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)


def test_sequences_are_stacked():
    z, t, y = gaussian(3, 6, 4), gaussian(2, 6, 4, seed=1), gaussian(3, 6, 5, seed=2)
    views = [view.clone().requires_grad_() for view in z]
    stacked = z.clone().requires_grad_()
    a = msbreg_loss(views, tuple(t), embedding=list(y), **NOISE)
    b = msbreg_loss(stacked, t, embedding=y, **NOISE)
    assert torch.equal(torch.stack(a), torch.stack(b))
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(torch.stack([view.grad for view in views]), stacked.grad)


def test_embedding_that_is_online_is_one_pass(monkeypatch):
    passes = []
    monkeypatch.setattr(
        reference, "tangent", lambda g, *rest, tangent=reference.tangent: passes.append(1) or tangent(g, *rest)
    )
    z, t = gaussian(2, 6, 4).requires_grad_(), gaussian(2, 6, 4, seed=1)
    gradients = []
    for y in (None, z, z.clone()):
        loss = msbreg_loss(z, t, embedding=y, **NOISE).loss
        gradients.append(torch.autograd.grad(loss, z)[0])
    assert len(passes) == 1 + 1 + 2
    assert torch.equal(gradients[0], gradients[1]) and torch.allclose(gradients[1], gradients[2])


def test_parts_are_detached_scalars():
    out = msbreg_loss(gaussian(2, 6, 4).requires_grad_(), gaussian(2, 6, 4), **NOISE)
    assert out.loss.requires_grad and out.loss.shape == ()
    assert not any(part.requires_grad for part in out[1:])


def test_two_views_left_out_are_byol():
    p, t = gaussian(2, 16, 8), gaussian(2, 16, 8, seed=1)
    p1, p2, t1, t2 = unit(p[0]), unit(p[1]), unit(t[0]), unit(t[1])
    byol = 0.5 * ((2 - 2 * (p1 * t2).sum(-1)).mean() + (2 - 2 * (p2 * t1).sum(-1)).mean())
    loss = msbreg_loss(p, t, lambda_s=0, lambda_b=0, leave_one_out=True, **NOISE).loss
    assert loss.item() == pytest.approx(byol.item(), rel=1e-12)
    assert centroid_loss(p, t, leave_one_out=True).item() == pytest.approx(byol.item(), rel=1e-12)
    assert centroid_loss(p, t).item() != pytest.approx(byol.item(), rel=1e-3)


def test_a_term_of_weight_zero_is_not_computed(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    z, t = gaussian(2, 6, 4), gaussian(2, 6, 4, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "singular_value_loss", refuse)
        assert msbreg_loss(z, t, lambda_s=0, **NOISE).singular_value == 0
        with pytest.raises(AssertionError):
            msbreg_loss(z, t, **NOISE)
    monkeypatch.setattr(plain, "brownian_directions", refuse)
    assert msbreg_loss(z, t, lambda_b=0, **NOISE).brownian == 0
    with pytest.raises(AssertionError):
        msbreg_loss(z, t, **NOISE)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_unreduced_centroid_loss(leave_one_out):
    z, t = gaussian(3, 5, 4), gaussian(3, 5, 4, seed=1)
    each = centroid_loss(z, t, leave_one_out=leave_one_out, reduction="none")
    assert each.shape == (3, 5)
    assert each.mean().item() == pytest.approx(centroid_loss(z, t, leave_one_out=leave_one_out).item())
    weights = gaussian(3, 5, seed=4)  # an upstream gradient that differs from row to row
    weighted = lambda z: (weights * centroid_loss(z, t, leave_one_out=leave_one_out, reduction="none")).sum()  # noqa: E731
    assert torch.autograd.gradcheck(weighted, (z.requires_grad_(),))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_gradcheck(leave_one_out):
    z, y, t = gaussian(2, 5, 3).requires_grad_(), gaussian(2, 5, 4, seed=1).requires_grad_(), gaussian(2, 5, 3, seed=2)
    loss = lambda z, y: msbreg_loss(z, t, embedding=y, lambda_s=0.3, leave_one_out=leave_one_out, **NOISE).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, (z, y))
    assert torch.autograd.gradcheck(lambda z: brownian_loss(z, per="view", **NOISE), (z,))


def test_target_gets_no_gradient():
    z, t = gaussian(2, 4, 3).requires_grad_(), gaussian(2, 4, 3, seed=1).requires_grad_()
    msbreg_loss(z, t, **NOISE).loss.backward()
    assert z.grad is not None and t.grad is None


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: MSBRegLoss()(z, z.detach().flip(0)).loss,
        lambda z: centroid_loss(z, z.detach().flip(0)),
        singular_value_loss,
        lambda z: brownian_loss(z, **NOISE),
        lambda z: functional.nuclear_norm(z).sum(),
        lambda z: functional.coding_rate(z).sum(),
        MMCRLoss(),
        SVMaxLoss(),
        CodingRateLoss(),
        lambda z: covariance_energy(z).sum(),
        lambda z: sum(cross_correlation_energy(*z)),
    ],
)
def test_second_derivatives_are_refused(loss):
    """As of a gradient penalty in a trainer, where weights before the embeddings need gradients of their own."""
    x, weight = gaussian(2, 4, 3).requires_grad_(), gaussian(3, 3, seed=1).requires_grad_()
    value = loss(x @ weight)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.equal(gradient, torch.autograd.grad(loss(x @ weight), x)[0])
    with pytest.raises(RuntimeError, match="got a second one"):
        torch.autograd.grad(gradient.square().sum(), weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="got a second one"):
        (value + gradient.square().sum()).backward()


@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_without_numbers(mode):
    """What estimates memory and operations before there is a machine to run on."""
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        z, criterion = torch.empty(2, 6, 4, requires_grad=True), MSBRegLoss()
        out = criterion(z, torch.empty(2, 6, 4))
        (out.loss + MMCRLoss()(z) + CodingRateLoss()(z)).backward()
    assert out.loss.shape == () and z.grad.shape == z.shape


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_targets_of_inference_mode(leave_one_out):
    z = gaussian(2, 6, 4).requires_grad_()
    with torch.inference_mode():
        t = gaussian(2, 6, 4, seed=1)
    loss = centroid_loss(z, t, leave_one_out=leave_one_out)
    loss.backward()
    assert loss == centroid_loss(z, gaussian(2, 6, 4, seed=1), leave_one_out=leave_one_out) and z.grad.norm() > 0


def test_a_module_that_is_made_in_inference_mode_counts_outside_of_it():
    with torch.inference_mode():
        criterion = MSBRegLoss()
    criterion(OK, OK)
    assert criterion.step == 1


def test_a_module_is_saved_whole():
    criterion = MSBRegLoss(0.1, seed=3)
    criterion(OK, OK)
    twin = pickle.loads(pickle.dumps(criterion))
    assert repr(twin) == repr(criterion) and twin(OK, OK) == criterion(OK, OK)


def test_unit_rows_are_the_same_whether_the_numbers_can_be_asked_or_not(monkeypatch):
    z = gaussian(3, 20, 9, dtype=F32)
    rows, lengths = reference.unit_rows(z)
    monkeypatch.setattr(reference, "can_be_asked", lambda z: False)
    for got, expected in zip(reference.unit_rows(z), (rows, lengths), strict=True):
        assert torch.allclose(got, expected, rtol=1e-6)
    monkeypatch.undo()
    z[1, 2] *= 1e30
    huge_rows, huge_lengths = reference.unit_rows(z)
    assert huge_lengths[1, 2].item() == pytest.approx(1e30 * lengths[1, 2].item(), rel=1e-6)
    assert torch.allclose(huge_rows, rows, rtol=1e-6)


def test_no_device_but_a_cpu_is_asked_and_no_graph():
    assert reference.can_be_asked(torch.zeros(1))
    assert not reference.can_be_asked(torch.zeros(1, device="meta"))
    in_graph = torch.compile(lambda z: z + reference.can_be_asked(z), fullgraph=True, backend="eager")
    assert in_graph(torch.zeros(1)).item() == 0


def test_gradient_keeps_its_digits_where_views_nearly_agree():
    """Its size is that of the small difference; a gradient by way of -2 ĉ, the twin below, has lost it in float32."""
    t = gaussian(1, 64, 128, dtype=F32)
    z = (t + 1e-5 * gaussian(4, 64, 128, seed=1, dtype=F32)).requires_grad_()
    (got,) = torch.autograd.grad(centroid_loss(z, t), z)
    z64 = z.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(centroid_loss(z64, t.double()), z64)

    def error(gradient):
        return ((gradient - expected).norm() / expected.norm()).item()

    assert error(got) < 2e-2
    z_hat, norms = reference.unit_rows(z.detach())
    twin = reference.tangent(-2 * reference.unit_rows(t)[0] / (4 * 64) * torch.ones_like(z), z_hat, norms)
    assert error(twin) > 2 * error(got)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_plain_torch(dtype):
    """Errors against float64 are at most those of the definitions in the same dtype, and a little."""
    z, t = (gaussian(4, 24, 16, seed=seed, dtype=dtype) for seed in (0, 1))

    def run(loss, *tensors):
        leaf = tensors[0].clone().requires_grad_()
        value = loss(leaf, *tensors[1:])
        return value.double(), torch.autograd.grad(value, leaf)[0].double()

    def plain(z, t):
        directions = plain_directions(24, 16, **NOISE, dtype=z.dtype)
        return (2 - 2 * (unit(z) * unit(unit(t).mean(0))).sum(-1)).mean() + 0.5 * (unit(z) * directions).sum(-1).mean()

    ours = lambda z, t: msbreg_loss(z, t, lambda_s=0, **NOISE).loss  # noqa: E731
    value, gradient = run(ours, z, t)
    plain_value, plain_gradient = run(plain, z, t)
    true_value, true_gradient = run(plain, z.double(), t.double())
    assert (value - true_value).abs() <= (plain_value - true_value).abs() + 1e-6
    rms = true_gradient.square().mean().sqrt()
    error, plain_error = ((g - true_gradient).square().mean().sqrt() / rms for g in (gradient, plain_gradient))
    assert error <= plain_error + 1e-6


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    z, t = gaussian(2, 8, 4, dtype=dtype).requires_grad_(), gaussian(2, 8, 4, seed=1, dtype=dtype)
    out = msbreg_loss(z, t, **NOISE)
    out.loss.backward()
    assert all(part.dtype == (F64 if dtype == F64 else F32) for part in out)
    assert z.grad.dtype == dtype and z.grad.isfinite().all()


def test_target_of_another_dtype():
    z = gaussian(2, 8, 4, dtype=torch.bfloat16)
    t = gaussian(2, 8, 4, seed=1)
    assert centroid_loss(z, t).dtype == F32
    assert centroid_loss(z, t).item() == pytest.approx(centroid_loss(z.double(), t).item(), rel=1e-6)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(amp):
    z, t = gaussian(2, 32, 8, dtype=F32), gaussian(2, 32, 8, seed=1, dtype=F32)

    def run():
        leaf = z.clone().requires_grad_()
        out = msbreg_loss(leaf, t, lambda_s=1.0, **NOISE)
        return torch.stack(out), torch.autograd.grad(out.loss, leaf)[0]

    values, gradient = run()
    with torch.autocast("cpu", dtype=amp):
        amp_values, amp_gradient = run()
        layer = torch.nn.Linear(8, 8)
        out = msbreg_loss(layer(z), t, **NOISE)  # half precision comes in, as from a network
    out.loss.backward()
    assert torch.equal(values, amp_values) and torch.equal(gradient, amp_gradient)
    assert out.loss.dtype == F32 and layer.weight.grad.isfinite().all()


LAYOUTS = {
    "transposed": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "columns_first": lambda z: z.mT.contiguous().mT,
    "every_other": lambda z: z.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda z: torch.cat((z[:1], z))[1:],
    "expanded": lambda z: z[:, :1].expand_as(z),
    "flipped": lambda z: z.flip(1).contiguous().flip(1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    z, t = LAYOUTS[layout](gaussian(3, 10, 6)), LAYOUTS[layout](gaussian(3, 10, 6, seed=1))

    def run(z, t):
        leaf = z.detach().requires_grad_()
        out = msbreg_loss(leaf, t, lambda_s=1.0, **NOISE)
        return torch.stack(out), torch.autograd.grad(out.loss, leaf)[0]

    for a, b in zip(run(z, t), run(z.contiguous(), t.contiguous()), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_inputs_are_not_changed():
    tensors = [
        gaussian(3, 8, 4).requires_grad_(),
        gaussian(3, 8, 4, seed=1),
        gaussian(3, 8, 5, seed=2).requires_grad_(),
    ]
    integers = [torch.tensor(3), torch.tensor(4)]
    before = [x.detach().clone() for x in tensors + integers]
    versions = [x._version for x in tensors + integers]
    z, t, y = tensors
    msbreg_loss(z, t, embedding=y, seed=integers[0], step=integers[1]).loss.backward()
    (functional.nuclear_norm(z).sum() + singular_value_loss(z, spectrum="whitening")).backward()
    assert all(torch.equal(x, was) for x, was in zip(tensors + integers, before, strict=True))
    assert [x._version for x in tensors + integers] == versions


@pytest.mark.parametrize("dtype", [F64, F32, torch.float16])
def test_zero_rows_have_zero_gradients(dtype):
    z, t = gaussian(3, 8, 4, dtype=dtype), gaussian(3, 8, 4, seed=1, dtype=dtype)
    z[0, 0], z[:, 1], t[:, 2], t[1, 3] = 0, 0, 0, 0
    for leave_one_out in (False, True):
        leaf = z.clone().requires_grad_()
        out = msbreg_loss(leaf, t, leave_one_out=leave_one_out, **NOISE)
        out.loss.backward()
        assert torch.stack(out).isfinite().all() and leaf.grad.isfinite().all()
        assert not leaf.grad[0, 0].any() and not leaf.grad[:, 1].any()
        assert leaf.grad[1, 0].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["online", "target"])
def test_not_finite_in_not_finite_out(bad, where):
    tensors = {"online": gaussian(2, 6, 4), "target": gaussian(2, 6, 4, seed=1)}
    tensors[where][1, 2, 3] = bad
    tensors["online"].requires_grad_()
    out = msbreg_loss(**tensors, **NOISE)
    out.loss.backward()
    assert out.loss.isnan() and out.centroid.isnan()
    assert tensors["online"].grad[:, 2].isnan().any()


@pytest.mark.parametrize("times", [1e30, 1.4e38])  # rows of the latter are longer than a float32 can be
def test_huge_entries_whose_squares_overflow(times):
    z, t = (gaussian(2, 6, 4, seed=seed, dtype=F32).clamp(-2.4, 2.4) for seed in (0, 1))
    assert (times * z).isfinite().all() and (1.4e38 * z).norm(dim=-1).isinf().any()
    huge = (times * z).requires_grad_()
    usual, out = msbreg_loss(z, t, **NOISE), msbreg_loss(huge, times * t, **NOISE)
    assert torch.allclose(torch.stack(usual), torch.stack(out), rtol=1e-5)
    out.loss.backward()
    assert huge.grad.isfinite().all()


COMPILED = [
    {},
    {"solver": "newton_schulz", "leave_one_out": True, "lambda_b": 0.0},
    {"solver": "svd", "spectrum": "coding_rate", "per": "view"},
]


@pytest.mark.parametrize("options", COMPILED)
def test_compiles_in_one_graph(options):
    torch._dynamo.reset()
    z, t, y = (gaussian(3, 8, dim, seed=dim, dtype=F32).requires_grad_() for dim in (4, 4, 5))

    def step(z, t, y, seed, step):
        return msbreg_loss(z, t, embedding=y, seed=seed, step=step, **options)

    integers = torch.tensor(11), torch.tensor(5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(z, t, y, *integers)
    eager = step(z, t, y, *integers)
    assert torch.allclose(torch.stack(compiled), torch.stack(eager))
    gradients = (torch.autograd.grad(out.loss, (z, y)) for out in (compiled, eager))
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.timeout(100)  # the plan of Newton-Schulz, traced with symbols, would not come to an end
@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
def test_compiles_for_all_batches_and_smoothings_in_one_graph(solver):
    torch._dynamo.reset()

    def step(z, smoothing):
        return singular_value_loss(z, smoothing=smoothing, solver=solver)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, smoothing in ((8, 0.03), (14, 0.03), (14, 0.05)):
        z = gaussian(2, batch, 5, dtype=F32).requires_grad_()
        value, expected = compiled(z, smoothing), step(z, smoothing)
        assert torch.allclose(value, expected, rtol=1e-4)
        assert torch.allclose(*(torch.autograd.grad(one, z)[0] for one in (value, expected)), atol=1e-5)


def test_modules_compile_and_their_step_advances():
    torch._dynamo.reset()
    eager, z, t = MSBRegLoss(seed=2, lambda_s=0.0), gaussian(2, 8, 4).requires_grad_(), gaussian(2, 8, 4, seed=1)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert torch.allclose(compiled(z, t).loss, eager(z, t).loss)
    assert twin.step.item() == 3
    norm = torch.compile(functional.nuclear_norm, fullgraph=True, backend="aot_eager")
    assert torch.allclose(norm(z), functional.nuclear_norm(z))


PAIRS = {
    "singular_value, singular_value": lambda z, t: SingularValueLoss()(z) + SingularValueLoss()(t),
    "singular_value, brownian": lambda z, t: SingularValueLoss()(z) + brownian_loss(z, seed=1, step=torch.tensor(2)),
    "singular_value, centroid": lambda z, t: SingularValueLoss()(z) + CentroidLoss()(z, t),
    "mmcr with targets": lambda z, t: MMCRLoss()(z, t),
    "svmax, coding_rate": lambda z, t: SVMaxLoss()(z) + CodingRateLoss()(t),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_losses_compile_for_all_shapes_in_one_graph(pair):
    torch._dynamo.reset()
    z, t = gaussian(2, 8, 4, dtype=F32).requires_grad_(), gaussian(2, 8, 4, seed=1, dtype=F32)
    compiled = torch.compile(PAIRS[pair], fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, t), PAIRS[pair](z, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "criterion",
    [MSBRegLoss(), SingularValueLoss(), SingularValueLoss(spectrum="whitening"), SVMaxLoss(), MMCRLoss()],
    ids=lambda criterion: f"{type(criterion).__name__}-{getattr(criterion, 'spectrum', '')}",
)
def test_exports_for_all_batches(criterion):
    """Of more rows than dimensions; with fewer the Gram matrices are on the other side, which is another program."""
    criterion = copy.deepcopy(criterion).eval()
    inputs = lambda batch: (gaussian(3, batch, 5).float(),) * (1 + isinstance(criterion, MSBRegLoss))  # noqa: E731
    sizes = tuple({1: torch.export.Dim("batch", min=6, max=4096)} for _ in inputs(12))
    program = torch.export.export(criterion, inputs(12), dynamic_shapes=sizes).module()
    got, expected = program(*inputs(50)), criterion(*inputs(50))
    for a, b in zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]:
        assert torch.allclose(a, b, rtol=1e-4)


def test_a_step_that_changes_is_no_symbol_in_the_compiled_arithmetic():
    """C++ that torch generates has no & for what may be a symbol."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda z, step: brownian_loss(z, seed=1, step=step), fullgraph=True, backend=backend)
    z = gaussian(2, 8, 4)
    for step in range(3):
        assert torch.allclose(compiled(z, step), brownian_loss(z, seed=1, step=step))
    assert len(graphs) == 2  # of the first step, and of any
    bitwise = [node for node in graphs[-1].graph.nodes if node.target in (operator.and_, operator.rshift)]
    values = [node.args[0].meta["example_value"] for node in bitwise]
    assert len(values) > 10 and all(isinstance(value, torch.Tensor) for value in values)


RECOMPUTED = {
    "msbreg": lambda z, t: MSBRegLoss()(z, t, step=3).loss,
    "centroid": lambda z, t: CentroidLoss()(z, t),
    "singular_value": lambda z, t: SingularValueLoss()(z),
    "brownian": lambda z, t: BrownianLoss()(z, step=3),
    "mmcr": lambda z, t: MMCRLoss(0.2)(z),
    "svmax": lambda z, t: SVMaxLoss()(z),
    "coding_rate": lambda z, t: CodingRateLoss()(z),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("loss", RECOMPUTED)
def test_checkpoints_recompute_the_same(loss, reentrant):
    z, t = gaussian(2, 8, 4).requires_grad_(), gaussian(2, 8, 4, seed=1)
    (expected,) = torch.autograd.grad(RECOMPUTED[loss](z, t), z)
    checkpoint(RECOMPUTED[loss], z, t, use_reentrant=reentrant).backward()
    assert torch.equal(z.grad, expected) and expected.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_that_would_draw_other_noise_is_refused(reentrant):
    z, criterion = gaussian(2, 8, 4).requires_grad_(), BrownianLoss()
    value = checkpoint(criterion, z, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="BrownianLoss to be called with step= where"):
        value.backward()
    assert criterion.step == 1
    checkpoint(criterion.eval(), z, use_reentrant=reentrant).backward()  # whose step stays


def test_a_compiled_module_is_copied_as_one():
    compiled = torch.compile(MSBRegLoss(seed=3), backend="eager")
    twin = copy.deepcopy(compiled)
    assert type(twin) is type(compiled) and twin.seed == 3 and twin.step is not compiled.step


def test_a_module_built_on_the_meta_device_is_made_whole():
    with torch.device("meta"):
        criterion = MSBRegLoss(seed=-5)
    assert criterion.step.is_meta
    criterion = criterion.to_empty(device="cpu")
    criterion.step.fill_(77)  # what memory may hold
    criterion.reset_parameters()
    assert (criterion.seed.item(), criterion.step.item()) == (-5, 0)


def test_module_is_the_function():
    z, t, y = gaussian(2, 8, 4), gaussian(2, 8, 4, seed=1), gaussian(2, 8, 5, seed=2)
    options = {"lambda_m": 0.7, "lambda_s": 0.1, "lambda_b": 0.2, "leave_one_out": True, "spectrum": "whitening",
               "smoothing": 0.1, "solver": "eigh", "per": "view"}  # fmt: skip
    out = MSBRegLoss(**options, seed=11)(z, t, y, step=5)
    assert torch.equal(torch.stack(out), torch.stack(msbreg_loss(z, t, embedding=y, **options, **NOISE)))
    assert torch.equal(CentroidLoss(reduction="none")(z, t), centroid_loss(z, t, reduction="none"))
    assert torch.equal(SingularValueLoss(smoothing=0.2)(z), singular_value_loss(z, smoothing=0.2))
    assert torch.equal(BrownianLoss(per="view", seed=11)(z, step=5), brownian_loss(z, per="view", **NOISE))


@pytest.mark.parametrize("make", [lambda: MSBRegLoss(seed=3), lambda: BrownianLoss(seed=3)])
def test_the_noise_step(make):
    criterion = make()
    z = gaussian(2, 8, 4)
    arguments = (z, z) if isinstance(criterion, MSBRegLoss) else (z,)

    def brownian(**options):
        out = criterion(*arguments, **options)
        return (out.brownian if isinstance(criterion, MSBRegLoss) else out).item()

    def at(step):
        return brownian_loss(z, seed=3, step=step).item()

    assert [brownian(), brownian()] == [at(0), at(1)]
    assert brownian(step=9) == brownian(step=torch.tensor(9)) == at(9)  # neither uses nor advances the module's own
    assert criterion.step.item() == 2
    criterion.eval()
    assert [brownian(), brownian()] == [at(2), at(2)]  # evaluation repeats, and disturbs nothing
    criterion.train()
    resumed = make()
    resumed.load_state_dict(criterion.state_dict())
    criterion = resumed
    assert [brownian(), brownian()] == [at(2), at(3)]


@pytest.mark.parametrize("given", [lambda z: z, list, tuple, lambda z: z[0]])
def test_images_are_numbered_by_rank_however_views_are_given(monkeypatch, given):
    monkeypatch.setattr(losses, "rank", lambda group: 2)
    views = given(gaussian(3, 8, 4))
    got = BrownianLoss(seed=11)(views, step=5)
    directions = plain_directions(8, 4, **NOISE, first_image=2 * 8, dtype=F64)
    rows = views if isinstance(views, torch.Tensor) else torch.stack(views)
    assert torch.allclose(got, (unit(rows) * directions).sum(-1).mean())


def test_integers_stay_integers_when_a_module_changes_dtype():
    criterion = MSBRegLoss().to(torch.bfloat16)
    assert criterion.seed.dtype == criterion.step.dtype == torch.int64


def test_defaults_are_the_same_everywhere():
    def defaults(callable_):
        return {name: p.default for name, p in inspect.signature(callable_).parameters.items()}

    module, function = defaults(MSBRegLoss), defaults(msbreg_loss)
    for name in ("lambda_m", "lambda_s", "lambda_b", "leave_one_out", "spectrum", "smoothing", "solver", "per"):
        assert module[name] == function[name]
    for name in ("spectrum", "smoothing", "solver"):
        assert defaults(SingularValueLoss)[name] == defaults(singular_value_loss)[name] == function[name]
    assert defaults(BrownianLoss)["per"] == defaults(brownian_loss)["per"] == function["per"]
    assert defaults(BrownianLoss)["seed"] == defaults(MSBRegLoss)["seed"] == 0
    assert (
        defaults(CentroidLoss)["leave_one_out"] == defaults(centroid_loss)["leave_one_out"] == module["leave_one_out"]
    )


def test_repr_shows_the_options():
    assert "lambda_s=0.1" in repr(MSBRegLoss(lambda_s=0.1)) and "spectrum='nuclear'" in repr(MSBRegLoss())
    assert "over this process" in repr(MSBRegLoss())


OK = torch.ones(2, 3, 4)


def several_gradients_at_once():
    z = OK.clone().requires_grad_()
    loss = centroid_loss(z, OK)
    return torch.vmap(lambda incoming: torch.autograd.grad(loss, z, incoming))(torch.ones(2))


class Mesh:
    """As torch's DeviceMesh."""

    def get_group(self):
        return None


REFUSED = [
    (lambda: centroid_loss(OK[0], OK), ValueError, r"online to be a tensor \(K, B, D\).*got shape \(3, 4\)"),
    (lambda: centroid_loss(OK, OK[:, :2]), ValueError, r"online's B and D, \(3, 4\), got \(2, 4\)"),
    (lambda: centroid_loss(OK, OK[..., :2]), ValueError, r"got \(3, 2\)"),
    (lambda: centroid_loss([], OK), ValueError, "at least one view, got an empty list"),
    (lambda: centroid_loss([OK[0], OK[0, :2]], OK), ValueError, r"one shape \(B, D\), got \(3, 4\), \(2, 4\)"),
    (lambda: centroid_loss([OK], OK), ValueError, r"one shape \(B, D\), got \(2, 3, 4\)"),
    (lambda: centroid_loss(OK[:0], OK), ValueError, r"got shape \(0, 3, 4\)"),
    (lambda: centroid_loss(OK[:, :0], OK[:, :0]), ValueError, r"got shape \(2, 0, 4\)"),
    (lambda: centroid_loss(OK[..., :0], OK[..., :0]), ValueError, r"got shape \(2, 3, 0\)"),
    (lambda: centroid_loss(OK.long(), OK), TypeError, r"online in float16.*got torch\.int64"),
    (lambda: centroid_loss(OK, OK.bool()), TypeError, r"target in float16.*got torch\.bool"),
    (lambda: centroid_loss(OK, OK.to(torch.complex64)), TypeError, r"got torch\.complex64"),
    (lambda: centroid_loss([[1.0]], OK), TypeError, "got list"),
    (lambda: centroid_loss(OK.numpy(), OK), TypeError, "got ndarray"),
    (lambda: centroid_loss(OK.to_sparse(), OK), TypeError, "online to be a dense tensor, got torch.sparse_coo"),
    (
        lambda: centroid_loss(OK, torch.nested.nested_tensor(list(OK), layout=torch.jagged)),
        TypeError,
        "target to be a dense.*a nested one",
    ),
    (lambda: centroid_loss(OK, OK.to("meta")), ValueError, "target on cpu, as online, got meta"),
    (lambda: centroid_loss([OK[0], OK[1].to("meta")], OK), ValueError, r"online\[1\] on cpu"),
    (lambda: centroid_loss(OK[:1], OK[:1], leave_one_out=True), ValueError, "at least 2.*got 1 and 1"),
    (lambda: centroid_loss(OK, OK[[0, 1, 1]], leave_one_out=True), ValueError, "got 3 and 2"),
    (lambda: centroid_loss(OK, OK, reduction="sum"), ValueError, "reduction to be one of 'mean', 'none', got 'sum'"),
    (lambda: msbreg_loss(OK, OK, embedding=OK[:1], **NOISE), ValueError, r"online's K and B, \(2, 3\), got \(1, 3\)"),
    (lambda: msbreg_loss(OK, OK, embedding=OK.to("meta"), **NOISE), ValueError, "embedding on cpu"),
    (lambda: msbreg_loss(OK, OK, per="batch", **NOISE), ValueError, "per to be one of 'image', 'view'"),
    (lambda: msbreg_loss(OK, OK, seed=0.5, step=0), TypeError, "seed to be an int"),
    (lambda: msbreg_loss(OK, OK, lambda_s=torch.ones(()), **NOISE), TypeError, "lambda_s to be a number, got Tensor"),
    (lambda: MSBRegLoss(lambda_s=math.nan), ValueError, "lambda_s to be finite, got nan"),
    (lambda: msbreg_loss(OK, OK, lambda_b=math.inf, **NOISE), ValueError, "lambda_b to be finite, got inf"),
    (lambda: MSBRegLoss(lambda_b=None), TypeError, "lambda_b to be a number, got NoneType"),
    (lambda: MSBRegLoss("whitening"), TypeError, "lambda_s to be a number, got str"),
    (lambda: MSBRegLoss(torch.nn.Parameter(torch.ones(()))), TypeError, "got Parameter; for weights that are learned"),
    (lambda: MMCRLoss(group="nccl"), TypeError, "group to be a process group or None, got str$"),
    (lambda: MSBRegLoss(group=Mesh()), TypeError, r"got Mesh; give what its get_group\(\) returns"),
    (lambda: MSBRegLoss(spectrum="flat"), ValueError, "spectrum to be one of .*got 'flat'"),
    (lambda: MSBRegLoss(solver="qr"), ValueError, "solver to be one of .*got 'qr'"),
    (lambda: MSBRegLoss(per="batch"), ValueError, "per to be one of 'image', 'view'"),
    (lambda: CentroidLoss(reduction="sum"), ValueError, "reduction to be one of 'mean', 'none', got 'sum'"),
    (lambda: SingularValueLoss(smoothing=-1), ValueError, "at least 0, and finite, got -1"),
    (lambda: SingularValueLoss(solver="qr"), ValueError, "solver to be one of .*got 'qr'"),
    (lambda: BrownianLoss(per="batch"), ValueError, "per to be one of 'image', 'view'"),
    (lambda: msbreg_loss(OK, OK, lambda_b=0, seed=0, step="1"), TypeError, "step to be an int"),
    (lambda: brownian_loss(OK, first_image=2**70, **NOISE), ValueError, "first_image to be an int of 64 bits"),
    (lambda: brownian_loss(OK, first_image=0.5, **NOISE), TypeError, "first_image to be an int"),
    (lambda: brownian_loss(OK, first_image=np.array([1, 2, 3]), **NOISE), TypeError, "first_image to be an int"),
    (lambda: torch.vmap(lambda z: singular_value_loss(z))(OK[None]), RuntimeError, "inside vmap"),
    (lambda: torch.func.grad(lambda z: MSBRegLoss()(z, OK).loss)(OK), RuntimeError, "inside vmap, grad"),
    (lambda: several_gradients_at_once(), RuntimeError, "inside vmap"),
    (lambda: pickle.dumps(MSBRegLoss(group=dist.ProcessGroup(0, 1))), TypeError, "save its state_dict"),
    (lambda: msbreg_loss(OK, OK, lambda_b="0.5", **NOISE), TypeError, "lambda_b to be a number, got str"),
    (lambda: singular_value_loss(OK, smoothing=None), TypeError, "smoothing to be a number, got NoneType"),
    (lambda: singular_value_loss(OK, smoothing=math.inf), ValueError, "and finite, got inf"),
    (lambda: MSBRegLoss(seed=1.9), TypeError, "seed to be an int"),
    (lambda: BrownianLoss(seed=2**63), ValueError, "seed to be an int of 64 bits"),
    (lambda: singular_value_loss(OK, spectrum="flat"), ValueError, "'nuclear', 'whitening', 'coding_rate', got 'flat'"),
    (lambda: singular_value_loss(OK, solver="qr"), ValueError, "solver to be one of .*got 'qr'"),
    (lambda: singular_value_loss(OK, smoothing=-1), ValueError, "at least 0, and finite, got -1"),
    (lambda: functional.nuclear_norm(OK, smoothing=math.nan), ValueError, "at least 0, and finite, got nan"),
    (lambda: singular_value_loss(OK[0, 0]), ValueError, r"a tensor \(B, D\).*got shape \(4,\)"),
    (lambda: brownian_loss(OK[None], **NOISE), ValueError, r"got shape \(1, 2, 3, 4\)"),
]


def test_numbers_of_numpy_are_numbers():
    numbers = {"seed": 11, "step": 5, "first_image": 3, "lambda_s": 0.25, "lambda_b": 0.5, "smoothing": 0.25}
    of_numpy = {name: np.asarray(value)[()] for name, value in numbers.items()}
    assert msbreg_loss(OK, OK, **of_numpy) == msbreg_loss(OK, OK, **numbers)


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_examples_in_docstrings_run():
    results = doctest.testmod(losses, extraglobs={"torch": torch})
    assert results.attempted == 10 and results.failed == 0


def test_import_needs_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import msbreg;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - {'msbreg', 'torch'};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert msbreg.__version__
