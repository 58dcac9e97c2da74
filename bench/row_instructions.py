"""How many instructions the row kernels execute for an image, and how many warps a processor holds: without a GPU.

    python bench/row_instructions.py --json bench/results/static/DATE/row_instructions.json

With half the bytes of float32 there are as many instructions, and on a GPU the time of half precisions goes with them:
see docs/decisions.md. They are read from the machine code that the installed Triton makes for an H100 and an H200, of
the tile that is chosen, or with other numbers of warps; the branch for rows that overflow is left out.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import triton
from assembly import executed, ptxas_resources
from compile_report import assembler_log, machine_code
from launches import Case, calls, specialised
from options import positive
from records import keep, provenance
from shapes import one_shape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from msbreg.tables import markdown_table

KERNELS = ("rows_forward_kernel", "image_gradient_kernel")
TARGET = GPUTarget("cuda", 90, 32)
REGISTERS, SHARED_BYTES, WARPS = 65536, 228 << 10, 64
"""That a processor of an H100 and an H200 has, by NVIDIA's CUDA programming guide; a program takes 1 KiB more."""


def count(case: Case, *, spectral: bool, warps: int | None = None) -> list[dict[str, Any]]:
    """One row for each kernel, forward and backward.

    Args:
        case: the call.
        spectral: whether it has a singular value loss, for which the forward kernel writes ẑ and the other reads ẑ W.
        warps: of a program; None for those of the chosen tile.
    """
    rows = []
    by_call = calls(case if spectral else case._replace(options=(*case.options, "rows")))
    for launch in (launch for made in by_call.values() for launch in made if launch.kernel.__name__ in KERNELS):
        compile_options = dict(launch.options) | ({} if warps is None else {"num_warps": warps})
        kernel = triton.compile(ASTSource(launch.kernel, *specialised(launch)), target=TARGET, options=compile_options)
        backend = make_backend(TARGET)
        with assembler_log() as log:
            backend.make_cubin(kernel.asm["ptx"], {}, backend.parse_options(compile_options), TARGET.arch)
        registers, spilled = ptxas_resources(log.getvalue())
        of_program = compile_options["num_warps"]
        trips = math.ceil(case.views / launch.arguments["BLOCK_K"])
        programs = min(
            REGISTERS // (8 * math.ceil(registers / 8) * 32 * of_program),
            SHARED_BYTES // (kernel.metadata.shared + 1024),
            WARPS // of_program,
        )
        rows.append(
            {
                "kernel": launch.kernel.__name__,
                "case": str(case),
                "spectral": spectral,
                "warps": of_program,
                "instructions": of_program * executed(machine_code(kernel.asm["cubin"]), trips),
                "registers": registers,
                "spilled_bytes": spilled,
                "warps_of_a_processor": of_program * programs,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = [
        "kernel",
        "call",
        "singular value loss",
        "warps",
        "instructions",
        "registers",
        "spilled",
        "a processor's warps",
    ]
    cells = [
        [row["kernel"], row["case"], "yes" if row["spectral"] else "no", row["warps"], f"{row['instructions']:,}"]
        + [row[name] for name in ("registers", "spilled_bytes", "warps_of_a_processor")]
        for row in rows
    ]
    return markdown_table(head, cells, text=3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=one_shape, default="8x4096x2048", help="K x B x D; default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--options", nargs="*", default=[], choices=["leave_one_out", "per_view", "each"])
    parser.add_argument(
        "--warps", nargs="*", type=positive, default=[], help="of a program, beside those that are chosen"
    )
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    options = parser.parse_args(arguments)
    case = Case(*options.shape, getattr(torch, options.dtype), tuple(options.options))
    rows = [
        row
        for spectral in (False, True)
        for warps in (None, *options.warps)
        for row in count(case, spectral=spectral, warps=warps)
    ]
    print(f"Triton {triton.__version__}, sm_{TARGET.arch}, of an image\n\n{table(rows)}")
    record = provenance("bench/row_instructions.py", None, torch.device("cpu"), ("triton",))
    keep(record | {"rows": rows}, options.json)


if __name__ == "__main__":
    main()
