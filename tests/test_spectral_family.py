"""MMCR, SVMax, EMP-SSL's coding rate and the energies against their papers' formulas in float64, SVD and slogdet."""

import doctest
import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_spectral import families, gaussian, value_and_gradient
from torch.nn.functional import cosine_similarity, normalize

import msbreg
from msbreg import CodingRateLoss, MMCRLoss, SVMaxLoss, spectral
from msbreg.distributed import rank, world_size
from msbreg.functional import coding_rate, nuclear_norm, singular_value_loss
from msbreg.spectral import covariance_energy, cross_correlation_energy

F64, F32 = torch.float64, torch.float32
SHAPES = [(3, 24, 8), (3, 8, 24), (2, 8, 8), (2, 1, 6), (2, 7, 1)]
FAMILIES = list(families(4, 4))


def unit(z):
    return normalize(z, dim=-1)


def nuclear(m):
    """Nuclear norm whose gradient is the polar factor over the nonzero singular values, as the definition has it."""
    u, s, vt = torch.linalg.svd(m.detach(), full_matrices=False)
    zero = s <= 1e-12 * s[..., :1]
    return (m * (u.masked_fill(zero[..., None, :], 0) @ vt)).sum((-2, -1))


def mmcr(z, target=None, local_weight=0.0):
    centroids = unit(z).mean(0)
    if target is not None:
        centroids = (centroids + unit(target).mean(0)) / 2
    return -nuclear(centroids) + local_weight * sum(nuclear(unit(z[:, b])) for b in range(z.shape[1])) / z.shape[1]


def svmax(z, weight=1.0):
    """With the mean over D, as in the paper, where N > D, and over N where N < D."""
    losses = []
    for view in z:
        n, d = view.shape
        r = min(n, d)
        mean, lower, upper = nuclear(unit(view)) / r, math.sqrt(n) / r, math.sqrt(n / r)
        losses.append(weight * torch.exp((upper - mean) / (upper - lower) if r > 1 else 0 * mean))
    return torch.stack(losses).mean()


def rate(m, precision=0.2):
    n, d = m.shape
    return 0.5 * torch.linalg.slogdet(torch.eye(d, dtype=m.dtype) + d / (n * precision) * m.T @ m).logabsdet


def emp_ssl(z, similarity_weight=200.0, rate_weight=1.0, precision=0.2):
    z_hat = unit(z)
    similarity = torch.stack([cosine_similarity(view, z_hat.mean(0), dim=-1).mean() for view in z_hat]).mean()
    rates = torch.stack([rate(view, precision) for view in z_hat])
    return -similarity_weight * similarity - rate_weight * rates.mean()


def covariance(x):
    cov = torch.atleast_2d(torch.cov(x.T))
    return cov.square().sum() - cov.diagonal().square().sum()


def barlow(x, y):
    x, y = ((v - v.mean(0)) / (v.var(0, correction=0) + 1e-5).sqrt() for v in (x, y))
    c = x.T @ y / len(x)
    return torch.stack(((1 - c.diagonal()).square().sum(), c.square().sum() - c.diagonal().square().sum()))


LOSSES = {
    "mmcr": (MMCRLoss(), mmcr),
    "mmcr_local": (MMCRLoss(0.3), lambda z: mmcr(z, local_weight=0.3)),
    "svmax": (SVMaxLoss(), svmax),
    "svmax_weight": (SVMaxLoss(0.2), lambda z: svmax(z, 0.2)),
    "emp_ssl": (CodingRateLoss(), emp_ssl),
    "emp_ssl_options": (CodingRateLoss(3.0, 0.5, precision=0.7), lambda z: emp_ssl(z, 3.0, 0.5, 0.7)),
}


def views(name, shape):
    """K matrices (B, D) of one family: the views of an image differ by a rotation, which keeps every spectrum."""
    count, n, d = shape
    rotations = torch.linalg.qr(torch.eye(d, dtype=F64) + 0.3 * gaussian(count, d, d, seed=7) / d**0.5).Q
    return families(n, d)[name] @ rotations


