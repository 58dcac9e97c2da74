"""Schedules: pure functions of the step, so that a resumed run needs nothing but the step to go on.

Formulas are those of BYOL (Grill et al., NeurIPS 2020, https://arxiv.org/abs/2006.07733, section 3.3 and appendix).
"""

import math

__all__ = ["ema_tau", "scaled_lr", "warmup_cosine"]


def _cosine(step: float, steps: float) -> float:
    """From 1 at step 0 to 0 at `steps`, and 0 after it."""
    return 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps)) if steps > 0 else 0.0


def warmup_cosine(step: int, steps: int, warmup_steps: int, base: float) -> float:
    """Rises linearly from 0 to `base`, then falls to 0 by half a cosine.

    Args:
        step: optimizer steps taken so far; 0 for the first one.
        steps: steps of the whole run; from there on the value is 0.
        warmup_steps: steps of the rise; with 0 the first value is `base`.
        base: the peak, reached at `warmup_steps`.

    Raises:
        ValueError: where the warm-up is longer than the run.
    """
    if warmup_steps > steps:
        raise ValueError(f"expected a warm-up no longer than the run, got {warmup_steps} of {steps} steps")
    if step < warmup_steps:
        return base * step / warmup_steps
    return base * _cosine(step - warmup_steps, steps - warmup_steps)


def ema_tau(step: int, steps: int, base: float = 0.996) -> float:
    """Momentum of the EMA network, 1 - (1 - base)(cos(pi step / steps) + 1) / 2: `base` at step 0, 1 at `steps`.

    Args:
        step: optimizer steps taken so far; 0 for the first one.
        steps: steps of the whole run; from there on the value is 1 and the EMA network stands still.
        base: momentum at the start; BYOL's default.
    """
    return 1.0 - (1.0 - base) * _cosine(step, steps)


def scaled_lr(base: float, batch: int) -> float:
    """Learning rate for `batch` images a step over all processes, where `base` is the one for 256."""
    return base * batch / 256
