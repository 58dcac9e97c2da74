"""What is timed: the fused loss and its parts, the same mathematics as others would write it, and other losses.

A loss here takes z, (K, B, D), or of it the views that it reads, t, (K, B, D), and, for the check before the timing
alone, n, (B, D), in place of the noise that it would draw. It returns a scalar.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor
from torch.nn.functional import normalize

from msbreg import MSBRegLoss, SingularValueLoss, linalg
from msbreg.functional import LAMBDA_B, LAMBDA_S, SMOOTHING
from msbreg.reference import CODING_PRECISION, Spectrum

__all__ = ["SEED", "Loss", "Provider", "Terms", "by_gram", "by_svd", "definition", "providers"]

Loss = Callable[..., Tensor]
Spectral = Callable[[Tensor], Tensor]
"""M, (K, N, D), to (K,)."""
Terms = Literal["all", "rows", "spectral"]

SEED = 0
"""Of the fused loss's noise."""

torch._functorch.config.donated_buffer = False  # of compiled losses, whose backward passes are timed again and again


@dataclass(frozen=True)
class Provider:
    """One way to compute a loss."""

    name: str
    about: str
    build: Callable[[torch.device], Loss]
    terms: Terms | None = "all"
    """Which terms of the MSBReg loss it computes: what it is checked against. None for other mathematics."""
    views: int | None = None
    """Of z, that it reads: None for all K."""
    targets: bool = True
    """Whether it reads t."""
    decomposition: Literal["svd", "eigh"] | None = None
    waits: bool = False
    """Whether a call waits for the device, so that no CUDA graph can hold it."""
    needs: str | None = None
    """A package that has to be installed."""
    compiled: bool = False

    def reads(self, views: int) -> tuple[int, int]:
        """How many views of z, and of t, it reads where there are so many."""
        of_z = self.views or views
        return of_z, of_z if self.targets else 0

    @property
    def missing(self) -> bool:
        """Whether the package that it needs is not installed."""
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


def providers(spectrum: Spectrum) -> dict[str, Provider]:
    """All providers by name, those first that matter most where time is short."""
    # The other spectra are functions of the Gram matrix without its eigenvalues.
    eigen: dict[str, Any] = {"decomposition": "eigh", "waits": True} if spectrum == "nuclear" else {}
    pair: dict[str, Any] = {"terms": None, "views": 2, "targets": False, "needs": "lightly"}
    ours = by_newton_schulz(spectrum)
    table = (
        Provider("fused", "msbreg.MSBRegLoss", lambda device: fused(device, spectrum)),
        Provider(
            "svd",
            "plain torch with torch.linalg.svdvals and autograd",
            lambda device: definition(by_svd(spectrum)),
            decomposition="svd",
            waits=True,
        ),
        Provider(
            "newton_schulz_compiled",
            "plain torch with Gram matrices and the package's Newton-Schulz iteration, under torch.compile",
            lambda device: compiled(ours),
            compiled=True,
        ),
        Provider("newton_schulz", "the same, not compiled", lambda device: definition(ours)),
        Provider(
            "lightly_mmcr",
            "other mathematics: lightly's MMCRLoss on z and t",
            lambda device: lightly_mmcr(),
            terms=None,
            decomposition="svd",
            waits=True,
            needs="lightly",
        ),
        Provider(
            "lightly_vicreg",
            "other mathematics: lightly's VICRegLoss on two of the views",
            lambda device: lightly_pair("VICRegLoss"),
            waits=True,
            **pair,
        ),
        Provider(
            "lightly_barlow_twins",
            "other mathematics: lightly's BarlowTwinsLoss on two of the views",
            lambda device: lightly_pair("BarlowTwinsLoss"),
            **pair,
        ),
        Provider(
            "gram",
            "plain torch with Gram matrices, torch.linalg.eigvalsh for the nuclear spectrum, and autograd",
            lambda device: definition(by_gram(spectrum)),
            **eigen,
        ),
        Provider(
            "gram_compiled",
            "the same under torch.compile",
            lambda device: compiled(by_gram(spectrum)),
            compiled=True,
            **eigen,
        ),
        Provider(
            "fused_compiled",
            "msbreg.MSBRegLoss under torch.compile",
            lambda device: torch.compile(fused(device, spectrum), dynamic=False),
            compiled=True,
        ),
        Provider("fused_rows", "a part: msbreg.MSBRegLoss(lambda_s=0)", fused_rows, terms="rows"),
        Provider(
            "fused_spectral",
            "a part: msbreg.SingularValueLoss",
            lambda device: fused_spectral(spectrum),
            terms="spectral",
            targets=False,
        ),
    )
    return {provider.name: provider for provider in table}


def fused(device: torch.device, spectrum: Spectrum) -> Loss:
    """The package's loss. Its noise is its own, that of step 0 in the first call."""
    criterion = MSBRegLoss(spectrum=spectrum, seed=SEED).to(device)
    return lambda z, t, n=None: criterion(z, t).loss


def fused_rows(device: torch.device) -> Loss:
    """The package's loss without the singular value loss: what is left does little but move memory."""
    criterion = MSBRegLoss(lambda_s=0.0, seed=SEED).to(device)
    return lambda z, t, n=None: criterion(z, t).loss