def assert_close(got, expected, z, tolerance):
    """Gradients times |z|, relative to the larger of theirs and 1e-2; rows of zeros have none."""
    length = z.to(F64).norm(dim=-1, keepdim=True)
    expected = torch.where(length == 0, 0.0, expected)
    assert not got[(length == 0).expand_as(got)].any()
    error, size = ((got.to(F64) - expected) * length).norm(), (expected * length).norm()
    assert (error / size.clamp_min(1e-2)).item() < tolerance


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_definition(loss, shape):
    criterion, definition = LOSSES[loss]
    for name in FAMILIES:
        z = views(name, shape)
        value, gradient = value_and_gradient(criterion, z)
        expected, expected_gradient = value_and_gradient(definition, z)
        assert value.shape == () and value.dtype == F64
        assert value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-9), name
        assert_close(gradient, expected_gradient, z, 1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_float32_is_close_to_the_definition(loss, shape):
    criterion, definition = LOSSES[loss]
    for name in FAMILIES:
        z = views(name, shape)
        value, gradient = value_and_gradient(criterion, z.to(F32))
        expected, expected_gradient = value_and_gradient(definition, z)
        assert value.dtype == gradient.dtype == F32
        assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-4), name
        assert_close(gradient, expected_gradient, z, 1e-3)


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "svd"])
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_solvers_agree(solver, shape):
    for name in ("gaussian", "power_law", "flat", "repeated"):
        z = views(name, shape)
        for criterion, definition in (
            (MMCRLoss(0.3, solver=solver), lambda z: mmcr(z, local_weight=0.3)),
            (SVMaxLoss(solver=solver), svmax),
        ):
            value, gradient = value_and_gradient(criterion, z)
            expected, expected_gradient = value_and_gradient(definition, z)
            assert value.item() == pytest.approx(expected.item(), rel=1e-8), name
            assert_close(gradient, expected_gradient, z, 1e-5)


def test_check_sees_a_wrong_sign_factor_and_a_missing_gradient():
    z = gaussian(3, 12, 5)
    _, gradient = value_and_gradient(MMCRLoss(), z)
    for twin in (
        lambda z: -mmcr(z),
        lambda z: 1.001 * mmcr(z),
        lambda z: -nuclear(unit(z.mean(0))),
        lambda z: mmcr(torch.cat((z[:1], z[1:].detach()))),
    ):
        with pytest.raises(AssertionError):
            assert_close(gradient, value_and_gradient(twin, z)[1], z, 1e-7)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5), (3, 1, 4)])
def test_gradcheck(loss, shape):
    criterion, _ = LOSSES[loss]
    assert torch.autograd.gradcheck(criterion, (gaussian(*shape).requires_grad_(),))


def test_defaults_are_the_papers():
    mmcr_loss, svmax_loss, emp_ssl_loss = MMCRLoss(), SVMaxLoss(), CodingRateLoss()
    assert (mmcr_loss.local_weight, svmax_loss.weight) == (0, 1)
    assert (emp_ssl_loss.similarity_weight, emp_ssl_loss.rate_weight, emp_ssl_loss.precision) == (200, 1, 0.2)
    assert "precision=0.2" in repr(emp_ssl_loss) and "local_weight=0.0" in repr(mmcr_loss)


@pytest.mark.parametrize("shape", [(64, 16), (12, 32)])
@pytest.mark.parametrize("criterion", [MMCRLoss(), SVMaxLoss(), CodingRateLoss()])
def test_spreading_lowers_the_loss_and_collapse_raises_it(criterion, shape):
    """Views agree throughout, so that spread alone differs; a step down the gradient spreads too."""
    spread = {name: torch.stack([families(*shape)[name]] * 2) for name in ("flat", "gaussian", "near_collapse")}
    flat, usual, collapsed = (criterion(z).item() for z in spread.values())
    assert flat < usual - 0.01 and usual < collapsed - 0.1
    for name in ("gaussian", "near_collapse"):
        z = spread[name] / spread[name].norm(dim=-1, keepdim=True)
        _, gradient = value_and_gradient(criterion, z)
        step = unit(z - 1e-4 * gradient)
        assert nuclear_norm(step[0]) > nuclear_norm(unit(z)[0])
        assert criterion(step) < criterion(z)


