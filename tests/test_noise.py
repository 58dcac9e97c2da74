import math

import numpy as np
import pytest
import torch

from msbreg.noise import brownian_directions, integer_on


def directions(batch=6, dim=10, **changes):
    return brownian_directions(batch, dim, **{"seed": 3, "step": 7, **changes})


def test_follows_the_counter_table():
    """Image 2**31 + 1, step 5, view 2: dimension d is normal d % 4 of counter (d // 4, image, step, 1 + view)."""
    from test_philox import numpy_philox4x32_10

    dim, image, step, view, seed = 11, 2**31 + 1, 5, 2, 2**40 + 3
    expected = []
    for quad in range(3):
        words = numpy_philox4x32_10([quad, image, step, 1 + view], [seed & 0xFFFFFFFF, seed >> 32])
        u = ((words >> np.uint64(9)) + 0.5) * 2.0**-23
        for radius, angle in ((u[0], u[1]), (u[2], u[3])):
            expected += [math.sqrt(-2 * math.log(radius)) * f(2 * math.pi * angle) for f in (math.cos, math.sin)]
    expected = np.array(expected[:dim]) / np.linalg.norm(expected[:dim])
    got = brownian_directions(3, dim, seed=seed, step=step, first_image=image - 1, views=3)
    assert np.abs(got[view, 1].double().numpy() - expected).max() < 2e-6


def test_rows_are_unit_and_float32():
    n = directions(50, 33)
    assert n.shape == (50, 33) and n.dtype == torch.float32
    assert (n.double().norm(dim=-1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("views", [None, 3])
def test_same_rows_for_any_split(views):
    whole = directions(64, 33, views=views)
    parts = [directions(n, 33, first_image=i, views=views) for i, n in ((0, 1), (1, 40), (41, 23))]
    assert torch.equal(whole, torch.cat(parts, dim=-2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_same_values_in_any_dtype(dtype):
    assert torch.equal(directions(dtype=dtype), directions().to(dtype))


def test_tensors_for_integers():
    tensors = {name: torch.tensor(value) for name, value in (("seed", 3), ("step", 7))}
    assert torch.equal(directions(first_image=4, **tensors), directions(first_image=4))


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"seed": 3 + 2**32}, {"step": 8}, {"step": 0}, {"first_image": 6}, {"views": 1}]
)
def test_every_part_of_the_counter_matters(change):
    other = directions(**change).reshape(6, 10)
    assert (directions() - other).abs().max(dim=-1).values.min() > 0.01


def test_views_are_independent_streams():
    n = directions(400, 16, views=4)
    products = torch.einsum("kid,lid->kl", n, n) / 400
    assert (products - torch.eye(4)).abs().max() < 5 / math.sqrt(400 * 16)


def test_directions_cover_the_sphere_evenly():
    n = directions(20000, 6).double()
    assert n.mean(0).abs().max() < 5 / math.sqrt(20000 * 6)
    covariance = n.T @ n / 20000
    assert (covariance - torch.eye(6, dtype=torch.float64) / 6).abs().max() < 0.01
    # On the sphere in six dimensions E[x⁴] = 3 / (6 · 8).
    assert abs(n.pow(4).mean().item() - 3 / 48) < 1e-3


def test_one_dimension_is_a_sign():
    assert set(directions(64, 1).flatten().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": 0}, ValueError, "at least 1"),
        ({"dim": 0}, ValueError, "at least 1"),
        ({"views": 0}, ValueError, "at least 1"),
        ({"dtype": torch.int32}, TypeError, "floating-point dtype, got torch.int32"),
        ({"step": 1.5}, TypeError, "expected step to be an int"),
        ({"step": 2**63}, ValueError, "64 bits"),
        ({"seed": torch.tensor([1])}, TypeError, "zero-dimensional int64"),
        ({"first_image": 2**63}, ValueError, "expected first_image to be an int of 64 bits"),
        ({"first_image": torch.tensor(1)}, TypeError, "first_image to be an int, got .*Tensor"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        directions(**arguments)


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False)])
def test_a_cpu_alone_waits_for_a_seed_from_another_device(device, waits):
    """It would read what has not come yet; a GPU's copies come in their turn."""
    asked = []

    class Elsewhere(torch.Tensor):
        def to(self, device, *, non_blocking):
            asked.append((device.type, not non_blocking))
            return self

    integer_on(torch.device(device), torch.tensor(3).as_subclass(Elsewhere))
    assert asked == [(device, waits)]
