"""Compares the choices that the MSBReg paper leaves open, on real images; docs/choices.md is drawn by it.

    python bench/choices.py --data CIFAR10_FOLDER --seeds 3 --jobs 2 --json choices.json --page docs/choices.md

Every row is the same short run of `msbreg pretrain` with one option changed, so that rows compare with each other and
with nothing else. Runs that the folder holds already are not run again.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from options import positive
from records import commit, percent, processor, versions
from runs import RunError, train

from msbreg.machine import usable_cores
from msbreg.tables import markdown_table

COMMON = [  # with the choices themselves, so that rows mean the same when a default changes
    "--method.leave_one_out", "false", "--method.disperse", "projector", "--method.spectrum", "nuclear",
    "--method.lambda_s", "0.004", "--method.lambda_b", "0.5",
    "--data.views", "2", "--data.batch_size", "128", "--eval.every", "0", "--eval.bank", "5000",
    "--eval.queries", "2000",
    "--run.threads", "1", "--data.threads", "1", "--run.checkpoint_every", "1000000", "--run.log_every", "50",
]  # fmt: skip
ROWS = {
    "baseline: all views in the centroid, projector dispersed, nuclear spectrum": [],
    "other views in the centroid (leave_one_out)": ["--method.leave_one_out", "true"],
    "predictor dispersed": ["--method.disperse", "predictor"],
    "whitening spectrum, lambda_s .0004": ["--method.spectrum", "whitening", "--method.lambda_s", "0.0004"],
    "coding_rate spectrum": ["--method.spectrum", "coding_rate"],
    "lambda_s .02": ["--method.lambda_s", "0.02"],
    "no singular value loss": ["--method.lambda_s", "0"],
    "no Brownian loss": ["--method.lambda_b", "0"],
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as image files: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--steps", type=positive, default=240, help="optimizer steps of a run; default: %(default)s")
    parser.add_argument("--seeds", type=positive, default=2, help="runs of each row; default: %(default)s")
    parser.add_argument(
        "--jobs", type=positive, default=1, help="runs at a time, one thread each; default: %(default)s"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/choices"), help="of the runs; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table there, with where it is from")
    options = parser.parse_args(arguments)

    os.environ["OMP_NUM_THREADS"] = "1"
    common = [*COMMON, "--optim.steps", str(options.steps), "--optim.warmup_epochs", "0.1"]
    tasks = [(name, seed) for seed in range(options.seeds) for name in ROWS]

    def run(task: tuple[str, int]) -> dict:
        name, seed = task
        place = options.folder / f"{list(ROWS).index(name):02}-{seed}"
        record = train(place, [*common, *ROWS[name], "--run.seed", str(seed)], data=options.data)
        return record["summary"]

    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            summaries = dict(zip(tasks, pool.map(run, tasks), strict=True))
    except RunError as error:
        sys.exit(str(error))
    result = {
        "command": f"python bench/choices.py --data CIFAR10_FOLDER --steps {options.steps} --seeds {options.seeds}",
        "date": date.today().isoformat(),
        "versions": versions(),
        "machine": {"processor": processor(), "cores": usable_cores(), "jobs": options.jobs},
        "commit": commit(),
        "common": ["--data.path", "CIFAR10_FOLDER", *common],
        "rows": {name: [summaries[name, seed] for seed in range(options.seeds)] for name in ROWS},
    }
    for path, text in ((options.json, json.dumps(result, indent=1) + "\n"), (options.page, page(result))):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(table(result["rows"]))


def table(rows: dict[str, list[dict]]) -> str:
    """Means and standard deviations over the seeds, in percent."""
    rows_of_cells = [
        [name, *(percent([summary[key] for summary in summaries]) for key in ("knn_top1", "linear_top1"))]
        for name, summaries in rows.items()
    ]
    first = next(iter(rows.values()))
    for label, key in (("untrained network", "knn_top1_untrained"), ("raw pixels", "knn_top1_pixels")):
        rows_of_cells.append([label, percent([summary[key] for summary in first]), ""])
    return markdown_table(["choice", "kNN top-1, %", "linear top-1, %"], rows_of_cells)


def page(result: dict) -> str:
    """docs/choices.md, drawn from the results file."""
    seeds = len(next(iter(result["rows"].values())))
    seeds_of_each = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed each"
    return f"""# The choices that the paper leaves open, measured

Short runs of `msbreg pretrain` on CIFAR-10, alike but for one option; {seeds_of_each}:
two views of 128 images, the small network for CPUs, torch {result["versions"]["torch"]}, {result["date"]}. Differences
within the spread mean nothing, and a short run of a small network is a hint, not a proof. The defaults were chosen on
these same 2,000 test images, which flatters them. What follows from it is in [decisions.md](decisions.md).

```bash
{result["command"]}
```

{table(result["rows"])}

This page is written by that command with `--page`, the figures of each run
([choices.json](../bench/results/cpu/{result["date"]}/choices.json)) with `--json`.
"""


if __name__ == "__main__":
    main()
