"""Tables and a plot of what bench/accuracy.py measured, beside the published figures."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from runs import markdown, percent

__all__ = ["Point", "draw", "equal_lengths", "equal_minutes", "one_line", "points"]

MARKS = [step * 10.0**power for power in range(-2, 4) for step in (1, 2, 5)]
"""Minutes to compare at."""


class Point(NamedTuple):
    """All seeds of one method and schedule; or a published figure, which has one accuracy, and no kNN and no times."""

    name: str
    views: int
    """K."""
    epochs: float
    linear: tuple[float, ...]
    """Shares of right answers, 0 to 1, of each seed; so is kNN."""
    knn: tuple[float, ...] = ()
    minutes: tuple[float, ...] = ()
    """Of training, data included, evaluation and saving not."""
    rates: tuple[float, ...] = ()
    """Views/s."""

    @property
    def views_seen(self) -> float:
        """Of each image, in the whole run."""
        return self.views * self.epochs

    @property
    def mean_minutes(self) -> float:
        """Over the seeds; infinite where they are not known."""
        return statistics.mean(self.minutes) if self.minutes else math.inf


PUBLISHED = [  # https://github.com/tsb0601/EMP-SSL, README; bench/accuracy.py says how its protocol differs
    Point(name, views, epochs, (accuracy,))
    for name, views, accuracies in (
        ("published: EMP-SSL, 20 patches", 20, (0.806, 0.907, 0.931)),
        ("published: BYOL", 2, (0.249, 0.489, 0.684)),
    )
    for epochs, accuracy in zip((1.0, 10.0, 30.0), accuracies, strict=True)
]
PUBLISHED_IMAGES = 50_000
NOTE = """Published figures: README of [EMP-SSL](https://github.com/tsb0601/EMP-SSL), of another protocol. Ours probe
the backbone's features of one whole image. EMP-SSL is probed at the 4096 features of its projector's first layer,
averaged over 128 augmented crops of each image, and its code prints the best test accuracy of the linear classifier's
100 epochs beside the last. Its .806 seems to be taken from a run whose learning rate falls over 30 epochs; its README
has .842 for a schedule made for 1 epoch. How BYOL's were made it does not say."""


def one_line(summary: dict[str, Any]) -> str:
    """A run's outcome."""
    accuracies = f"linear {percent([summary['linear_top1']])} %, kNN {percent([summary['knn_top1']])} %"
    return f"{accuracies}, {summary['seconds'] / 60:.2f} minutes, {summary['views_per_second']:,.0f} views/s"


def points(records: Iterable[dict[str, Any]]) -> list[Point]:
    """The records of the runs, all seeds together, in their order."""
    groups = defaultdict(list)
    for record in records:
        groups[record["name"], record["views"], record["epochs"]].append(record["summary"])
    return [
        Point(
            *key,
            tuple(summary["linear_top1"] for summary in group),
            tuple(summary["knn_top1"] for summary in group),
            tuple(summary["seconds"] / 60 for summary in group),
            tuple(summary["views_per_second"] for summary in group),
        )
        for key, group in groups.items()
    ]


def published(records: Iterable[dict[str, Any]]) -> list[Point]:
    """The published figures, where the runs are of CIFAR-10's training images too."""
    return PUBLISHED if all(record["summary"]["images"] == PUBLISHED_IMAGES for record in records) else []


def by_name(found: Iterable[Point]) -> dict[str, list[Point]]:
    """The points of each method, in their order."""
    rows = defaultdict(list)
    for point in found:
        rows[point.name].append(point)
    return rows


def everything(found: list[Point]) -> str:
    """A table of all runs."""
    columns = {
        "method": lambda point: point.name,
        "epochs": lambda point: f"{point.epochs:g}",
        "views of an image": lambda point: f"{point.views_seen:g}",
        "seeds": lambda point: str(len(point.linear)),
        "linear, %": lambda point: percent(point.linear),
        "kNN, %": lambda point: percent(point.knn),
        "minutes": lambda point: f"{point.mean_minutes:.2f}",
        "views/s": lambda point: f"{statistics.mean(point.rates):,.0f}",
    }
    return markdown(list(columns), ([cell(point) for cell in columns.values()] for point in found))


def equal_lengths(shown: list[Point], lengths: Iterable[float], length: Callable[[Point], float], unit: str) -> str:
    """A table of runs of equal length, with columns for each length that a run of ours has; empty without one."""
    columns = [value for value in lengths if any(point.minutes and length(point) == value for point in shown)]
    if not columns:
        return ""
    rows = []
    for name, of_method in by_name(shown).items():
        there = {length(point): point for point in of_method}
        cells = [cell for value in columns for cell in (cells_of(there[value]) if value in there else [""] * 3)]
        rows += [[name, *cells]] if any(cells) else []
    header = [f"{unit} {value:g}: {column}" for value in columns for column in ("linear, %", "kNN, %", "minutes")]
    return markdown(["method", *header], rows)


def cells_of(point: Point) -> list[str]:
    return [percent(point.linear), percent(point.knn), f"{point.mean_minutes:.2f}" if point.minutes else ""]


def equal_minutes(found: list[Point]) -> str:
    """A table of the linear accuracy after the longest schedule that ends within so many minutes, with its epochs."""
    times = [point.mean_minutes for point in found]
    marks = [mark for mark in MARKS if mark >= min(times)]
    marks = marks[: 1 + sum(mark < max(times) for mark in marks)]
    rows = []
    for name, of_method in by_name(found).items():
        fitting = [[point for point in of_method if point.mean_minutes <= mark] for mark in marks]
        longest = [max(fit, key=lambda point: point.epochs, default=None) for fit in fitting]
        rows.append([name, *(f"{percent(point.linear)} ({point.epochs:g})" if point else "" for point in longest)])
    return markdown(["method", *(f"{mark:g} min" for mark in marks)], rows)


def page(records: list[dict[str, Any]], plots: Iterable[str], epochs: Iterable[float], seen: Iterable[float]) -> str:
    """The whole Markdown page, with the plots of those file names."""
    found, known = points(records), published(records)
    summaries = [record["summary"] for record in records]
    machines = [record["machine"] for record in records]
    words = zip(*(record["options"] for record in records), strict=False)
    shared = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, words)]
    facts = {
        "trained on": [summary["device"] for summary in summaries],
        "driver": [machine.get("gpu", {}).get("driver_version", "") for machine in machines],
        "processor": [f"{machine['processor']}, {machine['cores']} cores" for machine in machines],
        "versions": [
            ", ".join(f"{name} {number}" for name, number in record["versions"].items()) for record in records
        ],
        "commit": [record["commit"] for record in records],
        "date": [record["date"] for record in records],
        "images": [f"{summary['images']:,}" for summary in summaries],
        "options of all runs": [f"`{' '.join(shared)}`"],
        "kNN of untrained networks, %": [percent([summary["knn_top1_untrained"] for summary in summaries])],
        "kNN of raw pixels, %": [percent([summary["knn_top1_pixels"]]) for summary in summaries],
    }
    sections = {
        "Equal epochs": equal_lengths([*found, *known], epochs, lambda point: point.epochs, "epochs"),
        "Equal views of each image": equal_lengths([*found, *known], seen, lambda point: point.views_seen, "views"),
        "Equal minutes": "Linear probe, %, after the longest schedule that ends within so many minutes, and its epochs."
        f"\n\n{equal_minutes(found)}",
        "All runs": everything(found),
    }
    parts = [
        "# Accuracy per minute of training",
        "Drawn by `bench/accuracy.py` from the JSON beside it. Mean ± standard deviation over the seeds; minutes are "
        "of training alone, data included, evaluation and saving not.",
        "\n".join(f"* {name}: {'; '.join(sorted(set(values)))}" for name, values in facts.items() if any(values)),
        *(f"![{plot}]({plot})" for plot in plots),
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
        *([NOTE] if known else []),
    ]
    return "\n\n".join(parts) + "\n"


