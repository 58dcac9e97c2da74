"""curves.png: what a run did, on one page, drawn from its metrics.jsonl alone."""

from pathlib import Path
from typing import Any

from msbreg.files import whole_file

__all__ = ["draw_curves"]

Rows = list[dict[str, Any]]


def draw_curves(rows: Rows, path: Path, *, title: str, score: str, start: str) -> None:
    """Draws losses, accuracy, effective rank and spectrum.

    Args:
        rows: the lines of metrics.jsonl.
        path: the PNG to write.
        title: a line above the panels.
        score: what the accuracy is the accuracy of.
        start: what to call the network before the first step.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    train = [row for row in rows if row["event"] == "train"]
    evaluations = [row for row in rows if row["event"] == "eval"]
    protocol = evaluations[-1].get("protocol") if evaluations else None
    evaluations = [row for row in evaluations if row.get("protocol", protocol) == protocol]  # older ones have none
    figure, ((losses, accuracy), (rank, spectrum)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    _draw_losses(losses, train)
    _draw_accuracy(accuracy, evaluations, score, start)
    _draw_rank(rank, train)
    _draw_spectrum(spectrum, evaluations)
    for axes in (losses, accuracy, rank, spectrum):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def _draw_losses(axes: Any, train: Rows) -> None:
    steps = [row["step"] for row in train]
    for name, label in (
        ("loss", "total"),
        ("centroid", "multiview centroid $L_M$"),
        ("brownian", "Brownian $L_B$"),
    ):
        if train and name in train[0]:
            axes.plot(steps, [row[name] for row in train], label=label, linewidth=1.8 if name == "loss" else 1.0)
    axes.set(title="Losses", xlabel="step")
    if train and "singular_value" in train[0]:
        beside = axes.twinx()
        beside.plot(steps, [row["singular_value"] for row in train], color="tab:red", linewidth=1.0)
        beside.set_ylabel("singular value $L_S$ (right)", color="tab:red")
        # Null where it was not finite; negative where it is a coding rate.
        if all(row["singular_value"] is None or row["singular_value"] >= 0 for row in train):
            beside.set_ylim(bottom=0)
    if axes.lines:  # a finished run whose metrics were deleted has none
        axes.legend(loc="upper right", fontsize=8)


def _draw_accuracy(axes: Any, evaluations: Rows, score: str, start: str) -> None:
    steps = [row["step"] for row in evaluations]
    axes.plot(steps, [row["knn_top1"] for row in evaluations], "o-", label=f"{score}, this run")
    if evaluations and evaluations[0]["step"] == 0:
        before = evaluations[0]["knn_top1"]
        axes.axhline(before, color="tab:gray", linestyle="--", label=f"{score}, {start}")
    if evaluations:
        pixels = evaluations[-1]["knn_top1_pixels"]
        axes.axhline(pixels, color="tab:brown", linestyle=":", label=f"{score}, raw pixels")
    axes.set(title="Held-out accuracy", xlabel="step", ylim=(0, 1))
    axes.legend(fontsize=8)  # where it hides nothing


def _draw_rank(axes: Any, train: Rows) -> None:
    axes.plot([row["step"] for row in train], [row["effective_rank"] for row in train], color="tab:green")
    axes.set(title="Effective rank of a batch's embeddings", xlabel="step")
    axes.set_ylim(bottom=0)


def _draw_spectrum(axes: Any, evaluations: Rows) -> None:
    for row in evaluations[:: max(1, len(evaluations) - 1)]:  # the first and the last
        values = [None if value is None else max(value, 1e-4) for value in row["spectrum"]]
        axes.semilogy(range(1, len(values) + 1), values, label=f"step {row['step']}")
    axes.axhline(1.0, color="tab:gray", linestyle=":", label="flat")
    axes.set(title="Singular values of held-out embeddings", xlabel="index")
    axes.legend(fontsize=8)
