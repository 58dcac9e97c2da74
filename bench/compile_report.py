"""Compiles every kernel ahead of time as its launcher would launch it, and reports what the compiler made of it.

    python bench/compile_report.py --arch 90 80 100 gfx942 --json bench/results/static/DATE/compile.json

Needs no GPU: Triton's wheel has the compilers for all of them. A row is a kernel in one specialisation; a kernel that
several calls share is compiled once, and Triton's cache keeps it for the next time. An architecture takes about two
minutes on one core. The exit status is 1 where a row has a fault: a kernel that does not compile, spills registers,
needs more shared memory than there is, loads narrowly what could be loaded 16 bytes at a time, multiplies matrices
without tensor cores or float32 ones by a single TF32 product, has these wait for each other where they could overlap,
adds by atomics, computes addresses in 32 bits, has no fence before Blackwell's tensor cores, or begins early and does
not wait.

A second table has what each call moves and multiplies, and how long an H200 would take for it at least.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import launch_cost
import torch
import triton
from assembly import (
    accesses,
    amd_resources,
    coarse_dots,
    dots,
    float_atomics,
    instructions,
    matrix_units,
    overflows,
    premature,
    ptxas_resources,
    serialised,
    unfenced,
)
from launches import CASES, QUICK, Case, Launch, calls, specialised
from records import provenance
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from msbreg.kernels import halves, tiles
from msbreg.tables import markdown_table

__all__ = ["Row", "assembler_log", "compiled", "faults", "machine_code", "main", "report", "target_of"]

WIDE = 128
NARROW = {  # smaller pieces, in bits, in which arguments may be loaded, and why
    "norm_pointer": (32, "one number a row"),
    "d_attraction_pointer": (32, "one number a row"),
    "d_total_pointer": (32, "one number"),
    "seed_pointer": (64, "one number"),
    "step_pointer": (64, "one number"),
    "key_pointer": (64, "two numbers"),
    "image_sums_pointer": (32, "its second half begins wherever the number of images puts it"),
    "squares_pointer": (64, "a few numbers, with a warp's loads side by side"),
    "coefficients_pointer": (64, "two numbers"),
    "counter_pointer": (32, "one number"),
    "spectral_pointer": (64, "a few kilobytes, with a warp's loads side by side"),
    "image_gradient centroid_pointer": (32, "one row for all threads of a program: one to four numbers for each"),
    "gram z_pointer": (32, "Triton turns a factor by copying it number by number, a warp's side by side"),
    "product z_pointer": (64, "Triton copies four half-precision numbers of a factor at a time"),
}
SHARED_BYTES = {  # that a program may have
    "sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_87": 163 << 10, "sm_89": 99 << 10,
    "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_103": 227 << 10, "sm_120": 99 << 10,
    "gfx90a": 64 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10,
}  # fmt: skip


@dataclasses.dataclass
class Row:
    """A kernel as compiled for one architecture."""

    kernel: str
    arch: str
    cases: list[str]
    """Which calls launch it."""
    blocks: dict[str, Any]
    """Its compile-time constants, and num_warps."""
    registers: int | None = None
    """Of a thread."""
    spilled_bytes: int | None = None
    """Stored and loaded by a thread."""
    shared_bytes: int | None = None
    """Of a program."""
    instructions: int | None = None
    """Of the machine code, those included that are for numbers out of the ordinary alone; NVIDIA's."""
    load_bits: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """The narrowest and the widest load from each argument."""
    store_bits: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """The narrowest and the widest store to each."""
    widest_load_bits: int | None = None
    early: bool = False
    """Whether its programs may take their places while those of the launch before end."""
    dots: int = 0
    """Matrix products in the source, as compiled."""
    matrix_units: str | None = None
    """The instruction that multiplies matrices."""
    faults: list[str] = dataclasses.field(default_factory=list)