@pytest.mark.parametrize("criterion", [MMCRLoss(), CodingRateLoss()])
def test_views_that_agree_have_the_lower_loss(criterion):
    z = gaussian(16, 8)
    apart = torch.stack((z, z + gaussian(16, 8, seed=1)))
    assert criterion(torch.stack((z, z))) < criterion(apart) - 0.1
    _, gradient = value_and_gradient(criterion, apart)
    step = apart - 1e-3 * gradient
    assert cosine_similarity(*step, dim=-1).mean() > cosine_similarity(*apart, dim=-1).mean()


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16)])
def test_svmax_is_between_its_bounds_whatever_the_shape(shape):
    """Where N < D the authors' code has means over N between bounds over D."""
    n, d = shape
    flat = torch.eye(d, dtype=F64).repeat(max(n // d, 1), 1)[:n]
    assert SVMaxLoss()(flat).item() == pytest.approx(1)
    assert SVMaxLoss(2.0)(gaussian(1, d).repeat(n, 1)).item() == pytest.approx(2 * math.e)
    assert 1 < SVMaxLoss()(gaussian(n, d)).item() < math.e
    assert SVMaxLoss(2.0)(gaussian(n, 1)).item() == 2


def test_svmax_of_rows_of_zeros():
    r, rows = 4, 25
    assert SVMaxLoss()(torch.zeros(rows, r)).item() == pytest.approx(math.exp(r**0.5 / (r**0.5 - 1)))
    value, gradient = value_and_gradient(SVMaxLoss(2.0), torch.zeros(rows, 1, dtype=F64))
    assert value.item() == 2 and gradient.count_nonzero() == 0


def test_momentum_mmcr():
    online, target = gaussian(2, 9, 5), gaussian(3, 9, 5, seed=1)
    assert_close(
        value_and_gradient(lambda z: MMCRLoss(0.3)(z, target), online)[1],
        value_and_gradient(lambda z: mmcr(z, target, 0.3), online)[1],
        online,
        1e-8,
    )
    assert MMCRLoss(0.3)(online, target).item() == pytest.approx(mmcr(online, target, 0.3).item())
    one_view = MMCRLoss()(online[:1], target[:1])  # two views in all
    assert one_view.item() == pytest.approx(mmcr(online[:1], target[:1]).item())
    leaf, ema = online.requires_grad_(), target.requires_grad_()
    MMCRLoss()(leaf, ema).backward()
    assert leaf.grad is not None and ema.grad is None
    assert MMCRLoss()(online.detach().to(F32), target.detach()).dtype == F32


def test_the_mean_view_has_a_gradient():
    """On unnormalised rows it matters whether z̄ is detached; on unit rows, with all views there, it does not."""
    z = gaussian(3, 6, 4)
    criterion = CodingRateLoss(rate_weight=0.0)

    def detached(z):
        return (
            -200 * torch.stack([cosine_similarity(v, unit(z).mean(0).detach(), dim=-1).mean() for v in unit(z)]).mean()
        )

    _, gradient = value_and_gradient(criterion, z)
    assert_close(gradient, value_and_gradient(detached, z)[1], z, 1e-9)
    assert_close(gradient, value_and_gradient(lambda z: emp_ssl(z, rate_weight=0.0), z)[1], z, 1e-9)


CODING = [((3, 12, 5), 0.2), ((3, 5, 12), 0.2), ((2, 6, 6), 1.5), ((1, 1, 4), 0.01), ((2, 4, 1), 0.2)]


@pytest.mark.parametrize(("shape", "precision"), CODING)
def test_coding_rate(shape, precision):
    m = gaussian(*shape) * 10 ** torch.linspace(-2, 1, shape[1], dtype=F64)[:, None]
    weights = torch.arange(1.0, shape[0] + 1, dtype=F64)  # an upstream gradient that differs from matrix to matrix
    got = coding_rate(m, precision=precision)
    expected = torch.stack([rate(matrix, precision) for matrix in m])
    assert got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-11)
    _, gradient = value_and_gradient(lambda m: coding_rate(m, precision=precision) @ weights, m)
    definition = lambda m: torch.stack([rate(matrix, precision) for matrix in m]) @ weights  # noqa: E731
    assert torch.allclose(gradient, value_and_gradient(definition, m)[1], rtol=1e-9)
    assert torch.autograd.gradcheck(lambda m: coding_rate(m, precision=precision), (m.requires_grad_(),))


def test_coding_rate_of_one_matrix_and_of_a_list():
    m = gaussian(2, 7, 4)
    rates = coding_rate(m)
    assert coding_rate(m[0]).shape == () and torch.equal(coding_rate(list(m)), rates)
    assert torch.allclose(torch.stack([coding_rate(m[0]), coding_rate(m[1])]), rates)
    unit_rate = coding_rate(unit(m)).mean()
    assert unit_rate.item() == pytest.approx(-singular_value_loss(m, spectrum="coding_rate").item())


def test_coding_rate_says_so_where_rounding_leaves_nothing_of_the_identity():
    m = torch.stack((gaussian(1, 8).expand(16, 8), gaussian(16, 8)))
    long = torch.stack((1e8 * m[0], m[1]))
    value, gradient = value_and_gradient(lambda m: coding_rate(m).nansum(), long.to(F32))
    rates = coding_rate(long.to(F32))
    assert rates[0].isnan() and gradient[0].isnan().all()
    assert rates[1].item() == pytest.approx(rate(m[1]).item(), rel=1e-5) and gradient[1].isfinite().all()
    assert value.isfinite()


ENERGY_SHAPES = [(24, 7), (7, 24), (9, 9), (8, 9), (9, 20), (11, 20), (2, 5), (5, 1)]


@pytest.mark.parametrize("shape", ENERGY_SHAPES)
def test_energies_equal_the_definitions(shape):
    x, y = gaussian(*shape) + 3, gaussian(*shape, seed=1) * torch.linspace(0.5, 2, shape[1], dtype=F64)
    y = y + 0.5 * x
    value, gradient = value_and_gradient(covariance_energy, x)
    expected, expected_gradient = value_and_gradient(covariance, x)
    assert value.shape == () and value.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-8, atol=1e-10)
    batch = covariance_energy(torch.stack((x, y)))
    assert torch.allclose(batch, torch.stack((covariance(x), covariance(y))))
    assert torch.allclose(torch.stack(cross_correlation_energy(x, y)), barlow(x, y), rtol=1e-9, atol=1e-12)
    mix = torch.tensor([1.0, 0.3], dtype=F64)
    for swap in (False, True):
        ours = lambda v: mix @ torch.stack(cross_correlation_energy(*((y, v) if swap else (v, y))))  # noqa: E731, B023
        theirs = lambda v: mix @ barlow(*((y, v) if swap else (v, y)))  # noqa: E731, B023
        assert torch.allclose(value_and_gradient(ours, x)[1], value_and_gradient(theirs, x)[1], rtol=1e-8, atol=1e-10)


