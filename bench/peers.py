"""Trains with lightly, with DALI in the manner of solo-learn, and with msbreg, in one run on one device: who is faster?

    python bench/peers.py                    # ResNet-18 at 32 pixels on a GPU, a network for CPUs elsewhere
    python bench/peers.py --case imagenet    # ResNet-50 at 224

Backbone, widths of the heads, batch, precision, memory format, optimizer and number of loading threads are the same for
all. Each provider lives in a process of its own, and they take turns, round after round, so that what else the machine
does hits all alike. What a loader prepared while others had their turn is thrown away before a turn is timed.
"""

import argparse
import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from options import add_device, listed, not_negative, positive
from peer_trainers import CASES, PROVIDERS, Case, Peer, Setting
from records import gpu_state, keep, provenance
from torch import Tensor, nn

from msbreg.data.rendered import render
from msbreg.errors import MSBRegError
from msbreg.files import cache_folder
from msbreg.machine import gpu_megabytes_in_use, synchronize, usable_cores
from msbreg.stopwatch import Stopwatch
from msbreg.tables import markdown_table

CHECK_STEPS = 3
WARM_UP = 3
"""Steps of a turn before its clock starts, at the least."""
CASE_OPTIONS = {
    "batch": "images in a step",
    "hidden": "width of the heads' hidden layer",
    "dim": "D, dimension of the embeddings",
    "view_chunk": "most views that msbreg takes through the networks at a time, more being recomputed in the backward "
    "pass; 0: all",
}
"""What of a case the command line may set, and its meaning."""


def check(peer: Peer) -> None:
    """Takes a few steps and sees that they train.

    Raises:
        MSBRegError: the loss is not finite, or a matrix or kernel of a network stays as it was.
    """

    def weights(network: nn.Module) -> dict[str, Tensor]:  # a bias before a batch normalisation has no gradient
        return {name: weight for name, weight in network.named_parameters() if weight.ndim > 1}

    networks = {"online": peer.online, "predictor": peer.predictor, "target": peer.target}
    before = {kind: [weight.detach().clone() for weight in weights(one).values()] for kind, one in networks.items()}
    losses = [peer.step(next(peer.batches)) for _ in range(CHECK_STEPS)]
    if not torch.stack(losses).isfinite().all():
        raise MSBRegError(f"it does not train: the first losses are {[float(loss) for loss in losses]}")
    for kind, network in networks.items():
        for old, (name, new) in zip(before[kind], weights(network).items(), strict=True):
            if torch.equal(old, new) or not new.isfinite().all():
                raise MSBRegError(f"it does not train: {CHECK_STEPS} steps leave {name} of the {kind} network wrong")


def turn(peer: Peer, device: torch.device, *, seconds: float, steps: int) -> dict[str, Any]:
    """One provider's turn in a round.

    Args:
        peer: the provider.
        device: it trains on.
        seconds: trains for at least so long.
        steps: takes at least so many; batches that become ready together are taken together.
    """
    for _ in range(peer.ahead):
        next(peer.batches)
    for _ in range(max(WARM_UP, peer.together)):
        peer.step(next(peer.batches))
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    done, watch, energy, began = 0, Stopwatch(device), joules(device), time.perf_counter()
    while done < steps or time.perf_counter() - began < seconds:
        for _ in range(peer.together):
            with watch.waiting():
                batch = next(peer.batches)
            loss = peer.step(batch)
        done += peer.together
    synchronize(device)
    spent = time.perf_counter() - began
    used = None if energy is None else joules(device) - energy
    if not math.isfinite(float(loss)):
        raise MSBRegError(f"its loss is {float(loss)}")
    return {
        "steps": done,
        "seconds": spent,
        "data_wait_ms": 1e3 * watch.waited / done,
        "memory_mb": memory_megabytes(device),
        "power_w": None if used is None else used / spent,
        "gpu": gpu_state(device),
    }


def memory_megabytes(device: torch.device) -> float:
    """What torch allocated of the GPU at the most; on a CPU what this process and its loader's have in memory now.

    Of memory that processes share each counts its part.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() for pid in pids]
    return sum(int(line.split()[1]) for lines in rollups for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def joules(device: torch.device) -> float | None:
    """Energy that the GPU has used since its driver was loaded, by NVML's counter; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value / 1e3