def plot(shown: list[Point], path: Path) -> None:
    """Linear accuracy against minutes of training, and against views of each image, with the published figures."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 5.5), layout="constrained")
    minutes, views = canvas.subplots(1, 2, sharey=True)
    for i, (name, of_method) in enumerate(by_name(shown).items()):
        timed = bool(of_method[0].minutes)
        style = {"color": f"C{i % 10}", "linewidth": 1} if timed else {"color": "black", "linestyle": ":"}
        axes = {views: lambda point: point.views_seen} | ({minutes: lambda point: point.mean_minutes} if timed else {})
        for axis, place in axes.items():
            line = sorted(of_method, key=place)
            accuracies = [[100 * share for share in point.linear] for point in line]
            axis.errorbar(
                [place(point) for point in line],
                [statistics.mean(values) for values in accuracies],
                [statistics.stdev(values) if len(values) > 1 else 0 for values in accuracies],
                marker="osD^v<>pPX*"[i % 11],
                label=name,
                **style,
            )
    for axis, label in ((minutes, "minutes of training"), (views, "views of each image")):
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25, which="both")
    minutes.set_ylabel("linear probe top-1, %")
    canvas.legend(*views.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    canvas.savefig(path, dpi=110)


def draw(records: list[dict[str, Any]], path: Path, *, epochs: Iterable[float], views_seen: Iterable[float]) -> None:
    """Writes the page and the plot beside the JSON.

    Args:
        records: of the finished runs, one or more.
        path: the JSON.
        epochs: lengths that the table of equal epochs has columns for.
        views_seen: lengths, in views of each image, that the other one has.
    """
    plots = [path.with_suffix(".png").name]
    try:
        plot([*points(records), *published(records)], path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        print(f"No plot: {error}. pip install matplotlib")
        plots = []
    path.with_suffix(".md").write_text(page(records, plots, epochs, views_seen), encoding="utf-8")