def test_energies_never_make_the_larger_side():
    """The point of the smaller side: N = 4 rows of D = 4096 without a D x D matrix."""
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    x, y = (gaussian(4, 4096, seed=seed).requires_grad_() for seed in (0, 1))
    with Sizes():
        (covariance_energy(x) + sum(cross_correlation_energy(x, y))).backward()
    assert max(largest) == 2 * 4 * 4096


@pytest.mark.parametrize("shape", [(30, 6), (6, 30)])
def test_energies_know_decorrelated_from_correlated(shape):
    x = gaussian(*shape)
    correlated = x[:, :1] + 0.1 * x
    assert (
        covariance_energy(correlated) / correlated.var(0).square().sum()
        > 2 * covariance_energy(x) / x.var(0).square().sum()
    )
    invariance, redundancy = cross_correlation_energy(x, x)
    assert invariance < 1e-6 and cross_correlation_energy(x, gaussian(*shape, seed=1))[0] > 1
    assert cross_correlation_energy(correlated, correlated)[1] > 2 * redundancy


def everything(x):
    """All values of one batch (K, B, D), as one tensor; K is 2."""
    return torch.stack(
        [criterion(x) for criterion, _ in LOSSES.values()]
        + [coding_rate(x).sum(), covariance_energy(x).sum(), *cross_correlation_energy(x[0], x[1])]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 8, 24)])
