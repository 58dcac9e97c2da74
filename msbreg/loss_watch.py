"""Whether a run has gone astray: losses and weights that are not finite, on any rank."""

import torch
from torch import Tensor, nn

from msbreg.processes import Processes

__all__ = ["LossWatch"]

BAD_LOSSES_IN_A_ROW = 3
"""So many end a run: one alone may be a batch's."""


class LossWatch:
    """Counts losses that are not finite, on the device: reading each would make the host wait for it.

    Args:
        processes: this process and its peers, which all ask the same questions in the same step.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._rows = torch.zeros(2, dtype=torch.int64, device=processes.device)  # in a row now, and the longest row

    def see(self, loss: Tensor) -> None:
        """Takes notice of a step's loss, a scalar on the processes' device; nothing waits for it."""
        row = torch.where(loss.detach().isfinite(), 0, self._rows[0] + 1)
        self._rows = torch.stack((row, torch.maximum(row, self._rows[1])))

    def gone_astray(self) -> str | None:
        """What "the loss ..." goes on with after three bad ones in a row on any rank; waits for the device."""
        rows = self.processes.gather(int(self._rows[1]))
        ranks = [rank for rank, row in enumerate(rows) if row >= BAD_LOSSES_IN_A_ROW]
        if not ranks:
            return None
        where = f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if self.processes.world > 1 else ""
        return f"was not finite in {BAD_LOSSES_IN_A_ROW} steps in a row{where}"

    def healthy(self, network: nn.Module) -> bool:
        """Whether the last loss and all weights are finite, on every rank; waits for the device."""
        finite = torch.stack([weight.isfinite().all() for weight in network.parameters()]).all()
        return all(self.processes.gather(int(finite & (self._rows[0] == 0))))
