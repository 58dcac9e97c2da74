"""Optimizers: LARS, and the split of parameters into those that decay and those that do not."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from msbreg.errors import MSBRegError

__all__ = ["LARS", "build_optimizer", "parameter_groups"]


class LARS(Optimizer):
    """Momentum SGD whose step is scaled, tensor by tensor, to the size of the weights.

    For each parameter w with gradient g and weight decay b:

        u = g + b w
        m <- momentum m + r u,  where r = eta |w| / |u|, and 1 where a norm is zero or the group does not adapt
        w <- w - lr m

    You, Gitman, Ginsburg, "Large batch training of convolutional networks", 2017, https://arxiv.org/abs/1708.03888,
    with the learning rate outside the momentum and the rule for zero norms as in BYOL's optimizer. Nothing in a step
    waits for the GPU.

    Args:
        params: parameters or groups; a group may set `lr`, `momentum`, `weight_decay`, `eta` and `adapt` for itself.
            Groups with `adapt=False` take plain momentum SGD steps: biases and norms (see `parameter_groups`).
        lr: learning rate; set `group["lr"]` to change it.
        momentum: BYOL's default.
        weight_decay: L2 coefficient b.
        eta: trust coefficient; You et al. and BYOL use 0.001.
        adapt: whether r is applied.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Updates every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if any(w.grad is not None for w in group["params"]):
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        weights = [w for w in group["params"] if w.grad is not None]
        updates = torch._foreach_add([w.grad for w in weights], weights, alpha=group["weight_decay"])
        if group["adapt"]:
            torch._foreach_mul_(updates, _trust_ratios(weights, updates, group["eta"]))  # type: ignore[arg-type]
        for w in weights:
            if "momentum_buffer" not in self.state[w]:
                self.state[w]["momentum_buffer"] = torch.zeros_like(w)
        buffers = [self.state[w]["momentum_buffer"] for w in weights]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(weights, buffers, alpha=-group["lr"])


def _trust_ratios(weights: list[Tensor], updates: list[Tensor], eta: float) -> Sequence[Tensor]:
    """eta |w| / |u| for each pair, zero-dimensional; 1 where either norm is zero."""
    w, u = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(updates))
    return torch.where((w > 0) & (u > 0), eta * w / u, 1.0).unbind()


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters: matrices and kernels decay; biases, norms and other vectors do not.

    Nor do those that a module names in `no_weight_decay()`, as timm's networks do with their tables of positions. Those
    that it names in `constant_rate()`, as SimSiam does with its predictor, have groups of their own.

    Args:
        module: network.
        weight_decay: coefficient of the first group.

    Returns:
        Optimizer groups with `params`, `weight_decay` and `adapt` (which LARS reads and others pass over): decay and
        adaptation are on for parameters of two dimensions and more, those of size 1 not counted, and off for the rest,
        as in BYOL. Last come those of a constant rate, with `constant`, which schedules read. Empty groups are left
        out.
    """

    def named_by(method: str) -> set[int]:
        found: set[int] = set()
        for part in module.modules():
            if callable(getattr(part, method, None)):
                names = getattr(part, method)()
                found |= {id(w) for name, w in part.named_parameters() if name in names}
        return found

    excepted, constant = named_by("no_weight_decay"), named_by("constant_rate")

    def decays(w: Tensor) -> bool:
        return sum(size > 1 for size in w.shape) > 1 and id(w) not in excepted

    trainable = [w for w in module.parameters() if w.requires_grad]
    groups = []
    for common in ({}, {"constant": True}):
        part = [w for w in trainable if (id(w) in constant) == bool(common)]
        tensors, vectors = [w for w in part if decays(w)], [w for w in part if not decays(w)]
        groups += [
            {"params": tensors, "weight_decay": weight_decay, "adapt": True, **common},
            {"params": vectors, "weight_decay": 0.0, "adapt": False, **common},
        ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, module: nn.Module, lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> Optimizer:
    """The optimizer of a run, over `parameter_groups(module, weight_decay)`.

    Args:
        name: "lars", "sgd" (heavy-ball momentum) or "adamw" (`momentum` is its first beta, the second is 0.999).
        module: network.
        lr: learning rate.
        weight_decay: L2 coefficient for "lars" and "sgd", decoupled decay for "adamw".
        momentum: coefficient in [0, 1).

    Raises:
        MSBRegError: for another name.
    """
    groups = parameter_groups(module, weight_decay)
    if name == "lars":
        return LARS(groups, lr, momentum=momentum)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(momentum, 0.999))
    raise MSBRegError(f"expected the optimizer lars, sgd or adamw, got {name!r}.")
