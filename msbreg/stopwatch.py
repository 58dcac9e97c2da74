"""How long a run has trained, and how much of that it has waited for data."""

import contextlib
import time
from collections.abc import Iterator

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Seconds of training (evaluation and saving left out), and how many of them were spent waiting for data.

    Args:
        device: of the training.
        seconds: of training before a resume.
        waited: of waiting before a resume.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0, waited: float = 0.0) -> None:
        self.seconds = seconds
        self._device, self._waited = device, waited
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._lap = (seconds, waited)
        self._running_since: float | None = None

    def start(self) -> None:
        """Goes on counting."""
        self._running_since = time.perf_counter()

    def stop(self) -> None:
        """Adds what has passed since `start`."""
        if self._running_since is not None:
            self.seconds += time.perf_counter() - self._running_since
            self._running_since = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch, whose seconds it counts.

        On a GPU they are the GPU's: from the end of what it was given before to the arrival of the batch. The host,
        which is some steps ahead, may well wait while the GPU does not.
        """
        if self._device.type == "cuda":
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._waits.append((before, after))
        else:
            began = time.perf_counter()
            yield
            self._waited += time.perf_counter() - began

    @property
    def waited(self) -> float:
        """Seconds of waiting so far; asks the GPU, and so waits for it."""
        for before, after in self._waits:
            after.synchronize()
            self._waited += 1e-3 * before.elapsed_time(after)
        self._waits.clear()
        return self._waited

    def lap(self) -> tuple[float, float]:
        """Seconds of training and of waiting since the last lap; goes on counting."""
        waited = self.waited
        self.stop()
        (seconds, waited_before), self._lap = self._lap, (self.seconds, waited)
        self.start()
        return self.seconds - seconds, waited - waited_before
