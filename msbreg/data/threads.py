"""Threads that never hold up the end of a process."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

__all__ = ["Threads"]

T = TypeVar("T")


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