def test_half_precision_is_raised(dtype, shape):
    z = gaussian(*shape).to(dtype)
    values, raised = everything(z), everything(z.to(F32))
    assert values.dtype == F32 and torch.equal(values, raised)
    _, gradient = value_and_gradient(lambda z: everything(z).sum(), z)
    _, exact = value_and_gradient(lambda z: everything(z).sum(), z.to(F32))
    assert gradient.dtype == dtype
    assert ((gradient.to(F32) - exact).norm() / exact.norm()).item() < 0.02


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 8, 24)])
def test_autocast_changes_nothing(amp, shape):
    z = gaussian(*shape).to(F32)

    def run():
        leaf = z.clone().requires_grad_()
        return leaf, everything(leaf)

    leaf, values = run()
    with torch.autocast("cpu", dtype=amp):
        amp_leaf, amp_values = run()
    assert torch.equal(values, amp_values)
    assert torch.equal(*(torch.autograd.grad(v.sum(), x)[0] for x, v in ((leaf, values), (amp_leaf, amp_values))))


@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 8, 24)])
def test_a_backward_pass_inside_autocast_keeps_its_digits(shape):
    leaf = gaussian(*shape).to(F32).requires_grad_()
    (expected,) = torch.autograd.grad(everything(leaf).sum(), leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(everything(leaf).sum(), leaf)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [F64, F32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 8, 24), (2, 1, 8), (2, 8, 1), (2, 1, 1)])
@pytest.mark.parametrize("kind", ["usual", "zero_rows", "all_zero", "collapsed"])
def test_odd_inputs_have_finite_values_and_gradients(shape, kind, dtype):
    z = gaussian(*shape)
    z = {"usual": z, "all_zero": 0 * z, "collapsed": z[:1, :1].expand(shape)}.get(kind, z).to(dtype).clone()
    if kind == "zero_rows":
        z[:, ::2] = 0
    values, gradient = value_and_gradient(lambda z: everything(z).sum(), z)
    assert values.isfinite() and gradient.isfinite().all()
    if kind == "zero_rows":
        for criterion, _ in LOSSES.values():
            assert not value_and_gradient(criterion, z)[1][:, ::2].any()


def test_one_view():
    z = gaussian(1, 12, 5)
    assert CodingRateLoss()(z).item() == pytest.approx(emp_ssl(z).item())
    assert SVMaxLoss()(z[0]).item() == pytest.approx(svmax(z).item())


def test_huge_rows_do_not_overflow():
    z = gaussian(2, 8, 4).to(F32)
    for criterion, _ in LOSSES.values():
        assert criterion(1e30 * z).item() == pytest.approx(criterion(z).item(), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(2, 12, 4), (2, 4, 12)])
def test_not_finite_in_nan_out(bad, shape):
    z = gaussian(*shape)
    z[0, 1, 2] = bad
    for criterion, _ in LOSSES.values():
        value, gradient = value_and_gradient(criterion, z)
        assert value.isnan() and gradient[0, 1].isnan().all()
    assert coding_rate(z).isnan().tolist() == covariance_energy(z).isnan().tolist() == [True, False]
    assert torch.stack(cross_correlation_energy(z[0], z[1])).isnan().all()


def test_lists_and_strides():
    z = gaussian(3, 8, 6)
    for criterion, _ in LOSSES.values():
        leaves = [view.clone().requires_grad_() for view in z]
        value, gradient = value_and_gradient(criterion, z)
        listed = criterion(leaves)
        listed.backward()
        assert torch.equal(listed, value) and torch.equal(torch.stack([leaf.grad for leaf in leaves]), gradient)
        strided = z.mT.contiguous().mT
        assert torch.allclose(criterion(strided), value)
        assert torch.allclose(value_and_gradient(criterion, strided)[1], gradient)


