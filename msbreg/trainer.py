"""Pretraining: the loop, and what stands around it.

Everything a step does is a function of the config and the step's number: the images and their views, the noise, the
learning rate, the EMA momentum. So a run that was killed and started again walks the same path as one that was not.
"""

import contextlib
import functools
import gc
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from msbreg import checkpoint
from msbreg.collapse import embedding_statistics
from msbreg.config import Config, with_absolute_paths
from msbreg.console import say
from msbreg.errors import MSBRegError, is_of_a_compiler
from msbreg.evaluator import TASKS, Evaluator, GivenUpError
from msbreg.export import export_backbone
from msbreg.files import METRICS, read_json, reason, write_json
from msbreg.inputs import has_labels, open_images, open_loader, recipe_of
from msbreg.loss_watch import LossWatch
from msbreg.machine import memory_megabytes
from msbreg.methods import StepOutput
from msbreg.metrics import MetricsFile, finite, read_metrics
from msbreg.plots import draw_curves
from msbreg.preflight import (
    planned_steps,
    require_images,
    require_networks,
    require_packages,
    require_processes,
)
from msbreg.processes import Processes
from msbreg.progress import Progress
from msbreg.run_folder import (
    forget_results,
    refuse_other_config,
    refuse_other_images,
    refuse_other_recipe,
    run_folder,
    state_to_go_on_from,
)
from msbreg.signals import StopSignals
from msbreg.step import TrainingStep
from msbreg.stopwatch import Stopwatch
from msbreg.summary import start_of, summary_table

__all__ = ["Trainer", "pretrain"]

SECONDS_BETWEEN_QUESTIONS = 5.0
"""At most so far apart ranks tell each other of signals: launchers kill what has not ended in half a minute."""


def pretrain(config: Config, signals: StopSignals | None = None) -> dict[str, Any]:
    """Trains a backbone as the config says, or goes on with the run that its folder holds.

    Args:
        config: the run's options.
        signals: what notes signals already; None: that is done here, until this returns.

    Returns:
        What summary.json holds. Where a signal stopped the run, `finished` is False and the run folder has a
        checkpoint of the last step, unless that is step 0.

    Raises:
        MSBRegError: what the user can mend; see its text.
    """
    config.validate()
    require_packages(config)
    require_images(config)
    # A signal while images are listed, networks built or other ranks awaited must end the run as cleanly as later ones.
    with (
        StopSignals() if signals is None else contextlib.nullcontext(signals) as noted,
        Processes(config.run.device, timeout=config.run.timeout) as processes,
        run_folder(config, processes) as folder,
    ):
        return Trainer(config, processes, folder).run(noted.received)