def compiled(launch: Launch, target: GPUTarget) -> Row:
    """One launch's kernel, compiled for a GPU."""
    signature, constants, attributes = specialised(launch)
    blocks = {p.name: launch.arguments[p.name] for p in launch.kernel.params if p.is_constexpr}
    row = Row(launch.kernel.__name__, named(target), [], blocks | {"num_warps": launch.options["num_warps"]})
    row.early = launch.options.get("launch_pdl", False)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    try:
        with assembler_log() as log:
            kernel = triton.compile(source, target=target, options=dict(launch.options))
    except Exception as error:  # whatever Triton's passes raise, the other kernels are still to be seen
        row.faults.append(f"does not compile: {str(error).strip().splitlines()[0]}")
        return row
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        row.registers, row.spilled_bytes, row.widest_load_bits = amd_resources(text)
    else:
        text = kernel.asm["ptx"]
        if not log.getvalue():  # Triton's cache had the kernel
            backend = make_backend(target)
            with assembler_log() as log:
                backend.make_cubin(text, {}, backend.parse_options(dict(launch.options)), target.arch)
        row.registers, row.spilled_bytes = ptxas_resources(log.getvalue())
        row.instructions = instructions(machine_code(kernel.asm["cubin"]))
    row.shared_bytes = kernel.metadata.shared
    row.dots, row.matrix_units = dots(kernel.asm["ttir"]), matrix_units(text)
    if target.backend == "cuda":
        names = [name for name, kind in signature.items() if kind != "constexpr"]
        for access in accesses(text):
            bits = row.load_bits if access.kind == "load" else row.store_bits
            for name in (names[number] for number in access.parameters if signature[names[number]].startswith("*")):
                seen = (*bits.get(name, ()), access.bits)
                bits[name] = (min(seen), max(seen))
        row.widest_load_bits = max((widest for _, widest in row.load_bits.values()), default=None)
    row.faults = faults(row, kernel.asm["ttir"], launch.arguments)
    if launch.options.get("launch_pdl") and premature(text):
        row.faults.append("reads, writes or ends before it has waited for the last launch")
    if unfenced(text):
        row.faults.append("has tensor cores read what is copied without a fence")
    if serialised(log.getvalue()):
        row.faults.append("has matrix products wait for each other")
    return row


@contextlib.contextmanager
def assembler_log() -> Iterator[io.StringIO]:
    """What Triton prints of its assembler, ptxas."""
    with mock.patch.dict(os.environ, TRITON_DUMP_PTXAS_LOG="1"), contextlib.redirect_stdout(io.StringIO()) as log:
        yield log


