"""The benchmarks of the losses: they time what agrees with the oracle, count right, and report what they measured."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks need the extra [bench]")

import ceilings
import cost
import gate
import records
import report
import shapes
import test_loss_times
import timing
import torch
import usage
from providers import by_svd, definition, lightly_pair, providers
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from msbreg import linalg
from msbreg.functional import SMOOTHING

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
SHAPE = shapes.Shape(2, 48, 32)
SAME = [name for name, provider in providers("nuclear").items() if provider.terms and not provider.compiled]


def truth(dtype=torch.float32, terms="all", spectrum="nuclear", shape=SHAPE):
    return gate.reference(*shapes.inputs(shape, dtype, CPU), terms, spectrum, "svd")


def judged(loss, **options):
    expected = truth(**options)
    return gate.refusal(expected.errors(loss), expected)


@pytest.mark.parametrize("spectrum", ["nuclear", "whitening", "coding_rate"])
@pytest.mark.parametrize("name", SAME)
def test_providers_of_the_same_mathematics_agree_with_the_oracle(name, spectrum):
    provider = providers(spectrum)[name]
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert judged(provider.build(CPU), dtype=dtype, terms=provider.terms, spectrum=spectrum) is None


@pytest.mark.parametrize("shape", [shapes.Shape(3, 20, 40), shapes.Shape(1, 16, 16)])
def test_providers_agree_with_the_oracle_with_fewer_images_than_dimensions(shape):
    for name in ("fused", "gram", "newton_schulz"):
        assert judged(providers("nuclear")[name].build(CPU), shape=shape) is None


def test_a_gradient_in_float16_keeps_its_digits():
    """Without a scale those of so many rows are below float16's normal range, and 4e-3 off."""
    assert truth(torch.float16, shape=shapes.Shape(2, 8192, 16)).plain.gradient < 5e-4


RIGHT = definition(by_svd("nuclear"))
WRONG = {
    "noise of the other sign": lambda z, t, n: RIGHT(z, t, -n),
    "spectral part 2 % too large": definition(lambda m: 1.02 * by_svd("nuclear")(m)),
    "another spectrum": definition(by_svd("whitening")),
    "targets of other images": lambda z, t, n: RIGHT(z, t.roll(1, dims=1), n),
    "gradient not of this value": lambda z, t, n: 1.01 * RIGHT(z, t, n) - 0.01 * RIGHT(z, t, n).detach(),
    "value not of this gradient": lambda z, t, n: RIGHT(z, t, n) + 1e-3,
    "no gradient through the norms": lambda z, t, n: RIGHT(z / z.detach().norm(dim=-1, keepdim=True), t, n) + z.mean(),
    "bfloat16 inside": lambda z, t, n: RIGHT(z.bfloat16().to(z.dtype), t, n),
    "not finite": lambda z, t, n: RIGHT(z, t, n) * torch.nan,
}


