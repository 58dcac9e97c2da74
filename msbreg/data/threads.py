"""Threads that never hold up the end of a process, and how many of them work at the same time."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

__all__ = ["Gate", "Threads"]

S = TypeVar("S")
T = TypeVar("T")

EVERY = 512
"""So often a gate is passed until a thread is let in alone again."""


class Threads:
    """Threads that work off what is submitted.

    A disk that never answers holds up neither `close` nor the interpreter's end, as it does with ThreadPoolExecutor.

    Args:
        count: how many.
        name: of the threads, for debuggers.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        for number in range(count):
            threading.Thread(target=_work_off, args=(self._tasks,), name=f"{name}_{number}", daemon=True).start()
        self._process, self._lock = os.getpid(), threading.Lock()
        self._dismiss = weakref.finalize(self, _dismiss, self._tasks, count)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._dismiss.alive

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Lets a thread call a function."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"the loader was made by process {self._process}, of whose threads a fork has none; make it in the "
                "process that uses it"
            )
        future: Future[T] = Future()
        with self._lock:
            if self.closed:
                raise RuntimeError("the loader is closed")
            self._tasks.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Cancels what has not begun, and lets the threads end."""
        with self._lock:  # so that nothing is submitted that no thread is left for
            self._dismiss()


class Gate:
    """Lets as many threads work at the same time as wait for something other than each other.

    Python computes in one thread at a time. Threads that read small files from memory do little else, and pass this
    right on at every call of the operating system: on two cores eight of them take twice as long as one. Threads that
    wait for a disk or a network do not. So how long one takes for an item, alone, decides how many may work together
    until it is measured again.

    Args:
        most: threads.
        worth: seconds of an item for each of which a thread is let in.
    """

    def __init__(self, most: int, worth: float) -> None:
        self.limit = most
        """How many may work together."""
        self._most, self._worth = most, worth
        self._passed = self._inside = 0
        self._changed = threading.Condition()

    def work(self, function: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """What the function makes of each item, in this thread, once it is let in."""
        with self._changed:
            if self._passed % EVERY == 0:
                self.limit = 1
            self._passed += 1
            while self._inside >= self.limit:
                self._changed.wait()
            self._inside += 1
            alone = self.limit == 1
        began = time.perf_counter()
        try:
            return [function(item) for item in items]
        finally:
            seconds = (time.perf_counter() - began) / max(1, len(items))
            with self._changed:
                self._inside -= 1
                if alone:
                    self.limit = min(self._most, max(1, round(seconds / self._worth)))
                self._changed.notify(max(0, self.limit - self._inside))


def _work_off(tasks: SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, function, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # it belongs to whoever waits for the result
                future.set_exception(error)
        del task, future, function, arguments  # or an idle thread would keep a batch alive


def _dismiss(tasks: SimpleQueue, count: int) -> None:
    with contextlib.suppress(Empty):
        while True:
            future = tasks.get_nowait()[0]
            future.cancel()
            future.set_running_or_notify_cancel()  # without which whoever waits for it would wait on
    for _ in range(count):
        tasks.put(None)
