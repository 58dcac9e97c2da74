"""The losses as modules. `MSBRegLoss` is the whole method; the others are its parts."""

import warnings
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msbreg import functional
from msbreg.arguments import Views, batch_size, check_choice, check_spectral, check_weight
from msbreg.distributed import Shared, rank
from msbreg.functional import (
    LAMBDA_B,
    LAMBDA_M,
    LAMBDA_S,
    LEAVE_ONE_OUT,
    PER,
    SMOOTHING,
    SOLVER,
    SPECTRUM,
    MSBRegOutput,
    Per,
    Reduction,
)
from msbreg.linalg import Solver
from msbreg.noise import check_noise
from msbreg.reference import Spectrum

__all__ = ["BrownianLoss", "CentroidLoss", "MSBRegLoss", "SingularValueLoss"]


class Loss(nn.Module):
    """A loss whose repr shows its options, and whose copies share its process group."""

    options: tuple[str, ...] = ()

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self._shared = Shared(group)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The processes that a batch is spread over; None for this one alone."""
        return self._shared.group

    @group.setter
    def group(self, group: dist.ProcessGroup | None) -> None:
        self._shared = Shared(group)

    def _over(self) -> dist.ProcessGroup | None:
        """The group that singular values are taken over; a warning where processes run together and none was given.

        torch's `group.WORLD` is None until `init_process_group`, so that a module made before it has none.
        """
        if self.group is None and not torch.compiler.is_compiling() and _several_processes():
            warnings.warn(
                f"{type(self).__name__} sees the embeddings of its own process alone: for those of all, give it a "
                "group, such as torch.distributed.group.WORLD once init_process_group has been called",
                stacklevel=5,  # whoever called the module
            )
        return self.group

    def extra_repr(self) -> str:
        processes = "this process" if self.group is None else "a group of other processes"
        if isinstance(self.group, dist.ProcessGroup):
            processes = f"{self.group.size()} processes"
        return ", ".join([*(f"{name}={getattr(self, name)!r}" for name in self.options), f"over {processes}"])


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class _Noise(TypedDict):
    """Where the noise comes from; arguments of `msbreg.functional.brownian_loss`."""

    seed: int | Tensor
    step: int | Tensor
    first_image: int


class _NoisyLoss(Loss):
    """Holds the noise's seed and step as int64 buffers, so that a state_dict resumes the noise where it was saved.

    In training mode a forward pass uses the current step, then advances it by one. In eval mode it uses the current
    step and leaves it, so that evaluation is repeatable and disturbs nothing. An explicit step does neither.
    """

    seed: Tensor
    step: Tensor

    def __init__(self, seed: int, group: dist.ProcessGroup | None) -> None:
        super().__init__(group)
        check_noise(seed, 0, 0)
        self._seed = int(seed)
        with torch.inference_mode(False):  # or they could not count outside of it
            self.register_buffer("seed", torch.tensor(self._seed, dtype=torch.int64))
            self.register_buffer("step", torch.tensor(0, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Sets seed and step as they were at first: what makes a module whole that was built on the meta device."""
        self.seed.fill_(self._seed)
        self.step.zero_()

    def _noise(self, views: Views, step: int | Tensor | None) -> _Noise:
        if step is None and self.training and in_a_backward_pass():
            raise RuntimeError(
                f"expected {type(self).__name__} to be called with step= where torch.utils.checkpoint recomputes it: "
                "its own has advanced since, and draws other noise"
            )
        return {
            "seed": self.seed,
            "step": self.step if step is None else step,
            "first_image": self._rank() * batch_size(views),
        }

    def _advance(self, step: int | Tensor | None) -> None:
        if self.training and step is None:
            self.step.add_(1)

    def _rank(self) -> int:
        """Whose images come first. Without a group too, processes that run together have different images."""
        if self.group is None and dist.is_available() and dist.is_initialized():
            return dist.get_rank()
        return rank(self.group)


