"""The loader: a stream of batches of views that is a pure function of (seed, global batch size, step).

Order, reading and random draws are this package's own; a backend (DALI or torchvision) only decodes and augments. So a
run resumes anywhere by its step number alone, with the same pixels, and neither the number of processes nor the number
of threads changes them.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msbreg.data.arguments import check_count, check_made, check_recipe, check_seconds, check_source, place
from msbreg.data.backends import open_backend
from msbreg.data.draws import Draw, draw, permutation
from msbreg.data.images import UndecodableError
from msbreg.data.reader import Reader, Sample
from msbreg.data.recipes import Recipe
from msbreg.data.source import Source, class_numbers
from msbreg.data.threads import Threads
from msbreg.errors import DataError
from msbreg.machine import number_from, usable_cores

__all__ = ["Batch", "ViewLoader", "whole_batches"]

T = TypeVar("T")

READING_THREADS = 8
"""At the most; those that wait for disks and networks do not compute, so they are not counted by cores."""
WORTH_A_THREAD = 1e-4
"""Seconds of an image. From memory one takes a third of that, from a network milliseconds."""
READ_TOGETHER = 16
"""Images that one thread reads in a row, where several read."""
CLOSED = "the loader is closed"


class Batch(NamedTuple):
    """Views of B images."""

    views: tuple[Tensor, ...]
    """Per view size, in the order of the recipe, one channels_last tensor (K_g B, 3, H_g, W_g) on the loader's device:
    all B images of its first view, then of its second, and so on. Normalised by ImageNet's mean and standard deviation.
    No later batch writes to it."""
    labels: Tensor
    """(B,) int64 on the CPU, -1 where unknown."""
    index: Tensor  # type: ignore[assignment]  # tuples have a method of this name, which nobody needs here
    """(B,) int64 on the CPU: which images of the source these are."""


class _Work(NamedTuple):
    """A batch, read and drawn."""

    step: int
    samples: list[Sample]
    draws: list[Draw]


class _Stream(Iterator[Batch]):
    """The batches of a generator, which fails by itself where one thread closes it while another asks for the next.

    Where it was ended before its end it says so: a loop would otherwise take what it had for all there is.
    """

    def __init__(self, batches: Generator[Batch, None, None], threads: Threads) -> None:
        self._batches, self._threads, self._in_use = batches, threads, threading.Lock()
        self._ended = ""
        """Why there is no next batch, where there would have been one."""

    def __next__(self) -> Batch:
        self._threads.require_process()  # whose fork may have the lock locked, by a thread that it does not have
        with self._in_use:
            if self._ended:
                raise RuntimeError(self._ended)
            try:
                return next(self._batches)
            except StopIteration:
                raise
            except BaseException as error:
                closed = self._threads.closed  # by another thread, meanwhile
                ended = f"these batches ended with {type(error).__name__}; ask the loader for those still due"
                self._ended = CLOSED if closed else ended
                if closed and isinstance(error, Exception):
                    raise RuntimeError(CLOSED) from None
                raise

    def close(self, why: str) -> bool:
        """Ends it, unless a thread waits for its next batch, which it tells by False."""
        if not self._in_use.acquire(blocking=False):
            return False
        try:
            if inspect.getgeneratorstate(self._batches) != inspect.GEN_CLOSED:  # it has not come to its end
                self._ended = why
            self._batches.close()
        finally:
            self._in_use.release()
        return True


class Epoch:
    """The batches of one epoch of a loader, for what wants an iterable with a length."""

    def __init__(self, loader: ViewLoader, number: int) -> None:
        self.loader, self.number = loader, number

    def __len__(self) -> int:
        return self.loader.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        first = self.number * len(self) if self.loader.shuffle else 0
        return self.loader.batches(first, first + len(self))


class ViewLoader:
    """Batches of views of the images of a source.

    Images that cannot be read are named in a warning, replaced by others, drawn from their numbers, and counted in
    `unreadable`. Of a JPEG that is damaged in its middle, DALI makes what libjpeg can save; the torchvision backend
    gives it up.

    Args:
        source: the images.
        recipe: K views.
        batch_size: images of this process in a step, B; the global batch is `world_size` times that.
        seed: of order and augmentation; any int64.
        shuffle: whether each epoch has an order of its own and goes on to the next, as training needs it; an epoch has
            whole global batches only, and which images it leaves out changes with its order. Otherwise the images come
            once, in the order of the source, and the last batch may be short.
        rank: which process this is, over all machines. Where neither this nor `world_size` is given, both are those of
            torch.distributed, if that is initialised and the images are shuffled, else 0 and 1. Where several processes
            share a model, give those of the group that shares the data.
        world_size: how many there are.
        device: where the views are made.
        dtype: of the views; None: float16 on a GPU, float32 on a CPU.
        backend: "dali", "torchvision", or "auto": DALI where it is installed, but torchvision on a CPU for views of 128
            pixels and more: at 224 it is faster there, between 96 and 128 that depends on the machine.
        threads: CPU threads that decode and augment; None: the cores this process may use, divided by the processes
            that torchrun started on this machine (LOCAL_WORLD_SIZE).
        prefetch: batches that the backend works on ahead of the one asked for; as many again are read ahead of those.
        timeout: seconds that a batch is waited for until its images have been read; 0: for ever.

    Raises:
        DataError: the global batch is larger than the source, or the source is empty.
        MSBRegError: the backend that is asked for is not installed (of "auto": neither is), or LOCAL_WORLD_SIZE is no
            number.
        TypeError: an argument of another kind than the above, or labels that are no whole numbers.
        ValueError: a number is out of range, a dtype that is not floating, a device other than a CPU or a GPU by CUDA,
            no GPU where one is asked for, or `shuffle=False` with several processes.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        backend: Literal["auto", "dali", "torchvision"] = "auto",
        threads: int | None = None,
        prefetch: int = 2,
        timeout: float = 600.0,
    ) -> None:
        check_source(source)
        check_recipe(recipe)
        self.device = torch.device(device)
        check_made(self.device, dtype)
        check_count("batch_size", batch_size, least=1)
        check_count("prefetch", prefetch, least=1)
        check_count("threads", 1 if threads is None else threads, least=1)
        check_count("seed", seed, least=-(2**63))
        check_seconds("timeout", timeout)
        self._place_given = rank is not None
        self.rank, self.world_size = place(rank, world_size, shuffle)
        images, self.global_batch = len(source), batch_size * self.world_size
        fillable = whole_batches(images, batch_size if shuffle else 1, self.world_size, of=source)
        self.source, self.recipe, self.batch_size, self.seed, self.shuffle = source, recipe, batch_size, seed, shuffle
        self.prefetch, self.timeout = prefetch, timeout
        self.steps_per_epoch = fillable if shuffle else -(-images // batch_size)
        """Steps in which each image comes at most once."""
        self._labels = class_numbers(source)
        self._reader = Reader(source)
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(images, seed=seed, epoch=epoch))
        self.threads = threads or max(1, usable_cores() // number_from("LOCAL_WORLD_SIZE", 1))
        self.dtype = dtype or (torch.float16 if self.device.type == "cuda" else torch.float32)
        self._backend = open_backend(backend, recipe, min(batch_size, images), self.device, self.threads, self.dtype)
        self._reading = Threads(READING_THREADS, "read", WORTH_A_THREAD)
        self._drawing, self._ordering = Threads(1, "draw"), Threads(1, "order")
        # Weak, so that a loader that is no longer used is freed at once, and with it what works ahead.
        self._stream: Callable[[], _Stream | None] = lambda: None
        self._closed: Future[None] = Future()

    @property
    def unreadable(self) -> dict[int, str]:
        """Why images were left out, by their number in the source; what other ranks found may be added."""
        return self._reader.unreadable

    def recall(self, unreadable: dict[int, str]) -> None:
        """Leaves out images that an earlier run found unreadable, unless they can be read by now: disks come back."""
        self._wait(self._reading.submit(self._reader.recall, unreadable))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """The batches of steps [start, stop). A loader serves one stream at a time: a new one ends the one before.

        Whoever goes on with a stream that was ended, by that, by `close` or by an error, gets a RuntimeError.

        Args:
            start: first step, counted from the start of training, across epochs.
            stop: step to end before; None: never with `shuffle`, else at the end of the source.

        Raises:
            TypeError: `start` or `stop` is no whole number; while iterating, where `Source.read` gives no bytes.
            ValueError: `start` or `stop` is below 0.
            RuntimeError: the loader is closed, or another process's, or another thread waits for a batch of the stream
                before.
            DataError: while iterating, where too many images cannot be read, or reading takes longer than `timeout`.
        """
        check_count("start", start)
        check_count("stop", start if stop is None else stop)
        if self._reading.closed:
            raise RuntimeError(CLOSED)
        self._reading.require_process()
        if not self._place_given and self.world_size == 1 < place(None, None, self.shuffle)[1]:
            warnings.warn(
                "this loader was made before init_process_group, so that every process has the same images and views: "
                "make it afterwards, or give it rank= and world_size=",
                stacklevel=2,
            )
        before = self._stream()
        if before is not None and not before.close(
            "these batches ended when the loader was asked for others, of which it serves one stream at a time"
        ):
            raise RuntimeError("another thread waits for a batch of this loader, which serves one stream at a time")
        if not self.shuffle:
            stop = self.steps_per_epoch if stop is None else min(stop, self.steps_per_epoch)
        steps = itertools.count(start) if stop is None else iter(range(start, stop))
        stream = _Stream(self._run(steps), self._reading)
        self._stream = weakref.ref(stream)
        return stream

    def epoch(self, number: int) -> Epoch:
        """The batches of the epoch with this number, from 0 on: an iterable of `steps_per_epoch`; see `batches`."""
        check_count("number", number)
        return Epoch(self, number)

    def __enter__(self) -> ViewLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the stream and frees threads and memory; so even while another thread waits for the next batch.

        In a fork of the loader's process there is nothing to free, and nothing is done.
        """
        if self._reading.forked:
            return
        if (stream := self._stream()) is not None:
            stream.close(CLOSED)  # where a thread waits for its next batch, that fails
        for threads in (self._reading, self._drawing, self._ordering):
            threads.close()
        if not self._closed.done():
            self._closed.set_result(None)
        self._backend.close()

    def _run(self, steps: Iterator[int]) -> Generator[Batch, None, None]:
        reading: deque[Future[_Work]] = deque()
        decoding: deque[_Work] = deque()

        def work_ahead() -> None:
            ahead = 2 * self.prefetch - len(reading) - len(decoding)
            reading.extend(self._read(step) for step in itertools.islice(steps, max(0, ahead)))
            # With something to hand out, nothing is waited for: the caller's time is for training.
            while reading and len(decoding) < self.prefetch and (not decoding or reading[0].done()):
                work = self._wait(reading.popleft())
                self._submit(work)
                decoding.append(work)

        try:
            while True:
                work_ahead()
                if not decoding:
                    return
                views = self._receive(decoding)
                index = np.array([sample.image for sample in decoding.popleft().samples])
                work_ahead()  # once more, so that the backend has a full queue while the caller is busy
                self._warn()
                yield Batch(views, torch.from_numpy(self._labels[index]), torch.from_numpy(index))
        finally:
            if not self._reading.forked:
                for future in reading:
                    future.cancel()
                self._backend.discard()

    def _read(self, step: int) -> Future[_Work]:
        """Starts to read the images of a step; its draws are made as soon as their sizes are known."""
        indices = self._indices(step).tolist()
        size = READ_TOGETHER if self._reading.limit > 1 else len(indices)
        chunks = [
            self._reading.submit(self._samples, indices[first : first + size]) for first in range(0, len(indices), size)
        ]
        return self._drawing.submit(
            lambda: self._drawn(step, [sample for chunk in chunks for sample in chunk.result()])
        )

    def _indices(self, step: int) -> NDArray[np.int64]:
        """(B,) which images of the source this process takes in a step."""
        if not self.shuffle:
            return np.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(self.source)))
        epoch, step = divmod(step, self.steps_per_epoch)
        if step == 0:
            self._ordering.submit(self._order, epoch + 1)  # a second's work for a million images
        first = step * self.global_batch + self.rank * self.batch_size
        return self._order(epoch)[first : first + self.batch_size]

    def _samples(self, indices: list[int]) -> list[Sample]:
        samples, seconds = [], []
        for index in indices:
            began = time.perf_counter()
            samples.append(self._reader.sample(index))
            seconds.append(time.perf_counter() - began)
        # The median: of a few images Pillow has to read the pixels, and for a few others compute in the meantime.
        self._reading.took(sorted(seconds)[len(seconds) // 2])
        return samples

    def _drawn(self, step: int, samples: list[Sample]) -> _Work:
        ordinals = step * self.global_batch + self.rank * self.batch_size + np.arange(len(samples))
        sizes = np.array([(sample.height, sample.width) for sample in samples])
        return _Work(step, samples, draw(self.recipe, ordinals, sizes, seed=self.seed))

    def _submit(self, work: _Work) -> None:
        self._backend.submit([sample.data for sample in work.samples], work.draws)

    def _receive(self, decoding: deque[_Work]) -> tuple[Tensor, ...]:
        """The views of the earliest batch. Images that turn out to be undecodable are replaced, and it is made anew."""
        while True:
            try:
                return self._backend.receive()
            except UndecodableError as error:
                refused = [decoding[0].samples[position] for position in error.positions]
                if any(sample.decoded for sample in refused):  # then it is not the images that something is wrong with
                    raise error.__cause__ or error from None
                for sample in refused:
                    self._wait(self._reading.submit(self._reader.distrust, sample.image))
                decoding[0] = self._wait(self._read(decoding[0].step))
                for work in decoding:
                    self._submit(work)

    def _wait(self, future: Future[T]) -> T:
        """What a thread has made, unless it takes longer than images may take, or the loader is closed meanwhile."""
        either: list[Future[Any]] = [future, self._closed]
        done = wait(either, self.timeout or None, return_when=FIRST_COMPLETED).done
        if future not in done and self._closed in done:
            raise RuntimeError(CLOSED)
        if not done:
            raise DataError(
                f"{self._reader.longest} is still being read after {self.timeout:g} s (timeout=, on the command "
                "line --data.timeout). See whether its disk or network answers, then go on from the last checkpoint: "
                "msbreg pretrain does where the same command is run again."
            )
        return future.result()

    def _warn(self) -> None:
        """Names images found unreadable, from the caller's thread."""
        while self._reader.news:
            warnings.warn(self._reader.news.pop(0), stacklevel=4)


def whole_batches(images: int, batch_size: int, world_size: int = 1, *, of: object) -> int:
    """Global batches that so many images fill.

    Args:
        images: how many there are.
        batch_size: images of each process in a batch.
        world_size: processes.
        of: what to call where the images are.

    Raises:
        DataError: they do not fill one.
    """
    batches = images // (batch_size * world_size)
    if batches == 0:
        each = f" ({batch_size:,} on each of {world_size} processes)" if world_size > 1 else ""
        raise DataError(
            f"a batch of {batch_size * world_size:,} images{each} cannot be filled from the {images:,} of {of}; use a "
            "smaller batch or more images"
        )
    return batches