def test_inputs_are_not_changed():
    z = gaussian(2, 6, 4).requires_grad_()
    before = z.detach().clone()
    everything(z).sum().backward()
    assert torch.equal(z, before) and z._version == 0
    upstream = torch.ones(2, 6, 4, dtype=F64)
    spectral._UnitRows.apply(z).backward(upstream)
    assert torch.equal(upstream, torch.ones_like(upstream))


def test_compiles_in_one_graph():
    """Which it could not if it asked the device for a number."""
    torch._dynamo.reset()
    z = gaussian(2, 12, 4).requires_grad_()
    values = torch.compile(everything, fullgraph=True, backend="aot_eager")(z)
    assert torch.allclose(values, everything(z))
    assert torch.allclose(torch.autograd.grad(values.sum(), z)[0], torch.autograd.grad(everything(z).sum(), z)[0])


OK = torch.ones(2, 3, 4)
REFUSED = [
    (lambda: MMCRLoss()(OK[:1]), ValueError, "at least two views of each image, or a target view, got one view"),
    (lambda: MMCRLoss()(OK[0]), ValueError, r"online to be a tensor \(K, B, D\).*got shape \(3, 4\)"),
    (lambda: MMCRLoss()(OK, OK[:, :2]), ValueError, r"online's B and D, \(3, 4\), got \(2, 4\)"),
    (lambda: MMCRLoss()(OK, OK.to("meta")), ValueError, "target on cpu, as online, got meta"),
    (lambda: MMCRLoss()(OK.long()), TypeError, r"online in float16.*got torch\.int64"),
    (lambda: MMCRLoss(solver="qr"), ValueError, "solver to be one of.*'qr'"),
    (lambda: MMCRLoss(solver="svd", group=dist.ProcessGroup(0, 1))(OK), ValueError, "with a process group, got 'svd'"),
    (lambda: SVMaxLoss()(OK[0, 0]), ValueError, r"a tensor \(B, D\).*got shape \(4,\)"),
    (lambda: SVMaxLoss()(OK[:, :0]), ValueError, r"got shape \(2, 0, 4\)"),
    (lambda: SVMaxLoss()([]), ValueError, "at least one view, got an empty list"),
    (lambda: CodingRateLoss()(OK[0]), ValueError, r"got shape \(3, 4\)"),
    (lambda: CodingRateLoss()([OK[0], OK[0, :2]]), ValueError, r"one shape \(B, D\), got \(3, 4\), \(2, 4\)"),
    (lambda: CodingRateLoss()("views"), TypeError, "got str"),
    (lambda: CodingRateLoss(precision=0.0), ValueError, "precision above 0, got 0.0"),
    (lambda: coding_rate(OK, precision=math.nan), ValueError, "precision above 0, got nan"),
    (lambda: coding_rate(OK.bool()), TypeError, r"got torch\.bool"),
    (lambda: covariance_energy(OK[0, 0]), ValueError, r"got shape \(4,\)"),
    (lambda: cross_correlation_energy(OK[0], OK[0, :2]), ValueError, r"got \(3, 4\) and \(2, 4\)"),
    (lambda: cross_correlation_energy(OK, OK), ValueError, r"got \(2, 3, 4\) and \(2, 3, 4\)"),
    (lambda: cross_correlation_energy(OK[0], [OK[0]]), TypeError, "expected y to be a tensor.*got list"),
    (lambda: MMCRLoss(local_weight="1"), TypeError, "local_weight to be a number, got str"),
    (lambda: SVMaxLoss(torch.ones(())), TypeError, "weight to be a number, got Tensor"),
    (lambda: SVMaxLoss(solver="qr"), ValueError, "solver to be one of.*'qr'"),
    (lambda: CodingRateLoss(None), TypeError, "similarity_weight to be a number, got NoneType"),
    (lambda: CodingRateLoss(rate_weight="x"), TypeError, "rate_weight to be a number, got str"),
    (lambda: coding_rate(OK, precision=torch.ones(())), TypeError, "precision to be a number, got Tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_examples_in_docstrings_run():
    names = {"torch": torch} | {name: getattr(msbreg, name) for name in ("MMCRLoss", "SVMaxLoss", "CodingRateLoss")}
    result = doctest.testmod(spectral, extraglobs=names)
    assert result.attempted == 9 and result.failed == 0


GROUPED = {
    "mmcr": (lambda group: MMCRLoss(group=group), 6),
    "mmcr_local": (lambda group: MMCRLoss(0.3, group=group), 6),
    "mmcr_newton_schulz": (lambda group: MMCRLoss(solver="newton_schulz", group=group), 6),
    "mmcr_wide": (lambda group: MMCRLoss(group=group), 20),
    "svmax": (lambda group: SVMaxLoss(group=group), 6),
    "svmax_wide": (lambda group: SVMaxLoss(group=group), 20),
    "emp_ssl": (lambda group: CodingRateLoss(group=group), 6),
    "emp_ssl_wide": (lambda group: CodingRateLoss(group=group), 20),
}
ROWS, FEATURES = 12, 5  # rows of all processes together


def mine(x, group):
    return x.chunk(world_size(group), dim=1)[rank(group)]


def loss_and_gradient(make, dim, group, loss_group):
    """One pass through a linear layer; gradients averaged by DistributedDataParallel."""
    model = torch.nn.Linear(FEATURES, dim, dtype=F64)
    with torch.no_grad():
        model.weight.copy_(gaussian(dim, FEATURES, seed=1))
        model.bias.copy_(gaussian(dim, seed=2))
    ddp = model if group is None else torch.nn.parallel.DistributedDataParallel(model, process_group=group)
    loss = make(loss_group)(ddp(mine(gaussian(2, ROWS, FEATURES, seed=3), group)))
    loss.backward()
    return {"value": loss.detach(), "weight": model.weight.grad, "bias": model.bias.grad}


def all_cases(group):
    results = {name: loss_and_gradient(make, dim, group, group) for name, (make, dim) in GROUPED.items()}
    results["without the group"] = loss_and_gradient(*GROUPED["mmcr"], group, None)
    m = mine(gaussian(3, ROWS, 6, seed=6), group).clone().requires_grad_()
    rates = coding_rate(m, group=group)
    (gradient,) = torch.autograd.grad(rates @ torch.arange(1.0, 4, dtype=F64), m)
    return results | {"coding_rate": {"value": rates.detach(), "gradient": gradient}}


def worker(number, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=world)
    torch.save(all_cases(dist.group.WORLD), f"{folder}/{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two processes computed."""
    folder = tmp_path_factory.mktemp("gloo")
    multiprocessing.set_forkserver_preload(["torch", "pytest", "msbreg"])
    mp.start_processes(worker, (2, str(folder)), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


@pytest.fixture(scope="module")
def alone():
    """What one process computes on the joined batch."""
    return all_cases(None)


@pytest.mark.parametrize("case", GROUPED)
def test_two_processes_are_one(processes, alone, case):
    """Each term is of all rows, or of this process's with the mean over processes that of all: as the gradients."""
    values = torch.stack([result[case]["value"] for result in processes])
    assert torch.allclose(values.mean(), alone[case]["value"], rtol=1e-9)
    if case not in ("mmcr_local", "emp_ssl", "emp_ssl_wide"):
        assert torch.allclose(values, alone[case]["value"], rtol=1e-9)
    for result in processes:
        for name in ("weight", "bias"):
            assert torch.allclose(result[case][name], alone[case][name], rtol=1e-8, atol=1e-10)


def test_the_check_catches_a_loss_without_the_group(processes, alone):
    got = processes[0]["without the group"]
    assert not torch.allclose(got["weight"], alone["mmcr"]["weight"], rtol=1e-2)


def test_coding_rate_of_two_processes(processes, alone):
    for result in processes:
        assert torch.allclose(result["coding_rate"]["value"], alone["coding_rate"]["value"], rtol=1e-10)
    gradient = torch.cat([result["coding_rate"]["gradient"] for result in processes], dim=1)
    assert torch.allclose(gradient / 2, alone["coding_rate"]["gradient"], rtol=1e-9)
