"""Options of `pytest bench/`, what is parametrised by them, and what the JSON says of the machine and the run."""

import os
import platform
import shlex
import textwrap
import time
from dataclasses import dataclass
from itertools import product
from typing import Any

import ceilings
import pytest
import shapes
import torch
from options import above_zero, limit
from providers import Provider, providers
from records import gpu_state, versions, without_folder

from msbreg.machine import usable_cores

MODES = ("forward", "backward", "both")
SPECTRA = ("nuclear", "whitening", "coding_rate")
DTYPES = ("bfloat16", "float32", "float16")
LARGE = 2**24
"""Numbers in z from which on eigenvalues take seconds."""
LASTING = ("name", "driver_version", "clocks.max.sm")
"""What nvidia-smi says of a GPU whatever it does."""


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    device: torch.device
    shapes: tuple[shapes.Shape, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    spectrum: str
    providers: dict[str, Provider]
    fused: Provider
    """What the others take turns with, whether it is among them or not."""
    seconds: float
    deadline: float
    """Of time.monotonic()."""
    load: tuple[float, float, float]
    """Processes that ran on average in the last 1, 5 and 15 minutes before this one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("losses", "benchmarks of the losses")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    group.addoption(
        "--bench-shapes", help="small (default on a CPU), targets (default on a GPU), all, or KxBxD,KxBxD,..."
    )
    group.addoption(
        "--bench-dtypes", help=f"of {', '.join(DTYPES)}; default: float32 on a CPU, bfloat16,float32 on a GPU"
    )
    group.addoption("--bench-modes", default=",".join(MODES), help="default: %(default)s")
    group.addoption("--bench-providers", help="names, with commas; default: all")
    group.addoption("--bench-spectrum", choices=SPECTRA, default="nuclear", help="default: %(default)s")
    group.addoption("--bench-seconds", type=above_zero, default=0.3, help="timed for each figure; default: %(default)s")
    group.addoption("--bench-minutes", type=limit, default=float("inf"), help="after which the rest is skipped")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[SETTINGS], config.stash[LEFT_OUT] = settings(config), []
    file = config.getoption("benchmark_json", None)
    if file is not None and not config.option.collectonly:
        try:  # now, and not when all is timed; and where nothing passes, an old file would seem to be this run's
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            if file.is_file() and not file.is_symlink():  # a device, as /dev/stdout leads to, stays
                file.unlink()
        except OSError as error:
            raise pytest.UsageError(f"--benchmark-json {file}: {error.strerror}") from None


SETTINGS = pytest.StashKey[Settings]()
CASE = ("shape", "dtype", "provider", "mode")
LEFT_OUT = pytest.StashKey[list[dict[str, Any]]]()
"""Cases that were skipped, refused or failed, with the reason."""


def settings(config: pytest.Config) -> Settings:
    device = torch.device(config.getoption("bench_device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device cuda: torch sees no GPU here")
    gpu = device.type == "cuda"
    spectrum = config.getoption("bench_spectrum")
    known = providers(spectrum)
    names = chosen(config, "bench_providers", tuple(known), tuple(known))
    try:
        wanted = shapes.parse(config.getoption("bench_shapes") or ("targets" if gpu else "small"))
    except ValueError as error:
        raise pytest.UsageError(f"--bench-shapes: {error}") from None
    return Settings(
        device=device,
        shapes=wanted,
        dtypes=chosen(config, "bench_dtypes", DTYPES, DTYPES[:2] if gpu else ("float32",)),
        modes=chosen(config, "bench_modes", MODES, MODES),
        spectrum=spectrum,
        providers={name: known[name] for name in names},
        fused=known["fused"],
        seconds=config.getoption("bench_seconds"),
        deadline=time.monotonic() + 60 * config.getoption("bench_minutes"),
        load=os.getloadavg(),
    )


def chosen(config: pytest.Config, option: str, known: tuple[str, ...], default: tuple[str, ...]) -> tuple[str, ...]:
    """The names that an option lists, in the order of those that are known."""
    text = config.getoption(option)
    names = tuple(text.split(",")) if text else default
    unknown = [name for name in names if name not in known]
    if unknown:
        raise pytest.UsageError(f"--{option.replace('_', '-')}: expected some of {', '.join(known)}, got {unknown[0]}")
    return tuple(name for name in known if name in names)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mode" not in metafunc.fixturenames:
        return
    wanted = metafunc.config.stash[SETTINGS]
    cases = list(product(map(str, wanted.shapes), wanted.dtypes, wanted.providers, wanted.modes))
    large = {str(shape) for shape in wanted.shapes if shape.size >= LARGE}

    def order(case: tuple[str, ...]) -> tuple[bool, bool]:
        """Where time is short, ours at every shape come first, and what decomposes large matrices last."""
        slow = case[0] in large and wanted.providers[case[2]].decomposition is not None
        return slow, not case[2].startswith("fused")

    cases.sort(key=order)
    metafunc.parametrize(("shape", "dtype", "provider", "mode"), cases, ids=["-".join(case) for case in cases])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Notes what is not timed; the report itself is pytest's."""
    if call.excinfo is not None and (case := getattr(item, "callspec", None)):
        skipped = call.excinfo.errisinstance(pytest.skip.Exception)
        found = str(call.excinfo.value) or call.excinfo.typename
        reason = textwrap.shorten(found, 300)
        item.config.stash[LEFT_OUT].append({**case.params, "failed": not skipped, "reason": reason})


@pytest.fixture(scope="session")
def wanted(request: pytest.FixtureRequest) -> Settings:
    """What the command line asks for."""
    return request.config.stash[SETTINGS]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What is alike in all runs on a machine, whose name in its network is left out: others are warned of."""
    wanted = config.stash[SETTINGS]
    cpu = machine_info.pop("cpu", {})
    machine_info.pop("node", None)
    machine_info |= {
        "cpu": cpu.get("brand_raw", platform.machine()),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": wanted.device.type,
        "gpu": {name: value for name, value in gpu_state(wanted.device).items() if name in LASTING},
        "versions": versions("triton", "lightly") | {"cuda": torch.version.cuda},
        "spectrum": wanted.spectrum,
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict) -> None:
    """What else the figures depend on, and what has none. Quartiles stay of the rounds' times."""
    wanted, arguments = config.stash[SETTINGS], config.invocation_params.args
    output_json["run"] = {
        "command": shlex.join(["python", "-m", "pytest", *(without_folder(str(word)) for word in arguments)]),
        "load_before": wanted.load,
        "gpu": gpu_state(wanted.device),
    }
    # What failed once it was timed, as in the profiler, has left its times, too.
    failed = {tuple(case[name] for name in CASE) for case in config.stash[LEFT_OUT] if case["failed"]}
    output_json["benchmarks"] = [
        benchmark
        for benchmark in output_json["benchmarks"]
        if tuple(benchmark["params"][name] for name in CASE) not in failed
    ]
    output_json["left_out"] = config.stash[LEFT_OUT]
    ceilings.level([benchmark["extra_info"] for benchmark in output_json["benchmarks"]])
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Says so where threads had to wait for cores: torch's spin meanwhile, which costs losses differently."""
    wanted, threads, cores = config.stash[SETTINGS], torch.get_num_threads(), usable_cores()
    if wanted.device.type == "cpu" and wanted.load[0] + threads > cores + 0.5:
        terminalreporter.write_line(
            f"{wanted.load[0]:.1f} processes ran before this with {threads} threads on {cores} cores: the ratios are "
            "not to be trusted. On a busy machine set OMP_NUM_THREADS=1, or OMP_WAIT_POLICY=PASSIVE."
        )
