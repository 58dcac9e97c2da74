"""How many threads work at the same time."""

import threading
import time

import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

from msbreg.data import threads
from msbreg.data.threads import Gate, Threads

MOST = 4


class Crowd:
    """Counts who is at work, for so many seconds an item."""

    def __init__(self, seconds, *, each_waits_for_all=False):
        self.seconds, self.each_waits_for_all, self.most, self._inside = seconds, each_waits_for_all, 0, 0
        self._lock = threading.Lock()

    def __call__(self, item):
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        time.sleep(self.seconds * (self._inside if self.each_waits_for_all else 1))
        with self._lock:
            self._inside -= 1
        return -item


@pytest.fixture
def pool():
    pool = Threads(MOST, "test")
    yield pool
    pool.close()


def passed(pool, gate, crowd, times):
    futures = [pool.submit(gate.work, crowd, [number, number]) for number in range(times)]
    assert [future.result() for future in futures] == [[-number, -number] for number in range(times)]
    return crowd.most


def test_one_thread_works_where_nothing_is_waited_for_and_all_where_it_is(pool):
    assert passed(pool, Gate(MOST, worth=0.1), Crowd(0), 50) == 1
    gate = Gate(MOST, worth=1e-3)
    assert passed(pool, gate, Crowd(0.01), 50) == gate.limit == MOST


def test_as_many_as_it_is_worth_and_those_that_wait_come_in_together(pool):
    assert passed(pool, Gate(MOST, worth=0.025), Crowd(0.05), 30) == 2
    assert passed(pool, Gate(MOST, worth=0.01), Crowd(0.05), 1 + 3) == 3


def test_those_that_hold_each_other_up_are_not_taken_for_slow_disks(pool):
    gate = Gate(MOST, worth=0.01)
    assert passed(pool, gate, Crowd(0.02, each_waits_for_all=True), 30) == gate.limit == 2


def test_what_becomes_quick_or_slow_is_noticed(pool, monkeypatch):
    monkeypatch.setattr(threads, "EVERY", 8)
    gate, crowd = Gate(MOST, worth=5e-3), Crowd(0.05)
    for seconds, limit in ((0.05, MOST), (0, 1), (0.05, MOST)):
        crowd.seconds = seconds
        passed(pool, gate, crowd, 40)
        assert gate.limit == limit


def test_a_failure_lets_the_next_ones_in(pool):
    gate = Gate(MOST, worth=1e-3)
    failing = [pool.submit(gate.work, {}.__getitem__, [1]) for _ in range(3 * MOST)]
    assert all(isinstance(future.exception(10), KeyError) for future in failing)
    assert pool.submit(gate.work, abs, [-1]).result(10) == [1]
