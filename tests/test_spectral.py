"""Singular value loss, nuclear norm and linalg against a singular value decomposition in float64 with autograd."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from msbreg import linalg, reference
from msbreg.functional import nuclear_norm, singular_value_loss

F64, F32 = torch.float64, torch.float32
SPECTRA = ["nuclear", "whitening", "coding_rate"]
# Solver and spectrum: the solver matters to one spectrum alone.
CASES = [
    ("nuclear", "eigh"),
    ("nuclear", "newton_schulz"),
    ("nuclear", "svd"),
    ("whitening", "auto"),
    ("coding_rate", "auto"),
]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def orthonormal(n, d, seed=1):
    return torch.linalg.qr(gaussian(n, d, seed=seed)).Q


def with_spectrum(n, d, s):
    r = min(n, d)
    return orthonormal(n, r) * s @ orthonormal(d, r, seed=2).T


def families(n, d):
    """Matrices (N, D) in float64 by name; the loss normalises their rows."""
    r = min(n, d)
    j = torch.arange(r, dtype=F64)
    noise, point = gaussian(n, d), gaussian(1, d, seed=3)
    return {
        "gaussian": noise,
        "flat": orthonormal(d, d).repeat(math.ceil(n / d), 1)[:n],
        "geometric": with_spectrum(n, d, 10 ** (-3 * j / max(r - 1, 1))),
        "power_law": with_spectrum(n, d, 1 / (1 + j)),
        "clustered": with_spectrum(n, d, torch.where(j < r / 2, 1.0, 0.01).to(F64)),
        "repeated": with_spectrum(n, d, torch.where(j < r / 2, 1.0, 0.5).to(F64)),
        "rank_deficient": with_spectrum(n, d, (j < max(r // 4, 1)).to(F64)),
        "near_collapse": point + 1e-3 * noise,
        "collapsed": point.repeat(n, 1),
        "zero_rows": noise * (torch.arange(n) % 3 > 0)[:, None],
        "all_zero": 0 * noise,
        "duplicates": noise[torch.arange(n) // 4],
        "huge": 1e30 * noise,
        "tiny": 1e-6 * noise,
        "mixed_scales": noise * 10 ** torch.linspace(-8, 8, n, dtype=F64)[:, None],
    }


def f_of(s, r, n, d, spectrum, smoothing):
    """f of the singular values, (..., r), written out."""
    scaled = s * math.sqrt(r / n)
    if spectrum == "nuclear":
        return (torch.sqrt(scaled**2 + smoothing**2) - 1) ** 2
    if spectrum == "whitening":
        return (scaled**2 - 1) ** 2
    return -0.5 * torch.log(1 + d / (n * 0.2) * s**2)


def oracle_value(z, spectrum, smoothing=0.03):
    """The definition, in the dtype of z: rows to unit length, singular values, f, mean over views."""
    n, d = z.shape[-2:]
    s = torch.linalg.svdvals(z / z.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    return f_of(s, min(n, d), n, d, spectrum, smoothing).sum(-1).mean()


def value_and_gradient(loss, z):
    z = z.detach().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


def gradient_error(z, gradient, expected):
    """RMS of the error over RMS of the gradient, both times |z|; the latter at least 1e-2 of the untangential force.

    That bound serves flat and collapsed spectra, whose gradient is zero.
    """
    length = z.to(F64).norm(dim=-1, keepdim=True)
    force = 2 * min(z.shape[-2:]) / z.shape[-2] * length.count_nonzero() ** 0.5
    error, size = ((gradient.to(F64) - expected) * length).norm(), (expected * length).norm()
    return (error / torch.maximum(size, 1e-2 * force).clamp_min(1e-300)).item()


def test_gradient_error_sees_a_wrong_factor_and_a_radial_part():
    z = families(96, 32)["gaussian"]
    _, expected = value_and_gradient(lambda z: oracle_value(z, "nuclear"), z)
    for wrong in (1.001 * expected, expected + 1e-3 * z / z.norm(dim=-1, keepdim=True) ** 2):
        assert gradient_error(z, wrong, expected) > 5e-4


def test_families_are_what_they_say():
    s = {name: torch.linalg.svdvals(normalize(z, dim=-1)) for name, z in families(64, 16).items()}
    assert torch.allclose(s["flat"], torch.full_like(s["flat"], 2.0))
    assert (s["rank_deficient"] > 1e-9).sum() == 4
    assert (s["collapsed"] > 1e-9).sum() == 1
    assert s["near_collapse"][1] < 0.02 * s["near_collapse"][0]


@pytest.mark.parametrize(("spectrum", "solver"), CASES)
@pytest.mark.parametrize("shape", [(2, 12, 5), (2, 5, 12)])
def test_gradient_before_it_is_made_tangential(shape, spectrum, solver):
    """Of Σ f(s²) for any M: normalised rows would hide a wrong radial part."""
    rows, dim = shape[1:]
    r, m = min(rows, dim), gaussian(*shape) / 3

    def root(gram, shift):
        return linalg.inverse_root(gram, shift, linalg.resolve_solver(solver, m.device), m, 0.0)

    options = {"rows": rows, "dim": dim, "spectrum": spectrum, "smoothing": 0.03}
    values, weight = reference.singular_value_loss(linalg.gram(m), root, **options)
    definition = lambda m: f_of(torch.linalg.svdvals(m), r, rows, dim, spectrum, 0.03).sum()  # noqa: E731
    expected, expected_gradient = value_and_gradient(definition, m)
    assert torch.allclose(values.sum(), expected)
    assert torch.allclose(linalg.multiply(m, weight), expected_gradient)


@pytest.mark.parametrize(("spectrum", "solver"), CASES)
@pytest.mark.parametrize("shape", [(96, 32), (20, 48), (32, 32), (1, 8), (7, 1), (1, 1)])
def test_float64_equals_the_oracle(shape, spectrum, solver):
    for name, z in families(*shape).items():
        value, gradient = value_and_gradient(lambda z: singular_value_loss(z, spectrum=spectrum, solver=solver), z)
        expected, expected_gradient = value_and_gradient(lambda z: oracle_value(z, spectrum), z)
        expected_gradient[z.norm(dim=-1) == 0] = 0  # the oracle's is 1e12 times too large to be of use
        assert value.item() == pytest.approx(expected.item(), rel=1e-10, abs=1e-10), name
        assert gradient_error(z, gradient, expected_gradient) < 1e-9, name


# What float32 Gram matrices hold near collapse; see `test_full_size_near_collapse` for the size that is trained.
F32_TOLERANCE = {"flat": 1e-4, "rank_deficient": 3e-3, "near_collapse": 1e-2, "collapsed": 1e-2, "clustered": 1e-3,
                 "geometric": 1e-3, "duplicates": 1e-3}  # fmt: skip


@pytest.mark.parametrize(("spectrum", "solver"), CASES)
@pytest.mark.parametrize("shape", [(96, 32), (20, 48), (32, 32), (1, 8)])
def test_float32_is_close_to_the_oracle(shape, spectrum, solver):
    for name, z in families(*shape).items():
        z = z.to(F32)
        value, gradient = value_and_gradient(lambda z: singular_value_loss(z, spectrum=spectrum, solver=solver), z)
        expected, expected_gradient = value_and_gradient(lambda z: oracle_value(z, spectrum), z.to(F64))
        expected_gradient[z.norm(dim=-1) == 0] = 0
        assert value.dtype == F32 and gradient.dtype == F32
        assert abs(value.item() - expected.item()) < 1e-4 * min(shape) + 1e-6 * abs(expected.item()), name
        assert gradient_error(z, gradient, expected_gradient) < F32_TOLERANCE.get(name, 2e-4), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("solver", ["eigh", "newton_schulz"])
@pytest.mark.parametrize(
    ("name", "tolerance"), [("near_collapse", 2e-2), ("power_law", 3e-3), ("geometric", 3e-3), ("flat", 1e-5)]
)
def test_full_size_near_collapse(solver, name, tolerance, device):
    z = families(512, 256)[name].to(F32)
    _, gradient = value_and_gradient(lambda z: singular_value_loss(z, solver=solver), z.to(device))
    gradient = gradient.cpu()
    _, expected = value_and_gradient(lambda z: oracle_value(z, "nuclear"), z.to(F64))
    scale = 2 * 256 / 512 * z.norm(dim=-1, keepdim=True).mean() ** -1 * 512**0.5 if name == "flat" else expected.norm()
    assert ((gradient - expected).norm() / scale).item() < tolerance


def newton_schulz_variant(gram, shift, *, cap, y_on_the_left=True, mirrored=False):
    """`linalg.newton_schulz` for rows of unit length, with each of its three choices open, and its number of steps."""
    dim = gram.shape[-1]
    smallest = float(shift / gram.trace())
    x, scales = math.sqrt(smallest / (1 + smallest)), []
    while 1 - x > 2**-23:
        scales.append(min(cap, math.sqrt(3 / (1 + x + x**2))))
        c = scales[-1]
        x = min(1.5 * c * x - 0.5 * c**3 * x**3, 1.5 * c - 0.5 * c**3)
    size, eye = gram.norm() + shift, torch.eye(dim)
    y, z = (gram + shift * eye) / size, eye
    keep = (lambda m: m.tril() + m.tril(-1).T) if mirrored else (lambda m: m)
    for c in scales:
        t = 1.5 * c * eye - 0.5 * c**3 * keep(y @ z if y_on_the_left else z @ y)
        y, z = (keep(t @ y), keep(z @ t)) if y_on_the_left else (keep(y @ t), keep(t @ z))
    return z * size.rsqrt(), len(scales)


def test_what_newton_schulz_owes_to_its_order_its_cap_and_its_scales():
    """Twins without one of them, on rows that point one way but for 1e-4; the figures are in `docs/decisions.md`."""
    n, d = 512, 256
    m = normalize(gaussian(1, d, seed=3) + 1e-4 * gaussian(n, d), dim=-1).to(F32)
    gram, shift = linalg.gram(m), 0.03**2 * n / d
    values, vectors = torch.linalg.eigh(linalg.gram(m.to(F64)))
    exact = tangential(m, (vectors * (values + shift).rsqrt()) @ vectors.T)

    def error(root):
        return ((tangential(m, root) - exact).norm() / exact.norm()).item()

    cap = linalg.NEWTON_SCHULZ_SCALE
    ours, steps = newton_schulz_variant(gram, shift, cap=cap)
    not_scaled, more_steps = newton_schulz_variant(gram, shift, cap=1.0)
    assert error(linalg.newton_schulz(gram, shift, trace=n)) == pytest.approx(error(ours), rel=0.1)
    assert error(ours) < 1.2e-2 and error(not_scaled) < 1.2e-2  # what a float32 Gram matrix holds
    assert (steps, more_steps) == (10, 20)
    assert [len(linalg.newton_schulz_plan(0.03**2 / d, F32)[1]) for d in (256, 512, 2048)] == [steps, 11, 11]
    assert error(newton_schulz_variant(gram, shift, cap=math.sqrt(3))[0]) > 3 * error(ours)
    assert error(newton_schulz_variant(gram, shift, cap=cap, y_on_the_left=False)[0]) > 3 * error(ours)
    assert not error(newton_schulz_variant(gram, shift, cap=cap, mirrored=True)[0]) < 1  # or NaN


def tangential(m, root):
    """M A^(-1/2) in float64, without what lies along each row."""
    force = m.to(F64) @ root.to(F64)
    return force - m * (force * m).sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_half_precision_loses_nothing_but_the_rounding_of_the_gradient(dtype, spectrum):
    z = gaussian(2, 64, 16).to(dtype)
    value, gradient = value_and_gradient(lambda z: singular_value_loss(z, spectrum=spectrum), z)
    raised, exact = value_and_gradient(lambda z: singular_value_loss(z, spectrum=spectrum), z.to(F32))
    assert value.dtype == F32 and torch.equal(value, raised)
    assert gradient.dtype == dtype and torch.equal(gradient, exact.to(dtype))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5), (1, 4, 4)])
def test_gradcheck(spectrum, shape):
    z = gaussian(*shape).requires_grad_()
    solvers = ("eigh", "newton_schulz", "svd") if spectrum == "nuclear" else ("auto",)
    for solver in solvers:
        assert torch.autograd.gradcheck(lambda z: singular_value_loss(z, spectrum=spectrum, solver=solver), (z,))  # noqa: B023


def test_views_are_averaged_and_two_dimensions_are_one_view():
    z = gaussian(3, 20, 8)
    each = [singular_value_loss(view).item() for view in z]
    assert singular_value_loss(z).item() == pytest.approx(sum(each) / 3, rel=1e-12)
    assert singular_value_loss(list(z)).item() == pytest.approx(sum(each) / 3, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("solver", ["eigh", "svd"])
def test_smoothing(smoothing, solver):
    z = gaussian(24, 8)
    loss = lambda z: singular_value_loss(z, smoothing=smoothing, solver=solver)  # noqa: E731
    value, gradient = value_and_gradient(loss, z)
    expected, expected_gradient = value_and_gradient(lambda z: oracle_value(z, "nuclear", smoothing), z)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert gradient_error(z, gradient, expected_gradient) < 1e-10


def test_without_smoothing_a_collapsed_spectrum_still_has_a_gradient():
    for dtype in (F32, F64):
        _, gradient = value_and_gradient(
            lambda z: singular_value_loss(z, smoothing=0.0), families(32, 8)["collapsed"].to(dtype)
        )
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("spectrum", "solver"), CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(2, 12, 4), (2, 4, 12)])
def test_not_finite_in_nan_out_and_other_views_untouched(spectrum, solver, bad, shape):
    clean = gaussian(*shape)
    z = clean.clone()
    z[0, 1, 2] = bad
    loss = lambda z: singular_value_loss(z, spectrum=spectrum, solver=solver)  # noqa: E731
    value, gradient = value_and_gradient(loss, z)
    assert value.isnan()
    assert gradient[0].isnan().all()
    assert torch.allclose(gradient[1], value_and_gradient(loss, clean)[1][1])


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "svd"])
@pytest.mark.parametrize("shape", [(3, 12, 5), (3, 5, 12), (3, 6, 6)])
def test_nuclear_norm_and_its_polar_gradient(solver, shape):
    m = gaussian(*shape)
    values = nuclear_norm(m, solver=solver)
    assert torch.allclose(values, torch.linalg.matrix_norm(m, "nuc"), rtol=1e-9)
    _, gradient = value_and_gradient(lambda m: nuclear_norm(m, solver=solver).sum(), m)
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    assert torch.allclose(gradient, u @ vt, atol=1e-8)
    assert torch.allclose(linalg.polar(m, solver=solver), u @ vt, atol=1e-8)
    assert torch.allclose(linalg.polar(m[0], solver=solver), (u @ vt)[0], atol=1e-8)
    assert torch.autograd.gradcheck(lambda m: nuclear_norm(m, solver=solver, smoothing=0.1), (m.requires_grad_(),))


def test_nuclear_norm_smoothing():
    m = gaussian(9, 4)
    s = torch.linalg.svdvals(m)
    for solver in ("eigh", "newton_schulz", "svd"):
        value = nuclear_norm(m, smoothing=0.5, solver=solver)
        assert value.shape == () and value.item() == pytest.approx((s**2 + 0.25).sqrt().sum().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("solver", "dtype", "tolerance"),
    [("eigh", F64, 1e-9), ("svd", F64, 1e-9), ("eigh", F32, 1e-5), ("svd", F32, 1e-5), ("newton_schulz", F32, 1e-3),
     ("newton_schulz", F64, 1e-7)],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(64, 24), (24, 64)])
def test_rank_deficient_gives_the_polar_factor_of_the_nonzero_part(solver, dtype, tolerance, shape):
    left, right = gaussian(shape[0], 5), gaussian(5, shape[1], seed=1)
    m = (left @ right).to(dtype)
    u, _, vt = torch.linalg.svd(m.to(F64), full_matrices=False)
    expected = u[:, :5] @ vt[:5]
    value, gradient = value_and_gradient(lambda m: nuclear_norm(m, solver=solver), m)
    assert value.item() == pytest.approx(torch.linalg.matrix_norm(m.to(F64), "nuc").item(), rel=1e-3)
    assert ((gradient - expected).norm() / expected.norm()).item() < tolerance


def test_one_direction_with_rows_of_zeros_is_decomposed():
    """One live unit behind a ReLU: of some seeds LAPACK's float32 eigh finds no end for these, of others NaN."""
    found = 0
    for seed in range(60):
        z = torch.zeros(2, 64, 128)
        z[..., 0] = gaussian(2, 64, seed=seed).float().relu()
        value, gradient = value_and_gradient(lambda z: singular_value_loss(z, solver="eigh"), z)
        assert value.isfinite() and gradient.isfinite().all()
        row_unit = torch.nn.functional.normalize(z, dim=-1)
        try:
            found += not torch.linalg.eigh(row_unit @ row_unit.mT)[1].isfinite().all()
        except torch.linalg.LinAlgError:
            found += 1
    if not found:
        pytest.skip("this machine's LAPACK decomposes them all anyway")