def fused_spectral(spectrum: Spectrum) -> Loss:
    """The package's singular value loss alone."""
    criterion = SingularValueLoss(spectrum=spectrum)
    return lambda z, t, n=None: criterion(z)


def definition(spectral: Spectral, terms: Terms = "all") -> Loss:
    """L_M + λ_s L_S + λ_b L_B in plain torch.

    Half precisions are raised to float32, as in the package. The noise is `torch.randn`, which costs far less than a
    counter-based generator written in torch.

    Args:
        spectral: L_S of each view.
        terms: `"rows"` leaves out L_S, `"spectral"` is L_S alone, without its weight.
    """
    return _with_noise(functools.partial(_definition, spectral=spectral, terms=terms))


def compiled(spectral: Spectral) -> Loss:
    """`definition` under torch.compile, but for the noise: it is drawn before, so that the check can give its own."""
    return _with_noise(torch.compile(functools.partial(_definition, spectral=spectral), dynamic=False))


def _with_noise(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Loss:
    def noisy(z: Tensor, t: Tensor, n: Tensor | None = None) -> Tensor:
        return loss(z, t, torch.randn(z.shape[1:], device=z.device) if n is None else n)

    return noisy


def _definition(z: Tensor, t: Tensor, n: Tensor, *, spectral: Spectral, terms: Terms = "all") -> Tensor:
    dtype = torch.promote_types(z.dtype, torch.float32)
    z_hat = normalize(z.to(dtype), dim=-1)
    if terms == "spectral":
        return spectral(z_hat).mean()
    c_hat = normalize(normalize(t.to(dtype), dim=-1).mean(0), dim=-1)
    attraction = (z_hat - c_hat).square().sum(-1).mean()
    push = (z_hat * normalize(n, dim=-1)).sum(-1).mean()
    rows = attraction + LAMBDA_B * push
    return rows if terms == "rows" else rows + LAMBDA_S * spectral(z_hat).mean()


def by_svd(spectrum: Spectrum) -> Spectral:
    """Σ_j f(s_j²) by singular values."""
    return lambda m: _f(torch.linalg.svdvals(m).square(), spectrum, m)


def by_gram(spectrum: Spectrum) -> Spectral:
    """Σ_j f(s_j²) by the Gram matrix G on the smaller side: its eigenvalues, a polynomial, or a Cholesky factor."""

    def spectral(m: Tensor) -> Tensor:
        c, a = _scales(m)
        g = _gram(m)
        identity = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
        if spectrum == "whitening":
            return (c * g - identity).square().sum((-2, -1))
        if spectrum == "coding_rate":
            factor, _ = torch.linalg.cholesky_ex(identity + a * g)
            return -factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return _f(torch.linalg.eigvalsh(g).clamp_min(0), spectrum, m)

    return spectral


def by_newton_schulz(spectrum: Spectrum) -> Spectral:
    """As `by_gram`, but without eigenvalues: Σ sqrt(cλ + δ²) = trace(A^(1/2)), of which ½ A^(-1/2) is the gradient.

    The iteration has the package's coefficients, so that the fused kernels are compared with as many products.
    """
    if spectrum != "nuclear":
        return by_gram(spectrum)

    def spectral(m: Tensor) -> Tensor:
        c, _ = _scales(m)
        g = _gram(m)
        inverse_root = linalg.newton_schulz(g.detach(), SMOOTHING**2 / c, m.shape[-2]) / c**0.5
        trace = c * g.diagonal(dim1=-2, dim2=-1).sum(-1)
        product = c * (g * inverse_root).sum((-2, -1))
        shift = SMOOTHING**2 * inverse_root.diagonal(dim1=-2, dim2=-1).sum(-1)
        root = product / 2 + product.detach() / 2 + shift  # <A, A^(-1/2)>, but for the factor of its gradient
        return trace + g.shape[-1] * (1 + SMOOTHING**2) - 2 * root

    return spectral


def _gram(m: Tensor) -> Tensor:
    return m @ m.mT if m.shape[-2] < m.shape[-1] else m.mT @ m


def _scales(m: Tensor) -> tuple[float, float]:
    """c = r / N and a = D / (N ε)."""
    rows, dim = m.shape[-2:]
    return min(rows, dim) / rows, dim / (rows * CODING_PRECISION)


def _f(squares: Tensor, spectrum: Spectrum, m: Tensor) -> Tensor:
    """Σ_j f(s_j²), (K,), of the squared singular values (K, r) of M."""
    c, a = _scales(m)
    if spectrum == "whitening":
        return (c * squares - 1).square().sum(-1)
    if spectrum == "coding_rate":
        return -0.5 * torch.log1p(a * squares).sum(-1)
    return ((c * squares + SMOOTHING**2).sqrt() - 1).square().sum(-1)


def lightly_mmcr() -> Loss:
    """lightly's MMCR, which wants images first. It has no SVD in half precision: what users do is raise it."""
    from lightly.loss import MMCRLoss

    criterion = MMCRLoss()
    return lambda z, t, n=None: criterion(z.float().transpose(0, 1), t.float().transpose(0, 1))


def lightly_pair(name: str) -> Loss:
    """One of lightly's losses of two views, which is all that z has: (2, B, D)."""
    import lightly.loss

    criterion = getattr(lightly.loss, name)()
    return lambda z, t, n=None: criterion(*z.unbind())