class Trainer:
    """One run: its data, networks and state, and the loop over them.

    Args:
        config: the run's options.
        processes: this process and its peers.
        folder: the run folder, which exists and is ours.
    """

    def __init__(self, config: Config, processes: Processes, folder: Path) -> None:
        self.config, self.processes, self.folder = config, processes, folder
        self.device = processes.device
        state = state_to_go_on_from(folder, config, processes)
        self.recipe = [asdict(view) for view in recipe_of(config)]
        if state is not None:
            refuse_other_config(state, config, folder)
            refuse_other_recipe(state, self.recipe, config, folder)

        # Those of a run that goes on are in its checkpoint, and the file of its first ones may be gone.
        begun = config if state is None else replace(config, model=replace(config.model, weights=None))
        require_networks(begun)  # now, since listing the images may take minutes
        require_processes(config, processes)
        trained_on = None if state is None else state["images"]
        self.source, self.held_out = open_images(config, processes, trained_on=trained_on)
        self.fingerprint = self.source.fingerprint()
        if state is not None:
            refuse_other_images(state, self.source, self.fingerprint, folder)
        self.loader = open_loader(config, processes, self.source)
        self.steps = planned_steps(config, self.loader.steps_per_epoch)
        self.warmup_steps = min(self.steps, round(config.optim.warmup_epochs * self.loader.steps_per_epoch))
        self.eval_every = (
            max(1, round(config.eval.every * self.loader.steps_per_epoch)) if config.eval.every else self.steps
        )
        classes = len(self.source.classes) if config.eval.linear and has_labels(self.source) else 0
        self.step = TrainingStep(begun, processes, steps=self.steps, warmup_steps=self.warmup_steps, classes=classes)
        self.losses = LossWatch(processes)
        self.done, self.stopwatch = 0, Stopwatch(self.device)
        self.ask_every = 1
        """Steps between two exchanges of the signals that came, the same on all ranks."""
        self.results: dict[str, Any] = {}
        self.change = ""
        """What is to be said of the number of processes, where it is another one than before."""
        if state is not None:
            self._restore(state)
            if self._kept():  # a kill may have come between saving and keeping it
                keep = functools.partial(checkpoint.keep_checkpoint, folder, self.done, anew=False)
                processes.of_first(keep, "keep the checkpoint")
        self.logged = self.done

    def run(self, stop: list[int]) -> dict[str, Any]:
        """Trains from where the run stands to its end, or until `stop` has a signal in it (see `StopSignals`)."""
        config, first = self.config, self.processes.first
        with contextlib.ExitStack() as opened, collected_by_hand():
            opened.callback(self.loader.close)
            self.progress = Progress(self.steps, self.done, shown=first)
            opened.callback(self.progress.close)
            if "finished" not in self.results and self._stopped(stop):
                return self._ended(stop)
            self.evaluator = None
            if first:
                self.evaluator = Evaluator(
                    config, self.source, self.held_out, device=self.device, threads=self.loader.threads, stop=stop
                )
                opened.callback(self.evaluator.close)
                if self.done < self.steps:
                    forget_results(self.folder)
                last = {"train": self.done, "eval": self.results["evaluated"]} if self.done else None
                self.metrics = MetricsFile(self.folder / METRICS, last)
                self.board = tensorboard(self.folder, self.done) if config.run.tensorboard else None
                opened.callback(lambda: self.board is None or self.board.close())
            if self.done == 0:
                if self.warmup_steps == self.steps > 1:
                    self.progress.say(
                        f"the warm-up, --optim.warmup_epochs {config.optim.warmup_epochs:g}, takes the whole run, so "
                        "that the learning rate only rises: lower it"
                    )
                if not self._evaluate():
                    return self._ended(stop)
            elif self.done < self.steps:
                self.progress.say(f"going on from step {self.done} of {self.steps} in {self.folder}{self.change}")
                killed_in_it = self.done % self.eval_every == 0 and self.results["evaluated"] < self.done
                if killed_in_it and not self._evaluate():
                    return self._ended(stop)
            try:
                self._train(stop)
            except RuntimeError as error:
                if not (stop and is_of_a_compiler(error)):
                    raise
                # A terminal's Ctrl-C goes to the C++ compiler, too.
                raise MSBRegError(
                    f"step {self.done + 1} was not compiled, since a signal came ({reason(error)}); the same command "
                    "goes on from the last checkpoint, or begins anew where there is none."
                ) from error
            if self.done < self.steps:
                return self._ended(stop, saved=self._save())
            return self._finish(stop)

    def _train(self, stop: list[int]) -> None:
        config = self.config
        self.step.train()
        self.stopwatch.start()
        for step, batch in self._timed(self.loader.batches(self.done, self.steps)):
            out = self.step(batch, step)
            self.done = step + 1
            self.losses.see(out.loss)
            self.progress.step()

            if self.done % config.run.log_every == 0 or self.done == self.steps:
                self._log(out)
            if self.done == self.steps:
                break
            if self.done % self.eval_every == 0:
                self._save()  # evaluation may take long, and a scheduler may not wait for it
                if not self._evaluate():
                    break
            if self._stopped(stop):
                break
            if self.done % config.run.checkpoint_every == 0 or self._kept():
                self._save()
        self.stopwatch.stop()

    def _ended(self, stop: list[int], *, saved: bool = True) -> dict[str, Any]:
        """Says that the run was stopped, and returns what `run` does then."""
        why = "as torchrun is gone" if self.processes.orphaned and not stop else "by a signal"
        where = "there" if saved else "the last good checkpoint, since the loss or a weight is not finite"
        place = f"at step {self.done} of {self.steps}; the same command goes on from {where}"
        if not self.done:
            place = "before the first step; the same command begins anew"
        self.progress.say(f"stopped {why} {place}")
        return {"finished": False, "step": self.done}

    def _timed(self, batches: Iterator) -> Iterator[tuple[int, Any]]:
        step = self.done
        while True:
            with self.stopwatch.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield step, batch
            step += 1

    def _check_losses(self) -> None:
        """Raises MSBRegError after three bad losses in a row on any rank."""
        if what := self.losses.gone_astray():
            raise self._diverged(what)

    def _diverged(self, what: str) -> MSBRegError:
        kept = "The last good checkpoint is kept" if checkpoint.holds_one(self.folder) else "No checkpoint was due yet"
        return MSBRegError(
            f"the loss {what}, at step {self.done} or shortly before. {kept}. "
            "Try a lower --optim.lr or a longer --optim.warmup_epochs in a new --run.dir."
        )

    def _stopped(self, stop: list[int]) -> bool:
        """Whether a signal or the end of torchrun came to any rank; several ask each other now and then only."""
        if self.processes.world > 1 and self.done % self.ask_every:
            return False
        return any(self.processes.gather(len(stop) + self.processes.orphaned))

    def _share_unreadable(self) -> None:
        """Lets every rank leave out what any of them could not read, and the first one count it."""
        self.loader.unreadable.update(self.processes.joined(self.loader.unreadable))

    def _log(self, out: StepOutput) -> None:
        gc.collect()  # on all ranks in the same step
        self._check_losses()
        self._share_unreadable()
        seconds, wait = self.stopwatch.lap()
        steps, self.logged = self.done - self.logged, self.done
        slowest = max(1, *self.processes.gather(round(1e6 * seconds / steps)))  # µs a step
        self.ask_every = max(1, min(self.config.run.log_every, round(1e6 * SECONDS_BETWEEN_QUESTIONS / slowest)))
        losses = self.processes.mean(torch.stack([out.loss.detach(), *out.terms.values()]))
        statistics = embedding_statistics(out.embeddings, self.processes.group)
        if not self.processes.first:
            return
        images = steps * self.config.data.batch_size
        row = {
            "event": "train",
            "step": self.done,
            "epoch": self.done / self.loader.steps_per_epoch,
            **dict(zip(("loss", *out.terms), losses.tolist(), strict=True)),
            "lr": self.step.lr,
            **statistics,
            "images_per_second": images / seconds,
            "views_per_second": images * self.config.data.views / seconds,
            "data_wait_ms": 1e3 * wait / steps,
            "step_ms": 1e3 * seconds / steps,
            "memory_mb": memory_megabytes(self.device),
            "unreadable_images": len(self.loader.unreadable),
            "processes": self.processes.world,
        }
        self._record(row)
        self.progress.show(
            loss=row["loss"],
            effective_rank=row["effective_rank"],
            images_s=row["images_per_second"],
            knn=self.results["knn_top1"],
        )

    def _record(self, row: dict[str, Any]) -> None:
        self.metrics.write(**row)
        if self.board is not None:
            for name, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{row['event']}/{name}", value, row["step"])

    def _evaluate(self, *, linear: bool = False) -> bool:
        """Measures the frozen backbone on the first rank while the others wait.

        Returns:
            False on all ranks where a signal to the first one came meanwhile: then it is to be done again.
        """
        self.stopwatch.stop()
        before, self.results["evaluated"] = self.results.get("evaluated"), self.done
        given_up = False
        if self.evaluator is not None:
            try:
                # Compiling what trains for other shapes and another mode would take longer than this does.
                with torch.compiler.set_stance("force_eager"):
                    self._record(self._measure(self.evaluator, linear=linear))
            except GivenUpError:
                given_up, self.results["evaluated"] = True, before
        given_up = any(self.processes.gather(given_up))
        self.stopwatch.start()
        return not given_up

    def _measure(self, evaluator: Evaluator, *, linear: bool) -> dict[str, Any]:
        """What an evaluation writes to metrics.jsonl, and keeps in the results."""
        network, results = self.step.method.online, self.results
        if results.setdefault("protocol", evaluator.protocol) != evaluator.protocol:
            self.progress.say(
                "other images are evaluated than before, or with other options, so that figures of before are left out"
            )
            for name in ("knn_top1_untrained", "online_linear_top1", "linear_top1"):
                results.pop(name, None)
            results |= {"protocol": evaluator.protocol, "knn_top1_pixels": evaluator.pixels()}
        results["task"] = evaluator.task
        if self.done == 0:
            results["knn_top1_pixels"] = evaluator.pixels()
        accuracy = evaluator(network.backbone, linear=linear)
        results["knn_top1"] = accuracy.knn
        if self.done == 0:
            results["knn_top1_untrained"] = accuracy.knn
        row = {"event": "eval", "step": self.done, "task": evaluator.task, "protocol": evaluator.protocol}
        row["knn_top1"] = accuracy.knn
        row["knn_top1_pixels"] = results["knn_top1_pixels"]
        if self.step.probe is not None and evaluator.task == "labels":
            results["online_linear_top1"] = row["online_linear_top1"] = self.step.probe.accuracy(*evaluator.measured)
        if accuracy.linear is not None:
            results["linear_top1"] = row["linear_top1"] = accuracy.linear
        row["spectrum"] = evaluator.spectrum(network.projector)
        return row

    def _save(self) -> bool:
        """Writes a checkpoint, unless the run has just gone astray: then the last good one is worth more."""
        self._check_losses()  # which waits for the GPU, whose time counts
        self.stopwatch.stop()
        self._share_unreadable()
        healthy = self.losses.healthy(self.step.method)
        if healthy:
            self.processes.of_first(self._write, "save the checkpoint")
        self.stopwatch.start()
        return healthy

    def _kept(self) -> bool:
        """Whether the checkpoint of this step is to be kept."""
        return self.config.run.keep_every > 0 and self.done % self.config.run.keep_every == 0

    def _write(self) -> None:
        checkpoint.save_checkpoint(self.folder, self._state())
        if self._kept():
            checkpoint.keep_checkpoint(self.folder, self.done)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.done,
            "images": len(self.source),
            "fingerprint": self.fingerprint,
            "processes": self.processes.world,
            "config": asdict(with_absolute_paths(self.config)),
            "recipe": self.recipe,
            **self.step.state_dict(),
            "unreadable": dict(self.loader.unreadable),
            "seconds": self.stopwatch.seconds,
            "waited": self.stopwatch.waited,
            "results": dict(self.results),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.step.load_state_dict(state)
        except (RuntimeError, ValueError, AttributeError, TypeError, KeyError) as error:
            raise MSBRegError(
                f"the checkpoint in {self.folder} does not fit the networks of this config, or is of another version "
                "of msbreg; choose another --run.dir."
            ) from error
        self.loader.recall(state["unreadable"])
        self.done, self.results = state["step"], state["results"]
        before, now = state["processes"], self.processes.world
        if before != now:
            plural = "es" if now > 1 else ""
            self.change = (
                f", with {now} process{plural} instead of {before}; images and views of each step are the same"
            )
        self.stopwatch = Stopwatch(self.device, state["seconds"], state["waited"])

    def _finish(self, stop: list[int]) -> dict[str, Any]:
        """Last evaluation, checkpoint, curves, exported backbone and table; does nothing twice on a finished run."""
        before = "finished" in self.results
        if not before:
            if not self.losses.healthy(self.step.method):
                raise self._diverged("or a weight is not finite")
            self._save()  # evaluation may take long, and a scheduler may not wait for it
            if not self._evaluate(linear=True):
                return self._ended(stop)
            self.results["finished"] = True
            self._save()
            self.stopwatch.stop()
        if self.evaluator is None:  # not the first rank
            return {"finished": True, "step": self.done}
        summary_file = self.folder / "summary.json"
        task = self.results.get("task", self.evaluator.task)  # of a finished run, which may be another one by now
        config, summary = self.config, self._summary(task)
        written = read_json(summary_file) if before else {}
        again = summary.keys() <= written.keys()
        if again:
            summary = written
        else:
            export_backbone(self.step.method.online.backbone, self.folder)
            title = f"msbreg pretrain: {config.method.name}, {config.model.backbone}, K = {config.data.views}"
            draw_curves(
                read_metrics(self.folder / METRICS),
                self.folder / "curves.png",
                title=title,
                score=TASKS[task],
                start=start_of(summary),
            )
            write_json(summary_file, finite(summary))
        self.progress.close()
        done = "This run had finished already" if again else "Curves, metrics, checkpoint and backbone are"
        say(f"{summary_table(summary)}\n\n{done} in {self.folder}/", sys.stdout)
        return summary

    def _summary(self, task: str) -> dict[str, Any]:
        seconds = self.stopwatch.seconds
        images = self.done * self.config.data.batch_size
        names = ("knn_top1", "knn_top1_untrained", "knn_top1_pixels", "linear_top1", "online_linear_top1")
        return {
            "finished": True,
            "method": self.config.method.name,
            "backbone": self.config.model.backbone,
            "weights": with_absolute_paths(self.config).model.weights,
            "step": self.done,
            "images": len(self.source),
            "task": task,
            **{name: self.results[name] for name in names if name in self.results},
            "seconds": seconds,
            "images_per_second": images / seconds,
            "views_per_second": images * self.config.data.views / seconds,
            "data_wait_ms": 1e3 * self.stopwatch.waited / self.done,
            "memory_mb": memory_megabytes(self.device),
            "unreadable_images": len(self.loader.unreadable),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "processes": self.processes.world,
        }


@contextlib.contextmanager
def collected_by_hand() -> Iterator[None]:
    """Within it Python collects garbage only when it is asked to, and passes over what there was before.

    A collection at a moment of its own choosing makes one rank late, and all others wait.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer in the run folder, which drops what an earlier process wrote after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
