"""The formulas of `bench/launch_cost.py` against what Triton's interpreter loads, stores and multiplies."""

import inspect
import runpy
import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import launch_cost  # noqa: E402
import triton.language as tl  # noqa: E402

from msbreg import kernels, ops  # noqa: E402
from msbreg.kernels.gram import gram, unit_gram  # noqa: E402
from msbreg.kernels.halves import split  # noqa: E402
from msbreg.kernels.inverse_root import inverse_root  # noqa: E402
from msbreg.kernels.philox import brownian_directions  # noqa: E402
from msbreg.kernels.pixels import pixelwise  # noqa: E402
from msbreg.kernels.product import product, unit_product  # noqa: E402
from msbreg.kernels.rows import row_losses  # noqa: E402

interprets = pytest.mark.skipif(not kernels.INTERPRETED, reason="only Triton's interpreter tells what a kernel loads")
pytestmark = pytest.mark.interpreter


class Counted:
    """What one launch did, as `launch_cost.Cost` has it."""

    def __init__(self, kernel: str, arguments: dict) -> None:
        self.kernel, self.arguments = kernel, arguments
        self.loaded = self.stored = self.flops = self.half_flops = 0
        self.touched: dict[int, int] = {}
        """Bytes at each address that was loaded or stored."""

    @property
    def cost(self) -> launch_cost.Cost:
        return launch_cost.Cost(self.loaded, self.stored, sum(self.touched.values()), self.flops, self.half_flops)

    def access(self, pointers, mask) -> int:
        """Notes an access; the bytes that it moves."""
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        self.touched.update(dict.fromkeys(places.tolist(), itemsize))
        return places.size * itemsize