@pytest.mark.parametrize("smoothing", [1e-5, 1e-4])
def test_eigenvalues_that_rounding_takes_below_zero_have_a_root(smoothing):
    for seed in range(5):
        z = gaussian(2, 48, 2, seed=seed).float() @ gaussian(2, 2, 32, seed=seed + 9).float()  # of rank two
        value, gradient = value_and_gradient(lambda z: singular_value_loss(z, solver="eigh", smoothing=smoothing), z)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "svd"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_nuclear_norm_of_zero_and_of_odd_scales(solver, dtype):
    value, gradient = value_and_gradient(lambda m: nuclear_norm(m, solver=solver), torch.zeros(6, 4, dtype=dtype))
    assert value.item() == 0 and torch.equal(gradient, torch.zeros_like(gradient))
    m = gaussian(12, 5).to(dtype)
    _, expected = value_and_gradient(lambda m: nuclear_norm(m, solver=solver), m)
    tolerance = 1e-4 if dtype == F32 else 1e-9
    for scale in (1e-13, 1e-8, 1e8, 1e14):  # of the last, and of the first, the squared Gram matrix is no float32
        value, gradient = value_and_gradient(lambda m: nuclear_norm(m, solver=solver), scale * m)
        assert torch.allclose(gradient, expected, atol=tolerance)
        assert value.item() == pytest.approx(scale * torch.linalg.matrix_norm(m, "nuc").item(), rel=tolerance)
        assert torch.allclose(linalg.polar(scale * m, solver=solver), expected, atol=tolerance)


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "svd"])
def test_the_polar_factor_keeps_its_digits_inside_autocast(solver):
    m = gaussian(64, 32).float()
    outside = linalg.polar(m, solver=solver)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linalg.polar(m, solver=solver), outside)


