"""The processes of a run: cores that they share, and what one does for all."""

import os
import subprocess
import sys

import pytest

from msbreg import machine
from msbreg.errors import MSBRegError
from msbreg.machine import allowed_cores, usable_cores
from msbreg.processes import Processes

PROGRAM = """
import os, sys
os.sched_setaffinity(0, [int(core) for core in sys.argv[1].split(",")])
from msbreg.processes import Processes
with Processes("cpu") as processes:
    print(processes.share_of_cores())
"""


def run_ranks(program: str, arguments: list[list[str]], port: int) -> list[str]:
    """What processes of one group print, each with arguments of its own."""
    world = str(len(arguments))
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *own],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(arguments)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started)
    of_torch = "[Gloo] "  # until 2.10
    return ["".join(line for line in text.splitlines(True) if not line.startswith(of_torch)) for text in said]


def shares(cores_of_each: list[list[int]], port: int) -> list[int]:
    """What processes that may run on these cores count on."""
    return [int(text) for text in run_ranks(PROGRAM, [[",".join(map(str, cores))] for cores in cores_of_each], port)]


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


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("150000 100000", 2), ("max 100000", 4), ("1000 100000", 1), ("900000 100000", 4), ("", 4), (None, 4),
    ],
)  # fmt: skip
def test_no_more_cores_than_the_containers_quota(tmp_path, monkeypatch, quota, cores):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(machine, "allowed_cores", lambda: {0, 1, 2, 3})
    assert usable_cores() == cores


def test_ranks_that_see_other_numbers_are_told(monkeypatch):
    processes = Processes("cpu")
    processes.agree(240, "the run folder here")
    monkeypatch.setattr(processes, "gather", lambda number: [number, number - 1])
    with pytest.raises(MSBRegError, match=r"do not see the same of the run folder here: \[240, 239\] by rank"):
        processes.agree(240, "the run folder here")


OF_FIRST = """
import sys
from msbreg.errors import MSBRegError
from msbreg.processes import Processes
calls = []
with Processes("cpu") as processes:
    def good():
        calls.append("good")
        return {"made by": processes.rank}
    def bad():
        raise MSBRegError("there are none.")
    print(processes.of_first(good, "list the images"), len(calls))
    try:
        processes.of_first(bad, "list the images")
    except MSBRegError as error:
        print(error)
"""


def test_the_first_rank_works_for_all(free_port):
    said = run_ranks(OF_FIRST, [[], []], free_port)
    assert [text.splitlines() for text in said] == [
        ["{'made by': 0} 1", "there are none."],
        ["{'made by': 0} 0", "rank 0 could not list the images; it says why."],
    ]


def test_the_end_of_torchrun_is_noticed_and_that_of_a_shell_is_not(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    by_a_shell = Processes("cpu")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    by_torchrun = Processes("cpu")
    assert not by_torchrun.orphaned
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert by_torchrun.orphaned and not by_a_shell.orphaned


@pytest.mark.parametrize("device", ["gpu", "meta", "cpu:x"])
def test_devices_that_cannot_be(device):
    with pytest.raises(MSBRegError, match=f"the device is '{device}'; expected auto, cpu, cuda or cuda:N"):
        Processes(device)


def test_each_process_has_a_gpu_of_its_own_machine(monkeypatch):
    """The second of two machines with two GPUs each."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert str(Processes().device) == str(Processes("cuda").device) == "cuda:1"
    with pytest.raises(MSBRegError, match="the device is 'cuda:0' for all 2 processes; say cuda for one each"):
        Processes("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one on each of four machines
    assert str(Processes("cuda:0").device) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MSBRegError, match="process 3 needs GPU 2, but this machine has 2"):
        Processes("cuda")


THREADS = """
import os
import torch, torch.distributed as dist
import msbreg.distributed
threads = len(os.listdir("/proc/self/task"))
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{PORT}", rank=0, world_size=1)
assert len(os.listdir("/proc/self/task")) > threads
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
dist.destroy_process_group()
assert len(os.listdir("/proc/self/task")) == threads, os.listdir("/proc/self/task")
"""


def test_a_group_that_is_destroyed_leaves_no_threads(free_port):
    """Torch's optimizers import what would keep it: one of its threads may then abort a process that is done."""
    for imports, status in ((True, 0), (False, 1)):
        script = THREADS if imports else THREADS.replace("import msbreg.distributed\n", "")
        done = subprocess.run([sys.executable, "-c", script.replace("PORT", str(free_port))], capture_output=True)
        assert done.returncode == status, done.stderr.decode()
