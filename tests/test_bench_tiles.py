"""`bench/tiles.py`: every kernel with other tiles than the chosen ones, compared and timed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import tiles
import timing
from triton.runtime.errors import PTXASError

from msbreg import kernels

BENCH = Path(__file__).resolve().parents[1] / "bench"

CPU = torch.device("cpu")


def test_rows_of_more_numbers_than_registers_hold_are_not_tried():
    usual = {"BLOCK_K": 1, "BLOCK_D": 2048, "STAGES": 4, "num_warps": 4}
    others = {"num_warps": 1}, {"num_warps": 4}, {"BLOCK_K": 8}, {"BLOCK_K": 8, "num_warps": 8}, {"STAGES": 1}
    assert tiles.tried(usual, others) == [usual, *(usual | others[number] for number in (0, 3, 4))]
    square = {"BLOCK_P": 128, "num_warps": 4}
    assert tiles.tried(square, [{"BLOCK_P": 64}]) == [square, {"BLOCK_P": 64, "num_warps": 4}]


@pytest.mark.skipif(not kernels.INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton kernels without a GPU")
@pytest.mark.interpreter
def test_the_harness_measures_what_it_has_compared(monkeypatch):
    monkeypatch.setattr(tiles, "CALLS", 1)
    monkeypatch.setattr(timing, "plan", lambda *_, **__: 1)
    monkeypatch.setattr(tiles, "SMOOTHING", 3.0)  # takes few steps, each of which takes long here
    names = []
    for case in tiles.cases(2, 4, 16, torch.float32, CPU):
        names.append(case.kernel)
        assert all(set(other) <= set(tiles.chosen(case)) for other in case.others), case.kernel
        case = case._replace(others=case.others[1:2])
        found = tiles.measure(case, CPU, seconds=0, rounds=2)
        assert found[0]["chosen"] and not any(row["chosen"] for row in found[1:])
        assert all(len(row["microseconds"]) == 2 and min(row["microseconds"]) > 0 for row in found)
        head, rule, *lines = tiles.table("2x4x16", found).splitlines()
        assert lines and {line.count("|") for line in (head, rule, *lines)} == {6}
    assert len(names) == len(set(names)) == 6


@pytest.mark.skipif(not kernels.INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton kernels without a GPU")
@pytest.mark.interpreter
def test_a_tile_with_other_results_is_refused(monkeypatch):
    monkeypatch.setattr(tiles, "CALLS", 1)
    case = next(tiles.cases(2, 4, 16, torch.float32, CPU))
    warps = case.others[1]["num_warps"]
    assert tiles.chosen(case)["num_warps"] != warps
    real = case.call
    case = case._replace(others=case.others[1:2])
    case = case._replace(
        call=lambda: [real()[0] * (1.1 if case.module.launch_config(2, 16, 4)["num_warps"] == warps else 1)]
    )
    found = tiles.measure(case, CPU, seconds=0, rounds=1)
    assert "misfit" not in found[0] and "its results differ by" in found[1]["misfit"]


@pytest.mark.skipif(not kernels.INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton kernels without a GPU")
@pytest.mark.interpreter
def test_a_tile_that_triton_cannot_make_is_refused(monkeypatch):
    monkeypatch.setattr(tiles, "CALLS", 1)
    case = next(tiles.cases(2, 4, 16, torch.float32, CPU))
    warps, real = case.others[1]["num_warps"], case.call

    def call():
        if case.module.launch_config(2, 16, 4)["num_warps"] == warps:
            raise PTXASError("no registers\nare left")
        return real()

    found = tiles.measure(case._replace(others=case.others[1:2], call=call), CPU, seconds=0, rounds=1)
    assert found[0]["chosen"] and "no registers" in found[1]["misfit"] and "\n" not in found[1]["misfit"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_difference_and_nan_is_one(dtype):
    exact = torch.randn(2, 24, 16, dtype=torch.float64)
    moved = exact * (1 + torch.finfo(dtype).eps / 2 * torch.rand(2, 24, 16, dtype=torch.float64))
    assert not torch.equal(moved.to(dtype), exact.to(dtype))
    tie = torch.full((2, 24, 16), 1 + 2**-11, dtype=torch.float64)  # between two halves
    for got, expected, other in (
        (moved.to(dtype), exact.to(dtype), (1.05 * exact).to(dtype)),
        (split(tie + 2**-22), split(tie - 2**-22), split(1.001 * tie)),
    ):
        assert tiles.difference(got, expected) is None
        assert tiles.difference(other, expected) and tiles.difference(got * torch.nan, expected)


def split(matrix):
    """As `kernels.halves` does."""
    high = matrix.float().half()
    return torch.stack([high, ((matrix.float() - high.float()) * 2048).half()], dim=1)


@pytest.mark.gpu
def test_no_number_of_warps_is_refused():
    for case in tiles.cases(4, 64, 256, torch.bfloat16, torch.device("cuda")):
        found = tiles.measure(case, torch.device("cuda"), seconds=0, rounds=1)
        assert not [row["misfit"] for row in found if "differ" in row.get("misfit", "")], case.kernel


@pytest.mark.skipif(torch.cuda.is_available() or kernels.INTERPRETED, reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, BENCH / "tiles.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "measures a GPU, and torch finds none here" in done.stderr
