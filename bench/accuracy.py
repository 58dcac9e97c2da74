"""Accuracy per minute of training: MSBReg at 2 to 20 views and with its parts left out, BYOL and SimSiam, on CIFAR-10.

    python bench/accuracy.py --data CIFAR10 --folder runs/accuracy --minutes 8 --json accuracy.json

goes through a fixed list of runs, cheap ones first, and ends in time: the run at hand saves itself, and the same
command goes on from there. Each call draws page and plot anew, beside the JSON, from all runs that have finished, and
names those that failed, which the next call tries again; `--report` does nothing else. What follows `--` are options of
`msbreg pretrain` for every run; give those a `--folder` of their own. `--small` tries it all on a CPU: rendered images,
a small network, one epoch of the cheaper methods.

Every run ends a schedule of its own; none is a checkpoint of a longer one. All methods share batch, recipe of views and
the width and depth of projectors. MSBReg has a predictor in two runs alone: what it disperses does not collapse without
one. Each method has the optimizer, learning rate and tau that were best for it in short runs of small networks
(docs/decisions.md, "The settings of short schedules"); nothing is tuned for longer ones. Accuracy is that of the
backbone's 512 features of whole, unaugmented images, from the 50,000 training images to the 10,000 test images:
logistic regression at its optimum, its weight decay chosen on a fifth of the training images, and a weighted vote of
200 neighbours (`msbreg.evaluation`). The published figures beside it, from the README of
https://github.com/tsb0601/EMP-SSL (commit 8fc3758), are of another protocol. As its code shows,

* EMP-SSL is probed at the 4096 features of its projector's first layer, after batch normalisation and ReLU (model.py),
  averaged over 128 augmented crops of a quarter of the image, in training and test images alike (evaluate.py, aug.py);
* its linear classifier is trained by SGD for 100 epochs, and the best of their test accuracies is printed beside the
  last (func.py);
* it trains on such crops too, in batches of 100, by LARS at .3, with heads of 4096 to 1024 (main.py, model.py);
* its .806 after 1 epoch seems to be taken from a run whose learning rate falls over 30 epochs: the README says so of
  the 1-epoch figure with 200 patches, and has .842 for a schedule made for 1 epoch (`--epoch 2`);
* how the other methods' figures after 1, 10 and 30 epochs were made it does not say.
"""

import argparse
import math
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import accuracy_report
import runs
from options import above_zero, limit, positive
from records import keep
from runs import RunError, finished, train

EPOCHS = (1.0, 10.0, 30.0)
"""Those of the published table."""
VIEWS_SEEN = (20.0, 60.0)
"""Views of each image after which methods with different K are compared; two views reach them in 10 and 30 epochs."""
SEEDS = 3

COMMON = [  # with the defaults that matter, so that runs mean the same when one changes
    "--data.recipe", "cifar", "--data.size", "32",
    "--data.batch_size", "100",  # EMP-SSL
    "--model.backbone", "resnet18", "--model.stem", "cifar",  # SimCLR appendix B.9; EMP-SSL
    "--model.hidden", "2048",  # msbreg/configs/cifar10-resnet18.yaml
    "--model.dim", "128",  # about the batch, which is how docs/choices.md found lambda_s
    "--method.lambda_m", "1", "--method.lambda_s", "0.004", "--method.lambda_b", "0.5",  # MSBReg
    "--method.leave_one_out", "false", "--method.disperse", "projector", "--method.spectrum", "nuclear",
    "--eval.every", "0", "--eval.k", "200", "--eval.bank", "50000", "--eval.queries", "10000",  # lightly's k
    "--run.log_every", "100", "--run.checkpoint_every", "1000",
]  # fmt: skip
SMALL = [
    "--data.size", "16", "--data.batch_size", "16", "--model.backbone", "convnet", "--model.stem", "imagenet",
    "--model.hidden", "64", "--model.dim", "16", "--eval.k", "20", "--eval.bank", "1000", "--eval.queries", "500",
    "--run.log_every", "10",
]  # fmt: skip