@pytest.mark.parametrize("name", WRONG)
def test_the_check_refuses(name):
    assert judged(RIGHT) is None
    assert "off by" in judged(WRONG[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_check_refuses_in_half_precision_too(dtype):
    assert judged(RIGHT, dtype=dtype) is None
    assert "its value is off by" in judged(lambda z, t, n: 1.05 * RIGHT(z, t, n), dtype=dtype)


def test_a_wrong_plain_torch_excuses_nobody():
    poor = truth()._replace(plain=gate.Errors(1.0, 1.0))
    assert gate.refusal(poor.errors(lambda z, t, n: 1.05 * RIGHT(z, t, n)), poor)


def test_a_loss_that_raises_is_not_timed():
    def build(device):
        return lambda z, t, n=None: z.reshape(7)

    for terms, expected in (("all", truth()), (None, None)):
        provider = replace(providers("nuclear")["fused"], build=build, terms=terms)
        loss, errors, fault = gate.verdict(provider, *shapes.inputs(SHAPE, torch.float32, CPU), expected)
        assert loss is errors is None and fault.startswith("it raises RuntimeError: shape '[7]' is invalid")


def test_bytes_are_those_of_inputs_and_outputs():
    z, t = shapes.inputs(SHAPE, torch.bfloat16, CPU)
    gradient = torch.autograd.grad(RIGHT(z, t), z)[0]
    counted = [cost.bytes_moved(2, 2, 48, 32, 2, mode) for mode in ("forward", "backward", "both")]
    assert counted == [z.nbytes + t.nbytes, z.nbytes + gradient.nbytes, z.nbytes + t.nbytes + gradient.nbytes]


@pytest.mark.parametrize(
    ("provider", "read"),
    [("fused", (8, 8)), ("fused_spectral", (8, 0)), ("lightly_mmcr", (8, 8)), ("lightly_vicreg", (2, 0))],
)
def test_inputs_are_copied_by_what_a_loss_reads_of_them(provider, read):
    """Three times the cache of what it reads, or a loss that reads a quarter of the inputs would have them cached."""
    assert providers("nuclear")[provider].reads(8) == read


def test_inputs_are_what_is_read_of_them(monkeypatch):
    known = providers("nuclear")
    monkeypatch.setattr(timing, "copies", lambda read, device: read)
    sizes = {name: timing.batches(known[name], shapes.Shape(3, 2, 2), torch.float32, CPU) for name in ("fused", "svd")}
    assert len(sizes["fused"]) == 2 * 3 * 2 * 2 * 4 and len(sizes["svd"]) == 1  # for svd the host waits
    z, t = sizes["fused"][0]
    assert all(map(torch.equal, (z, t), shapes.inputs(shapes.Shape(3, 2, 2), torch.float32, CPU)))
    pairs = timing.batches(known["lightly_barlow_twins"], shapes.Shape(3, 2, 2), torch.float32, CPU)
    assert len(pairs) == 2 * 2 * 2 * 4
    assert all(z.shape == (2, 2, 2) and z.is_leaf and z.requires_grad for z, _ in pairs)


@pytest.mark.parametrize("name", ["VICRegLoss", "BarlowTwinsLoss"])
def test_a_loss_of_two_views_makes_no_zeros(name):
    """Its backward pass stacks two gradients, and fills no z of zeros to write each into."""
    pytest.importorskip("lightly", reason="times lightly's losses")
    z, t = shapes.inputs(shapes.Shape(2, 8, 4), torch.float32, CPU)
    value = lightly_pair(name)(z, t)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.autograd.grad(value, z)
    assert not [
        event.key for event in profiler.key_averages() if event.key in ("SelectBackward0", "aten::select_backward")
    ]


def test_flops_are_those_of_the_products():
    m = torch.nn.functional.normalize(torch.randn(3, 48, 32), dim=-1)
    with FlopCounterMode(display=False) as counter:
        g = linalg.gram(m)
        gram = counter.get_total_flops()
        weight = linalg.newton_schulz(g, SMOOTHING**2 * 48 / 32, 48)
        root = counter.get_total_flops() - gram
        linalg.multiply(m, weight)
        product = counter.get_total_flops() - gram - root
    # Counted: one triangle of the Gram matrix, and of the root all but the three products that may be left out.
    forward = gram / 2 + root - 3 * 2 * 3 * 32**3
    assert cost.spectral_flops(3, 48, 32, "nuclear", "forward") == forward
    assert cost.spectral_flops(3, 48, 32, "nuclear", "backward") == product
    assert cost.spectral_flops(3, 48, 32, "nuclear", "both") == forward + product
    assert cost.spectral_flops(3, 48, 32, "whitening", "forward") == gram / 2


def test_shapes_of_the_command_line():
    assert shapes.parse("8x512x256,2x3x4") == ((8, 512, 256), (2, 3, 4))
    assert len(shapes.parse("all")) == 80
    assert (8, 512, 256) in shapes.parse("small")
    for wrong in ("", "8x512", "8x512x0", "axbxc", "8x512x256,"):
        with pytest.raises(ValueError, match="expected small, targets, all or shapes"):
            shapes.parse(wrong)


def test_what_would_take_minutes_or_too_much_memory_is_left_out():
    known = providers("nuclear")
    assert shapes.left_out(shapes.Shape(8, 512, 256), known["svd"], CPU) is None
    assert "minutes" in shapes.left_out(shapes.Shape(8, 2048, 512), known["svd"], CPU)
    assert shapes.left_out(shapes.Shape(8, 2048, 512), known["fused_rows"], CPU) is None
    assert "oracle minutes" in shapes.left_out(shapes.Shape(4, 2048, 2048), known["fused"], CPU)
    assert "two images" in shapes.left_out(shapes.Shape(8, 1, 64), replace(known["lightly_vicreg"], needs=None), CPU)
    assert "2 views" in shapes.left_out(shapes.Shape(1, 8, 64), replace(known["lightly_vicreg"], needs=None), CPU)
    assert "GB" in shapes.left_out(shapes.Shape(1024, 8192, 8192), known["fused_rows"], CPU)


def sleeper(seconds, log):
    def loss(z, t, n=None):
        time.sleep(seconds)
        log.append(z)
        return (z * t).sum()

    return loss


def test_a_round_is_the_time_of_one_call_and_runs_all_of_them():
    log = []
    batches = [shapes.inputs(SHAPE, torch.float32, CPU, seed) for seed in range(3)]
    round_, clock = timing.device_round(lambda: timing.calls(sleeper(0.05, log), batches, "forward"), CPU, waits=False)
    assert clock == "wall"
    assert 0.05 <= round_() < 0.1
    assert [id(z) for z in log] == [id(z) for z, _ in batches]
    before = timing.CLOCK()
    timing.CLOCK.tick(round_)
    assert 0.05 <= timing.CLOCK() - before < 0.1


def test_modes_time_their_part():
    z, t = shapes.inputs(SHAPE, torch.float32, CPU)
    log = []
    modes = ("forward", "backward", "both")
    forward, backward, both = (timing.calls(sleeper(0, log), [(z, t)], mode)[0] for mode in modes)
    assert len(log) == 1  # the forward pass that is behind the backward pass
    assert forward().requires_grad and len(log) == 2
    for _ in range(2):
        assert torch.equal(backward()[0], t) and len(log) == 2
    assert torch.equal(both()[0], t) and len(log) == 3


def test_rounds_fill_the_time():
    assert timing.plan(lambda: 0.01, 2, 1.0) == 50
    assert timing.plan(lambda: 1e-6, 1, 1.0) == 1000
    rounds = iter([9.0, 0.1, 0.01, 0.2])  # the shortest is what a call takes, the first says nothing
    assert timing.plan(lambda: next(rounds), 1, 1.0) == 100


def test_calls_without_a_graph_take_turns_with_the_fused_loss(monkeypatch):
    """The machine becomes slower from round to round, and a ratio is of one round."""
    slower = {"own": itertools.count(2, 2), "fused": itertools.count(1)}
    taken = []

    def wall_round(calls, device):
        taken.append(len(calls))
        return lambda: 1e-4 * next(slower[calls[0]()])

    monkeypatch.setattr(test_loss_times, "wall_round", wall_round)
    found = test_loss_times.eager(lambda: "own", lambda: "fused", CPU, 0.0)
    assert found["eager_over_fused"] == {"median": 2, "q1": 2, "q3": 2, "rounds": 31}
    assert found["eager"]["q1"] < found["eager"]["median"] < found["eager"]["q3"] and found["eager"]["rounds"] == 31
    slower["own"] = itertools.count(2, 2)
    assert test_loss_times.eager(lambda: "own", None, CPU, 0.0).keys() == {"eager"}
    assert taken == [1, 1, 3, 3, 1, 3]
    slower["own"] = itertools.repeat(200)  # 20 ms
    assert test_loss_times.eager(lambda: "own", None, CPU, 0.0)["eager"]["rounds"] == 25
    assert taken[-2:] == [1, 1]


@pytest.mark.parametrize(("taken", "rounds"), [(0.2, 11), (0.5, 5), (1.0, 3)])
def test_what_takes_long_has_few_rounds(taken, rounds):
    assert timing.plan(lambda: taken, 1, 0.3) == rounds


def test_ceilings_are_of_bytes_both_ways_and_of_multiplications_and_additions(monkeypatch):
    monkeypatch.setattr(ceilings, "best", lambda make, device: [call() for call in make()] and 1.0)
    assert ceilings.copy_rate(8000, CPU) == 8000
    assert ceilings.product_rate(CPU, 16) == 2 * 16**3


def test_of_copies_of_much_the_best_counts():
    found = [{"bytes": 2**size, "copy_rate": rate} for size, rate in ((20, 1.0), (28, 2.0), (29, 3.0))]
    ceilings.level([*found, {"bytes": 2**30}])
    assert [one["copy_rate"] for one in found] == [1, 3, 3]


def test_launches_are_kernels_copies_and_fills():
    categories = ["kernel", "kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation", "cpu_op", None]
    events = [{"cat": category, "dur": 2.5, "ts": 1.0} if category else {"ph": "M"} for category in categories]
    assert usage.work_in({"traceEvents": events}, 1) == (4, pytest.approx(10e-6))
    assert usage.work_in({"traceEvents": events[-2:]}, 3) == (0, 0)
    # Three calls of two kernels each, the first of which is slow, in whatever order.
    calls = [{"cat": "kernel", "dur": dur, "ts": ts} for ts, dur in enumerate([90.0, 10, 2, 1, 3, 1])]
    assert usage.work_in({"traceEvents": calls[::2] + calls[1::2]}, 3) == (2, pytest.approx(4e-6))


PLUGIN = """
import providers
from dataclasses import replace

known = providers.providers

def with_a_wrong_one(spectrum):
    table = known(spectrum)
    loss = table["svd"].build(None)
    table["wrong"] = replace(table["svd"], name="wrong", build=lambda device: lambda z, t, n=None: 1.01 * loss(z, t, n))
    return table

providers.providers = with_a_wrong_one
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """`pytest bench/` at one small shape, with a wrong provider among the right ones, and the JSON that it wrote."""
    pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")
    folder = tmp_path_factory.mktemp("bench")
    (folder / "wrong_provider.py").write_text(PLUGIN)
    path = folder / "new" / "losses.json"
    options = ["--bench-device", "cpu", "--bench-shapes", "2x16x8", "--bench-seconds", "0.01"]
    options += ["--bench-providers", "fused,svd,wrong,fused_spectral", "--benchmark-json", str(path)]
    done = run_suite("-p", "wrong_provider", *options, path=[folder, ROOT / "bench"])
    return done, path


def run_suite(*options, path=()):
    command = [sys.executable, "-m", "pytest", "bench/", "-p", "no:cacheprovider", *options]
    # pytest-benchmark times nothing in a worker of pytest-xdist, and a worker's children would be taken for some.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)


def test_the_suite_times_what_is_right_and_refuses_what_is_wrong(suite):
    done, path = suite
    assert done.returncode == 1, done.stdout + done.stderr
    assert "9 passed" in done.stdout and "3 failed" in done.stdout
    assert "wrong is not timed at 2x16x8 in float32: its value is off by 1.0e-02 from the float64 oracle" in done.stdout
    run = json.loads(path.read_text())
    found = [(b["extra_info"]["provider"], b["extra_info"]["mode"]) for b in run["benchmarks"]]
    modes = ("forward", "backward", "both")
    assert [(c["provider"], c["shape"], c["mode"], c["failed"]) for c in run["left_out"]] == [
        ("wrong", "2x16x8", mode, True) for mode in modes
    ]
    assert sorted(found) == sorted((name, mode) for name in ("fused", "svd", "fused_spectral") for mode in modes)
    assert all(1e-6 < b["stats"]["median"] < 1 for b in run["benchmarks"])
    errors = [b["extra_info"][name] for b in run["benchmarks"] for name in ("value_error", "gradient_error")]
    assert all(0 <= error < 1e-4 for error in errors) and max(errors) > 1e-9


def test_the_json_says_where_it_is_from(suite):
    run = json.loads(suite[1].read_text())
    machine = run["machine_info"]
    assert machine["versions"]["torch"] == torch.__version__
    assert "--bench-shapes 2x16x8" in run["run"]["command"]
    assert machine["cpu"] and machine["threads"] >= 1 and len(run["run"]["load_before"]) == 3
    assert not {"command", "load_before"} & machine.keys()  # or no two runs could be compared without a warning
    assert "node" not in machine and "data" not in run["benchmarks"][0]["stats"]
    assert {"id", "dirty"} <= run["commit_info"].keys()


def test_without_time_everything_is_skipped(tmp_path):
    """And figures of another run do not stay in the file."""
    pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")
    (tmp_path / "losses.json").write_text("{}")
    options = ["--bench-device", "cpu", "--bench-shapes", "2x16x8", "--bench-minutes", "0"]
    done = run_suite(*options, "--benchmark-json", str(tmp_path / "losses.json"))
    assert done.returncode == 0 and not (tmp_path / "losses.json").exists()
    assert f"{3 * len(providers('nuclear'))} skipped" in done.stdout
    assert "the time of --bench-minutes is over" in done.stdout


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="plots need matplotlib")
def test_the_report_draws_a_run(suite, tmp_path):
    command = [sys.executable, ROOT / "bench" / "report.py", suite[1], "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "losses.md").read_text()
    assert "\n* 3 x wrong is not timed at 2x16x8 in float32: its value is off by 1.0e-02" in text
    assert "## K = 2, B = 16, D = 8" in text and "![losses-float32.png](losses-float32.png)" in text
    assert (tmp_path / "losses-float32.png").read_bytes().startswith(b"\x89PNG")
    assert done.stdout.strip() in text
    short = subprocess.run([*command[:3], "--short"], capture_output=True, text=True, timeout=100).stdout
    assert "time / fused" in short and "| fused " in short and "forward" not in short


@pytest.mark.parametrize(("load", "threads", "warned"), [(3.0, 2, True), (0.0, 2, False), (1.0, 1, False)])
def test_a_busy_machine_is_said_to_be_one(monkeypatch, load, threads, warned):
    spec = importlib.util.spec_from_file_location("conftest_of_bench", ROOT / "bench" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, conftest)  # where its dataclass looks for its module
    spec.loader.exec_module(conftest)
    lines, stash = [], {conftest.SETTINGS: SimpleNamespace(device=CPU, load=(load, 0.0, 0.0))}
    monkeypatch.setattr(conftest, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    conftest.pytest_terminal_summary(SimpleNamespace(write_line=lines.append), SimpleNamespace(stash=stash))
    assert bool(lines) == warned and all("not to be trusted" in line for line in lines)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("{}", "is not what"),
        ('{"machine_info": null}', "is not what"),
        ('{"machine_info": {"load_before": []}}', "is not what"),
        ('{"machine_info": {"load_before": []}, "benchmarks": [{"extra_info": {}}]}', "is not what"),
    ],
)
def test_the_report_says_what_is_wrong_with_its_file(monkeypatch, capsys, tmp_path, content, said):
    file = tmp_path / "losses.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(file)])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert ended.value.code == 2 and said in capsys.readouterr().err


def benchmark_of(provider, seconds, **info):
    info = {"shape": [8, 512, 256], "dtype": "bfloat16", "mode": "both", "clock": "graph", "about": "", **info}
    stats = {"median": seconds, "q1": 0.9 * seconds, "q3": 1.2 * seconds, "rounds": 31}
    return {"extra_info": {"provider": provider, **info}, "stats": stats}


def test_what_the_report_computes():
    measured = {"bytes": 6_000_000, "copy_rate": 4e12, "half_product_rate": 1.2e15, "memory": 3e6, "launches": 9}
    measured |= {"eager_seconds": 2.5e-4}
    in_rounds = {"eager": {"median": 2e-4, "q1": 1.9e-4, "q3": 2.2e-4, "rounds": 31}}
    off = {"value_error": 1.23e-7, "gradient_error": 3.4e-6}
    in_rounds["eager_over_fused"] = {"median": 0.5, "q1": 0.4, "q3": 0.6, "rounds": 31}
    run = {
        "machine_info": {"gpu": {"clocks.max.sm": "1980 MHz"}},
        "benchmarks": [
            benchmark_of("gram", 0.0125, **measured, clock="events", sm_clock="1965 MHz"),
            benchmark_of(
                "svd", 0.0125, sm_clock="1725 MHz", **measured | {"eager_seconds": 0.02}, busy_seconds=0.01, **off
            ),
            benchmark_of("fused_spectral", 4e-5, flops=2e9, **measured | {"eager_seconds": None}, **in_rounds),
            benchmark_of("fused", 5e-5, **measured),
            benchmark_of("fused", 1e-3, **measured | {"mode": "forward", "copy_rate": None}),
        ],
    }
    lines = [line.strip("|").split("|") for line in report.tables(report.figures(run)).splitlines()]
    lines = [[cell.strip() for cell in line] for line in lines]
    rows = {(row[0], row[2]): dict(zip(lines[2], row, strict=True)) for row in lines[4:]}
    assert [row[0] for row in lines[4:]] == ["fused_spectral", "fused", "gram", "svd", "fused"]
    assert rows["gram", "both"]["time / fused"] == rows["gram", "both"]["SM clock"] == ""
    assert rows["gram", "both"]["eager / fused"] == "1.00" and rows["svd", "both"]["SM clock"] == "1725 MHz"
    assert rows["svd", "both"]["spread"] == "11.3 ms to 15.0 ms" and rows["svd", "both"]["rounds"] == "31"
    assert rows["svd", "both"]["value, gradient off by"] == "1.2e-07, 3.4e-06"
    assert rows["svd", "both"]["time"] == "12.5 ms" and rows["svd", "both"]["time / fused"] == "250"
    assert rows["fused", "forward"]["time"] == "1.00 ms"
    assert rows["svd", "both"]["eager / fused"] == "80.0" and rows["svd", "both"]["kernels"] == "10.0 ms"
    fused = rows["fused", "both"]
    assert fused["time"] == "50.0 µs" and fused["time / fused"] == "1.00" and fused["eager"] == "250 µs"
    assert fused["GB/s"] == "120" and fused["of a copy"] == "3.00 %"
    assert fused["memory"] == "3.00 MB" and fused["launches"] == "9"
    assert rows["fused_spectral", "both"]["eager"] == "200 µs (190 µs to 220 µs)"
    assert rows["fused_spectral", "both"]["eager / fused"] == "0.500 (0.400 to 0.600)"
    assert rows["fused_spectral", "both"]["TFLOP/s"] == "50.0"
    assert rows["fused_spectral", "both"]["of three products of halves"] == "12.5 %"
    assert fused["TFLOP/s"] == ""
    assert rows["fused", "forward"]["time / fused"] == "1.00" and rows["fused", "forward"]["GB/s"] == ""


def report_of(monkeypatch, tmp_path, *runs, options=()):
    """Runs the report on files with these benchmarks."""
    files = [tmp_path / f"{number}.json" for number in range(len(runs))]
    for file, run in zip(files, runs, strict=True):
        file.write_text(json.dumps({"machine_info": {"load_before": []}, "benchmarks": run}))
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, files), *options])
    report.main()


def test_the_report_compares_two_runs(monkeypatch, tmp_path, capsys):
    old = [benchmark_of("fused", 1e-4), benchmark_of("svd", 1e-2), benchmark_of("gram", 1e-2, clock="events")]
    new = [benchmark_of("svd", 1.1e-2), benchmark_of("fused", 5e-5), benchmark_of("gram", 1e-2)]
    report_of(monkeypatch, tmp_path, old, new)
    text = " ".join(capsys.readouterr().out.split())
    assert "| 8x512x256 | bfloat16 | both | fused | apart | 100 µs (90.0 µs to 120 µs) | 50.0 µs (" in text
    assert "| 0.500 |" in text and "| svd | overlap | 10.0 ms" in text and "| 1.10 |" in text
    assert "| gram |" not in text and text.endswith("by the same clock: 1 of the old, 1 of the new.")


def test_the_report_draws_times_over_one_size(monkeypatch, tmp_path, capsys):
    shapes = [[8, 64, 256], [8, 64, 128], [8, 32, 128], [4, 64, 512]]
    run = [benchmark_of(name, 1e-4, shape=shape) for name in ("fused", "svd") for shape in shapes]
    report_of(monkeypatch, tmp_path, run, options=["--over", "dim"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "0-bfloat16-dim-K8-B64.png")]
    assert [path.name for path in tmp_path.glob("*.png")] == ["0-bfloat16-dim-K8-B64.png"]
    with pytest.raises(SystemExit):
        report_of(monkeypatch, tmp_path, run, options=["--over", "views"])
    assert "has no two shapes that differ in K alone" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
@pytest.mark.parametrize("name", ["fused", "newton_schulz", "svd"])
def test_clocks_of_a_gpu_agree(name, mode):
    device = torch.device("cuda")
    provider = providers("nuclear")[name]
    loss = provider.build(device)
    batches = [shapes.inputs(shapes.Shape(4, 512, 256), torch.float32, device, seed) for seed in range(2)]
    loss(*batches[0], None).backward()
    round_, clock = timing.device_round(lambda: timing.calls(loss, batches, mode), device, waits=provider.waits)
    assert clock == ("events" if provider.waits else "graph")
    eager = timing.wall_round(timing.calls(loss, batches, mode), device)
    fastest, walls = min(round_() for _ in range(10)), min(eager() for _ in range(10))
    assert 1e-6 < fastest < 1.2 * walls


@pytest.mark.gpu
def test_usage_and_ceilings_of_a_gpu():
    device = torch.device("cuda")
    x = torch.randn(2**20, device=device)
    launches, seconds = usage.device_work(lambda: x + x, 5)
    assert launches == 1 and 1e-7 < seconds < 1e-3
    assert usage.peak_memory(lambda: lambda: x + x) == x.nbytes
    assert records.gpu_state(device).get("name", torch.cuda.get_device_name()) == torch.cuda.get_device_name()
    assert timing.copies(x.nbytes, device) * x.nbytes >= 3 * torch.cuda.get_device_properties(device).L2_cache_size
    assert 1e11 < ceilings.copy_rate(2**30, device) < 2e13
    assert 1e12 < ceilings.product_rate(device) < 1e16


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2345, "1.23 s"), (99.97e-3, "100 ms"), (9.996e-3, "10.0 ms"), (0.9996e-3, "1.00 ms"), (1.5e-9, "0.00150 µs")],
)
def test_times_have_three_digits(seconds, text):
    assert report.time_of(seconds) == text


def test_an_old_file_of_figures_goes_and_a_device_stays(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")
    old, device = tmp_path / "old.json", tmp_path / "device"
    old.write_text("{}")
    device.symlink_to("/dev/null")
    for file in (old, device):
        run_suite("--bench-minutes", "0", "--bench-shapes", "1x2x2", "--benchmark-json", str(file))
    assert not old.exists() and device.is_char_device()


LATE = """
def pytest_runtest_teardown(item):
    if "-svd-" in item.name:
        raise RuntimeError("too late")
"""


def test_what_fails_once_it_is_timed_is_left_out(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")
    (tmp_path / "late.py").write_text(LATE)
    file = tmp_path / "losses.json"
    options = ["--bench-shapes", "1x4x2", "--bench-modes", "forward", "--bench-seconds", "0.01", "-p", "late"]
    options += ["--bench-device", "cpu", "--bench-providers", "fused,svd"]
    run_suite(*options, "--benchmark-json", str(file), path=[tmp_path])
    run = json.loads(file.read_text())
    assert [benchmark["extra_info"]["provider"] for benchmark in run["benchmarks"]] == ["fused"]
    assert [(case["provider"], case["reason"]) for case in run["left_out"]] == [("svd", "too late")]
