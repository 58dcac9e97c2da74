"""Threads: their order, their end, and how many work at the same time."""

import threading
import time
from concurrent.futures import CancelledError, wait

import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

from msbreg.data import threads
from msbreg.data.threads import Threads

MOST = 4


class Crowd:
    """A task that takes so many seconds, and counts how many are at it."""

    def __init__(self, pool, seconds, *, each_waits_for_all=False):
        self.pool, self.seconds, self.each_waits_for_all = pool, seconds, each_waits_for_all
        self.most, self.begun, self.limits, self._inside, self._lock = 0, [], [], 0, threading.Lock()

    def __call__(self, number):
        began = time.perf_counter()
        with self._lock:
            self.begun.append(number)
            self.limits.append(self.pool.limit)
            self._inside += 1
            self.most = max(self.most, self._inside)
        time.sleep(self.seconds * (self._inside if self.each_waits_for_all else 1))
        with self._lock:
            self._inside -= 1
        self.pool.took(time.perf_counter() - began)
        return -number


@pytest.fixture
def crowd():
    """A pool with a limit, and a crowd for it."""
    made = []

    def make(worth, seconds, **options):
        made.append(Threads(MOST, "test", worth))
        return Crowd(made[-1], seconds, **options)

    yield make
    for pool in made:
        pool.close()


def passed(crowd, times):
    futures = [crowd.pool.submit(crowd, number) for number in range(times)]
    assert [future.result(10) for future in futures] == [-number for number in range(times)]
    return crowd.most


def test_one_thread_works_where_nothing_is_waited_for_and_all_where_it_is(crowd):
    assert passed(quick := crowd(0.1, 0), 50) == quick.pool.limit == 1
    assert quick.begun == list(range(50))
    assert passed(slow := crowd(1e-3, 0.01), 50) == slow.pool.limit == MOST
    assert passed(crowd(None, 0.01), 50) == MOST


def test_as_many_work_as_it_is_worth_and_come_in_together(crowd):
    assert passed(crowd(0.025, 0.05), 30) == 2
    assert passed(crowd(0.01, 0.05), 1 + 3) == 3


def test_those_that_hold_each_other_up_are_not_taken_for_slow_disks(crowd):
    assert passed(mutual := crowd(0.01, 0.02, each_waits_for_all=True), 30) == mutual.pool.limit == 2


def test_what_becomes_quick_or_slow_is_noticed(crowd, monkeypatch):
    monkeypatch.setattr(threads, "EVERY", 8)
    changing = crowd(5e-3, 0.05)
    for seconds, limit in ((0.05, MOST), (0, 1), (0.05, MOST)):
        changing.seconds = seconds
        passed(changing, 40)
        assert changing.pool.limit == limit


def test_while_one_is_alone_to_be_measured_the_limit_is_what_it_was(crowd, monkeypatch):
    monkeypatch.setattr(threads, "EVERY", 8)
    slow = crowd(5e-3, 0.05)
    assert passed(slow, 40) == MOST and set(slow.limits) == {MOST}


def test_a_failure_lets_the_next_ones_work(crowd):
    pool = crowd(1e-3, 0).pool
    failing = [pool.submit({}.__getitem__, 1) for _ in range(3 * MOST)]
    assert all(isinstance(future.exception(10), KeyError) for future in failing)
    assert pool.submit(abs, -1).result(10) == 1


@pytest.mark.parametrize("before", [0, 3, 6, 50])
@pytest.mark.parametrize("seconds", [0, 0.05])
def test_all_but_what_stalls_go_on(crowd, monkeypatch, before, seconds):
    """Alone to be measured, while it works beside others, and while one works at a time because all are quick."""
    monkeypatch.setattr(threads, "EVERY", 8)
    monkeypatch.setattr(threads, "PATIENCE", 0.2)
    pool, stalled = (usual := crowd(0.01, seconds)).pool, threading.Event()
    passed(usual, before)
    first = pool.submit(stalled.wait)
    others = [pool.submit(abs, -1) for _ in range(30)]
    assert [future.result(10) for future in others] == [1] * 30
    assert not first.done() and pool.limit == MOST
    stalled.set()
    assert first.result(10)
    usual.seconds = 0
    passed(usual, 20)
    assert pool.limit == 1


def test_quick_tasks_that_take_long_together_are_no_stall(crowd, monkeypatch):
    monkeypatch.setattr(threads, "PATIENCE", 0.2)
    assert passed(quick := crowd(0.1, 0.02), 60) == quick.pool.limit == 1  # 1.2 s, one after another
    assert set(quick.limits[1:]) == {1}


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_waits_for_a_stalled_task_ends_with_the_pool(forgotten):
    pool, stalled = Threads(MOST, "stalling", 1.0), threading.Event()
    first = pool.submit(stalled.wait)  # alone
    others = [pool.submit(abs, -1) for _ in range(9)]
    while not first.running():
        time.sleep(0.01)
    if forgotten:
        del pool
    else:
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            pool.submit(abs, -1)
    assert not wait(others, 10).not_done
    for future in others:
        with pytest.raises(CancelledError):
            future.result(10)
    patience = time.monotonic() + 10
    while (alive := names("stalling")) > 1 and time.monotonic() < patience:
        time.sleep(0.01)
    assert alive == 1
    stalled.set()
    assert first.result(10)


def names(prefix):
    return sum(thread.name.startswith(prefix) for thread in threading.enumerate())