class Setting(NamedTuple):
    """What was best for a method in short runs: docs/decisions.md, "The settings of short schedules"."""

    options: tuple[str, ...]
    forgets: float
    """1 - tau of one epoch; 0 where there is no EMA network."""
    longest: float
    """Epochs up to which tau remembers the same share of a schedule; from there on it stays."""


ALONE = Setting(
    (
        "--model.predictor", "false",
        "--optim.name", "lars", "--optim.lr", "32", "--optim.weight_decay", "1e-6",
    ), 0.5, math.inf,
)  # fmt: skip
"""Where there is a singular value loss: with neither that nor a predictor all embeddings become one."""
PREDICTOR = Setting(("--optim.name", "lars", "--optim.lr", "8", "--optim.weight_decay", "1e-6"), 0.1, 10)
"""tau is .9 for one epoch, as in the default run, which has about as few steps, and .99 from 10 epochs on."""
BYOL = Setting(
    ("--method.name", "byol", "--optim.name", "adamw", "--optim.lr", "0.004", "--optim.weight_decay", "1e-4"), 0.01, 1
)
"""tau is .99 for all lengths, as solo-learn's BYOL on CIFAR-10 has it."""
SIMSIAM = Setting(
    ("--method.name", "simsiam", "--optim.name", "adamw", "--optim.lr", "0.002", "--optim.weight_decay", "1e-4"), 0, 1
)


class Arm(NamedTuple):
    """One way to train."""

    key: str
    name: str
    views: int
    """K."""
    setting: Setting
    options: tuple[str, ...] = ()


ARMS = (
    *(Arm(f"msbreg-k{views}", f"MSBReg, K = {views}", views, ALONE) for views in (2, 4, 8, 16, 20)),
    Arm("msbreg-k4-predictor", "MSBReg, K = 4, with a predictor", 4, PREDICTOR),
    Arm("msbreg-k4-no-centroid", "MSBReg, K = 4, no centroid loss", 4, ALONE, ("--method.lambda_m", "0")),
    Arm(
        "msbreg-k4-no-singular-value", "MSBReg, K = 4, with a predictor, no singular value loss", 4, PREDICTOR,
        ("--method.lambda_s", "0"),
    ),
    Arm("msbreg-k4-no-brownian", "MSBReg, K = 4, no Brownian loss", 4, ALONE, ("--method.lambda_b", "0")),
    Arm("byol", "BYOL", 2, BYOL),
    Arm("simsiam", "SimSiam", 2, SIMSIAM),
)  # fmt: skip
KEYS = [arm.key for arm in ARMS]


class Run(NamedTuple):
    """One run of the comparison."""

    arm: Arm
    epochs: float
    seed: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm.name}, epochs {self.epochs:g}, seed {self.seed}"

    @property
    def folder(self) -> str:
        """Of its own."""
        return f"{self.arm.key}-epochs{self.epochs:g}-seed{self.seed}"

    @property
    def cost(self) -> float:
        """What places it in the list: views of each image, and another seed counts as four times as dear."""
        return self.arm.views * self.epochs * 4**self.seed

    def options(self) -> list[str]:
        """Its own, beside the common ones.

        The learning rate rises during a tenth of the epochs, as in BYOL's schedule of 100.
        """
        setting = self.arm.setting
        numbers = {
            "data.views": self.arm.views,
            "optim.epochs": self.epochs,
            "optim.warmup_epochs": self.epochs / 10,
            "method.tau": 1 - setting.forgets / min(setting.longest, max(1.0, self.epochs)),
            "run.seed": self.seed,
        }
        if not setting.forgets:
            del numbers["method.tau"]
        chosen = (*setting.options, *self.arm.options)
        return [*chosen, *(word for name, value in numbers.items() for word in (f"--{name}", f"{value:g}"))]


def plan(arms: Iterable[Arm], epochs: Iterable[float], views_seen: Iterable[float], seeds: int) -> list[Run]:
    """The runs in their order, the cheapest first.

    Args:
        arms: ways to train.
        epochs: lengths of all of them.
        views_seen: further lengths of all of them, in views of each image.
        seeds: runs of each.
    """
    lengths = {arm: {*epochs, *(seen / arm.views for seen in views_seen)} for arm in arms}
    chosen = [Run(arm, length, seed) for arm in lengths for length in lengths[arm] for seed in range(seeds)]
    return sorted(chosen, key=lambda run: (run.cost, ARMS.index(run.arm), run.seed))


