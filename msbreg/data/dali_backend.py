"""Decoding and augmentation by NVIDIA DALI, on the CPU or on a GPU, from one graph.

DALI has no part in reading, order or randomness: it is handed encoded images and the draws of `msbreg.data.draws`,
and is a pure function of them. Each image is decoded once and cropped once per view. On a GPU it makes no more than
crops and blurs them; the rest is one kernel of ours.

https://docs.nvidia.com/deeplearning/dali
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msbreg.data.blur import gaussian_window
from msbreg.data.draws import Draw
from msbreg.data.images import UndecodableError
from msbreg.data.pixels import joined_views, packed
from msbreg.data.recipes import MEAN, STD, Recipe, View, size_groups

if TYPE_CHECKING:
    from nvidia.dali import Pipeline, types
    from nvidia.dali.data_node import DataNode

__all__ = ["DaliBackend"]

Bytes = NDArray[np.uint8]

_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()
"""All that have not been freed."""


def _leave_to_the_parent() -> None:
    """Lets a forked process never free its parent's pipelines: that waits for their threads, of which it has none.

    torch's DataLoader forks its workers, whose garbage collector would otherwise come across what the parent left open,
    and DALI itself frees at exit whatever there is.
    """
    for pipeline in _pipelines:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(pipeline._pipe))
        pipeline._pipe = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)


class DaliBackend:
    """Makes views of batches of encoded images; several batches may be under way, first in, first out.

    Args:
        recipe: K views.
        batch_size: most images of a batch, B.
        device: where images are decoded (on a GPU: by nvJPEG) and views lie.
        threads: CPU threads.
        dtype: of the views.

    Raises:
        ImportError: DALI is not installed.
    """

    def __init__(self, recipe: Recipe, batch_size: int, device: torch.device, threads: int, dtype: torch.dtype) -> None:
        import nvidia.dali  # noqa: F401 - a missing DALI is to be noticed here, not at the first batch

        self.recipe, self.batch_size, self.threads = recipe, batch_size, threads
        self.device, self.dtype = device, dtype
        self._ends_with_crops = device.type == "cuda"
        """Whether DALI hands out bytes, and `pixelwise` does the rest."""
        self._groups = size_groups(recipe)
        self._pipeline: Any = None
        self._pending: deque[tuple[list[Bytes], Tensor | None]] = deque()

    def submit(self, encoded: list[Bytes], draws: list[Draw]) -> None:
        """Starts work on a batch.

        Args:
            encoded: B files, each (bytes,) uint8.
            draws: one per view, each of B.
        """
        if self._pipeline is None:
            self._pipeline = views_pipeline(
                self.recipe, self.batch_size, self.device, self.threads, ends_with_crops=self._ends_with_crops
            )
            # DALI reads from the arrays without a copy, so they must live as long as a pipeline that may be at work.
            self._pipeline.encoded = self._pending = deque()
        drawn = None
        if self._ends_with_crops:
            # Not through DALI, whose copy to a GPU goes by way of a buffer that the next batch's may overwrite.
            drawn = torch.from_numpy(packed(draws))
            drawn = drawn.pin_memory() if self.device.type == "cuda" else drawn
        self._pending.append((encoded, drawn))
        self._pipeline.feed_input("encoded", encoded)
        for number, (view, draw) in enumerate(zip(self.recipe, draws, strict=True)):
            for name, values in _crop_inputs(view, draw, self.device).items():
                self._pipeline.feed_input(f"{name}{number}", values)
            if not self._ends_with_crops:
                for name, values in _finish_inputs(view, draw).items():
                    self._pipeline.feed_input(f"{name}{number}", values)
        self._pipeline.schedule_run()

    def receive(self) -> tuple[Tensor, ...]:
        """Waits for the earliest batch.

        Returns:
            One channels_last tensor (K_g B, 3, H_g, W_g) per view size, view by view.

        Raises:
            UndecodableError: images of the batch cannot be decoded. All batches under way are forgotten.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        encoded, drawn = self._pending[0]
        try:
            outputs = self._pipeline.share_outputs(cuda_stream=stream)
        except RuntimeError as error:
            self.discard()
            positions = [position for position, data in enumerate(encoded) if not self._can_decode(data)]
            if not positions:
                raise
            raise UndecodableError(positions) from error
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]  # each (B, H, W, 3)
        self._pipeline.release_outputs()
        self._pending.popleft()
        if drawn is not None:
            numbers = drawn.to(self.device, non_blocking=True).unbind(1)  # K of (B, 16)
            return tuple(
                joined_views([views[number] for number in group], [numbers[number] for number in group], self.dtype)
                for group in self._groups
            )
        return tuple(_joined([views[number] for number in group]).to(self.dtype) for group in self._groups)

    def discard(self) -> None:
        """Forgets all batches under way."""
        if self._pending:
            self.close()

    def close(self) -> None:
        """Frees DALI's threads and memory; the next batch builds them anew, which takes some 20 ms."""
        self._pipeline, self._pending = None, deque()

    def _can_decode(self, data: Bytes) -> bool:
        pipeline = _pipeline(1, self.device, threads=1)
        with pipeline:
            pipeline.set_outputs(_decode(self.device))
        pipeline.build()
        pipeline.feed_input("encoded", [data])
        try:
            pipeline.run()
        except RuntimeError:
            return False
        return True


