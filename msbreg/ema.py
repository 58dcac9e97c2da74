"""The target network: an exponential moving average of the online one."""

import torch
from torch import Tensor

__all__ = ["ema_update"]


@torch.no_grad()
def ema_update(target: tuple[Tensor, ...], online: tuple[Tensor, ...], tau: float) -> None:
    """Moves the target's parameters in place: target <- tau target + (1 - tau) online.

    Buffers are not for it. As in BYOL, the target's batch normalisation is in training mode on batches of its own, so
    that it keeps statistics of its own, which fit its own weights.

    Args:
        target: parameters of the network that follows; any device and dtype, the same as the online one's.
        online: those of the network that the optimizer trains, in the same order.
        tau: momentum in [0, 1]; 1 leaves the target as it is (BYOL, Grill et al. 2020, equation 1).
    """
    torch._foreach_lerp_(target, online, 1.0 - tau)
