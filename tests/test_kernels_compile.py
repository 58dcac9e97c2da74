"""Every kernel compiled ahead of time as its launcher launches it, and the checks that `bench/compile_report.py` makes.

Compiling needs no GPU, but a process without Triton's interpreter: this module is imported there too, for the kernels
below that each check has to find fault with.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.extra.cuda import gdc_wait  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compilers come with its Linux wheels alone"),
    pytest.mark.timeout(900),  # a minute or two on a machine of one's own
]

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SPECTRAL = tuple(
    f"{name}_kernel" for name in ("gram", "unit_gram", "step", "last_step", "root", "product", "unit_product")
)
"""Kernels that multiply matrices."""
EARLY = {
    f"{name}_kernel"
    for name in (
        "rows_forward", "unit_gram", "first_factors", "step", "last_step", "totals", "unit_product", "image_gradient",
    )
}  # fmt: skip
"""Kernels of a step of training."""


@triton.jit
def copy(x, y, stride, BLOCK: tl.constexpr):
    """Nothing is wrong with this one."""
    place = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def narrow_offsets(x, y, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def late_widening(x, y, stride, BLOCK: tl.constexpr):
    place = (tl.program_id(0) * stride).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def narrow_scalars(x, y, stride, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK).to(tl.int64)
    row = tl.program_id(0) * stride
    tl.store(y + row + place, tl.load(x + row + place))


@triton.jit
def long_blocks(x, y, stride, BLOCK: tl.constexpr):
    """A row's length is no block size that programs may be counted in."""
    place = (tl.program_id(0) * 4096).to(tl.int64) + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def narrow_in_a_loop(x, y, stride, BLOCK: tl.constexpr):
    """The first loop gives its counter the name of the second's, which makes the address."""
    sums = tl.zeros([BLOCK], tl.float32)
    for k in range(0, 4):
        sums += tl.load(x + k.to(tl.int64) * stride + tl.arange(0, BLOCK).to(tl.int64))
    for k in range(0, 4):
        sums += tl.load(x + (k * stride).to(tl.int64) + tl.arange(0, BLOCK).to(tl.int64))
    tl.store(y + tl.arange(0, BLOCK).to(tl.int64), sums)


@triton.jit(do_not_specialize=["stride"])
def without_hint(x, y, stride, BLOCK: tl.constexpr):
    """Triton is not told that rows begin at 16 bytes."""
    place = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def large_tile(x, y, stride, BLOCK: tl.constexpr):
    """A row that one warp holds, with fewer registers than it has numbers for a thread."""
    place = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    row = tl.load(x + place).to(tl.float32)
    row = tl.exp(row - tl.max(row, axis=0))
    tl.store(y + place, row / tl.sum(row, axis=0))


@triton.jit
def multiply(x, y, stride, PRECISION: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    p, q = tl.arange(0, BLOCK).to(tl.int64)[:, None], tl.arange(0, DEPTH).to(tl.int64)[None, :]
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, 4 * DEPTH, DEPTH):
        tile = tl.load(x + (first + p * stride + q))
        sums = tl.dot(tile, tl.trans(tile), sums, input_precision=PRECISION)
    tl.store(y + p * stride + tl.arange(0, BLOCK).to(tl.int64)[None, :], sums)


@triton.jit
def summed_by_atomics(x, y, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.atomic_add(y, tl.sum(tl.load(x + place), axis=0))


@triton.jit
def patient(x, y, stride, BLOCK: tl.constexpr):
    """May begin early, for it waits before all else."""
    gdc_wait()
    place = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def impatient(x, y, stride, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    row = tl.load(x + place)
    gdc_wait()
    tl.store(y + place, row)


@triton.jit
def hasty(x, y, stride, BLOCK: tl.constexpr):
    """Some of its programs end without having waited."""
    if tl.program_id(0) > 3:
        return
    gdc_wait()
    place = tl.program_id(0).to(tl.int64) * stride + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place))


