"""Forward and backward pass as one CUDA graph: one launch in the place of thousands.

For networks so small that the host cannot launch their kernels as fast as the GPU runs them.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msbreg.methods import StepOutput

__all__ = ["RecordedPass"]

WARM_UP = 3
"""Passes on a side stream before the recording, in which libraries choose their algorithms; what torch recommends."""

SECONDS_TO_FREE_A_BATCH = 0.1
"""DALI's thread asks each millisecond whether it may."""


class RecordedPass:
    """A forward and backward pass that is recorded the fourth time it runs, and replayed from then on.

    The passes before are steps of the training like any other, so nothing is computed in vain and no state has to be
    put back.

    Args:
        work: the pass, on tensors that are alike in every call. It must make the gradients anew instead of adding to
            them, and must not make the host wait.
        dtype: what `work` wants the tensors in; they are copied anyway, so the conversion is free.
    """

    def __init__(self, work: Callable[[Sequence[Tensor]], StepOutput], dtype: torch.dtype) -> None:
        self._work, self._dtype = work, dtype
        self._passes = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, views: Sequence[Tensor]) -> StepOutput:
        """Runs, records or replays the pass; its result is overwritten by the next one's."""
        if self._graph is None and self._passes < WARM_UP:
            self._passes += 1
            return self._on_a_side_stream(views)
        if self._graph is None:
            self._views = [torch.empty_like(view, dtype=self._dtype) for view in views]
            self._graph = torch.cuda.CUDAGraph()
            # DALI frees batches in a thread of its own, which waits for the whole device: no recording survives that.
            # The first wait here lets those that are left be freed.
            torch.cuda.synchronize()
            time.sleep(SECONDS_TO_FREE_A_BATCH)
            torch.cuda.synchronize()
            # Runs nothing. Other threads may go on calling CUDA, as those that prepare the next batches do.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._out = self._work(self._views)
        torch._foreach_copy_(self._views, list(views))
        self._graph.replay()
        return self._out

    def _on_a_side_stream(self, views: Sequence[Tensor]) -> StepOutput:
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            out = self._work(views)
        current.wait_stream(side)
        return out
