"""summary.json, what a run has come to, as a table."""

from typing import Any

from msbreg.evaluator import TASKS
from msbreg.tables import markdown_table

__all__ = ["start_of", "summary_table"]


def summary_table(summary: dict[str, Any]) -> str:
    """Markdown: the figures of summary.json for people.

    Args:
        summary: what the file holds of a run that has finished.
    """
    task = TASKS[summary["task"]]
    rows = [
        (f"{task}, {what}", f"{summary[name]:.1%}")
        for what, name in (
            ("this run", "knn_top1"),
            (start_of(summary), "knn_top1_untrained"),  # not there where it was measured on other images
            ("raw pixels", "knn_top1_pixels"),
        )
        if name in summary
    ]
    if "linear_top1" in summary:
        rows.append(("linear probe top-1", f"{summary['linear_top1']:.1%}"))
    rows += [
        ("training images", f"{summary['images']:,}"),
        ("steps", f"{summary['step']:,}"),
        ("seconds of training", f"{summary['seconds']:.0f}"),
        ("images/s", f"{summary['images_per_second']:,.0f}"),
        ("views/s", f"{summary['views_per_second']:,.0f}"),
        ("waiting for data, ms a step", f"{summary['data_wait_ms']:.1f}"),
        ("peak memory, MB", f"{summary['memory_mb']:,.0f}"),
    ]
    if summary["unreadable_images"]:
        rows.append(("unreadable images left out", f"{summary['unreadable_images']:,}"))
    return markdown_table((f"{summary['method']}, {summary['backbone']}", "value"), rows)


def start_of(summary: dict[str, Any]) -> str:
    """What the network is called as it was before the first step."""
    return "untrained network" if summary["weights"] is None else "weights it began with"
