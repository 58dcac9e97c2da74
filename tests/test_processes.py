"""The processes of a run share the cores of their machine."""

import os
import subprocess
import sys

import pytest

from msbreg.machine import allowed_cores, usable_cores
from msbreg.processes import Processes

PROGRAM = """
import os, sys
os.sched_setaffinity(0, [int(core) for core in sys.argv[1].split(",")])
from msbreg.processes import Processes
with Processes("cpu") as processes:
    print(processes.share_of_cores())
"""


def shares(cores_of_each: list[list[int]], port: int) -> list[int]:
    """What processes that may run on these cores count on."""
    world = str(len(cores_of_each))
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, ",".join(map(str, cores))],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, cores in enumerate(cores_of_each)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    return [int(text) for text in said]


def test_one_process_has_all_cores():
    assert Processes("cpu").share_of_cores() == usable_cores()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_processes_share_the_cores_that_they_have_in_common(free_port):
    two = sorted(allowed_cores())[:2]
    assert shares([two, two], free_port) == [1, 1]


def test_cores_of_their_own_are_not_divided(monkeypatch):
    """As a scheduler binds them: eight processes with four cores each, and as many on another machine."""
    processes = Processes("cpu")
    monkeypatch.setattr("msbreg.processes.allowed_cores", lambda: {4, 5, 6, 7})
    monkeypatch.setattr("msbreg.processes.usable_cores", lambda: 4)
    own = [set(range(4 * rank, 4 * rank + 4)) for rank in range(8)]
    for ranks, share in (
        ([("here", cores) for cores in own], 4),
        ([("here", set(range(32))), ("here", own[1])], 2),
        ([("here", own[1])] + [("there", own[1])] * 7, 4),
        ([("here", own[1])] * 8, 1),
    ):
        monkeypatch.setattr("socket.gethostname", lambda: "here")
        monkeypatch.setattr(processes, "gather_objects", lambda mine, ranks=ranks: ranks)
        assert processes.share_of_cores() == share