@pytest.mark.parametrize("solver", ["eigh", "newton_schulz", "svd"])
def test_nuclear_norm_of_nan(solver):
    m = gaussian(2, 6, 4)
    m[0, 0, 0] = math.nan
    values = nuclear_norm(m, solver=solver)
    assert values[0].isnan() and values[1].isfinite()
    assert linalg.polar(m, solver=solver)[0].isnan().any()


def test_mmcr_in_one_line():
    """As `nuclear_norm`'s docstring has it, against autograd."""
    z = gaussian(4, 20, 6)
    mmcr = lambda z: -nuclear_norm(normalize(z, dim=-1).mean(0))  # noqa: E731
    value, gradient = value_and_gradient(mmcr, z)
    reference = lambda z: -torch.linalg.matrix_norm(normalize(z, dim=-1).mean(0), "nuc")  # noqa: E731
    expected, expected_gradient = value_and_gradient(reference, z)
    assert torch.allclose(value, expected) and torch.allclose(gradient, expected_gradient, atol=1e-9)


def test_singular_values_keep_small_ones():
    s = torch.tensor([1.0, 1e-3, 1e-5], dtype=F64)
    got = linalg.singular_values(with_spectrum(40, 3, s).to(F32))
    assert got.dtype == F32
    assert torch.allclose(got.to(F64), s, rtol=2e-2, atol=0)  # through a float32 Gram matrix the last would be noise
    assert linalg.singular_values(gaussian(2, 3, 4, 7).to(torch.bfloat16)).shape == (2, 3, 4)