def serve(name: str, setting: Setting, pipe: Connection) -> None:
    """Life of a provider's process: it builds and checks, and takes a turn, whenever it is asked for that."""
    peer = None
    device = torch.device(setting.device, 0) if setting.device == "cuda" else torch.device("cpu")
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    try:
        pipe.recv()
        before = gpu_megabytes_in_use(device)
        peer = PROVIDERS[name].build(setting)
        check(peer)
        synchronize(device)
        answer = {"gpu_memory_mb": gpu_megabytes_in_use(device) - before if gpu else None}
        while True:
            if gpu:  # for the others, before one of them is asked
                gc.collect()
                torch.cuda.empty_cache()
            pipe.send(answer)
            answer = turn(peer, device, **pipe.recv())
    except (EOFError, ConnectionError):  # no more turns
        if peer is not None:
            peer.close()
    except ImportError as error:
        pipe.send({"missing": f"a package that it needs is not installed: {error}"})
    except MSBRegError as error:  # which says what is wrong
        pipe.send({"failed": str(error)})
    except Exception as error:
        traceback.print_exc()
        pipe.send({"failed": textwrap.shorten(f"{type(error).__name__}: {error}", 300)})


class LeftOutError(Exception):
    """A provider cannot be measured."""

    def __init__(self, reason: str, *, failed: bool) -> None:
        super().__init__(reason)
        self.failed = failed
        """Whether it should have been possible."""


class Worker:
    """A provider in a process of its own."""

    def __init__(self, name: str, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, setting, theirs))
        self.process.start()
        theirs.close()
        self.turns: list[dict[str, Any]] = []
        self.gpu_memory_mb: float | None = None

    def build(self) -> None:
        """Has it built and checked. Its process imports torch since it was started, all at the same time."""
        self.gpu_memory_mb = self._ask()["gpu_memory_mb"]

    def turn(self, seconds: float, steps: int) -> dict[str, Any]:
        """Has it take a turn."""
        self.turns.append(self._ask(seconds=seconds, steps=steps))
        return self.turns[-1]

    def _ask(self, **request: float) -> dict[str, Any]:
        """Its answer to a request: to be built, where there is nothing in it."""
        try:
            self.pipe.send(request)
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            answer = {"failed": f"its process ended with status {self.process.exitcode}"}
        for kind in ("missing", "failed"):
            if kind in answer:
                self.close()
                raise LeftOutError(answer[kind], failed=kind == "failed")
        return answer

    def dismiss(self) -> None:
        """Lets the process end, and does not wait for it."""
        self.pipe.close()

    def close(self) -> None:
        """Ends the process."""
        self.dismiss()
        self.process.join(3)
        if self.process.is_alive():
            self.process.terminate()


def row(name: str, worker: Worker, batch: int) -> dict[str, Any]:
    """Medians over the rounds."""
    turns, views = worker.turns, PROVIDERS[name].views
    images = statistics.median(batch * turn["steps"] / turn["seconds"] for turn in turns)
    powers = [turn["power_w"] for turn in turns if turn["power_w"] is not None]
    return {
        "provider": name,
        "about": PROVIDERS[name].about,
        "views": views,
        "views_per_second": views * images,
        "images_per_second": images,
        "step_ms": 1e3 * batch / images,
        "data_wait_ms": statistics.median(turn["data_wait_ms"] for turn in turns),
        "memory_mb": max(turn["memory_mb"] for turn in turns),
        "gpu_memory_mb": worker.gpu_memory_mb,
        "power_w": statistics.median(powers) if powers else None,
        "turns": turns,
    }


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with its views/s over lightly's, None without lightly."""
    base = next((row["views_per_second"] for row in rows if row["provider"] == "lightly"), None)
    return [{**row, "over_lightly": row["views_per_second"] / base if base else None} for row in rows]


COLUMNS = {
    "provider": ("provider", "{}"),
    "views": ("K", "{}"),
    "views_per_second": ("views/s", "{:,.0f}"),
    "over_lightly": ("over lightly's", "{:.2f}"),
    "images_per_second": ("images/s", "{:,.0f}"),
    "step_ms": ("step, ms", "{:,.1f}"),
    "data_wait_ms": ("waiting for data, ms", "{:,.1f}"),
    "memory_mb": ("memory, MB", "{:,.0f}"),
    "gpu_memory_mb": ("all of the GPU's, MB", "{:,.0f}"),
    "power_w": ("power, W", "{:,.0f}"),
}


def table(result: dict[str, Any]) -> str:
    """Markdown; columns that nothing is known of are left out."""
    rows = result["rows"]
    known = [key for key in COLUMNS if any(row[key] is not None for row in rows)]
    cells = [["" if one[key] is None else COLUMNS[key][1].format(one[key]) for key in known] for one in rows]
    figures = [markdown_table([COLUMNS[key][0] for key in known], cells), ""] if rows else []
    case = result["case"]
    heading = f"{case['backbone']} at {case['size']} pixels, {case['batch']} images a step, {result['device_name']}"
    notes = [f"Left out: {name}: {reason}." for name, reason in result["left_out"].items()]
    return "\n".join([heading, "", *figures, *notes]).strip()


