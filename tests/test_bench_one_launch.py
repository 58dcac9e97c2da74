"""`bench/one_launch.py`: the inverse root in one launch is what the sequence of launches computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from msbreg import kernels
from msbreg.kernels.inverse_root import inverse_root
from msbreg.linalg import newton_schulz_plan

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))
import one_launch  # noqa: E402

SHIFT = 0.01
interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton kernels without a GPU")
compiled = pytest.mark.skipif(kernels.INTERPRETED, reason="Triton's interpreter does not compile")


def gram_matrices(views, side, dtype):
    generator = torch.Generator().manual_seed(side)
    rows = torch.randn(views, 2 * side, side, generator=generator, dtype=dtype)
    rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows.mT @ rows


@interpreted
@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("views", "side", "dtype", "count"),
    [(2, 40, torch.float32, 2), (1, 70, torch.float32, 3), (2, 32, torch.float64, None)],
)
def test_one_launch_gives_the_bits_of_the_sequence(views, side, dtype, count):
    gram = gram_matrices(views, side, dtype)
    floor, steps = newton_schulz_plan(SHIFT, dtype)
    expected = inverse_root(gram, SHIFT, floor, steps[:count])
    assert torch.equal(one_launch.one_launch(gram, SHIFT, floor, steps[:count]), expected)
    assert count or one_launch.oracle_error(expected, gram, SHIFT) < 1e-12


@interpreted
@pytest.mark.interpreter
def test_the_harness_measures_what_it_has_checked(monkeypatch):
    monkeypatch.setattr(one_launch, "REPEATS", 1)
    monkeypatch.setattr(one_launch, "CALLS", 1)
    monkeypatch.setattr(one_launch, "SMOOTHING", 3.0)  # takes few steps, each of which takes long here
    device = torch.device("cpu")
    row = one_launch.measure(1, 16, device, seconds=0, rounds=2)
    assert (row["views"], row["side"]) == (1, 16) and row["steps"] > 2
    assert all(len(times) == 2 and min(times) > 0 for times in row["microseconds"].values())
    head, rule, line = one_launch.table([row]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")

    noise = torch.Generator().manual_seed(0)
    twins = {
        "is off by": lambda root: 1.01 * root,
        "other bits": lambda root: root + 1e-6 * torch.rand((), generator=noise),
    }
    for why, broken in twins.items():
        monkeypatch.setattr(one_launch, "one_launch", lambda *call, broken=broken: broken(inverse_root(*call)))
        with pytest.raises(SystemExit, match=why):
            one_launch.measure(1, 16, device, seconds=0, rounds=1)


@compiled
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_as_many_programs_as_are_launched_fit_on_a_processor(architecture):
    import compile_report as report

    (*_, launch) = report.recorded(
        lambda: one_launch.one_launch(torch.empty(8, 256, 256), SHIFT, *newton_schulz_plan(SHIFT, torch.float32))
    )
    row = report.compiled(launch, report.target_of(architecture.removeprefix("sm_")))
    assert row.kernel == "one_launch_kernel" and row.arch == architecture and row.spilled_bytes == 0
    registers = row.registers * 32 * launch.options["num_warps"]
    assert one_launch.RESIDENT * registers <= 2**16
    assert one_launch.RESIDENT * row.shared_bytes <= report.SHARED_BYTES[architecture]
    assert row.matrix_units in ("mma.sync", "wgmma", "tcgen05")


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, BENCH / "one_launch.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "measures a GPU, and torch finds none here" in done.stderr
