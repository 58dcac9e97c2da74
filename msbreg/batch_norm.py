"""Batch normalisation over the processes of a group, on any device, which never makes the host wait for the device.

`torch.nn.SyncBatchNorm` refuses CPU tensors, gathers every process's statistics where their sum is enough, and reads a
mask of the gathered ones, for which the host waits in every layer.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msbreg.derivatives import Saved, once_differentiable
from msbreg.distributed import Shared, all_reduce_sum
from msbreg.errors import MSBRegError
from msbreg.precision import raised

__all__ = ["CrossRankBatchNorm", "convert_sync_batchnorm"]


class CrossRankBatchNorm(_BatchNorm):
    """Batch normalisation over the joined batch of all processes, on any device and backend (gloo included).

    Output, running statistics and, once DistributedDataParallel has averaged them over the processes, gradients are
    those of `torch.nn.BatchNorm1d` or `BatchNorm2d` in one process. Processes may hold batches of different sizes, none
    of them empty. In eval mode, and without a process group, it is plain batch normalisation.

    On a GPU the gradients of images and volumes in half precision that are not channels_last are rounded to that
    precision on the way, by the kernel that `torch.nn.SyncBatchNorm` has too.

    For C channels each process sends 2 C + 1 float64 numbers to one all-reduce in the forward pass, and 2 C numbers of
    its statistics' dtype to one in the backward pass.

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
        self._shared = Shared(group)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ValueError(f"expected input (N, {self.num_features}, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (N, C) or (N, C, ...); raises ValueError on another shape."""
        self._check_input_dim(input)
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        group = dist.group.WORLD if self._shared.group is None else self._shared.group
        output, mean, variance = _CrossRankNormalise.apply(input, self.weight, self.bias, self.eps, group)
        self._update_running(mean, variance)
        return output

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return  # made without track_running_stats
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            running.lerp_(new.to(running.dtype), momentum)


class CrossRankBatchNormAct(CrossRankBatchNorm):
    """timm's `BatchNormAct2d`, a batch normalisation with an activation behind it, over all processes.

    Args:
        layer: whose modules `drop` and `act` follow the normalisation.
    """

    def __init__(self, layer: Any, **options: Any) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, **options)
        self.drop, self.act = layer.drop, layer.act

    def forward(self, input: Tensor) -> Tensor:
        """See `CrossRankBatchNorm.forward`."""
        return self.act(self.drop(super().forward(input)))