def test_singular_values_of_nan():
    m = gaussian(2, 5, 3)
    m[1, 2, 0] = math.inf
    s = linalg.singular_values(m)
    assert s[0].isfinite().all() and s[1].isnan().all()


def test_effective_rank():
    flat, collapsed = families(64, 16)["flat"], families(64, 16)["collapsed"]
    assert linalg.effective_rank(torch.stack((flat, collapsed, 0 * flat))).tolist() == pytest.approx([16, 1, 0])
    p = torch.tensor([0.75, 0.25], dtype=F64)
    entropy = -(p * p.log()).sum()
    assert linalg.effective_rank(with_spectrum(9, 2, 8 * p)).item() == pytest.approx(math.exp(entropy))
    assert linalg.effective_rank(torch.full((3, 2), math.nan)).isnan()
    m = gaussian(8, 6).to(F32)
    assert linalg.effective_rank(2e37 * m).item() == pytest.approx(linalg.effective_rank(m).item())


@pytest.mark.parametrize("solver", ["eigh", "svd"])
def test_exact_solvers_keep_the_digits_of_unequal_singular_values(solver):
    s = torch.full((16,), 1e-4, dtype=F64)
    s[0] = 1
    m = with_spectrum(64, 16, s).to(F32)
    assert nuclear_norm(m, solver=solver).item() == pytest.approx(linalg.singular_values(m.double()).sum().item(), 1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)])
def test_matrices_without_entries(shape):
    m = torch.empty(shape)
    assert linalg.polar(m).shape == shape and (linalg.effective_rank(m) == 0).all()


def test_the_solver_that_is_chosen_is_the_exact_one_but_on_gpus():
    chosen = {device: linalg.resolve_solver("auto", torch.device(device)) for device in ("cpu", "meta", "cuda")}
    assert chosen == {"cpu": "eigh", "meta": "eigh", "cuda": "newton_schulz"}


@pytest.mark.parametrize("function", [linalg.singular_values, linalg.effective_rank, linalg.polar])
def test_linalg_refuses(function):
    with pytest.raises(ValueError, match=r"\(\.\.\., N, D\), got shape \(3,\)"):
        function(torch.ones(3))
    with pytest.raises(TypeError, match=r"floating-point matrix, got torch\.int64"):
        function(torch.ones(3, 3, dtype=torch.int64))