@triton.jit
def broken(x, y, stride, BLOCK: tl.constexpr):
    tl.store(y, tl.load(x + tl.arange(0, BLOCK)))


TWINS = {  # kernel, what is passed beside x, y and the stride, what is to be found
    "copy": (copy, {"BLOCK": 512}, None),
    "narrow_offsets": (narrow_offsets, {"BLOCK": 512}, "computes an address in 32 bits"),
    "late_widening": (late_widening, {"BLOCK": 512}, "computes an address in 32 bits"),
    "narrow_scalars": (narrow_scalars, {"BLOCK": 512}, "computes an address in 32 bits"),
    "long_blocks": (long_blocks, {"BLOCK": 512}, "computes an address in 32 bits"),
    "narrow_in_a_loop": (narrow_in_a_loop, {"BLOCK": 512}, "computes an address in 32 bits"),
    "without_hint": (without_hint, {"BLOCK": 512}, "loads 32 bits at a time from x"),
    "large_tile": (large_tile, {"BLOCK": 2048, "num_warps": 1, "maxnreg": 32}, "spills"),
    "multiply": (multiply, {"PRECISION": "tf32x3", "BLOCK": 32, "DEPTH": 32}, None),
    "multiply_once": (multiply, {"PRECISION": "tf32", "BLOCK": 32, "DEPTH": 32}, "by one TF32 product"),
    "multiply_ieee": (
        multiply, {"PRECISION": "ieee", "BLOCK": 32, "DEPTH": 32}, "multiplies matrices without tensor cores"
    ),
    "multiply_deep": (
        multiply,
        {"PRECISION": "tf32x3", "BLOCK": 64, "DEPTH": 64, "num_warps": 8, "num_stages": 16},
        "of shared memory",
    ),
    "summed_by_atomics": (summed_by_atomics, {"BLOCK": 512}, "adds by atomics"),
    "patient": (patient, {"BLOCK": 512, "launch_pdl": True}, None),
    "impatient": (impatient, {"BLOCK": 512, "launch_pdl": True}, "before it has waited"),
    "hasty": (hasty, {"BLOCK": 512, "launch_pdl": True}, "before it has waited"),
    "never waits": (copy, {"BLOCK": 512, "launch_pdl": True}, "before it has waited"),
    "broken": (broken, {"BLOCK": 512}, "does not compile"),
}  # fmt: skip


def compile_all() -> dict:
    """Rows of the report for all architectures and for the twins, and how Triton itself specialises the launches."""
    import dataclasses

    import compile_report as report
    from launches import QUICK, Case, calls, recorded

    from msbreg.kernels.pixels import pixelwise

    rows = []
    for name in ("90", "80", "100", "gfx942"):
        cases = QUICK if name == "90" else QUICK[:2]
        rows += report.report(cases, [name], lambda text: None)[0]
    x, y = torch.empty(64, 8192), torch.empty(64, 8192)
    twins = {}
    for name, (kernel, options, _) in TWINS.items():
        (launch,) = recorded(lambda k=kernel, o=options: k[(64,)](x, y, x.stride(0), **{"num_warps": 4} | o))
        twins[name] = report.compiled(launch, report.target_of("90")).faults
    quick = [launch for case in QUICK for made in calls(case).values() for launch in made]
    one = calls(Case(1, 1, 1, torch.bfloat16, ("whitening",)))["forward"]
    large = calls(Case(2, 1024, 1024, torch.float64, ("matrix",)))["matrix"][1:]
    wide = calls(Case(2, 64, 2048, torch.float64, ("leave_one_out",)))
    wide = [wide["forward"][0], wide["backward"][-1]]
    crops, flags = torch.empty(2, 3, 40, 37, dtype=torch.uint8).permute(0, 2, 3, 1), torch.empty(2, dtype=torch.bool)
    views, normal = torch.empty(2, 40, 37, 3), {"scale": (1.0,) * 3, "shift": (0.0,) * 3}
    planar = recorded(lambda: pixelwise(crops, torch.empty(2, 3, 4), flags, flags, views, **normal))
    return {
        "planar": [report.compiled(launch, report.target_of("90")).faults for launch in planar],
        "rows": [dataclasses.asdict(row) for row in rows],
        "twins": twins,
        "one": {launch.kernel.__name__: report.compiled(launch, report.target_of("90")).faults for launch in one},
        "large": dataclasses.asdict(report.compiled(large[0], report.target_of("86"))),
        "wide": [dataclasses.asdict(report.compiled(launch, report.target_of("86"))) for launch in wide],
        "additions": {
            launch.kernel.__name__: additions(launch)
            for made in calls(QUICK[0]).values()
            for launch in made
            if launch.kernel.__name__ in ("unit_gram_kernel", "step_kernel", "unit_product_kernel")
        },
        "options": [sorted(launch.options) for launch in quick],
        "specialised": [(specialised(launch), by_triton(launch)) for launch in quick],
        "numpy": [by_triton(launch)["first_image"][0] for launch in launches_with_numbers_of_numpy()],
    }


