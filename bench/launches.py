"""The launches of kernels that a call makes, recorded: none of them takes place, and no GPU is needed.

`compile_report.py` compiles them ahead of time, and `row_instructions.py` counts instructions in two of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from msbreg.functional import LAMBDA_B, LAMBDA_S, SMOOTHING

__all__ = ["CASES", "QUICK", "Case", "Launch", "calls", "recorded", "specialised"]

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Case(NamedTuple):
    """A call: forward and backward of the losses of embeddings (K, B, D), or the noise alone, or views of images."""

    views: int
    batch: int
    dim: int
    dtype: torch.dtype
    options: tuple[str, ...] = ()
    """Of `leave_one_out`, `per_view`, `each` (the centroid loss of each row), and `whitening` or `rows` (no singular
    value loss); or one alone of `directions`, `root` (the inverse root of K matrices (D, D) in one launch), `matrix`
    (the Gram matrices of any matrices, and a product with them), and `pixels` (K views of B images, of D x D
    pixels)."""

    def __str__(self) -> str:
        return " ".join([f"{self.views}x{self.batch}x{self.dim}", TYPES[self.dtype], *self.options])


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES = (
    Case(8, 512, 256, BF16),
    Case(8, 512, 256, BF16, ("leave_one_out",)),
    Case(8, 512, 256, BF16, ("per_view",)),
    Case(8, 512, 256, BF16, ("each",)),
    Case(8, 512, 256, BF16, ("whitening",)),
    Case(8, 512, 256, FP32),
    Case(8, 512, 256, FP32, ("directions",)),
    Case(8, 512, 256, FP32, ("root",)),
    Case(8, 512, 256, FP32, ("matrix",)),
    Case(8, 512, 256, FP16),
    Case(2, 256, 256, BF16),
    Case(4, 256, 128, BF16),
    Case(4, 512, 2048, BF16),
    Case(4, 512, 2048, BF16, ("leave_one_out", "per_view")),
    Case(4, 512, 2048, BF16, ("directions",)),
    Case(4, 512, 2048, FP32),
    Case(4, 512, 2048, FP32, ("matrix",)),
    Case(2, 100, 130, FP32, ("root",)),
    Case(8, 80, 40, FP32, ("root",)),
    Case(4, 1024, 512, FP32, ("root",)),
    Case(2, 1500, 2048, BF16),
    Case(2, 4096, 1030, BF16),
    Case(2, 64, 64, FP64, ("root",)),
    Case(2, 256, 8192, BF16),
    Case(2, 256, 8192, FP32),
    Case(8, 4096, 512, BF16),
    Case(8, 4096, 512, FP32),
    Case(8, 4096, 2048, BF16),
    Case(2, 100, 130, BF16),
    Case(2, 64, 64, FP64),
    Case(4, 256, 224, BF16, ("pixels",)),
    Case(4, 512, 32, FP16, ("pixels",)),
)
QUICK = (
    Case(8, 512, 256, BF16),
    Case(8, 512, 256, FP32, ("root",)),
    Case(4, 512, 2048, FP32),
    Case(8, 512, 256, BF16, ("whitening",)),
    Case(8, 512, 256, BF16, ("matrix",)),
    Case(8, 512, 256, FP32, ("directions",)),
    Case(4, 256, 224, BF16, ("pixels",)),
)
PROCESSORS = 132
"""Of an H100 and an H200: programs that run at the same time."""


class Launch(NamedTuple):
    """A launch of a kernel: what was passed, by name, and how."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


def recorded(call: Callable[[], object]) -> list[Launch]:
    """The launches that a call makes. None of them takes place, so that its results are not numbers."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: tuple[int, ...], warmup: bool, **rest: Any) -> None:
        names = kernel.arg_names
        bound = dict(zip(names, arguments, strict=False)) | {name: rest[name] for name in rest if name in names}
        launches.append(Launch(kernel, grid, bound, {name: rest[name] for name in rest if name not in names}))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return launches


def calls(case: Case) -> dict[str, list[Launch]]:
    """The launches of the forward and the backward pass of a case."""
    from msbreg import ops
    from msbreg.kernels import gram, inverse_root, pixels, product
    from msbreg.kernels.philox import brownian_directions

    if "pixels" in case.options:
        crops = torch.empty(case.views, case.batch, case.dim, case.dim, 3, dtype=torch.uint8)
        drawn, views = torch.empty(case.views, case.batch, 16), torch.empty(crops.shape, dtype=case.dtype)
        colour, normal = drawn[:, :, :12].unflatten(2, (3, 4)), {"scale": (0.02,) * 3, "shift": (-2.0,) * 3}
        parts = list(zip(crops, colour, drawn[:, :, 12], drawn[:, :, 13], views, strict=True))
        return {"pixels": recorded(lambda: [pixels.pixelwise(*part, **normal) for part in parts])}
    shape = (case.views, case.batch, case.dim)
    z = torch.empty(shape, dtype=case.dtype, requires_grad=True)
    t = torch.empty(shape, dtype=case.dtype)
    seed, step = torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    if "directions" in case.options:
        options = {"seed": seed, "step": step, "dtype": case.dtype}
        return {"directions": recorded(lambda: brownian_directions(case.batch, case.dim, **options))}
    square = torch.empty(case.views, case.dim, case.dim, dtype=case.dtype)
    if "root" in case.options:
        # As many tiles as the triangle of the Gram matrix has add up to |G|².
        squares, plan = torch.empty(case.views, 10, dtype=torch.float64), (0.1, 0.0, ((1.5, -0.5),) * 11)
        with mock.patch.object(inverse_root, "processors", return_value=PROCESSORS):
            call = lambda: inverse_root.inverse_root(square, squares, *plan, weights=(0.5, -1.0), at_once=True)  # noqa: E731
            return {"root": recorded(call)}
    if "matrix" in case.options:
        call = lambda: (gram.gram(z, smaller=True), product.product(z, square))  # noqa: E731
        return {"matrix": recorded(call)}
    options = {name: name in case.options for name in ("leave_one_out", "per_view", "each")}
    spectrum = None if "rows" in case.options else "whitening" if "whitening" in case.options else "nuclear"
    results: list[Tensor] = []

    def forward() -> None:
        total, _, each = ops.losses(
            z, t, seed, step, first_image=0, weights=(1.0, LAMBDA_S, LAMBDA_B), group=None, smoothing=SMOOTHING,
            spectrum=spectrum, **options,
        )  # fmt: skip
        results[:] = [each if options["each"] else total]

    def backward() -> None:
        results[0].backward(torch.empty_like(results[0]))

    return {"forward": recorded(forward), "backward": recorded(backward)}


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Signature, constants and attributes, as Triton's launcher makes them of the arguments."""
    signature, constants, attributes = {}, {}, {}
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        specialise = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialise and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name], aligned = "*" + TYPES[value.dtype], value.data_ptr() % 16 == 0
        else:
            integer = "i32" if -(2**31) <= value < 2**31 else "i64"
            signature[name] = parameter.annotation_type or ("fp32" if isinstance(value, float) else integer)
            aligned = specialise and value % 16 == 0
        if aligned:
            attributes[parameter.num,] = [["tt.divisibility", 16]]
    return signature, constants, attributes
