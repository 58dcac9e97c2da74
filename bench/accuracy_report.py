"""Tables and a plot of what bench/accuracy.py measured, beside the published figures."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from records import percent

from msbreg.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Point", "draw", "equal_lengths", "one_line", "points", "similar_minutes"]


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
    asked: int = 1
    """Seeds that there are to be."""

    @property
    def views_seen(self) -> float:
        """Of each image, in the whole run."""
        return self.views * self.epochs

    @property
    def mean_minutes(self) -> float:
        """Over the seeds; infinite where they are not known."""
        return statistics.mean(self.minutes) if self.minutes else math.inf

    @property
    def mark(self) -> float:
        """The least power of two, in minutes, that it ends within: it uses more than half of them."""
        return 2.0 ** math.ceil(math.log2(self.mean_minutes))

    def percent(self, shares: tuple[float, ...]) -> str:
        """Mean and standard deviation of accuracies, in percent, with their number where seeds are missing."""
        missing = f", n = {len(shares)}" if 0 < len(shares) < self.asked else ""
        return percent(shares) + missing


PUBLISHED = [  # https://github.com/tsb0601/EMP-SSL, README; bench/accuracy.py says how its protocol differs
    Point(name, views, epochs, (accuracy,))
    for name, views, accuracies in (
        ("published: EMP-SSL, 20 patches", 20, (0.806, 0.907, 0.931)),
        ("published: BYOL", 2, (0.249, 0.489, 0.684)),
    )
    for epochs, accuracy in zip((1.0, 10.0, 30.0), accuracies, strict=True)
]
STYLES = {
    "published: EMP-SSL, 20 patches": {"color": "black", "marker": "x", "linestyle": ":"},
    "published: BYOL": {"color": "black", "marker": "+", "linestyle": ":"},
}
PUBLISHED_IMAGES = 50_000
NOTE = """Published figures: README of [EMP-SSL](https://github.com/tsb0601/EMP-SSL), of another protocol. Ours probe
the backbone's features of one whole image. EMP-SSL is probed at the 4096 features of its projector's first layer,
averaged over 128 augmented crops of each image, and its code prints the best test accuracy of the linear classifier's
100 epochs beside the last. Its .806 seems to be taken from a run whose learning rate falls over 30 epochs; its README
has .842 for a schedule made for 1 epoch. How BYOL's were made it does not say."""


TUNED = """Optimizer, learning rate and τ were chosen by short runs of small networks, one seed each
(docs/decisions.md, "The settings of short schedules"): MSBReg's by 20 runs that were judged on 5,000 of the test images
of this page, which flatters it, if anything; BYOL's by ten runs and SimSiam's by seven, judged on training images that
were set aside. Nothing was tuned for schedules of more than one epoch."""


def one_line(summary: dict[str, Any]) -> str:
    """A run's outcome."""
    accuracies = f"linear {percent([summary['linear_top1']])} %, kNN {percent([summary['knn_top1']])} %"
    return f"{accuracies}, {summary['seconds'] / 60:.2f} minutes, {summary['views_per_second']:,.0f} views/s"


def points(records: Iterable[dict[str, Any]], seeds: int) -> list[Point]:
    """The records of the runs, all seeds together, in their order.

    Args:
        records: of finished runs.
        seeds: that there are to be of each.
    """
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
            seeds,
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
    return markdown_table(list(columns), ([cell(point) for cell in columns.values()] for point in found))


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
    return markdown_table(["method", *header], rows)


def cells_of(point: Point) -> list[str]:
    minutes = f"{point.mean_minutes:.2f}" if point.minutes else ""
    return [point.percent(point.linear), point.percent(point.knn), minutes]


def similar_minutes(found: list[Point]) -> str:
    """A table of the linear accuracy after the longest schedule of about a time, with its epochs and minutes."""
    marks = sorted({point.mark for point in found})
    rows = []
    for name, of_method in by_name(found).items():
        longest = {point.mark: point for point in sorted(of_method, key=lambda point: point.epochs)}
        rows.append([name, *(timed(longest[mark]) if mark in longest else "" for mark in marks)])
    return markdown_table(["method", *(f"{mark / 2:g} to {mark:g} min" for mark in marks)], rows)


def timed(point: Point) -> str:
    return f"{point.percent(point.linear)} ({point.epochs:g}; {point.mean_minutes:.2f})"


def shared_options(records: Iterable[dict[str, Any]], known: Iterable[str] = ()) -> list[str]:
    """The options that all these runs have, each with its value, but for those known; of two alike the last counts."""
    lines = [re.split(" (?=--)", " ".join(record["options"])) for record in records]
    counting = [list({word.split()[0]: word for word in line}.values()) for line in lines]
    return [word for word in counting[0] if word not in known and all(word in line for line in counting)]


def own_options(records: list[dict[str, Any]]) -> str:
    """A table of the options that the runs of each method share, beside those of all; their lengths vary."""
    common, groups = shared_options(records), defaultdict(list)
    for record in records:
        groups[record["name"]].append(record)
    return markdown_table(
        ["method", "options"],
        ([name, f"`{' '.join(shared_options(group, common))}`"] for name, group in groups.items()),
    )


def page(
    records: list[dict[str, Any]],
    failed: dict[str, str],
    plots: Iterable[str],
    *,
    seeds: int,
    epochs: Iterable[float],
    views_seen: Iterable[float],
) -> str:
    """The whole Markdown page, with the plots of those file names; the rest is as for `draw`."""
    found, known = points(records, seeds), published(records)
    summaries = [record["summary"] for record in records]
    machines = [record["machine"] for record in records]
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
        "options of all runs": [f"`{' '.join(shared_options(records))}`"],
        "kNN of untrained networks, %": [percent([summary["knn_top1_untrained"] for summary in summaries])],
        "kNN of raw pixels, %": [percent([summary["knn_top1_pixels"]]) for summary in summaries],
    }
    sections = {
        "Equal epochs": equal_lengths([*found, *known], epochs, lambda point: point.epochs, "epochs"),
        "Equal views of each image": equal_lengths(
            [*found, *known], views_seen, lambda point: point.views_seen, "views"
        ),
        "Minutes within a factor of two": "Linear probe, %, after the longest schedule that takes more than the "
        "first and at most the second number of minutes: one run of a column may have had nearly twice the time of "
        f"another. In brackets are its epochs and its minutes.\n\n{similar_minutes(found)}",
        "Settings": f"{TUNED}\n\n{own_options(records)}",
        "Failed runs": "\n".join(f"* {name}: {reason}" for name, reason in failed.items()),
        "All runs": everything(found),
    }
    parts = [
        "# Accuracy per minute of training",
        "Drawn by `bench/accuracy.py` from the JSON beside it. Mean ± standard deviation over the seeds, "
        f"with their number n where it is below {seeds}; minutes are of training alone, data included, evaluation and "
        "saving not.",
        "\n".join(f"* {name}: {'; '.join(sorted(set(values)))}" for name, values in facts.items() if any(values)),
        *(f"![{plot}]({plot})" for plot in plots),
        *(f"## {title}\n\n{text}" for title, text in sections.items() if text),
        *([NOTE] if known else []),
    ]
    return "\n\n".join(parts) + "\n"


