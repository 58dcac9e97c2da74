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
COMMON = [
    "--data.views", "2", "--data.batch_size", "128", "--eval.every", "0", "--eval.bank", "10000",
    "--eval.queries", "2000",
    "--run.threads", "1", "--data.threads", "1", "--run.checkpoint_every", "1000000", "--run.log_every", "50",
]  # fmt: skip
ROWS = {
    "baseline: centroid of all views, dispersion on the projector, nuclear, lambda_s .004": [],
    "centroid of the other views (leave_one_out)": ["--method.leave_one_out", "true"],
    "dispersion on the predictor": ["--method.disperse", "predictor"],
    "whitening, lambda_s .004": ["--method.spectrum", "whitening"],
    "whitening, lambda_s .0004": ["--method.spectrum", "whitening", "--method.lambda_s", "0.0004"],
    "coding_rate, lambda_s .004": ["--method.spectrum", "coding_rate"],
    "coding_rate, lambda_s .02": ["--method.spectrum", "coding_rate", "--method.lambda_s", "0.02"],
    "nuclear, lambda_s .001": ["--method.lambda_s", "0.001"],
    "nuclear, lambda_s .02": ["--method.lambda_s", "0.02"],
    "no singular value loss": ["--method.lambda_s", "0"],
    "no Brownian loss": ["--method.lambda_b", "0"],
    "neither": ["--method.lambda_s", "0", "--method.lambda_b", "0"],
    "BYOL": ["--method.name", "byol"],
    "SimSiam": ["--method.name", "simsiam"],
}


def run(name: str, seed: int, options: list[str], folder: Path) -> dict:
    """One run's summary."""
    place = folder / f"{list(ROWS).index(name):02}-{seed}"
    command = [sys.executable, "-m", "msbreg", "pretrain", "--run.dir", str(place), "--run.seed", str(seed), *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads((place / "summary.json").read_text())


def percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10 as image files: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
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
        "common": [option for option in common if option != options.data],
        "rows": {name: [summaries[name, seed] for seed in range(options.seeds)] for name in ROWS},
    }
    results = ROOT / "bench" / "results" / "cpu" / result["date"]
    results.mkdir(parents=True, exist_ok=True)
    (results / "choices.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = ["| choice | kNN top-1, % | linear top-1, % |", "| --- | ---: | ---: |"]
    for name in ROWS:
        of_row = result["rows"][name]
        columns = [percent([summary[key] for summary in of_row]) for key in ("knn_top1", "linear_top1")]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    first = result["rows"][next(iter(ROWS))]
    for label, key in (("untrained network", "knn_top1_untrained"), ("raw pixels", "knn_top1_pixels")):
        lines.append(f"| {label} | {percent([summary[key] for summary in first])} | |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
