"""What a call has to move and to compute, whoever computes it: counted by formula, not measured."""

import torch

from msbreg import linalg
from msbreg.functional import SMOOTHING
from msbreg.reference import Spectrum

__all__ = ["Mode", "bytes_moved", "inverse_root_products", "spectral_flops"]

Mode = str
"""`"forward"`, `"backward"`, or `"both"`, one after the other."""


def bytes_moved(views: int, target_views: int, batch: int, dim: int, itemsize: int, mode: Mode) -> int:
    """Bytes of device memory with each input read once and each output written once; a lower bound.

    Forward reads z and t; backward reads z and writes its gradient, since of t it needs the centroids alone. `"both"`
    counts as one call: a cache that holds z from the forward to the backward pass saves reading it again. Matrices of
    K D² numbers, centroids and statistics of K B are left out: they stay in the cache at usual sizes.

    Args:
        views: of z, and of its gradient.
        target_views: of t.
        batch: B.
        dim: D.
        itemsize: bytes of a number.
        mode: what is called.
    """
    moved = {"forward": views + target_views, "backward": 2 * views, "both": 2 * views + target_views}[mode]
    return moved * batch * dim * itemsize


def spectral_flops(views: int, batch: int, dim: int, spectrum: Spectrum, mode: Mode) -> float:
    """Floating-point operations of the singular value loss of K matrices (B, D), p = min(B, D), by Gram matrices.

    Forward: one triangle of the Gram matrix, p² max(B, D); then the inverse root of `"nuclear"`, 2 p³ for each product;
    the inverse of `"coding_rate"`, p³ by a Cholesky factor. Backward: the product with the weight, 2 p B D.
    """
    p = min(batch, dim)
    inverse = {"nuclear": 2.0 * inverse_root_products(p) * p**3, "coding_rate": 1.0 * p**3, "whitening": 0.0}
    forward = p * p * max(batch, dim) + inverse[spectrum]
    backward = 2.0 * p * batch * dim
    return views * (forward * (mode != "backward") + backward * (mode != "forward"))


def inverse_root_products(rank: int) -> int:
    """Products of p x p matrices that Newton-Schulz takes in float32, for unit rows and the default smoothing.

    Three a step, but for two that the first step need not make, where one factor is I, and one that the last need not.
    """
    _, steps = linalg.newton_schulz_plan(SMOOTHING**2 / rank, torch.float32)
    return 3 * len(steps) - 3
