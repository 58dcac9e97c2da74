"""The signals that ask a run to end. Little is imported here: the command line hears them before it loads torch."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType

__all__ = ["StopSignals"]

SENT_BY_LAUNCHERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""What schedulers send before they preempt, and terminals as they close; it may come again at any moment."""


class StopSignals:
    """Notes SIGTERM, SIGUSR1, SIGHUP and Ctrl-C from its making on; a context manager that gives them back.

    A first Ctrl-C is acknowledged on standard error, a second one interrupts at once. SIGHUP is left ignored where
    nohup has made it so. In a thread other than the first, which Python lets no signals reach, it notes none.

    Attributes:
        received: the numbers of the signals that came.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._interrupted = False
        first = threading.current_thread() is threading.main_thread()
        numbers = [*SENT_BY_LAUNCHERS, signal.SIGINT] if first else []
        if first and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
            numbers.remove(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            self._interrupted = True
            raise KeyboardInterrupt
        self.received.append(number)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":  # all ranks get it
            with contextlib.suppress(OSError):  # and not by print, which may be what was interrupted
                os.write(2, b"\nCtrl-C: a run saves itself after its step; again: it ends at once\n")

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_back()

    def give_back(self) -> None:
        """From here on signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def deliver(self) -> None:
        """Gives signals back, and lets those that came do what they do: for work that has nothing to save."""
        self.give_back()
        for number in self.received:
            signal.raise_signal(number)

    def ignore(self) -> None:
        """From here on no signal is heard, up to the end of the process, whose status is settled.

        A handler would not do: Python takes it off some time before the process ends. Whoever has interrupted it may
        do so again.
        """
        for number in self._before:
            again = self._interrupted and number == signal.SIGINT
            signal.signal(number, signal.SIG_DFL if again else signal.SIG_IGN)
