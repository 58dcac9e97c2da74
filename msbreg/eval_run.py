"""`msbreg eval`: how good the frozen backbone of a run is."""

import warnings
from pathlib import Path
from typing import Any

from msbreg.checkpoint import read_run
from msbreg.config import config_of
from msbreg.data.recipes import View
from msbreg.evaluator import TASKS, Evaluator
from msbreg.export import backbone_of
from msbreg.findings import keep_findings
from msbreg.inputs import open_images
from msbreg.machine import usable_cores
from msbreg.processes import Processes
from msbreg.tables import markdown_table

__all__ = ["evaluate"]


def evaluate(run: Path, changes: dict[str, Any], *, file: Path | None = None) -> str:
    """Measures the backbone of a run's newest checkpoint, or of one that a file holds.

    Args:
        run: the run folder, or a checkpoint.
        changes: options that are to be others than the run's, as {"eval.k": 5}. Device and threads are this machine's
            anyway, and another `data.path` leaves the run's `data.eval_path` behind.
        file: where the figures go as JSON, too.

    Returns:
        A Markdown table of accuracies.

    Raises:
        MSBRegError: there is no checkpoint, an option cannot be, or the images are not there.
    """
    state = read_run(run)
    config = config_of(state)
    config.run.device, config.data.threads, config.eval.linear = "auto", 0, True
    if "data.path" in changes:
        config.data.eval_path = None
    for name, value in changes.items():
        group, option = name.split(".")
        setattr(getattr(config, group), option, value)
    config.validate()
    its_own = not {"data.path", "data.eval_path"} & changes.keys()
    with Processes(config.run.device) as processes:
        train, held_out = open_images(config, processes, trained_on=state["images"] if its_own else None)
        if its_own and train.fingerprint() != state["fingerprint"]:
            warnings.warn(f"the images of {config.data.path} are not those that the run was trained on", stacklevel=1)
        threads = config.data.threads or usable_cores()
        view = View(**state["recipe"][0]) if "recipe" in state else None  # whose file may be another by now
        evaluator = Evaluator(config, train, held_out, device=processes.device, threads=threads, view=view)
        accuracy = evaluator(backbone_of(state).to(processes.device), linear=True)
        task, pixels = TASKS[evaluator.task], evaluator.pixels()
        rows = [(task, f"{accuracy.knn:.1%}"), (f"{task}, raw pixels", f"{pixels:.1%}")]
        if accuracy.linear is not None:
            rows.insert(1, ("linear probe top-1", f"{accuracy.linear:.1%}"))
        if file is not None:
            figures = {"step": state["step"], "task": evaluator.task, "protocol": evaluator.protocol}
            figures |= {"knn_top1": accuracy.knn, "linear_top1": accuracy.linear, "knn_top1_pixels": pixels}
            keep_findings(file, config, processes.device, figures)
        evaluator.close()
    return markdown_table((f"{config.model.backbone}, step {state['step']:,}", "value"), rows)
