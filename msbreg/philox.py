"""Philox4x32-10, the counter-based generator behind all of msbreg's randomness.

A counter-based generator is a pure function: the same counter and key give the same four words, whatever was drawn
before, on whatever device, by however many processes. That is why noise and augmentation here do not depend on block
size, world size or where a run was resumed.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

Who owns which counters under one seed (the key), so that no two streams ever meet:

====================  =================  ================  ===============  =======================
stream                c0                 c1                c2               c3
====================  =================  ================  ===============  =======================
Brownian noise        dimension // 4     global image      step             0, or 1 + view
augmentation          draw // 4          sample, low word  sample, high     2**31 + view
order of images       image              epoch             0                2**32 - 1
====================  =================  ================  ===============  =======================
"""

import math

import torch
from torch import Tensor

__all__ = ["key_from_seed", "normals", "philox4x32", "uniforms"]

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF
ROUNDS = 10


def key_from_seed(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """Splits a 64-bit seed into the two 32-bit key words, low word first."""
    return seed & WORD, (seed >> 32) & WORD


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, ...]:
    """Four random 32-bit words per counter.

    Args:
        counter: four int64 tensors of values in [0, 2**32) that broadcast together; any device.
        seed: 64-bit seed, a Python int or a zero-dimensional int64 tensor.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32), bit for bit those of Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key_from_seed(seed)
    for _ in range(ROUNDS):
        # All 64 bits are as they should be, since int64 wraps around. The low half goes on with the high one above it,
        # which the mask takes off before it is multiplied again.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c2 = ((product_1 >> 32) ^ c1 ^ k0) & WORD, ((product_0 >> 32) ^ c3 ^ k1) & WORD
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + WEYL_0) & WORD, (k1 + WEYL_1) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def uniforms(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Words to float32 in the open interval (0, 1): the upper 23 bits plus a half, exact in float32."""
    return tuple(((word >> 9).to(torch.float32) + 0.5) * 2.0**-23 for word in words)


def normals(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four words to four standard normals, float32, by two Box-Muller pairs; none exceeds 5.77 in size."""
    u0, u1, u2, u3 = uniforms(words)
    radius_0, angle_0 = torch.sqrt(-2.0 * torch.log(u0)), (2.0 * math.pi) * u1
    radius_1, angle_1 = torch.sqrt(-2.0 * torch.log(u2)), (2.0 * math.pi) * u3
    return (
        radius_0 * torch.cos(angle_0),
        radius_0 * torch.sin(angle_0),
        radius_1 * torch.cos(angle_1),
        radius_1 * torch.sin(angle_1),
    )