def go_through(
    todo: Iterable[Run], common: list[str], last: list[str], folder: Path, data: str | None, deadline: float
) -> bool:
    """Runs what has not finished, with common options before its own and the last ones behind, until time is up.

    Returns:
        Whether no run failed.
    """
    good = True
    for run in todo:
        if runs.CLOCK() >= deadline:
            break
        new = finished(folder / run.folder) is None
        about = {"arm": run.arm.key, "name": run.arm.name, "views": run.arm.views}
        about |= {"epochs": run.epochs, "seed": run.seed}
        try:
            record = train(folder / run.folder, [*common, *run.options(), *last], data=data, deadline=deadline, **about)
        except RunError as error:
            good = False
            print(f"{run.name}: {error}", file=sys.stderr, flush=True)
            continue
        if record is None:
            print(f"{run.name}: time is up; the same command goes on with it", flush=True)
        elif new:
            print(f"{run.name}: {accuracy_report.one_line(record['summary'])}", flush=True)
    return good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10 as image files: train/CLASS/*, test/CLASS/*")
    parser.add_argument("--folder", type=Path, help="of the runs; default: runs/accuracy, or runs/accuracy-small")
    parser.add_argument("--minutes", type=limit, default=float("inf"), help="after which this call ends; default: none")
    parser.add_argument(
        "--json", type=Path, help="results; page and plot go beside it; default: accuracy.json in FOLDER"
    )
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--small", action="store_true", help="the small case, for a CPU")
    parser.add_argument("--arms", nargs="+", choices=KEYS, metavar="ARM", help=f"only these, of {', '.join(KEYS)}")
    parser.add_argument("--epochs", nargs="+", type=above_zero, help="schedules of these lengths only; default: all")
    parser.add_argument("--seeds", type=positive, help=f"runs of each; default: {SEEDS}, or 1 with --small")
    parser.add_argument("options", nargs="*", help="of msbreg pretrain, after --")
    options = parser.parse_args(arguments)
    if not options.report and not options.small and options.data is None:
        parser.error("--data is missing: the folder of CIFAR-10, with train/ and test/ in it")
    if options.data is not None and not Path(options.data).exists():
        parser.error(f"--data: there is no folder {options.data}")

    small = options.small
    folder = options.folder or Path("runs/accuracy-small" if small else "runs/accuracy")
    arms = [arm for arm in ARMS if (arm.key in options.arms if options.arms else arm.views <= 4 or not small)]
    epochs = options.epochs or ((1.0,) if small else EPOCHS)
    views_seen = () if options.epochs or small else VIEWS_SEEN
    seeds = options.seeds or (1 if small else SEEDS)
    todo = plan(arms, epochs, views_seen, seeds)
    good = True
    if not options.report:
        common = [*COMMON, *(SMALL if small else ())]
        good = go_through(todo, common, options.options, folder, options.data, runs.CLOCK() + 60 * options.minutes)

    records = [record for place in folder.glob("*") if (record := finished(place)) is not None]
    records.sort(key=lambda record: (KEYS.index(record["arm"]), record["epochs"], record["seed"]))
    failed = {place.name: reason for place in sorted(folder.glob("*")) if (reason := runs.failed(place)) is not None}
    if not records:
        print(f"no run in {folder} has finished yet")
        return 0 if good else 1
    path = options.json or folder / "accuracy.json"
    keep({"runs": records, "failed": failed}, path)
    accuracy_report.draw(records, failed, path, seeds=seeds, epochs=EPOCHS, views_seen=VIEWS_SEEN)
    left = sum(finished(folder / run.folder) is None for run in todo)
    counts = f"runs finished: {len(records)}, failed: {len(failed)}, left of this list: {left}"
    print(f"{counts}; {path.with_suffix('.md')}")
    return 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which lets the run at hand save itself
    sys.exit(main())