def launches_with_numbers_of_numpy() -> list:
    from launches import recorded

    from msbreg import kernels
    from msbreg.functional import brownian_directions, brownian_loss

    three, noise = np.int64(3), {"seed": np.int64(0), "step": np.int64(0)}
    with mock.patch.object(kernels, "DEVICE_TYPE", "cpu"):
        loss = lambda: brownian_loss(torch.empty(2, 4, 8), **noise, first_image=three)  # noqa: E731
        directions = lambda: brownian_directions(three, three, **noise, first_image=three, views=three)  # noqa: E731
        return [*recorded(loss), *recorded(directions)][::2]  # without the sum of the loss


def additions(launch) -> int:
    """Of tiles, in the loop of a kernel as compiled for an H100."""
    import compile_report as report
    import launches
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *launches.specialised(launch))
    ir = triton.compile(source, target=report.target_of("90"), options=dict(launch.options)).asm["ttgir"]
    loop = ir[ir.index("scf.for") :]
    return loop[: loop.index("scf.yield")].count("arith.addf")


def specialised(launch) -> dict:
    """What the report takes each argument for: its type, and whether 16 divides it."""
    import launches

    signature, _, attributes = launches.specialised(launch)
    numbers = {name: number for number, name in enumerate(launch.kernel.arg_names)}
    return {name: [kind, (numbers[name],) in attributes] for name, kind in signature.items()}


def by_triton(launch) -> dict:
    """What Triton's own launcher takes it for."""
    import compile_report as report
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import create_function_from_signature

    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(report.target_of("90")))
    _, kinds, _ = binder(**launch.arguments, **launch.options)
    return {
        name: [kind, kind != "constexpr" and "D" in (key or "")]
        for name, (kind, key) in zip(kernel.arg_names, kinds, strict=True)
    }


@pytest.fixture(scope="session")
def compiled() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ROOT / "tests"), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    program = "import json, test_kernels_compile as t; print(json.dumps(t.compile_all()))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=880, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def rows_of(compiled: dict, architecture: str) -> list[dict]:
    return [row for row in compiled["rows"] if row["arch"] == architecture]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kernels_compile_without_fault(compiled, architecture):
    rows = rows_of(compiled, architecture)
    kernels = {row["kernel"] for row in rows}
    expected = {
        "rows_forward",
        "unit_gram",
        "first_factors",
        "step",
        "last_step",
        "root",
        "totals",
        "unit_product",
        "image_gradient",
    }
    if architecture in ("sm_80", "gfx942"):
        expected -= {"root"}
    if architecture == "sm_90":
        expected |= {"spectral_sums", "split", "gram", "product", "brownian_directions", "pixelwise"}
    assert kernels == {f"{name}_kernel" for name in expected}
    assert {f"{row['kernel']} {fault}" for row in rows for fault in row["faults"]} == set()
    assert all(row["spilled_bytes"] == 0 and row["registers"] <= 255 for row in rows)


