"""Compares the choices that the MSBReg paper leaves open, on real images, and writes docs/choices.md.

    python bench/choices.py --data CIFAR10_FOLDER --seeds 3 --jobs 2

Every row is the same short run of `msbreg pretrain` with one option changed, so that rows compare with each other and
with nothing else. Runs that a results folder holds already are not run again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

import msbreg

ROOT = Path(__file__).resolve().parents[1]
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
    "BYOL": ["--method.name", "byol"],
    "SimSiam": ["--method.name", "simsiam"],
}


def run(name: str, seed: int, options: list[str], folder: Path) -> dict:
    """One run's summary."""
    place = folder / f"{list(ROWS).index(name):02}-{seed}"
    asked, summary = place / "options.json", place / "summary.json"
    if summary.exists() and asked.exists() and json.loads(asked.read_text()) == options:
        return json.loads(summary.read_text())
    command = [sys.executable, "-m", "msbreg", "pretrain", "--run.dir", str(place), "--run.seed", str(seed), *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    asked.write_text(json.dumps(options))
    return json.loads(summary.read_text())


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as image files: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each row")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/choices"), help="where the runs are kept")
    options = parser.parse_args()

    common = ["--data.path", options.data, *COMMON, "--optim.steps", str(options.steps), "--optim.warmup_epochs", "0.1"]
    tasks = [(name, seed) for seed in range(options.seeds) for name in ROWS]
    with ThreadPoolExecutor(options.jobs) as pool:
        summaries = dict(
            zip(tasks, pool.map(lambda task: run(*task, [*common, *ROWS[task[0]]], options.folder), tasks), strict=True)
        )
    result = {
        "command": f"python bench/choices.py --data CIFAR10_FOLDER --steps {options.steps} --seeds {options.seeds}",
        "date": date.today().isoformat(),
        "versions": {"msbreg": msbreg.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "jobs": options.jobs},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "common": ["--data.path", "CIFAR10_FOLDER", *common[2:]],
        "rows": {name: [summaries[name, seed] for seed in range(options.seeds)] for name in ROWS},
    }
    results = ROOT / "bench" / "results" / "cpu" / result["date"]
    results.mkdir(parents=True, exist_ok=True)
    (results / "choices.json").write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs" / "choices.md").write_text(page(result))
    print(table(result["rows"]))


def table(rows: dict[str, list[dict]]) -> str:
    """Means and standard deviations over the seeds, in percent."""
    lines = ["| choice | kNN top-1, % | linear top-1, % |", "| --- | ---: | ---: |"]
    for name, summaries in rows.items():
        columns = [percent([summary[key] for summary in summaries]) for key in ("knn_top1", "linear_top1")]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    first = next(iter(rows.values()))
    for label, key in (("untrained network", "knn_top1_untrained"), ("raw pixels", "knn_top1_pixels")):
        lines.append(f"| {label} | {percent([summary[key] for summary in first])} | |")
    return "\n".join(lines)


def page(result: dict) -> str:
    """docs/choices.md, drawn from the results file."""
    seeds = len(next(iter(result["rows"].values())))
    seeds_of_each = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "one seed each"
    return f"""# The choices that the paper leaves open, measured

Short runs of `msbreg pretrain` on CIFAR-10, alike but for one option; {seeds_of_each}:
two views of 128 images, the small network for CPUs, torch {result["versions"]["torch"]}, {result["date"]}. Differences
within the spread mean nothing, and a short run of a small network is a hint, not a proof. What follows from it is in
[decisions.md](decisions.md).

```bash
{result["command"]}
```

{table(result["rows"])}

This page is written by that command, from `bench/results/cpu/{result["date"]}/choices.json`.
"""


if __name__ == "__main__":
    main()