@pytest.fixture
def launches(monkeypatch) -> list[Counted]:
    """What every launch in the test does."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    made: list[Counted] = []
    launch, load = GridExecutor.__call__, InterpreterBuilder.create_masked_load
    store, dot = InterpreterBuilder.create_masked_store, InterpreterBuilder.create_dot

    def launching(self, *arguments, **rest):
        names = inspect.getfullargspec(self.fn).args
        bound = dict(zip(names, arguments, strict=False)) | {name: rest[name] for name in rest if name in names}
        made.append(Counted(self.fn.__name__, bound))
        return launch(self, *arguments, **rest)

    def loading(self, pointers, mask, *rest):
        made[-1].loaded += made[-1].access(pointers, mask)
        return load(self, pointers, mask, *rest)

    def storing(self, pointers, value, mask, *rest):
        made[-1].stored += made[-1].access(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def multiplying(self, a, b, *rest):
        flops = 2 * a.data.size * b.data.shape[-1]
        if a.data.dtype == np.float16:
            made[-1].half_flops += flops
        else:
            made[-1].flops += flops
        return dot(self, a, b, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", launching)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", storing)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", multiplying)
    return made


def agree(launches: list[Counted], *names: str) -> None:
    assert [launch.kernel.removesuffix("_kernel") for launch in launches] == list(names)
    for launch in launches:
        assert launch_cost.of(launch.kernel, launch.arguments) == launch.cost, launch.kernel


@interprets
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"leave_one_out": True}),
        (torch.bfloat16, {"leave_one_out": True, "per_view": True, "each": True}),
        (torch.float64, {"per_view": True}),
    ],
    ids=str,
)
def test_the_losses(launches, dtype, options):
    options = {"leave_one_out": False, "per_view": False, "each": False} | options
    z, t = (torch.randn(3, 5, 18, dtype=dtype) for _ in range(2))
    z.requires_grad_()
    key = torch.tensor(4)
    options |= {"spectrum": "whitening", "smoothing": 0.0, "group": None}
    total, _, each = ops.losses(z, t, key, key, first_image=0, weights=(1.0, 0.1, 0.5), **options)
    (total + each.sum() if options["each"] else total).backward()
    forward = "rows_forward", "unit_gram", "spectral_sums", "split", "totals"
    agree(launches, *forward, "unit_product", "image_gradient")


@interprets
@pytest.mark.parametrize("views", [1, 20])
def test_rows_whose_views_are_read_a_tile_at_a_time(launches, views):
    z = torch.randn(views, 1, 1000)
    row_losses(z, None, (torch.tensor(1), torch.tensor(2)), per_view=True)
    row_losses(z, z)
    agree(launches, "rows_forward", "rows_forward")


@interprets
@pytest.mark.parametrize("shape", [(2, 40, 70), (1, 75, 70), (1, 75, 90), (1, 20, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices_and_products_of_several_tiles(launches, shape, dtype):
    z = torch.randn(shape, dtype=dtype)
    for smaller in (True, False):
        product(z, gram(z, smaller=smaller))
    z_hat, dim = row_losses(z, want_z_hat=True).z_hat, shape[2]
    for smaller in (True, False):
        g, _ = unit_gram(z_hat, dim, smaller=smaller)
        unit_product(z_hat, split(g, 1.0), dim, left=g.shape[-1] != dim)
    unit = "unit_gram", "split", "unit_product"
    agree(launches, "gram", "product", "gram", "product", "rows_forward", *unit, *unit)


@interprets
@pytest.mark.parametrize("weights", [None, (0.5, -2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [16, 40])
def test_steps_of_the_inverse_root(launches, side, dtype, weights):
    gram = torch.eye(side, dtype=dtype).expand(2, side, side).contiguous()
    squares = torch.full((2, 3), side / 3, dtype=torch.float64)
    for at_once in (False, True):
        inverse_root(gram, squares, 0.01, 0.0, [(1.5, -0.5)] * 4, weights=weights, at_once=at_once)
    agree(launches, "first_factors", *["step"] * 6, "last_step", "root")


@interprets
@pytest.mark.parametrize("views", [None, 3])
def test_directions(launches, views):
    brownian_directions(9, 130, seed=torch.tensor(1), step=torch.tensor(2), views=views)
    agree(launches, "brownian_directions")


@interprets
def test_views(launches):
    crops, drawn = torch.zeros(3, 40, 33, 3, dtype=torch.uint8), torch.zeros(3, 14)
    views = torch.empty(crops.shape, dtype=torch.bfloat16)
    colour = drawn[:, :12].unflatten(1, (3, 4))
    pixelwise(crops, colour, drawn[:, 12], drawn[:, 13], views, scale=(1.0,) * 3, shift=(0.0,) * 3)
    agree(launches, "pixelwise")


@triton.jit
def twice(x, y, count, BLOCK: tl.constexpr):
    """Loads [count] twice, of which the second time is not needed, and stores it."""
    place = tl.arange(0, BLOCK)
    row = tl.load(x + place, mask=place < count) + tl.load(x + place, mask=place < count)
    tl.store(y + place, row, mask=place < count)


@interprets
def test_what_is_loaded_twice_counts_twice_and_what_is_masked_not_at_all(launches):
    twice[(1,)](torch.zeros(11), torch.zeros(11, dtype=torch.float64), 11, BLOCK=16)
    assert launches[0].cost == launch_cost.Cost(loaded=88, stored=88, minimal=44 + 88, flops=0)


@interprets
def test_a_wrong_formula_is_noticed(launches, monkeypatch):
    gram(torch.randn(1, 10, 70), smaller=False)
    agree(launches, "gram")
    right = launch_cost.FORMULAS["gram_kernel"]
    monkeypatch.setitem(
        launch_cost.FORMULAS, "gram_kernel", lambda **arguments: (right(**arguments)[0] - 4, *right(**arguments)[1:])
    )
    with pytest.raises(AssertionError):
        agree(launches, "gram")


def test_the_time_on_an_h200_is_that_of_launches_and_the_longer_of_copying_and_multiplying():
    assert launch_cost.h200_seconds(2, 0, 0) == pytest.approx(5e-6)
    assert launch_cost.h200_seconds(1, 4_300_000_000, 10) == pytest.approx(1.0025e-3)
    assert launch_cost.h200_seconds(1, 10, 165 * 10**9) == pytest.approx(1.0025e-3)
    assert launch_cost.h200_seconds(1, 10, 67 * 10**9, double=True) == pytest.approx(1.0025e-3)
    assert launch_cost.h200_seconds(1, 10, 0, 989 * 10**9) == pytest.approx(1.0025e-3)


def test_the_formulas_need_neither_torch_nor_triton(monkeypatch):
    for name in ("torch", "triton", "msbreg"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    runpy.run_path(launch_cost.__file__)