@pytest.mark.parametrize(
    ("architecture", "instructions"),
    [
        ("sm_80", {"mma.sync"}),
        ("sm_90", {"mma.sync", "wgmma"}),
        ("sm_100", {"tcgen05"}),
        ("gfx942", {"v_mfma"}),
    ],
)
def test_products_are_made_by_tensor_cores(compiled, architecture, instructions):
    units = {row["kernel"]: row["matrix_units"] for row in rows_of(compiled, architecture)}
    products = [units[name] for name in SPECTRAL if name in units]
    assert set(products) == instructions
    assert not any(unit for name, unit in units.items() if name not in SPECTRAL)


@pytest.mark.parametrize("architecture", ARCHITECTURES[:3])
def test_large_tensors_are_read_16_bytes_at_a_time(compiled, architecture):
    for row in rows_of(compiled, architecture):
        for name in ("z", "t", "z_hat", "weight", "gram", "matrix", "left", "right", "work", "product"):
            if f"{name}_pointer" in row["load_bits"]:
                narrow = (row["kernel"], name) == ("product_kernel", "z")  # by Triton 3.6, see NARROW in the report
                assert row["load_bits"][f"{name}_pointer"][1] >= (64 if narrow else 128), (row["kernel"], name)
    whole = {"rows_forward": "zt", "step": ("left", "right"), "last_step": ("left", "right")}
    for row in rows_of(compiled, architecture):
        for name in whole.get(row["kernel"].removesuffix("_kernel"), ()):
            assert row["load_bits"][f"{name}_pointer"] == [128, 128]


def test_results_are_written_16_bytes_at_a_time(compiled):
    stores = {
        (row["kernel"], name): bits for row in rows_of(compiled, "sm_90") for name, bits in row["store_bits"].items()
    }
    for kernel, name in (("image_gradient", "dz"), ("unit_product", "output"), ("brownian_directions", "output")):
        assert stores[f"{kernel}_kernel", f"{name}_pointer"] == [128, 128]


@pytest.mark.parametrize(("faults", "status"), [([], 0), (["spills 8 bytes"], 1)])
def test_the_report_fails_where_a_kernel_has_a_fault(monkeypatch, tmp_path, capsys, faults, status):
    import compile_report as report

    row = report.Row("gram_kernel", "sm_90", ["8x512x256 bf16"], {"BLOCK_P": 64, "num_warps": 4}, faults=faults)
    monkeypatch.setattr(report, "report", lambda cases, names, say: ([row], []))
    assert report.main(["--json", str(tmp_path / "compile.json")]) == status
    (kernel,) = json.loads((tmp_path / "compile.json").read_text())["kernels"]
    assert kernel["faults"] == faults
    assert "| gram" in (tmp_path / "compile.md").read_text()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"1 kernels for 90: {len(faults)} with faults")


@pytest.mark.parametrize("name", TWINS)
def test_each_check_finds_its_twin(compiled, name):
    found, expected = compiled["twins"][name], TWINS[name][2]
    if expected is None:
        assert found == []
    else:
        assert found
        assert all(expected in fault for fault in found), found


def test_launches_are_specialised_as_triton_does_it(compiled):
    assert len(compiled["specialised"]) > 40
    for ours, tritons in compiled["specialised"]:
        assert ours == tritons
        assert not any(kind == "fp32" for kind, _ in ours.values())  # Python's floats are float64


def test_launches_take_numbers_of_numpy(compiled):
    """Triton's interpreter does, its launcher does not."""
    assert compiled["numpy"] == ["i64", "i64"]


def test_launches_begin_early_from_hopper_on(compiled):
    """Where they do, that they wait is a check of the report."""
    assert {row["kernel"] for row in compiled["rows"] if row["early"]} == EARLY
    assert {row["arch"] for row in compiled["rows"] if row["early"]} == {"sm_90", "sm_100"}


