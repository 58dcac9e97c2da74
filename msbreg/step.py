"""One training step: forward, backward, optimizer, moving average.

A step is a function of the networks' state, the batch and the step's number, and nothing in it makes the host wait for
the device.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from msbreg.batch_norm import convert_sync_batchnorm
from msbreg.compilation import compile_regions
from msbreg.config import Config
from msbreg.cuda_graph import RecordedPass
from msbreg.data import Batch
from msbreg.inputs import input_dtype, share_of_batch
from msbreg.methods import StepOutput, build_method
from msbreg.online_probe import OnlineProbe
from msbreg.optim import build_optimizer
from msbreg.processes import Processes
from msbreg.schedules import ema_tau, scaled_lr, warmup_cosine

__all__ = ["TrainingStep"]


class TrainingStep:
    """The networks of a run, and what a step does to them. Sets how many threads torch uses in this process.

    Args:
        config: the run's options.
        processes: this process and its peers, which share each batch evenly.
        steps: of the whole run.
        warmup_steps: those of them in which the learning rate rises.
        classes: of the linear probe that trains alongside; 0 for none.

    Raises:
        MSBRegError: the backbone is unknown or does not take the views' sizes, or a graph cannot be recorded here.

    Attributes:
        method: the networks and their loss.
        optimizer: of the method's parameters.
        probe: the linear probe, or None.
    """

    def __init__(
        self, config: Config, processes: Processes, *, steps: int, warmup_steps: int, classes: int = 0
    ) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.steps, self.warmup_steps = steps, warmup_steps
        self.batch = share_of_batch(config, processes)
        self.peak_lr = scaled_lr(config.optim.lr, config.data.batch_size)
        self.input_dtype = input_dtype(config, processes)
        bf16 = self.input_dtype == torch.bfloat16
        self._autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

        if config.run.threads:
            torch.set_num_threads(config.run.threads)
        torch.manual_seed(config.run.seed)  # the same weights on every rank
        method = build_method(config, processes.group)
        method = method.to(self.device).to(memory_format=torch.channels_last)
        features = method.online.backbone.num_features
        self.probe = OnlineProbe(features, classes, group=processes.group).to(self.device) if classes else None
        if processes.group is not None:
            convert_sync_batchnorm(method, processes.group)
        self.method = method
        if config.model.compile is True or (config.model.compile == "auto" and self.device.type == "cuda"):
            compile_regions(self.method)
        self._model: nn.Module | DistributedDataParallel = (
            self.method if processes.group is None else _shared(self.method)
        )
        self.optimizer = build_optimizer(
            config.optim.name, self.method, lr=self.peak_lr, weight_decay=config.optim.weight_decay
        )
        self._pass = self._forward_backward
        if config.model.cuda_graph:
            self._pass = RecordedPass(self._forward_backward, self.input_dtype)

    def __call__(self, batch: Batch, number: int) -> StepOutput:
        """Takes one step.

        Args:
            batch: this process's images; their views are on its device.
            number: of the step, from 0.

        Returns:
            What the step computed. The next step may overwrite it.
        """
        self._seed(number)
        lr = warmup_cosine(number, self.steps, self.warmup_steps, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr if group.get("constant") else lr
        out = self._pass(batch.views)
        self.optimizer.step()
        self.method.after_step(ema_tau(number, self.steps, self.config.method.tau))
        if self.probe is not None:
            self.probe.learn(out.features, batch.labels.to(self.device, non_blocking=True))
        return out

    def loss_alone(self, batch: Batch) -> Callable[[], Tensor]:
        """The loss of the networks' embeddings of a batch, and its gradient at these: what it costs, for a benchmark.

        Args:
            batch: as in a step. The networks, which see it now, are in their present mode.

        Returns:
            A function that computes both, and gives the loss.
        """
        # Not compiled: the step has no compiled networks that train without a gradient.
        with torch.no_grad(), self._autocast, torch.compiler.set_stance("force_eager"):
            embeddings = self.method.embed([view.to(self.input_dtype) for view in batch.views], self.batch)
        z = embeddings.z.detach().requires_grad_()
        p = z if embeddings.p is embeddings.z else embeddings.p.detach().requires_grad_()
        leaves = embeddings._replace(z=z, p=p)

        def loss() -> Tensor:
            z.grad = p.grad = None
            with self._autocast:
                out = self.method.losses(leaves)
            out.loss.backward()
            return out.loss.detach()

        return loss

    @property
    def lr(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    def train(self) -> None:
        """Puts the networks into training mode."""
        self._model.train()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "probe": self.probe.state_dict() if self.probe is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; raises what torch raises where it is another network's."""
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.probe is not None:
            self.probe.load_state_dict(state["probe"])

    def _seed(self, number: int) -> None:
        """Makes dropout and the like, which draw from torch's generators, a function of seed, step and rank too.

        `torch.manual_seed` would seed devices that are not there too, and format a stack for each in every step.
        """
        # Mixed, since torch's generator on CPUs takes 32 bits alone, and NumPy's sequence makes any of them good.
        entropy = np.random.SeedSequence((self.config.run.seed, number, self.processes.rank))
        seed = int(entropy.generate_state(1, np.uint64)[0]) >> 1
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _forward_backward(self, views: Sequence[Tensor]) -> StepOutput:
        """The loss of a batch, and its gradients in the place of those before."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast:
            out = self._model([view.to(self.input_dtype) for view in views], self.batch)
        out.loss.backward()
        return out._replace(loss=out.loss.detach())


def _shared(method: nn.Module) -> DistributedDataParallel:
    """Averages gradients over processes. Buffers need no broadcast: they are the same on every rank anyway."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*broadcast_buffers")  # torch 2.15 has a new name, 2.9 only this one
        return DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)
