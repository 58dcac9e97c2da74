"""What a run tells: metrics.jsonl, the terminal, and the numbers that give a collapse away."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from msbreg.console import say
from msbreg.distributed import all_gather_rows, all_reduce_sum, world_size
from msbreg.errors import MSBRegError
from msbreg.files import whole_file
from msbreg.linalg import entropy_rank, singular_values

__all__ = ["MetricsFile", "Progress", "Stopwatch", "embedding_statistics", "markdown_table", "memory_megabytes"]


class MetricsFile:
    """A JSON Lines file of metrics, one object a line, in the order of the steps.

    Args:
        path: the file.
        last: the last step of each kind of event that counts. Later lines are dropped: a killed run may have written
            past its checkpoint. None for a new run.
    """

    def __init__(self, path: Path, last: dict[str, int] | None = None) -> None:
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= last.get(row["event"], -1)] if last else []
        with whole_file(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row: Any) -> None:
        """Appends one line; numbers that are not finite become null, since JSON has none.

        Raises:
            MSBRegError: where the file cannot grow.
        """
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(finite(row)) + "\n")
        except OSError as error:
            raise MSBRegError(
                f"cannot write to {self.path}: {error.strerror}. Make room and run the same command again to go on "
                "from the last checkpoint."
            ) from error


def finite(value: Any) -> Any:
    """A value for JSON: numbers that are not finite become None, in containers too."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics file; lines that are none, as a last line cut by a kill, are left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "event" in row and isinstance(row.get("step"), int)]


@torch.no_grad()
def embedding_statistics(embeddings: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """How spread out the embeddings of a step are; each says a healthy value from a collapsed one.

    Args:
        embeddings: (K, B, D), any floating dtype; normalised to unit rows here.
        group: processes that have as many images each, N in all; None for this one alone.

    Returns:
        embedding_std: mean standard deviation of a dimension times sqrt(D): 1 spread out, 0 collapsed to a point.
        effective_rank: of the first view's (N, D) matrix, 1 to min(N, D).
        singular_max, singular_min: its extreme singular values over those of a flat spectrum, which has 1 and 1.
        centroid_norm: length of the mean embedding: 0 spread out, 1 collapsed to a point.
    """
    rows = normalize(embeddings.float(), dim=-1).double()  # sums of squares, less the squared mean, leave digits
    views, _, dim = rows.shape
    count = rows.shape[1] * world_size(group)
    mean, square = all_reduce_sum(torch.stack((rows, rows.square())).sum((1, 2)), group) / (views * count)
    if group is None or count <= dim:
        values = singular_values(all_gather_rows(rows[0], group))
    else:  # D² numbers, however many rows there are
        gram = all_reduce_sum(rows[0].mT @ rows[0], group)
        finite = gram.isfinite().all()
        values = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).clamp_min(0).sqrt()
        values = torch.where(finite, values, torch.nan)
    values = values * math.sqrt(min(count, dim) / count)
    variance = (square - mean.square()).clamp_min(0) * (views * count / (views * count - 1))
    statistics = {
        "embedding_std": variance.sqrt().mean() * math.sqrt(dim),
        "effective_rank": entropy_rank(values),
        "singular_max": values.max(),
        "singular_min": values.min(),
        "centroid_norm": mean.norm(),
    }
    return dict(zip(statistics, torch.stack(list(statistics.values())).tolist(), strict=True))


def memory_megabytes(device: torch.device) -> float:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (peak if sys.platform == "darwin" else 1024 * peak) / 1e6


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


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere, nothing on ranks other than the first."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self._shown, self._terminal = shown, shown and is_terminal(sys.stderr)
        self._total, self._done, self._first = total, done, done
        self._began = self._last = time.monotonic()
        self._bar = tqdm(
            total=total, initial=done, unit="step", disable=not self._terminal, dynamic_ncols=True, smoothing=0.1
        )

    def step(self) -> None:
        """One more step is done."""
        self._done += 1
        self._bar.update()

    def show(self, **numbers: float) -> None:
        """Shows the latest numbers beside the bar, or in a line if the last line is old enough."""
        text = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        if self._terminal:
            self._bar.set_postfix_str(text)
        elif self._shown and time.monotonic() - self._last >= self.SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            left = (self._last - self._began) / max(1, self._done - self._first) * (self._total - self._done)
            say(f"step {self._done}/{self._total}  {text}  {left:.0f} s left", sys.stderr)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._terminal:
            with self._bar.external_write_mode(file=sys.stderr):
                say(text, sys.stderr)
        elif self._shown:
            say(text, sys.stderr)

    def close(self) -> None:
        """Leaves the terminal's cursor below the bar."""
        self._bar.close()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sees it; False where it is closed."""
    return stream is not None and not stream.closed and stream.isatty()


def markdown_table(rows: list[tuple[str, str]], header: tuple[str, str]) -> str:
    """A two-column Markdown table, padded so that it reads well in a terminal too."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in (0, 1)]
    lines = [f"| {left:<{widths[0]}} | {right:>{widths[1]}} |" for left, right in [header, *rows]]
    return "\n".join([lines[0], f"| {'-' * widths[0]} | {'-' * (widths[1] - 1)}: |", *lines[1:]])