class MSBRegLoss(_NoisyLoss):
    """The multiview centroid, singular value and Brownian losses: λ_m L_M + λ_s L_S + λ_b L_B.

    See `msbreg.functional.msbreg_loss` for the terms and their options. Weights may be changed between calls, though
    where torch.compile traces the kernels it compiles anew for each value, and with fullgraph soon refuses to: call a
    loss with a schedule outside of it.

    Returns the weighted sum, which is differentiable, and the three losses, which are detached: for weights that are
    learned, add up the modules of the single losses.

    The noise is a function of seed, step and image. The module counts steps, in its state_dict: one for each call in
    training mode, none in eval mode, and none for calls with a `step`, which `torch.utils.checkpoint` needs. Keep it
    out of averages of buffers, such as `AveragedModel(use_buffers=True)` makes: a mean of steps is none.

    Args:
        lambda_s, lambda_b: weights; a term of weight 0 is not computed.
        lambda_m: weight of the centroid loss; at 0 it is computed for the log alone.
        leave_one_out: compare a view with the targets of the other views alone.
        spectrum: `"nuclear"`, `"whitening"` or `"coding_rate"`.
        smoothing: δ of `"nuclear"`.
        solver: `"auto"`, `"newton_schulz"`, `"eigh"` or `"svd"`.
        per: `"image"` or `"view"`: whose random directions are independent.
        seed: of the noise; any int64. The same in all processes, another one for another module of the same model.
        group: process group over which a batch is spread, as many images in each process. None for local singular
            values. Images are numbered by the rank in the group, without one by the global rank, times B: so processes
            get different noise, as long as they have as many images each, and two groups the same. A module that
            runs beside others without a group warns once.

    Raises:
        ValueError: an unknown option, a weight that is not finite, a smoothing that is negative or not finite, a seed
            beyond 64 bits.
        TypeError: a weight or smoothing that is no number, a seed that is no integer, a group that is none.

    Example:
        >>> criterion = MSBRegLoss(lambda_s=0.004, lambda_b=0.5)
        >>> online = torch.randn(4, 32, 16, requires_grad=True)  # K = 4 views of B = 32 images, D = 16
        >>> out = criterion(online, torch.randn(4, 32, 16))
        >>> out.loss.backward()
    """

    options = ("lambda_s", "lambda_b", "lambda_m", "leave_one_out", "spectrum", "smoothing", "solver", "per")

    def __init__(
        self,
        lambda_s: float = LAMBDA_S,
        lambda_b: float = LAMBDA_B,
        *,
        lambda_m: float = LAMBDA_M,
        leave_one_out: bool = LEAVE_ONE_OUT,
        spectrum: Spectrum = SPECTRUM,
        smoothing: float = SMOOTHING,
        solver: Solver = SOLVER,
        per: Per = PER,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(seed, group)
        for name, weight in (("lambda_s", lambda_s), ("lambda_b", lambda_b), ("lambda_m", lambda_m)):
            check_weight(name, weight)
        check_spectral(spectrum, smoothing)
        check_choice("solver", solver, Solver)
        check_choice("per", per, Per)
        self.lambda_s = lambda_s
        self.lambda_b = lambda_b
        self.lambda_m = lambda_m
        self.leave_one_out = leave_one_out
        self.spectrum = spectrum
        self.smoothing = smoothing
        self.solver = solver
        self.per = per

    def forward(
        self, online: Views, target: Views, embedding: Views | None = None, *, step: int | Tensor | None = None
    ) -> MSBRegOutput:
        """The loss of one batch; arguments and errors as in `msbreg.functional.msbreg_loss`.

        Args:
            online: (K, B, D) or K tensors (B, D).
            target: (K', B, D) or K' tensors (B, D); no gradient.
            embedding: (K, B, D') or K tensors (B, D'), which the dispersive losses act on; None for online.
            step: the noise's step, in place of the module's own, which then does not advance.
        """
        out = functional.msbreg_loss(
            online,
            target,
            embedding=embedding,
            lambda_s=self.lambda_s,
            lambda_b=self.lambda_b,
            lambda_m=self.lambda_m,
            leave_one_out=self.leave_one_out,
            spectrum=self.spectrum,
            smoothing=self.smoothing,
            solver=self.solver,
            per=self.per,
            group=self._over() if self.lambda_s != 0 else None,
            **self._noise(online, step),
        )
        self._advance(step)
        return out

    if TYPE_CHECKING:
        __call__ = forward  # of torch.nn.Module it is of anything


class CentroidLoss(Loss):
    """L_M, the squared distance of views to the centroid of the target views; `msbreg.functional.centroid_loss`.

    Args:
        leave_one_out: compare a view with the targets of the other views alone; half of BYOL's loss for two views.
        reduction: `"mean"` for a scalar, `"none"` for (K, B).

    Raises:
        ValueError: an unknown reduction.

    Example:
        >>> online, target = torch.randn(4, 8, 16, requires_grad=True), torch.randn(4, 8, 16)  # K = 4, B = 8, D = 16
        >>> CentroidLoss()(online, target).backward()
    """

    options = ("leave_one_out", "reduction")

    def __init__(self, *, leave_one_out: bool = LEAVE_ONE_OUT, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        self.leave_one_out = leave_one_out
        self.reduction = reduction

    def forward(self, online: Views, target: Views) -> Tensor:
        """online (K, B, D) and target (K', B, D), or as many of (B, D), to a scalar or (K, B)."""
        return functional.centroid_loss(online, target, leave_one_out=self.leave_one_out, reduction=self.reduction)

    if TYPE_CHECKING:
        __call__ = forward


class SingularValueLoss(Loss):
    """L_S, how far singular values are from equal; `msbreg.functional.singular_value_loss`.

    Args:
        spectrum: `"nuclear"`, `"whitening"` or `"coding_rate"`.
        smoothing: δ of `"nuclear"`.
        solver: `"auto"`, `"newton_schulz"`, `"eigh"` or `"svd"`.
        group: process group over which the rows are spread; None for this process alone.

    Raises:
        ValueError: an unknown option, a smoothing that is negative or not finite.
        TypeError: a smoothing that is no number, a group that is none.

    Example:
        >>> embeddings = torch.randn(2, 32, 16, requires_grad=True)  # K = 2 matrices of N = 32 rows, D = 16
        >>> SingularValueLoss()(embeddings).backward()
    """

    options = ("spectrum", "smoothing", "solver")

    def __init__(
        self,
        *,
        spectrum: Spectrum = SPECTRUM,
        smoothing: float = SMOOTHING,
        solver: Solver = SOLVER,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(group)
        check_spectral(spectrum, smoothing)
        check_choice("solver", solver, Solver)
        self.spectrum = spectrum
        self.smoothing = smoothing
        self.solver = solver

    def forward(self, embeddings: Views) -> Tensor:
        """(K, N, D), K of (N, D), or one (N, D), to a scalar."""
        return functional.singular_value_loss(
            embeddings, spectrum=self.spectrum, smoothing=self.smoothing, solver=self.solver, group=self._over()
        )

    if TYPE_CHECKING:
        __call__ = forward


class BrownianLoss(_NoisyLoss):
    """L_B, the embeddings' product with random directions; `msbreg.functional.brownian_loss`.

    It counts steps, and numbers images, as `MSBRegLoss` does.

    Args:
        per: `"image"` or `"view"`: whose random directions are independent.
        seed: of the noise; any int64. The same in all processes, another one for another module of the same model.
        group: process group by whose ranks images are numbered; None for the global rank.

    Raises:
        ValueError: an unknown option, a seed beyond 64 bits.
        TypeError: a seed that is no integer, a group that is none.

    Example:
        >>> criterion = BrownianLoss(seed=3)
        >>> criterion(torch.randn(2, 32, 16, requires_grad=True)).backward()  # K = 2, B = 32, D = 16
    """

    options = ("per",)

    def __init__(self, *, per: Per = PER, seed: int = 0, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(seed, group)
        check_choice("per", per, Per)
        self.per = per

    def forward(self, embeddings: Views, *, step: int | Tensor | None = None) -> Tensor:
        """(K, B, D), K of (B, D), or one (B, D), to a scalar; `step` as in `MSBRegLoss`."""
        loss = functional.brownian_loss(embeddings, per=self.per, **self._noise(embeddings, step))
        self._advance(step)
        return loss

    if TYPE_CHECKING:
        __call__ = forward


def in_a_backward_pass() -> bool:
    """Whether autograd is at work in this thread, as when a checkpoint recomputes."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
