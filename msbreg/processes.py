"""The processes of a run: one alone, or those that torchrun started."""

import gc
import os
import re
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from msbreg.errors import MSBRegError, is_of_memory
from msbreg.machine import allowed_cores, number_from, usable_cores

__all__ = ["Processes"]

T = TypeVar("T")


class Processes:
    """This process among those of the run; a context manager that joins and leaves the group.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        timeout: seconds that a rank waits for the others, when they gather at the start and in every collective, before
            it gives up. One that dies is noticed at once by gloo, whose connection to it closes, and by torchrun, which
            ends the others; this is for one that hangs, or whose machine is gone. Losses and gradients on GPUs go
            through NCCL, where torch itself ends the process (see `timeout` of `torch.distributed.init_process_group`).

    Raises:
        MSBRegError: on entering, where the device cannot be used or the others do not come; on leaving, where memory
            did not suffice, or a collective failed because another rank is gone or did not answer.

    Attributes:
        rank: 0 to world - 1 over all machines.
        local_rank: index on this machine.
        local_world: processes on this machine.
        world: processes of the run.
        device: where this process's networks live.
        group: process group of the losses and gradients, or None where the process is alone.
    """

    def __init__(self, device: str = "auto", *, timeout: float = 1800.0) -> None:
        self.rank, self.world = number_from("RANK", 0), number_from("WORLD_SIZE", 1)
        self.local_rank, self.local_world = number_from("LOCAL_RANK", 0), number_from("LOCAL_WORLD_SIZE", 1)
        # Of torchrun alone: a shell may well end before what it started.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.device = self._choose(device)
        self.timeout = timeout
        self.group: dist.ProcessGroup | None = None
        self._control: dist.ProcessGroup | None = None

    def _choose(self, wanted: str) -> torch.device:
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(wanted)
        except RuntimeError as error:
            raise MSBRegError(f"the device is {wanted!r}; expected auto, cpu, cuda or cuda:N.") from error
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise MSBRegError(f"the device is {wanted!r}; expected auto, cpu, cuda or cuda:N.")
        if not torch.cuda.is_available():
            raise MSBRegError(
                f"the device is {wanted!r}, but torch finds no usable GPU here; `msbreg doctor` says why."
            )
        if device.index is not None and self.local_world > 1:
            raise MSBRegError(f"the device is {wanted!r} for all {self.local_world} processes; say cuda for one each.")
        index = self.local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise MSBRegError(
                f"process {self.rank} needs GPU {index}, but this machine has {torch.cuda.device_count()}; "
                "start as many processes a machine as it has GPUs."
            )
        return torch.device("cuda", index)

    def __enter__(self) -> "Processes":
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            timeout = timedelta(seconds=self.timeout)
            try:
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timeout)
                self.group = dist.group.WORLD  # type: ignore[assignment]  # of a process that belongs to it
                # Waits on the CPU, not in a GPU's queue.
                self._control = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
            except (RuntimeError, ValueError) as error:
                raise MSBRegError(
                    f"rank {self.rank} could not join the {self.world} processes of the run: {first_sentence(error)}. "
                    "Start all of them with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun does."
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the others may be waiting in a collective, where leaving the group would wait for them in turn.
        if kind is None and dist.is_initialized():
            dist.destroy_process_group()
            # Their threads end with the last reference, of which modules in cycles may have some. One with a tensor
            # to release as the interpreter ends aborts the process.
            self.group = self._control = None
            gc.collect()
        if isinstance(error, RuntimeError) and is_of_memory(error):
            where = f"GPU {self.device.index}" if self.device.type == "cuda" else "this machine"
            (wanted,) = re.findall(r"ried to allocate ([\d.]+ \w+)", str(error))[:1] or ["tensor"]
            raise MSBRegError(
                f"the memory of {where} does not suffice for another {wanted}: lower --data.batch_size, --data.views "
                "or --data.size, set --model.view_chunk, or start more processes."
            ) from error
        if self.world > 1 and isinstance(error, RuntimeError) and is_of_a_collective(error):
            if "imed out" in str(error):
                why = f"another one did not answer in {self.timeout:g} s (--run.timeout)"
            else:
                why = "another one is gone, and its last message or the system's log says why"
            raise MSBRegError(
                f"rank {self.rank} of {self.world} gave up: {why} ({first_sentence(error)}; {place(trace)}). "
                "Once that is mended, the same command goes on from the last checkpoint, where there is one."
            ) from error

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    @property
    def orphaned(self) -> bool:
        """Whether the torchrun that started this process is gone, so that nobody would end it."""
        return self._launcher is not None and os.getppid() != self._launcher

    def gather(self, number: int) -> list[int]:
        """One number from each rank, on every rank."""
        if self.world == 1:
            return [number]
        mine, everyone = (
            torch.tensor([number], dtype=torch.int64),
            [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)],
        )
        dist.all_gather(everyone, mine, group=self._control)
        return [int(one) for one in everyone]

    def agree(self, number: int, what: str) -> None:
        """Raises MSBRegError where ranks see different numbers: on several machines, folders may differ."""
        if len(set(numbers := self.gather(number))) > 1:
            raise MSBRegError(
                f"processes do not see the same of {what}: {numbers} by rank; use a folder they all share."
            )

    def of_first(self, make: Callable[[], T], what: str) -> T:
        """What the first rank makes, on every rank; pickled on the way. To be called on all ranks.

        Args:
            make: called on the first rank alone.
            what: it does, to be told to the others where it fails: "list the images".

        Raises:
            MSBRegError: on the first rank what `make` raised, on the others that it could not.
        """
        made: list[T] = []
        problem: MSBRegError | None = None
        if self.first:
            try:
                made.append(make())
            except MSBRegError as error:
                problem = error
        if self.world > 1:
            box = [made]
            dist.broadcast_object_list(box, src=0, group=self._control)
            (made,) = box
        if problem is not None:
            raise problem
        if not made:
            raise MSBRegError(f"rank 0 could not {what}; it says why.")
        return made[0]

    def gather_objects(self, mine: T) -> list[T]:
        """What each rank has, on every rank; pickled on the way."""
        everyone = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, mine, group=self._control)
        return everyone

    def joined(self, entries: dict[int, str]) -> dict[int, str]:
        """The entries of all ranks, on every rank."""
        return {key: value for one in self.gather_objects(dict(entries)) for key, value in one.items()}

    def share_of_cores(self) -> int:
        """How many cores this process may count on; to be called on all ranks.

        Those that it may use, divided among the ranks on this machine that may run on some of the same: all of them
        under torchrun, itself alone where a scheduler has bound each to its own.
        """
        mine, host = allowed_cores(), socket.gethostname()
        others = self.gather_objects((host, mine))
        return max(1, usable_cores() // sum(host == theirs[0] and bool(mine & theirs[1]) for theirs in others))

    def mean(self, numbers: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor on each rank's device, which it overwrites."""
        if self.group is not None:
            dist.all_reduce(numbers, group=self.group)
            numbers /= self.world
        return numbers

    def wait(self) -> None:
        """Returns once every rank has come here."""
        self.gather(0)


def is_of_a_collective(error: RuntimeError) -> bool:
    """Whether torch could not talk to another rank; of gloo's errors only the text tells, by its source's path."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def first_sentence(error: BaseException) -> str:
    """What an error of torch says, without the place in its source and advice that is not for our users."""
    text = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0])
    return text.split(". ")[0].rstrip(". ")


def place(trace: TracebackType | None) -> str:
    """Where in msbreg an error came from."""
    frames = traceback.extract_tb(trace)
    here = Path(__file__).parent
    frame = [frame for frame in frames if here in Path(frame.filename).parents or frame is frames[0]][-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"
