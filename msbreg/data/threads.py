"""Threads that never hold up the end of a process, as many at a time as it is worth."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Threads"]

T = TypeVar("T")

EVERY = 512
"""Tasks after which one is let alone again, to see how long it takes."""
PATIENCE = 1.0
"""Seconds without a task begun after which those that wait go on without whatever stalls."""


class Threads:
    """Threads that work off what is submitted, in its order.

    A disk that never answers holds up neither `close` nor the interpreter's end, as it does with ThreadPoolExecutor.

    Python computes in one thread at a time. Threads that read small files from memory do little else, and pass this
    right on at every call of the operating system: on two cores eight of them take twice as long as one. Threads that
    wait for a disk or a network do not. So with `worth` now and then one works alone, and tells by `took` what an item
    takes it; that decides how many work together from then on. Where none begins for a second, all go on.

    Args:
        count: how many threads.
        name: of the threads, for debuggers.
        worth: seconds of an item for each of which a thread works; None: all do.
    """

    def __init__(self, count: int, name: str, worth: float | None = None) -> None:
        self._crew = _Crew(count, worth)
        for number in range(count):
            threading.Thread(target=_work_off, args=(self._crew,), name=f"{name}_{number}", daemon=True).start()
        self._dismiss = weakref.finalize(self, self._crew.dismiss)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._crew.dismissed

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that has the threads: it has none, and their locks for ever."""
        return os.getpid() != self._crew.process

    @property
    def limit(self) -> int:
        """How many work together."""
        return self._crew.limit

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Lets a thread call a function."""
        self.require_process()
        future: Future[T] = Future()
        self._crew.take_on((future, function, arguments))
        return future

    def require_process(self) -> None:
        """Raises RuntimeError in a process that was forked from the one that has the threads."""
        if self.forked:
            raise RuntimeError(
                f"the loader was made by process {self._crew.process}, of whose threads a fork has none; make it in "
                "the process that uses it"
            )

    def took(self, seconds: float) -> None:
        """What an item takes, said by the function that a thread calls, at its end: it counts where it is alone."""
        self._crew.took(seconds)

    def close(self) -> None:
        """Cancels what has not begun, and lets the threads end."""
        self._dismiss()


class _Crew:
    """What threads share. They hold no reference to their `Threads`, which so may be forgotten instead of closed."""

    def __init__(self, count: int, worth: float | None) -> None:
        self.count, self.worth, self.limit, self.dismissed = count, worth, count, False
        self.process = os.getpid()
        self._allowed = count  # the limit, or 1 while somebody is to be alone
        self._at_work = self._begun = self._next_alone = 0
        self._last_began = time.monotonic()
        self._tasks: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()
        self._changed = threading.Condition()  # whose lock a thread may take twice: dismissed by the garbage collector

    def take_on(self, task: tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]) -> None:
        with self._changed:  # so that nothing is taken on that no thread is left for
            if self.dismissed:
                raise RuntimeError("the loader is closed")
            self._tasks.append(task)
            self._changed.notify()

    def next_task(self, *, first: bool) -> tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None:
        """Waits for a task and for room; None: there will be none. All but a thread's first call end its last task."""
        with self._changed:
            self._at_work -= not first
            while not self.dismissed:
                if self._tasks:
                    if self.worth is not None and self._begun >= self._next_alone:
                        self._allowed = 1
                    if self._at_work < self._allowed:
                        break
                if not self._changed.wait(PATIENCE if self._tasks and self._allowed < self.count else None):
                    self._go_on_without_what_stalls()
            try:
                task = self._tasks.popleft()
            except IndexError:  # dismissed
                return None
            if self._begun >= self._next_alone:
                self._next_alone = self._begun + EVERY
            self._at_work += 1
            self._begun += 1
            self._last_began = time.monotonic()
            if self._tasks and self._at_work < self._allowed:
                self._changed.notify()  # whoever begins wakes the next one, as long as there is work and room
            return task

    def _go_on_without_what_stalls(self) -> None:
        if self._tasks and time.monotonic() - self._last_began >= PATIENCE:
            self.limit = self._allowed = self.count
            self._next_alone = self._begun + EVERY

    def took(self, seconds: float) -> None:
        with self._changed:
            if self.worth is not None and self._allowed == 1:
                self.limit = self._allowed = min(self.count, max(1, round(seconds / self.worth)))

    def dismiss(self) -> None:
        if os.getpid() != self.process:  # a fork has none of the threads, one of which may have the lock
            return
        with self._changed:
            self.dismissed = True
            while self._tasks:
                future = self._tasks.popleft()[0]
                future.cancel()
                future.set_running_or_notify_cancel()  # without which whoever waits for it would wait on
            self._changed.notify_all()


def _work_off(crew: _Crew) -> None:
    first = True
    while (task := crew.next_task(first=first)) is not None:
        first = False
        future, function, arguments = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # it belongs to whoever waits for the result
                future.set_exception(error)
        del task, future, function, arguments  # or an idle thread would keep a batch alive