def machine_code(cubin: bytes) -> str:
    """SASS, as the disassembler in Triton's wheel writes it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults(row: Row, ttir: str, arguments: Mapping[str, Any]) -> list[str]:
    """What is wrong with a kernel, in words."""
    found = []
    if row.spilled_bytes:
        found.append(f"spills {row.spilled_bytes} bytes")
    for name, (bits, _) in row.load_bits.items():
        least, _ = NARROW.get(f"{row.kernel.removesuffix('_kernel')} {name}") or NARROW.get(name, (WIDE, ""))
        if bits < least and can_be_wide(arguments[name]):
            found.append(f"loads {bits} bits at a time from {name}")
    if row.shared_bytes > SHARED_BYTES.get(row.arch, row.shared_bytes):
        found.append(f"needs {row.shared_bytes} bytes of shared memory, of {SHARED_BYTES[row.arch]}")
    if row.dots and not row.matrix_units:
        found.append("multiplies matrices without tensor cores")
    if coarse_dots(ttir):
        found.append("multiplies float32 matrices by one TF32 product")
    if float_atomics(ttir):
        found.append("adds by atomics, in another order at each run")
    found.extend(f"computes an address in 32 bits: {line}" for line in overflows(ttir))
    return found


def can_be_wide(tensor: Tensor) -> bool:
    """Whether each row of a tensor begins at 16 bytes and has a whole number of them, as far as Triton is told."""
    return tensor.stride(-1) == 1 and all(n % 16 == 0 for n in (tensor.shape[-1], *tensor.stride()[:-1]))


def target_of(name: str) -> GPUTarget:
    """The target of `90` or `gfx942`."""
    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name), 32)


def architecture(text: str) -> str:
    """The `type` of --arch."""
    known = [name.removeprefix("sm_") for name in SHARED_BYTES]
    if text not in known:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {text}")
    return text


def named(target: GPUTarget) -> str:
    """Its usual name."""
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


def report(cases: Iterable[Case], names: Sequence[str], say: Callable[[str], None]) -> tuple[list[Row], list[dict]]:
    """The rows of all kernels on all architectures, and what each call costs."""
    rows: dict[str, Row] = {}
    cases = list(cases)
    for name in names:
        target = target_of(name)
        for case, by_call in launches_on(target, cases).items():
            say(f"{named(target)} {case}")
            for launch in (launch for made in by_call.values() for launch in made):
                key = str((named(target), launch.kernel.__name__, specialised(launch), launch.options))
                if key not in rows:
                    rows[key] = compiled(launch, target)
                if str(case) not in rows[key].cases:
                    rows[key].cases.append(str(case))
    on_an_h200 = launches_on(target_of("90"), cases)  # whatever is compiled for: the bounds are of an H200's launches
    costs = [cost_of(case, call, made) for case, by_call in on_an_h200.items() for call, made in by_call.items()]
    return list(rows.values()), costs


def launches_on(target: GPUTarget, cases: Iterable[Case]) -> dict[Case, dict[str, list[Launch]]]:
    """What each call of each case launches there."""
    # The launchers ask whether this is AMD's, whose matrix units take other precisions, and what memory there is.
    with (
        mock.patch.object(torch.version, "hip", "ahead of time" if target.backend == "hip" else None),
        mock.patch.object(halves, "shared_memory", return_value=SHARED_BYTES[named(target)]),
        mock.patch.object(tiles, "architecture", return_value=target.arch if target.backend == "cuda" else 0),
    ):
        # Elsewhere the inverse root is a sequence of launches.
        at_once = halves.ample_shared_memory(torch.device("cpu"))
        return {case: calls(case) for case in cases if at_once or "root" not in case.options}


def cost_of(case: Case, call: str, launches: Sequence[Launch]) -> dict[str, Any]:
    """What a call moves and multiplies, and the time that it takes an H200 at least."""
    parts = [launch_cost.of(launch.kernel.__name__, launch.arguments) for launch in launches]
    flops, half_flops = sum(part.flops for part in parts), sum(part.half_flops for part in parts)
    views = {"forward": 2, "backward": 2 + ("leave_one_out" in case.options), "root": 2, "matrix": 2}.get(
        call, 1 / case.views
    )
    rows = case.dim if call == "root" else case.batch
    once = round(views * case.views * rows * case.dim * case.dtype.itemsize)
    if call == "pixels":
        once = case.views * case.batch * case.dim**2 * 3 * (1 + case.dtype.itemsize)
    return {
        "call": call,
        "case": str(case),
        "launches": len(parts),
        "once_bytes": once,
        "tensors_bytes": sum(part.minimal for part in parts),
        "moved_bytes": sum(part.loaded + part.stored for part in parts),
        "product_flops": flops,
        "half_flops": half_flops,
        "h200_microseconds": 1e6
        * launch_cost.h200_seconds(len(parts), once, flops, half_flops, double=case.dtype == torch.float64),
    }


def kernel_table(rows: Iterable[Row]) -> str:
    """One line for each kernel that was compiled."""
    head = ["kernel", "first of its cases", "arch", "blocks", "warps", "registers", "spilled", "shared", "instructions"]
    head += ["widest load", "tensor cores", "faults"]
    return markdown_table(
        head,
        (
            [
                row.kernel.removesuffix("_kernel"),
                row.cases[0],
                row.arch,
                "x".join(str(size) for name, size in row.blocks.items() if name.startswith("BLOCK")),
                row.blocks["num_warps"],
                *(number if number is not None else "-" for number in (row.registers, row.spilled_bytes)),
                *(number if number is not None else "-" for number in (row.shared_bytes, row.instructions)),
                row.widest_load_bits or "-",
                row.matrix_units or ("none" if row.dots else "-"),
                "; ".join(row.faults) or "-",
            ]
            for row in rows
        ),
        text=len(head),
    )


def summary_table(rows: Iterable[Row]) -> str:
    """One line for each kernel and architecture: the most of all its specialisations."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel.removesuffix("_kernel"), row.arch), []).append(row)
    head = ["kernel", "arch", "specialisations", "most registers", "spilled bytes", "most shared bytes", "widest load"]
    head += ["tensor cores", "faults"]
    return markdown_table(
        head,
        (
            [
                kernel,
                arch,
                len(group),
                max(row.registers or 0 for row in group),
                max(row.spilled_bytes or 0 for row in group),
                max(row.shared_bytes or 0 for row in group),
                max(row.widest_load_bits or 0 for row in group),
                ", ".join(sorted({row.matrix_units for row in group if row.matrix_units})) or "-",
                sum(len(row.faults) for row in group),
            ]
            for (kernel, arch), group in sorted(groups.items())
        ),
        text=len(head),
    )


