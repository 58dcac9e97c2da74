"""Float32 matrices on tensor cores: each number is a pair of halves, high + low / 2048.

Both are float16, of 11 bits: together 22, as many as three TF32 products keep, at twice their rate. And a tile of
halves goes from memory to the tensor cores as it is, where one of float32 is taken apart in registers whenever it is
read. Low is scaled because float16's numbers end at 6e-8: without that, nothing of it is left in a number below 1e-4.

For matrices whose entries are about one: from 65520 on a number is infinite, below 6e-5 it is wrong by up to 1.5e-11.

Ootomo, Yokota, "Recovering single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak
performance", 2022, https://arxiv.org/abs/2203.03341.
"""

import triton
import triton.language as tl

__all__ = ["SCALE", "halves", "store_number"]

SCALE = tl.constexpr(2048.0)
"""Of the low half, which is then up to half as large as the high one."""


@triton.jit
def halves(x):
    """High and low, float16, of float32 numbers."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * SCALE).to(tl.float16)


@triton.jit
def store_number(pointer, low, x, mask):
    """Stores x as it is; where pointer has places of halves as a pair, whose low is `low` elements behind its high."""
    if pointer.dtype.scalar.element_ty == tl.float16:
        x_high, x_low = halves(x)
        tl.store(pointer, x_high, mask=mask)
        tl.store(pointer + low, x_low, mask=mask)
    else:
        tl.store(pointer, x, mask=mask)