def facts(options: argparse.Namespace, setting: Setting) -> dict[str, Any]:
    """Where the figures are from."""
    packages = ("torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "lightly")
    return {
        **provenance("bench/peers.py", options.data, torch.device(setting.device), packages),
        "images": "rendered" if options.data is None else "IMAGES",
        "case": setting.case._asdict(),
        "precision": "bf16 autocast" if setting.bf16 else "fp32",
        "compile": setting.compile,
        "cuda_graph": setting.cuda_graph,
        "loading_threads": setting.threads,
        "compute_threads": torch.get_num_threads(),
    }


def measure(names: list[str], setting: Setting, *, rounds: int, seconds: float, steps: int) -> Iterator[dict[str, Any]]:
    """Starts the providers, has them built one by one, then lets them take turns.

    Yields:
        Once all are built, and after each turn: rows of those that have had one; left_out, name to reason; failed,
        whether one is left out that should not have been.
    """
    workers: dict[str, Worker] = {}
    left_out: dict[str, str] = {}
    failed = False

    def leave_out(name: str, error: LeftOutError) -> None:
        nonlocal failed
        failed |= error.failed
        left_out[name] = str(error)
        print(f"{name} is left out: {error}", file=sys.stderr, flush=True)

    def measured() -> dict[str, Any]:
        rows = [row(name, worker, setting.case.batch) for name, worker in workers.items() if worker.turns]
        return {"rows": compared(rows), "left_out": left_out, "failed": failed}

    try:
        for name in names:
            workers[name] = Worker(name, setting)
        for name in names:
            began = time.perf_counter()
            try:
                workers[name].build()
                print(f"{name} is ready after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            except LeftOutError as error:
                del workers[name]
                leave_out(name, error)
        yield measured()
        for number in range(1, rounds + 1):
            for name in list(workers):
                try:
                    taken = workers[name].turn(seconds, steps)
                    speed = PROVIDERS[name].views * setting.case.batch * taken["steps"] / taken["seconds"]
                    print(f"round {number}: {name} {speed:,.0f} views/s", file=sys.stderr, flush=True)
                except LeftOutError as error:
                    del workers[name]
                    leave_out(name, error)
                yield measured()
    finally:
        for worker in workers.values():
            worker.dismiss()  # so that all of them end at the same time: whoever interrupts this waits for the table
        for worker in workers.values():
            worker.close()


def rendered(case: Case) -> Path:
    """The images to train on where none are given, kept for the next time."""
    return render(
        cache_folder() / f"bench-{case.side}-{case.images}", images=case.images, test_images=20, size=case.side
    )


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = "; ".join(f"{name}: {case.backbone} at {case.size} pixels" for name, case in CASES.items())
    parser.add_argument(
        "--case", choices=CASES, default="small" if gpu else "tiny", help=f"{cases}; default: %(default)s"
    )
    parser.add_argument(
        "--providers", nargs="+", default=list(PROVIDERS), metavar="NAME", help=f"default: {' '.join(PROVIDERS)}"
    )
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each provider; default: %(default)s")
    parser.add_argument("--seconds", type=not_negative, default=8.0, help="of a turn at least; default: %(default)s")
    parser.add_argument("--steps", type=positive, default=1, help="of a turn at least; default: %(default)s")
    add_device(parser, "that trains")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 autocast on a GPU, fp32 on a CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks of all; default: off")
    parser.add_argument("--cuda-graph", action="store_true", help="msbreg's step as one CUDA graph; default: off")
    parser.add_argument(
        "--threads",
        type=positive,
        default=usable_cores(),
        help="that load images, a DataLoader's are processes; default: the cores, here %(default)s",
    )
    for name, meaning in CASE_OPTIONS.items():
        usual = ", ".join(f"{getattr(case, name)} ({label})" for label, case in CASES.items())
        kind = int if name == "view_chunk" else positive
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{meaning}; default: {usual}")
    parser.add_argument(
        "--data", type=Path, help="image folder; default: images that msbreg renders, kept in its cache"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, after each turn")
    options = parser.parse_args()
    options.providers = listed(parser, options.providers, PROVIDERS)
    return options


def main() -> None:
    options = parse()
    given = {name: getattr(options, name) for name in CASE_OPTIONS}
    case = CASES[options.case]._replace(**{name: value for name, value in given.items() if value is not None})
    setting = Setting(
        case,
        str(rendered(case) if options.data is None else options.data),
        options.device,
        options.precision == "bf16" or (options.precision is None and options.device == "cuda"),
        options.compile,
        options.cuda_graph,
        options.threads,
    )
    result = facts(options, setting) | {"rows": [], "left_out": {}, "failed": False}
    turns = measure(options.providers, setting, rounds=options.rounds, seconds=options.seconds, steps=options.steps)
    try:
        for measured in turns:
            result |= measured
            keep(result, options.json)
    finally:  # whoever interrupts it has what was measured by then
        print(table(result), flush=True)
    sys.exit(int(result["failed"]))


if __name__ == "__main__":
    main()