def cost_table(costs: Iterable[Mapping[str, Any]]) -> str:
    """One line for each call."""
    head = ["call", "case", "launches", "inputs and gradient, MB", "each launch's tensors, MB", "loaded and stored, MB"]
    head += ["products, GFLOP", "three of halves each, GFLOP", "H200 at least, µs"]
    return markdown_table(
        head,
        (
            [
                cost["call"],
                cost["case"],
                cost["launches"],
                *(f"{cost[name] / 1e6:.2f}" for name in ("once_bytes", "tensors_bytes", "moved_bytes")),
                *(f"{cost[name] / 1e9:.2f}" for name in ("product_flops", "half_flops")),
                f"{cost['h200_microseconds']:.0f}",
            ]
            for cost in costs
        ),
        text=len(head),
    )


def document(rows: Iterable[Row], costs: Iterable[Mapping[str, Any]]) -> str:
    """The report in JSON, a row a line."""
    about = provenance("bench/compile_report.py", None, torch.device("cpu"), ("triton",))
    lists = {"kernels": [dataclasses.asdict(row) for row in rows], "calls": list(costs)}
    text = json.dumps(about)[:-1]
    for name, items in lists.items():
        text += f',\n"{name}": [\n' + ",\n".join(json.dumps(item, default=str) for item in items) + "\n]"
    return text + "}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the report; 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch",
        nargs="+",
        type=architecture,
        default=["90"],
        help="compute capabilities times ten, or AMD names as gfx942",
    )
    parser.add_argument("--json", type=Path, help="file to write the rows to, with a short table in Markdown beside it")
    parser.add_argument("--quick", action="store_true", help="seven of the cases")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    rows, costs = report(QUICK if options.quick else CASES, options.arch, lambda text: print(text, file=sys.stderr))
    print(kernel_table(rows), cost_table(costs), sep="\n\n")
    faulty = [row for row in rows if row.faults]
    registers, spilled = max(row.registers or 0 for row in rows), sum(row.spilled_bytes or 0 for row in rows)
    summary = (
        f"{len(rows)} kernels for {', '.join(options.arch)}: {len(faulty)} with faults, "
        f"at most {registers} registers, {spilled} bytes spilled"
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(document(rows, costs), encoding="utf-8")
        plain = [cost for cost in costs if len(cost["case"].split()) == 2]
        lines = (f"Triton {triton.__version__}. {summary}.", summary_table(rows), cost_table(plain))
        options.json.with_suffix(".md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{summary}, in {time.monotonic() - began:.0f} s")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
