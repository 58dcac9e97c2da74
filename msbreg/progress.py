"""How far a run is, on the terminal or in lines."""

import sys
import time

from tqdm import tqdm

from msbreg.console import is_terminal, say

__all__ = ["Progress"]


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
