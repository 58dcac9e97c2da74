"""Draws tables and plots from the JSON of the loss benchmarks: nothing in them is typed.

    python bench/report.py losses.json --out FOLDER

writes FOLDER/losses.md, with a table for each shape, and FOLDER/losses-DTYPE.png for each dtype (and, where shapes are
many, each K); without --out, beside the JSON. The name is that of the JSON file.

    python bench/report.py losses.json --over dim    # plots of the times over D, for each K and B
    python bench/report.py old.json new.json         # prints old and new times, and their ratios
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from msbreg.tables import markdown_table

__all__ = ["Figure", "figures", "page", "plot", "tables"]

MODES = ("forward", "backward", "both")
AXES = {"views": "K", "batch": "B", "dim": "D"}
"""Names of a shape's sizes, in their order."""
FUSED = "fused"
COLOURS = (*(f"C{number}" for number in range(10)), "gold", "navy", "lime", "deeppink")
MARKERS = "osD^v<>pP*Xdh8"


class Figure(NamedTuple):
    """One benchmark of the JSON."""

    shape: tuple[int, int, int]
    dtype: str
    mode: str
    provider: str
    seconds: float
    """Median, of a call."""
    quartiles: tuple[float, float]
    """Of the rounds, seconds a call."""
    rounds: int
    info: dict[str, Any]
    fused: "Figure | None"
    """The fused loss's at the same shape, dtype and mode, in the same run."""
    most_clock: str | None
    """Of the GPU's processors, what it has at the most."""

    @property
    def ratio(self) -> float | None:
        """Time over the fused loss's by the same clock: another has host time in it, or has not."""
        alike = self.fused is not None and self.fused.info["clock"] == self.info["clock"]
        return self.seconds / self.fused.seconds if alike else None

    @property
    def other_clock(self) -> str | None:
        """That of the GPU's processors, where it was not the highest by more than two percent."""
        clock, most = (megahertz(text) for text in (self.info.get("sm_clock"), self.most_clock))
        return self.info["sm_clock"] if clock and most and abs(clock / most - 1) > 0.02 else None

    @property
    def eager(self) -> dict[str, float] | None:
        """Wall time of a call without a graph; until 2026-11-28 its median alone."""
        median = self.info.get("eager_seconds")
        return {"median": median} if median else self.info.get("eager")

    @property
    def eager_ratio(self) -> dict[str, float] | None:
        """The same over the fused loss's, in rounds in turn where there are such."""
        if "eager_over_fused" in self.info or not (self.eager and self.fused and self.fused.eager):
            return self.info.get("eager_over_fused")
        return {"median": self.eager["median"] / self.fused.eager["median"]}

    @property
    def flop_rate(self) -> float | None:
        """Floating-point operations a second, of the singular value loss alone, on a GPU."""
        info = self.info
        return info["flops"] / self.seconds if "flops" in info and info.get("copy_rate") else None


