"""curves.png: what a run did, on one page, drawn from its metrics.jsonl alone."""

from pathlib import Path
from typing import Any

from msbreg.files import whole_file

__all__ = ["draw_curves"]


def draw_curves(rows: list[dict[str, Any]], path: Path, *, title: str, score: str, start: str) -> None:
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

    steps = [row["step"] for row in train]
    for name, label in (
        ("loss", "total"),
        ("centroid", "multiview centroid $L_M$"),
        ("brownian", "Brownian $L_B$"),
    ):
        if train and name in train[0]:
            losses.plot(steps, [row[name] for row in train], label=label, linewidth=1.8 if name == "loss" else 1.0)
    losses.set(title="Losses", xlabel="step")
    if train and "singular_value" in train[0]:
        beside = losses.twinx()
        beside.plot(steps, [row["singular_value"] for row in train], color="tab:red", linewidth=1.0)
        beside.set_ylabel("singular value $L_S$ (right)", color="tab:red")
        # Null where it was not finite; negative where it is a coding rate.
        if all(row["singular_value"] is None or row["singular_value"] >= 0 for row in train):
            beside.set_ylim(bottom=0)
    if losses.lines:  # a finished run whose metrics were deleted has none
        losses.legend(loc="upper right", fontsize=8)

    where = [row["step"] for row in evaluations]
    accuracy.plot(where, [row["knn_top1"] for row in evaluations], "o-", label=f"{score}, this run")
    if evaluations and evaluations[0]["step"] == 0:
        before = evaluations[0]["knn_top1"]
        accuracy.axhline(before, color="tab:gray", linestyle="--", label=f"{score}, {start}")
    if evaluations:
        pixels = evaluations[-1]["knn_top1_pixels"]
        accuracy.axhline(pixels, color="tab:brown", linestyle=":", label=f"{score}, raw pixels")
    accuracy.set(title="Held-out accuracy", xlabel="step", ylim=(0, 1))
    accuracy.legend(fontsize=8)  # where it hides nothing

    rank.plot(steps, [row["effective_rank"] for row in train], color="tab:green")
    rank.set(title="Effective rank of a batch's embeddings", xlabel="step")
    rank.set_ylim(bottom=0)

    for row in evaluations[:: max(1, len(evaluations) - 1)]:
        label, values = f"step {row['step']}", row["spectrum"]
        spectrum.semilogy(
            range(1, len(values) + 1), [None if value is None else max(value, 1e-4) for value in values], label=label
        )
    spectrum.axhline(1.0, color="tab:gray", linestyle=":", label="flat")
    spectrum.set(title="Singular values of held-out embeddings", xlabel="index")
    spectrum.legend(fontsize=8)

    for axes in (losses, accuracy, rank, spectrum):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