def views_pipeline(
    recipe: Recipe, batch_size: int, device: torch.device, threads: int, *, ends_with_crops: bool
) -> Pipeline:
    """The graph: decode, then per view crop, resize and blur; then colours, solarize, flip and normalise.

    One that ends with crops hands out bytes.
    """
    pipeline = _pipeline(batch_size, device, threads)
    with pipeline:
        images = _decode(device)
        views = [_crop(view, number, images, device) for number, view in enumerate(recipe)]
        if not ends_with_crops:
            views = [_finish(view, number, x) for number, (view, x) in enumerate(zip(recipe, views, strict=True))]
        pipeline.set_outputs(*views)
    return pipeline


def _pipeline(batch_size: int, device: torch.device, threads: int) -> Pipeline:
    from nvidia.dali import Pipeline

    index = None
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
    # Depth 1: a first run would otherwise expect that many batches at once. Runs scheduled ahead queue up all the same.
    pipeline = Pipeline(batch_size=batch_size, num_threads=threads, device_id=index, prefetch_queue_depth=1)
    _pipelines.add(pipeline)
    return pipeline


def _decode(device: torch.device) -> DataNode:
    """RGB images, (H, W, 3) uint8 each. They stand upright as they are, see `probe`: no two parsers of EXIF agree."""
    from nvidia.dali import fn, types

    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    return fn.decoders.image(
        encoded,
        device="mixed" if device.type == "cuda" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # chroma on a GPU as on the CPU
    )


def _crop_inputs(view: View, draw: Draw, device: torch.device) -> dict[str, np.ndarray | list[np.ndarray]]:
    """The arguments of a crop's operators, by name; `_crop` declares the same ones."""
    box = draw.box.astype(np.float32)
    inputs: dict[str, np.ndarray | list[np.ndarray]] = {
        "start": np.ascontiguousarray(box[:, :2]),
        "end": box[:, :2] + box[:, 2:],
    }
    if view.blur > 0 and device.type == "cuda":
        inputs["sigma"], inputs["window"] = draw.sigma, 2 * draw.radius + 1
    elif view.blur > 0:
        windows = map(gaussian_window, draw.sigma.tolist(), draw.radius.tolist())
        inputs["blur"] = [window[None] for window in windows]  # each (1, 2 radius + 1)
    return inputs


def _finish_inputs(view: View, draw: Draw) -> dict[str, np.ndarray]:
    """The arguments of `_finish`, likewise."""
    inputs: dict[str, np.ndarray] = {"flip": draw.flip.astype(np.int32)}
    if view.changes_colour:
        inputs["colour"] = draw.colour
    if view.solarize > 0:
        inputs["solarize"] = 255 * draw.solarize.astype(np.uint8)
    return inputs


def _argument(name: str, number: int, dtype: types.DALIDataType, ndim: int) -> DataNode:
    """What is fed for the view of that number."""
    from nvidia.dali import fn

    return fn.external_source(name=f"{name}{number}", dtype=dtype, ndim=ndim)


def _crop(view: View, number: int, images: DataNode, device: torch.device) -> DataNode:
    """The crop of each image that a view shows, blurred: (size, size, 3), bytes."""
    from nvidia.dali import fn, types

    x: Any = fn.resize(
        images,
        size=[view.size, view.size],
        roi_start=_argument("start", number, types.FLOAT, 1),
        roi_end=_argument("end", number, types.FLOAT, 1),
        interp_type=types.INTERP_CUBIC if view.interpolation == "cubic" else types.INTERP_LINEAR,
        antialias=True,
    )
    # A window of one pixel leaves the others as they are.
    if view.blur > 0 and device.type == "cuda":
        sigma, window = _argument("sigma", number, types.FLOAT, 0), _argument("window", number, types.INT32, 0)
        x = fn.gaussian_blur(x, sigma=sigma, window_size=window)
    elif view.blur > 0:  # on a CPU `fn.filter` is OpenCV's, six times as fast as `fn.gaussian_blur`
        row = _argument("blur", number, types.FLOAT, 2)
        x = fn.filter(fn.filter(x, row), fn.transpose(row, perm=[1, 0]))
    return x


def _finish(view: View, number: int, x: Any) -> DataNode:
    """What `pixelwise` does, by DALI's operators on a CPU: (size, size, 3), float32."""
    from nvidia.dali import fn, types

    if view.changes_colour:
        x = fn.coord_transform(x, MT=_argument("colour", number, types.FLOAT, 2), dtype=types.UINT8)
    if view.solarize > 0:
        # 255 ^ x = 255 - x
        x = x ^ (fn.cast(x >= 128, dtype=types.UINT8) * _argument("solarize", number, types.UINT8, 0))
    return fn.crop_mirror_normalize(
        x,
        mirror=_argument("flip", number, types.INT32, 0),
        mean=[255 * value for value in MEAN],
        std=[255 * value for value in STD],
        dtype=types.FLOAT,
        output_layout="HWC",  # which is channels_last once its axes are named NCHW
    )


def _joined(views: list[Tensor]) -> Tensor:
    """(B, H, W, 3) each to one (K B, 3, H, W) in channels_last."""
    return (torch.cat(views) if len(views) > 1 else views[0]).permute(0, 3, 1, 2)
