"""Sums over the processes of a group, and batch normalisation that is over all of them on CPUs too."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msbreg.derivatives import once_differentiable
from msbreg.errors import MSBRegError

__all__ = ["CrossRankBatchNorm", "all_reduce_sum", "convert_sync_batchnorm", "rank", "world_size"]


def world_size(group: dist.ProcessGroup | None) -> int:
    """Processes in the group, which this one must belong to; 1 for None, which stands for this process alone."""
    return 1 if group is None else _member(dist.get_world_size(group))


def rank(group: dist.ProcessGroup | None) -> int:
    """This process's number in the group; 0 for None."""
    return 0 if group is None else _member(dist.get_rank(group))


def _member(number: int) -> int:
    """What torch says of a group, which is -1 to processes outside it."""
    if number < 0:
        raise ValueError("expected a group that this process belongs to, got one of other processes")
    return number


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of x over the processes of the group; x itself for None. x is not changed and carries no gradient."""
    if group is None:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


class CrossRankBatchNorm(_BatchNorm):
    """Batch normalisation over the joined batch of all processes, on any device and backend (gloo included).

    `torch.nn.SyncBatchNorm` refuses CPU tensors. Output, running statistics and, once DistributedDataParallel has
    averaged them over the processes, gradients are those of `torch.nn.BatchNorm1d` or `BatchNorm2d` in one process.
    Processes may hold batches of different sizes. In eval mode, and without a process group, it is plain batch
    normalisation.

    Args:
        num_features: channels, C, dimension 1 of the input, (N, C) or (N, C, ...).
        eps, momentum, affine, track_running_stats: as for `torch.nn.BatchNorm2d`.
        group: process group; None for the default one.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.group = group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input (N, {self.num_features}, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C) or (N, C, ...); raises ValueError on another shape."""
        self._check_input_dim(input)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        group = dist.group.WORLD if self.group is None else self.group
        output, mean, variance, count = _CrossRankNormalise.apply(input, self.weight, self.bias, self.eps, group)
        self._update_running(mean, variance * (count / (count - 1)))
        return output

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return  # made without track_running_stats
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.add_(momentum * (new.to(running.dtype) - running))


class _CrossRankNormalise(torch.autograd.Function):
    """x̂ = (x - mean) / sqrt(variance + eps) * weight + bias with statistics of all processes, two sums over them.

    Its output comes from an operation that makes a new tensor: torch.compile of torch 2.11 loses the gradient of one
    that was changed in place, or cast to the dtype that it has.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [d for d in range(x.dim()) if d != 1]
        local = x32.new_full((1,), x.numel() // x.shape[1])
        total = all_reduce_sum(torch.cat((x32.sum(others), local)), group)
        mean, count = total[:-1] / total[-1], total[-1]
        # The mean is subtracted before squaring: E[x²] - E[x]² would cancel.
        centred = x32 - _channels(mean, x)
        variance = all_reduce_sum(centred.square().sum(others), group) / count
        inverse = torch.rsqrt(variance + eps)
        output = centred * _channels(inverse, x)
        if weight is not None:
            output = output * _channels(weight, x)
        if bias is not None:
            output = output + _channels(bias, x)
        ctx.save_for_backward(x, weight, bias, mean, inverse, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return output if output.dtype == x.dtype else output.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse, count = ctx.saved_tensors
        others = [d for d in range(x.dim()) if d != 1]
        dy32 = dy.to(mean.dtype)
        x_hat = (x.to(mean.dtype) - _channels(mean, x)) * _channels(inverse, x)
        d_bias, d_weight = dy32.sum(others), (dy32 * x_hat).sum(others)
        mean_dy, mean_dy_x = all_reduce_sum(torch.stack((d_bias, d_weight)), ctx.group) / count
        scale = inverse if weight is None else inverse * weight
        dx = (dy32 - _channels(mean_dy, x) - x_hat * _channels(mean_dy_x, x)) * _channels(scale, x)
        return (
            dx.to(x.dtype),
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast over x, (N, C, ...)."""
    return statistic.reshape(1, -1, *[1] * (x.dim() - 2))


CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def convert_sync_batchnorm(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replaces every batch normalisation in a module by one over all processes.

    On a CUDA device by `torch.nn.SyncBatchNorm`, elsewhere by `CrossRankBatchNorm`; move the module to its device
    first. Parameters and running statistics are kept, as the same tensors.

    Args:
        module: changed in place, unless it is a batch normalisation itself.
        group: process group; None for the default one.

    Returns:
        The module, or its replacement.

    Raises:
        MSBRegError: a layer is of a class derived from torch's, of which more than the statistics would be lost.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and type(layer) not in (*CONVERTIBLE, CrossRankBatchNorm, nn.SyncBatchNorm):
            raise MSBRegError(
                f"cannot synchronise layer {name!r}: expected torch's own BatchNorm1d, 2d or 3d, got "
                f"{type(layer).__name__}; choose another backbone, or train in one process"
            )
    if any(tensor.is_cuda for tensor in (*module.parameters(), *module.buffers())):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    return _convert(module, group)


def _convert(module: nn.Module, group: dist.ProcessGroup | None) -> nn.Module:
    if isinstance(module, CONVERTIBLE):
        new = CrossRankBatchNorm(
            module.num_features,
            module.eps,
            module.momentum,
            affine=False,
            track_running_stats=False,
            group=group,
        )
        new.affine, new.track_running_stats, new.training = module.affine, module.track_running_stats, module.training
        new._parameters.update(module._parameters)
        new._buffers.update(module._buffers)
        return new
    for name, child in module.named_children():
        setattr(module, name, _convert(child, group))
    return module
