"""The folder that a run lives in: kept to one run at a time, and to the options and images that it began with."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msbreg.checkpoint import holds_one, kept_in, load_run
from msbreg.config import Config, config_of, flatten, with_absolute_paths
from msbreg.data import Source
from msbreg.errors import MSBRegError
from msbreg.files import LOCK, expanded
from msbreg.processes import Processes

__all__ = [
    "forget_results", "refuse_other_config", "refuse_other_images", "refuse_other_recipe", "run_folder",
    "state_to_go_on_from",
]  # fmt: skip

FREE_TO_CHANGE = {
    "run.dir", "run.resume", "run.threads", "run.checkpoint_every", "run.keep_every", "run.log_every",
    "run.tensorboard", "run.device", "run.timeout", "data.path", "data.images", "data.eval_path", "data.backend",
    "data.threads", "data.prefetch", "data.timeout", "data.cache", "model.compile", "model.cuda_graph", "eval.every",
    "eval.k", "eval.temperature", "eval.bank", "eval.queries",
}  # fmt: skip


@contextlib.contextmanager
def run_folder(config: Config, processes: Processes) -> Iterator[Path]:
    """Makes the run folder and keeps other runs out of it until this one ends."""
    folder = expanded(config.run.dir)
    if not processes.first:
        processes.wait()
        yield folder
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")  # noqa: SIM115 - held until the run ends
    except OSError as error:
        raise MSBRegError(
            f"cannot write to the run folder {folder}: {error.strerror}; choose another --run.dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MSBRegError(f"another process is training in {folder}; choose another --run.dir.") from error
        except OSError:  # a file system without locks: nothing keeps two runs apart then but their users
            pass
        processes.wait()
        yield folder


def forget_results(folder: Path) -> None:
    """Deletes what says of an earlier run that it finished, where one begins. Its backbone stays until this one's."""
    for name in ("summary.json", "curves.png"):
        (folder / name).unlink(missing_ok=True)


def state_to_go_on_from(folder: Path, config: Config, processes: Processes) -> dict[str, Any] | None:
    """The newest checkpoint in a run folder, or None where a run begins; to be called on all ranks.

    Raises:
        MSBRegError: the folder holds a run that is not to be gone on with, or checkpoints that one has kept; none can
            be read; ranks see different ones.
    """
    state = load_run(folder, to_go_on=processes.first) if config.run.resume else None
    processes.agree(-1 if state is None else state["step"], f"the run folder {folder}")
    if state is None and holds_one(folder):
        raise MSBRegError(f"{folder} holds a run already and --run.resume is false; choose another --run.dir.")
    if state is None and (kept := kept_in(folder)):
        raise MSBRegError(
            f"{folder} holds no checkpoint.pt to go on from, but {kept[-1].name}, which an earlier run has kept: "
            "rename it to checkpoint.pt to go on from it, or move such files elsewhere to start anew."
        )
    return state


def refuse_other_config(state: dict[str, Any], config: Config, folder: Path) -> None:
    """A run goes on only as it began: options that shape its result may not change in the middle."""
    before, now = (flatten(with_absolute_paths(one)) for one in (config_of(state), config))
    changed = [name for name in now if name not in FREE_TO_CHANGE and before[name] != now[name]]
    if changed:
        differences = "; ".join(f"--{name} was {before[name]} and is now {now[name]}" for name in changed)
        raise MSBRegError(
            f"{folder} holds a run with other options: {differences}. "
            "Give the options it had to go on with it, or another --run.dir to start anew."
        )


def refuse_other_recipe(state: dict[str, Any], recipe: list[dict[str, Any]], config: Config, folder: Path) -> None:
    """A run goes on with the views that it began with; of a recipe's file the name alone is in its config."""
    if state.get("recipe", recipe) != recipe:
        raise MSBRegError(
            f"--data.recipe {config.data.recipe} makes other views than when the run in {folder} began; "
            "restore it to go on with the run, or choose another --run.dir to start anew."
        )


def refuse_other_images(state: dict[str, Any], source: Source, fingerprint: str, folder: Path) -> None:
    """A run goes on with the images that it began with, wherever they lie by now."""
    if state["images"] != len(source):
        raise MSBRegError(
            f"the run in {folder} was trained on {state['images']:,} images, but there are {len(source):,} "
            "now; choose another --run.dir, or the images it had."
        )
    if state["fingerprint"] != fingerprint:
        raise MSBRegError(
            f"the run in {folder} was trained on images of other names or labels than those of {source}; "
            "choose another --run.dir, or the images it had."
        )