@pytest.mark.parametrize(
    ("capability", "hip", "able", "ahead"),
    [
        ((9, 0), None, 1, 3), ((10, 0), None, 1, 1), ((10, 3), None, 1, 1), ((11, 0), None, 1, 1),
        ((12, 0), None, 1, 3), ((8, 9), None, 0, 3), ((9, 4), "6", 0, 3),
    ],
)  # fmt: skip
def test_gpus_before_hopper_and_amds_do_not_begin_early_and_some_do_not_copy_ahead(
    monkeypatch, capability, hip, able, ahead
):
    from msbreg.kernels import tiles

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(tiles, "architecture", tiles.architecture.__wrapped__)
    assert tiles.early(torch.device("cpu"), 1) == {"EARLY": False}
    for version, expected in (((3, 7), ahead), ((3, 8), 3)):
        monkeypatch.setattr(tiles, "TRITON", version)
        assert tiles.stages(torch.device("cuda", 0)) == expected and tiles.stages(torch.device("cpu")) == 3
    early = [tiles.early(torch.device("cuda", 0), numbers) for numbers in (tiles.FEW - 1, tiles.FEW)]
    assert early == [{"EARLY": True, "launch_pdl": True} if able else {"EARLY": False}, {"EARLY": False}]


def test_launches_choose_what_versions_of_triton_choose_differently(compiled):
    assert all("enable_fp_fusion" in options and "num_warps" in options for options in compiled["options"])


def test_sizes_of_one_compile(compiled):
    """Which Triton puts in as constants, without the methods of a tensor."""
    names = "rows_forward", "unit_gram", "spectral_sums", "split", "totals"
    assert compiled["one"] == {f"{name}_kernel": [] for name in names}


def test_images_of_one_channel_after_another_and_of_odd_sizes_compile(compiled):
    assert compiled["planar"] == [[]]


def test_parts_of_long_sums_are_added_outside_of_tensor_cores(compiled):
    """Triton makes of `sums += dot(x, y)` a product that goes on from sums, which is not wanted there.

    A Gram matrix is over 512 rows here, the steps of the inverse root over 256 dimensions.
    """
    assert compiled["additions"] == {"unit_gram_kernel": 2, "step_kernel": 0, "unit_product_kernel": 2}


def test_missing_fences_are_noticed():
    import assembly

    product = "cp.async.wait_group 4;\nbar.sync 0;\ntcgen05.mma.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;"
    assert assembly.unfenced(product)
    assert not assembly.unfenced(product.replace("bar.sync 0;", "fence.proxy.async.shared::cta;\nbar.sync 0;"))
    assert not assembly.unfenced("cp.async.wait_group 4;\nbar.sync 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32;")


def test_serialised_products_are_noticed():
    import assembly

    note = (
        "(C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions"
    )
    assert assembly.serialised(f"ptxas info    : {note}") and not assembly.serialised(
        "ptxas info    : Used 128 registers"
    )


def test_instructions_are_counted():
    import assembly

    sass = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*0020*/                   FADD R1, R1, R0 ;
.L_x_1:
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
        /*0060*/                   NOP;
"""
    assert assembly.instructions(sass) == 5


def test_large_products_of_float64_fit_into_the_least_shared_memory(compiled):
    row = compiled["large"]
    assert (row["kernel"], row["arch"], row["spilled_bytes"]) == ("product_kernel", "sm_86", 0)
    assert not [fault for fault in row["faults"] if "shared memory" in fault]


def test_rows_of_float64_that_are_on_their_way_fit_too(compiled):
    assert [row["kernel"] for row in compiled["wide"]] == ["rows_forward_kernel", "image_gradient_kernel"]
    assert [fault for row in compiled["wide"] for fault in row["faults"] if "shared memory" in fault] == []