def plot(shown: list[Point]) -> "Figure":
    """Linear accuracy against minutes of training, and against views of each image, with the published figures."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    canvas = Figure(figsize=(13, 5.5), layout="constrained")
    minutes, views = canvas.subplots(1, 2, sharey=True)
    for i, (name, of_method) in enumerate(by_name(shown).items()):
        style = STYLES.get(name) or {"color": f"C{i % 10}", "marker": "osD^v<>pPX*"[i % 11]}
        for axis, place in ((minutes, lambda point: point.mean_minutes), (views, lambda point: point.views_seen)):
            line = sorted((point for point in of_method if math.isfinite(place(point))), key=place)
            draw_line(axis, [place(point) for point in line], [point.linear for point in line], label=name, **style)
    for axis, label in ((minutes, "minutes of training"), (views, "views of each image")):
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25, which="both")
    minutes.set_ylabel("linear probe top-1, % (hollow: one seed)")
    canvas.legend(*views.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    return canvas


def draw_line(axis: "Axes", places: list[float], shares: list[tuple[float, ...]], **style: Any) -> None:
    """Means with their standard deviations; a hollow mark where there is one figure, which has none."""
    means = [100 * statistics.mean(values) for values in shares]
    spreads = [100 * statistics.stdev(values) if len(values) > 1 else 0 for values in shares]
    axis.errorbar(places, means, spreads if any(spreads) else None, linewidth=1, **style)
    single = [i for i, values in enumerate(shares) if len(values) == 1]
    hollow = style | {"markerfacecolor": "white", "linestyle": "none", "label": None}
    axis.plot([places[i] for i in single], [means[i] for i in single], zorder=3, **hollow)


def draw(
    records: list[dict[str, Any]],
    failed: dict[str, str],
    path: Path,
    *,
    seeds: int,
    epochs: Iterable[float],
    views_seen: Iterable[float],
) -> None:
    """Writes the page and the plot beside the JSON.

    Args:
        records: of the finished runs, one or more.
        failed: folder and last words of those that failed.
        path: the JSON.
        seeds: that there are to be of each run.
        epochs: lengths that the table of equal epochs has columns for.
        views_seen: lengths, in views of each image, that the other one has.
    """
    plots = [path.with_suffix(".png").name]
    try:
        plot([*points(records, seeds), *published(records)]).savefig(path.with_suffix(".png"), dpi=110)
    except ModuleNotFoundError as error:
        print(f"No plot: {error}. pip install matplotlib")
        plots = []
    text = page(records, failed, plots, seeds=seeds, epochs=epochs, views_seen=views_seen)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
