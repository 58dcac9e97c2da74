"""`bench/row_instructions.py`: loops count as often as they are gone through, the branch for rows that overflow not."""

import json
import sys

import pytest

pytest.importorskip("triton")

import assembly
import row_instructions
import torch
from launches import Case

from msbreg import kernels

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers come with its Linux wheels alone"),
    pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter compiles nothing"),
]

SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
SKIPPED
.L_x_1:
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   EXIT ;
.L_x_3:
        /*0060*/                   BRA `(.L_x_3);
        /*0070*/                   NOP;
"""


@pytest.mark.parametrize(
    ("skipped", "in_a_trip"),
    [(["FMNMX"] * 8, 3), (["FMNMX"] * 7, 10), (["FADD"] * 8, 11), ([*["FMNMX"] * 8, "LDG.E"], 12)],
)
def test_what_a_warp_executes(skipped, in_a_trip):
    lines = "\n".join(f"        /*0030*/                   {name} R3, R3, R2 ;" for name in skipped)
    for trips in (1, 5):
        assert assembly.executed(SASS.replace("SKIPPED", lines), trips) == 1 + trips * in_a_trip + 1


def test_every_view_costs_the_same():
    counts = [row_instructions.count(Case(views, 64, 2048, torch.bfloat16), spectral=False) for views in (2, 3, 4)]
    for two, three, four in zip(*counts, strict=True):
        view = three["instructions"] - two["instructions"]
        assert four["instructions"] - three["instructions"] == view
        assert 4 * 16 * 5 < view < two["instructions"]  # 2,048 numbers, 32 a warp's instruction, five each at the least
        assert two["warps"] == (2 if two["kernel"] == "rows_forward_kernel" else 4)
        assert two["warps_of_a_processor"] == two["warps"] * min(
            65536 // (-(-two["registers"] // 8) * 8 * 32 * two["warps"]), 32, (228 << 10) // (1024 + 12 * 1024)
        )


def test_the_command(tmp_path, capsys):
    row_instructions.main(["--shape", "2x64x64", "--options", "per_view", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["kernel"], row["spectral"]) for row in rows] == [
        (kernel, spectral) for spectral in (False, True) for kernel in row_instructions.KERNELS
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert f"| no | 1 | {rows[0]['instructions']:,} | {rows[0]['registers']} |" in said


def test_a_shape_that_is_none(capsys):
    for shape in ("8x512", "0x1x1"):
        with pytest.raises(SystemExit):
            row_instructions.main(["--shape", shape])
        assert "expected one shape KxBxD" in capsys.readouterr().err