def figures(run: dict[str, Any]) -> list[Figure]:
    """The benchmarks of a run, in its order."""
    found, most_clock = [], run["machine_info"].get("gpu", {}).get("clocks.max.sm")
    for benchmark in run["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        key = (tuple(info["shape"]), info["dtype"], info["mode"], info["provider"])
        times = (stats["median"], (stats["q1"], stats["q3"]), stats["rounds"])
        found.append(Figure(*key, *times, info, None, most_clock))
    fused = {figure[:3]: figure for figure in found if figure.provider == FUSED}
    return [figure._replace(fused=fused.get(figure[:3])) for figure in found]


def megahertz(text: str | None) -> float | None:
    """Of what nvidia-smi says, which may be that it cannot say."""
    number = (text or "").partition(" ")[0]
    return float(number) if number.isdecimal() else None


def time_of(seconds: float) -> str:
    """Three digits, with their unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if float(f"{seconds * scale:.2e}") >= 1 or unit == "µs":
            return f"{digits(seconds * scale)} {unit}"
    raise AssertionError


def digits(x: float) -> str:
    """Three digits that count, whole numbers from 100 on."""
    x = float(f"{x:.2e}") if x < 100 else x  # what is rounded up may have one digit more
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if 0 < x < 100 else f"{x:,.0f}"


def of_rounds(values: dict[str, float] | None, text: Callable[[float], str]) -> str | None:
    """Median, and in brackets the quartiles where they were kept."""
    if values is None or "q1" not in values:
        return values and text(values["median"])
    return f"{text(values['median'])} ({text(values['q1'])} to {text(values['q3'])})"


def share(part: float, whole: float) -> str:
    return f"{digits(100 * part / whole)} %"


COLUMNS: dict[str, Callable[[Figure], str | None]] = {
    "provider": lambda f: f.provider,
    "dtype": lambda f: f.dtype,
    "mode": lambda f: f.mode,
    "clock": lambda f: f.info["clock"],
    "time": lambda f: time_of(f.seconds),
    "spread": lambda f: " to ".join(map(time_of, f.quartiles)),
    "rounds": lambda f: str(f.rounds),
    "time / fused": lambda f: f.ratio and digits(f.ratio),
    "kernels": lambda f: optional(f, "busy_seconds", time_of),
    "eager": lambda f: of_rounds(f.eager, time_of),
    "eager / fused": lambda f: of_rounds(f.eager_ratio, digits),
    "GB/s": lambda f: optional(f, "copy_rate", lambda _: digits(f.info["bytes"] / f.seconds / 1e9)),
    "of a copy": lambda f: optional(f, "copy_rate", lambda rate: share(f.info["bytes"] / f.seconds, rate)),
    "TFLOP/s": lambda f: f.flop_rate and digits(f.flop_rate / 1e12),
    "of three products of halves": lambda f: optional(
        f, "half_product_rate", lambda rate: f.flop_rate and share(f.flop_rate, rate / 3)
    ),
    "memory": lambda f: optional(f, "memory", lambda size: f"{digits(size / 1e6)} MB"),
    "launches": lambda f: optional(f, "launches", str),
    "SM clock": lambda f: f.other_clock,
    "value, gradient off by": lambda f: optional(
        f, "value_error", lambda error: f"{error:.1e}, {f.info['gradient_error']:.1e}"
    ),
}
TEXT = {"provider", "dtype", "mode", "clock"}
"""Columns of words, before those of numbers."""


def optional(figure: Figure, name: str, text: Callable[[Any], str]) -> str | None:
    """None where it was not measured."""
    value = figure.info.get(name)
    return None if value is None else text(value)


SHORT = ("provider", "dtype", "clock", "time", "spread", "time / fused", "eager / fused", "GB/s", "launches")


def table(rows: list[Figure], columns: Iterable[str]) -> str:
    """Markdown, without the columns that have nothing in them."""
    cells = {name: [COLUMNS[name](row) for row in rows] for name in columns}
    cells = {name: column for name, column in cells.items() if any(column)}
    lines = ([cell or "" for cell in line] for line in zip(*cells.values(), strict=True))
    return markdown_table(list(cells), lines, text=len(TEXT & cells.keys()))


def tables(found: list[Figure], columns: Iterable[str] = COLUMNS) -> str:
    """One for each shape: by dtype and mode, the fastest first."""
    by_shape = defaultdict(list)
    for figure in found:
        by_shape[figure.shape].append(figure)
    parts = []
    for shape, rows in by_shape.items():
        rows.sort(key=lambda row: (row.dtype, -MODES.index(row.mode), row.seconds))
        parts.append("## K = {}, B = {}, D = {}\n\n".format(*shape) + table(rows, columns))
    return "\n\n".join(parts)


def page(run: dict[str, Any], plots: Iterable[str] = ()) -> str:
    """The whole Markdown page, with the plots of those file names."""
    machine = run["machine_info"] | run.get("run", {})  # which until 2026-11-28 were one
    commit, found = run["commit_info"], figures(run)
    gpu = machine["gpu"]
    name = gpu.get("name") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    state = ", ".join(f"{key} {value}" for key, value in gpu.items() if key != "name")
    packages = {"python": machine["python_version"], **machine["versions"]}
    versions = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
    load = ", ".join(f"{load:.2f}" for load in machine["load_before"])
    facts = {
        "machine": f"{name}{'; at the end ' * bool(state)}{state}",
        "load before (1, 5, 15 minutes)": load,
        "versions": versions,
        "commit": f"{commit.get('id')}{' with changes' * bool(commit.get('dirty'))}",
        "date": run["datetime"][:10],
        "command": f"`{machine['command']}`",
        "spectrum": machine["spectrum"],
    }
    about = {figure.provider: figure.info["about"] for figure in found}
    parts = [
        "# The losses, timed",
        "Drawn by `bench/report.py` from the JSON beside it; `bench/README.md` says what the columns are. Ratios "
        "within this run are what counts.",
        "\n".join(f"* {fact}: {value}" for fact, value in facts.items()),
        "\n".join(f"* `{provider}`: {text}" for provider, text in about.items()),
        *(f"![{plot}]({plot})" for plot in plots),
        tables(found),
        *left_out(run),
    ]
    return "\n\n".join(parts) + "\n"


def left_out(run: dict[str, Any]) -> list[str]:
    """What has no figures, and why: a paragraph, or none."""
    cases = defaultdict(list)
    for case in run.get("left_out", []):
        cases[case["reason"]].append(case)
    lines = []
    for reason, alike in cases.items():
        values = {name: dict.fromkeys(case[name] for case in alike) for name in ("provider", "shape", "dtype", "mode")}
        which = ", ".join(next(iter(found)) for found in values.values() if len(found) == 1)
        lines.append(f"* {len(alike)} x {reason}" + f" ({which})" * bool(which))
    return ["## Left out\n\n" + "\n".join(lines)] if lines else []


def charts(found: list[Figure]) -> dict[str, list[Figure]]:
    """What goes on one picture, by its name: a dtype, or where shapes are many, a dtype and a K."""
    many = len({figure.shape for figure in found}) > 20
    parts = defaultdict(list)
    for figure in found:
        parts[figure.dtype + f"-K{figure.shape[0]}" * many].append(figure)
    return parts


def sweeps(found: list[Figure], over: str) -> dict[str, list[Figure]]:
    """Figures that differ in one of K, B and D, by a name with the others; single ones are left out."""
    axis = list(AXES).index(over)
    parts = defaultdict(list)
    for figure in found:
        rest = [f"{AXES[name]}{size}" for name, size in zip(AXES, figure.shape, strict=True) if name != over]
        parts["-".join([figure.dtype, over, *rest])].append(figure)
    return {name: part for name, part in parts.items() if len({figure.shape[axis] for figure in part}) > 1}


def plot(found: list[Figure], names: list[str], path: Path, over: str | None = None) -> None:
    """Times of one dtype by shape, or over one of K, B and D, with quartiles, one panel for each mode.

    Args:
        found: figures.
        names: of the providers, whose places here decide how they look.
        path: of the picture.
        over: the dimension in which they differ; None for all shapes, one beside the other.
    """
    from matplotlib.figure import Figure as Canvas

    shapes = sorted({figure.shape for figure in found}) if over else list(dict.fromkeys(f.shape for f in found))
    if over:
        places = {shape: shape[list(AXES).index(over)] for shape in shapes}
        ticks = list(map(str, places.values()))
        others = [f"{AXES[name]} = {size}" for name, size in zip(AXES, shapes[0], strict=True) if name != over]
    else:
        places = {shape: number for number, shape in enumerate(shapes)}
        ticks = ["x".join(map(str, shape)) for shape in shapes]
    modes = [mode for mode in MODES if any(figure.mode == mode for figure in found)]
    stacked = len(shapes) > 6
    width, height = max(2.0, 0.9 * len(shapes)), 3.4
    size = (2.5 + width, 1 + height * len(modes)) if stacked else (2.5 + width * len(modes), 1 + height)
    canvas = Canvas(figsize=size, layout="constrained")
    grid = (len(modes), 1) if stacked else (1, len(modes))
    panels = canvas.subplots(*grid, sharex=True, sharey=True, squeeze=False).flat
    drawn = {}
    for panel, mode in zip(panels, modes, strict=True):
        for i, name in enumerate(names):
            rows = [figure for figure in found if (figure.mode, figure.provider) == (mode, name)]
            rows.sort(key=lambda row: places[row.shape])
            beside = 0.0 if over else 0.6 * ((i + 0.5) / len(names) - 0.5)  # or those alike would hide each other
            points = [places[row.shape] + beside for row in rows]
            if rows:
                drawn[name] = panel.errorbar(points, *heights(rows), linestyle="-" if over else "none", **look(i, name))
        panel.set_title(mode)
        panel.set_yscale("log")
        if over:
            panel.set_xscale("log")
            panel.set_xticks([], minor=True)
        else:
            panel.set_xlim(-0.5, len(shapes) - 0.5)
        panel.set_xticks(list(places.values()), ticks, rotation=35, ha="right")
        panel.grid(axis="y", which="both", alpha=0.25)
    canvas.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize="small", frameon=False)
    canvas.supxlabel(f"{AXES[over]} ({', '.join(others)})" if over else "K x B x D", fontsize="medium")
    canvas.supylabel(f"µs a call, {found[0].dtype}", fontsize="medium")
    canvas.savefig(path, dpi=110)


def heights(rows: list[Figure]) -> tuple[list[float], list[list[float]]]:
    """Microseconds, and how far the quartiles are below and above."""
    below = [1e6 * (row.seconds - row.quartiles[0]) for row in rows]
    above = [1e6 * (row.quartiles[1] - row.seconds) for row in rows]
    return [1e6 * row.seconds for row in rows], [below, above]


def look(number: int, name: str) -> dict[str, Any]:
    """The fused loss is black and on top; no two of fourteen are alike."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    ours = {"color": "black", "zorder": 9} if name == FUSED else {"color": colour, "zorder": 3}
    return {"marker": marker, "markersize": 5, "capsize": 2, "elinewidth": 1, **ours}


def is_ours(run: Any) -> bool:
    """Whether it is from the benchmarks of the losses."""
    if not (isinstance(run, dict) and isinstance(run.get("machine_info"), dict) and run.get("benchmarks")):
        return False
    known = run["machine_info"] | run.get("run", {})
    return "load_before" in known and all("provider" in benchmark["extra_info"] for benchmark in run["benchmarks"])


def read(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A run's JSON."""
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{path} cannot be read ({error}); pytest bench/ --benchmark-json {path} writes it")
    if not is_ours(run):
        parser.error(f"{path} is not what pytest bench/ --benchmark-json writes")
    return run


def compared(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Figures of both runs by the same clock, and whether their quartiles overlap; then how many have no partner."""
    before, after = ({figure[:4]: figure for figure in figures(run)} for run in (old, new))
    both = [key for key in before if key in after and before[key].info["clock"] == after[key].info["clock"]]
    cells = []
    for key in both:
        shape, *names = key
        one, other = before[key], after[key]
        overlap = max(one.quartiles[0], other.quartiles[0]) <= min(one.quartiles[1], other.quartiles[1])
        times = [f"{time_of(f.seconds)} ({' to '.join(map(time_of, f.quartiles))})" for f in (one, other)]
        ratio = digits(other.seconds / one.seconds)
        cells.append(["x".join(map(str, shape)), *names, "overlap" if overlap else "apart", *times, ratio])
    head = ["K x B x D", "dtype", "mode", "provider", "quartiles", "old", "new", "new / old"]
    alone = f"{len(before) - len(both)} of the old, {len(after) - len(both)} of the new"
    return markdown_table(head, cells, text=5) + f"\n\nWithout a partner by the same clock: {alone}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json wrote; two, to compare them")
    parser.add_argument("--out", type=Path, help="folder for the page and the plots; default: that of the JSON")
    parser.add_argument("--short", action="store_true", help="print forward and backward together, write nothing")
    parser.add_argument(
        "--over", choices=AXES, help="draw the times over this size alone, for each value of the others"
    )
    options = parser.parse_args()
    runs = [read(path, parser) for path in options.json]
    if len(runs) > 2:
        parser.error(f"expected one file, or two to compare, got {len(runs)}")
    if (len(runs) == 2 and (options.out or options.over or options.short)) or (options.over and options.short):
        parser.error("--out and --over are for one file that is drawn, --short for one that is printed")
    if len(runs) == 2:
        print(compared(*runs))
        return
    (run,), (path,) = runs, options.json
    if options.short:
        print(tables([figure for figure in figures(run) if figure.mode == "both"], SHORT))
        return
    folder, stem = options.out or path.parent, path.stem
    parts = sweeps(figures(run), options.over) if options.over else charts(figures(run))
    if not parts:
        parser.error(f"{path} has no two shapes that differ in {AXES[options.over]} alone")
    folder.mkdir(parents=True, exist_ok=True)
    plots = {f"{stem}-{name}.png": found for name, found in parts.items()}
    names = list(dict.fromkeys(figure.provider for figure in figures(run)))
    try:
        for name, found in plots.items():
            plot(found, names, folder / name, options.over)
    except ModuleNotFoundError as error:
        print(f"No plots: {error}. pip install matplotlib")
        plots = {}
    if options.over:
        print("\n".join(str(folder / name) for name in plots))
        return
    (folder / f"{stem}.md").write_text(page(run, plots), encoding="utf-8")
    print(tables(figures(run)))


if __name__ == "__main__":
    main()