class _CrossRankNormalise(torch.autograd.Function):
    """x̂ = (x - mean) / sqrt(variance + eps) * weight + bias with statistics of all processes, two sums over them.

    Gives mean and the unbiased variance too, (C,) each. On a GPU the passes over x are torch's own kernels for its
    SyncBatchNorm; elsewhere, and for torch.compile, which fuses them, plain operations.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor, Tensor]:
        native = _has_kernels(x)
        if native:
            x = _dense(x)
            mean, inverse = torch.batch_norm_stats(x, eps)  # float32 for halves
            variance = inverse.square().reciprocal() - eps
        else:
            wide = raised(x)
            variance, mean = torch.var_mean(wide, _not_channels(x), correction=0)
        dtype = mean.dtype

        # Mean squares, from which the squared mean is taken off again once they are of all rows: float64 leaves enough.
        mean = mean.double()
        moments = torch.cat((mean, mean.square() + variance.double(), mean.new_ones(1)))
        total = all_reduce_sum(moments * (x.numel() // x.shape[1]), group)
        count = total[-1]
        mean, square = (total[:-1] / count).view(2, -1)
        variance = (square - mean.square()).clamp_min(0)
        inverse = torch.rsqrt(variance + eps).to(dtype)
        unbiased, mean = variance * (count / (count - 1).clamp_min(1)), mean.to(dtype)

        if native:
            output = torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)
        else:
            output = (wide - _channels(mean, x)) * _channels(inverse, x)
            # Both make a new tensor: torch.compile of torch 2.11 loses the gradient of one that was changed in place,
            # or cast to the dtype that it has.
            if weight is not None:
                output = output * _channels(weight, x)
            if bias is not None:
                output = output + _channels(bias, x)
            output = output if output.dtype == x.dtype else output.to(x.dtype)
        ctx.save_for_backward(x, weight, bias, mean, inverse, count)
        ctx.group, ctx.native = group, native
        ctx.mark_non_differentiable(mean, unbiased)
        return output, mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: Saved, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse, count = saved
        if ctx.native:
            dy = _dense(dy)
            # Sums of dy and of dy (x - mean).
            d_bias, scaled = torch.batch_norm_backward_reduce(dy, x, mean, inverse, weight, True, False, False)[:2]
            d_weight = scaled * inverse
        else:
            dy_wide = dy.to(mean.dtype)
            x_hat = (x.to(mean.dtype) - _channels(mean, x)) * _channels(inverse, x)
            d_bias = dy_wide.sum(_not_channels(x))
            d_weight = (dy_wide * x_hat).sum(_not_channels(x))

        mean_dy, mean_dy_x = all_reduce_sum(torch.stack((d_bias, d_weight)), ctx.group) / count.to(mean.dtype)
        if ctx.native:
            # It would divide the sums by the number of rows, which it takes as int32: they are divided already.
            one = torch.ones(1, dtype=torch.int32, device=x.device)
            scale = None if weight is None else weight.to(mean.dtype)
            dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse, scale, mean_dy, mean_dy_x / inverse, one)
        else:
            scale = inverse if weight is None else inverse * weight
            dx = (dy_wide - _channels(mean_dy, x) - x_hat * _channels(mean_dy_x, x)) * _channels(scale, x)
        return (
            dx.to(x.dtype),
            None if weight is None else d_weight.to(weight.dtype),
            None if bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _has_kernels(x: Tensor) -> bool:
    """Whether torch has the kernels of its SyncBatchNorm for x, and nothing traces, which they do not let."""
    return x.is_cuda and not torch.compiler.is_compiling()


def _dense(x: Tensor) -> Tensor:
    """x in a layout that those kernels take."""
    last = (4, torch.channels_last), (5, torch.channels_last_3d)
    dense = any(x.dim() == dim and x.is_contiguous(memory_format=layout) for dim, layout in last)
    return x if dense else x.contiguous()


def _not_channels(x: Tensor) -> list[int]:
    """The dimensions over which statistics are taken."""
    return [d for d in range(x.dim()) if d != 1]


def _channels(statistic: Tensor, x: Tensor) -> Tensor:
    """(C,) shaped to broadcast over x, (N, C, ...)."""
    return statistic.reshape(1, -1, *[1] * (x.dim() - 2))


CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _is_timms(layer: nn.Module) -> bool:
    """Whether a layer is timm's `BatchNormAct2d`, which is known without timm."""
    return type(layer).__name__ == "BatchNormAct2d" and type(layer).__module__.startswith("timm.")


def convert_sync_batchnorm(module: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Replaces every batch normalisation in a module by `CrossRankBatchNorm`, with its tensors and options.

    Hooks of the layers are not taken over.

    Args:
        module: changed in place, unless it is a batch normalisation itself.
        group: process group; None for the default one.

    Returns:
        The module, or its replacement.

    Raises:
        MSBRegError: a layer is of a class derived from torch's, of which more than the statistics would be lost.
    """
    for name, layer in module.named_modules():
        known = type(layer) in (*CONVERTIBLE, CrossRankBatchNorm, CrossRankBatchNormAct, nn.SyncBatchNorm)
        if isinstance(layer, _BatchNorm) and not (known or _is_timms(layer)):
            raise MSBRegError(
                f"cannot synchronise layer {name!r}: expected torch's own BatchNorm1d, 2d or 3d, or timm's "
                f"BatchNormAct2d, got {type(layer).__name__}; choose another backbone, or train in one process"
            )
    return _convert(module, group, {})


def _convert(module: nn.Module, group: dist.ProcessGroup | None, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """`made` has the layers that were replaced already: a module may have one under several names."""
    if module in made:
        return made[module]
    if type(module) in CONVERTIBLE or _is_timms(module):
        layer: Any = module
        options: dict[str, Any] = {"affine": False, "track_running_stats": False, "group": group}
        if _is_timms(layer):
            new: CrossRankBatchNorm = CrossRankBatchNormAct(layer, **options)
        else:
            new = CrossRankBatchNorm(layer.num_features, layer.eps, layer.momentum, **options)
        new.affine, new.track_running_stats, new.training = layer.affine, layer.track_running_stats, layer.training
        new._parameters.update(layer._parameters)
        new._buffers.update(layer._buffers)
        made[module] = new
        return new
    made[module] = module
    for name, child in list(module._modules.items()):
        if child is not None:
            setattr(module, name, _convert(child, group, made))
    return module
