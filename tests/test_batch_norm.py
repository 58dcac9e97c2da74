"""Batch normalisation over processes: what one process can show of it. Several: `test_distributed_losses.py`."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from msbreg.batch_norm import CrossRankBatchNorm, convert_sync_batchnorm
from msbreg.errors import MSBRegError

ON_A_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", ON_A_GPU])
def device(request, tmp_path):
    """Where a group of this process alone can sum."""
    backend = "nccl" if request.param == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield request.param
    dist.destroy_process_group()


def gaussian(*shape, seed=0, mean=0.0, std=1.0):
    return mean + std * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def trained(layer, x, weight):
    """Output, gradients and running statistics of a training step."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(weight)
    return [y.detach(), x.grad, *[p.grad for p in layer.parameters()], layer.running_mean, layer.running_var]


SHAPES = {"linear": (16, 5), "contiguous": (8, 5, 6, 7), "channels_last": (8, 5, 6, 7), "a_volume": (4, 5, 3, 4, 2)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_one_process_it_is_plain_batch_norm(device, shape, affine, dtype):
    x, weight = (gaussian(*SHAPES[shape], seed=seed, mean=2, std=3).to(device, dtype) for seed in (1, 2))
    if shape == "channels_last":
        x, weight = (tensor.to(memory_format=torch.channels_last) for tensor in (x, weight))
    kind = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim()]
    plain = kind(5, affine=affine).to(device, torch.promote_types(dtype, torch.float32))
    if affine:
        nn.init.uniform_(plain.weight, 0.5, 2)
        nn.init.uniform_(plain.bias)
    layer = convert_sync_batchnorm(copy.deepcopy(plain))
    exact = trained(copy.deepcopy(plain).double(), x.double(), weight.double())
    got, expected = trained(layer, x, weight), trained(plain, x, weight)
    # Torch's kernel rounds to halves what it sums over them where channels lie one after another; cuDNN's does not.
    rounds = device == "cuda" and dtype.itemsize == 2 and shape in ("contiguous", "a_volume")
    slack = 4 * torch.finfo(dtype).eps if rounds else 1e-6
    for one, other, true in zip(got, expected, exact, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        error, allowed = ((value.double() - true).norm() for value in (one, other))
        assert error <= 2 * allowed + slack * true.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mean_of_a_thousand_deviations_leaves_the_variance(device, dtype):
    """Sums of squares in float32, less the squared mean, would have no digit of it left."""
    x = gaussian(64, 3, 4, 4, mean=1e3).to(device, dtype)
    layer = CrossRankBatchNorm(3, momentum=1.0).to(device, dtype)
    layer(x)
    torch.testing.assert_close(layer.running_var, x.double().var((0, 2, 3)).to(dtype), rtol=1e-4, atol=0)
    cancelled = x.float().square().mean((0, 2, 3)) - x.float().mean((0, 2, 3)).square()
    assert (cancelled - layer.running_var).abs().max() > 1e-2


def test_constant_channels_stay_finite(device):
    results = trained(
        CrossRankBatchNorm(3).to(device), torch.full((4, 3), 7.0, device=device), torch.ones(4, 3).to(device)
    )
    assert all(result.isfinite().all() for result in results) and results[0].abs().max() == 0


def test_the_variance_of_large_constant_channels_is_not_below_zero(device):
    """Which the rounding of their squares would leave of it."""
    x = (1e8 * gaussian(64)).to(device, torch.float32).expand(1001, 64)
    layer = CrossRankBatchNorm(64, momentum=1.0).to(device)
    assert layer(x).isfinite().all() and layer.running_var.min() >= 0


@pytest.mark.parametrize("device", [ON_A_GPU], indirect=True)
def test_the_host_does_not_wait_and_a_graph_can_be_recorded(device):
    layer, x = CrossRankBatchNorm(5).to(device), torch.randn(16, 5, 3, 3, device=device, requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            layer(x).square().sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, x.grad = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        y = layer(x)
        y.square().sum().backward()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, layer.weight, layer.bias, training=True))


def test_conversion_keeps_tensors_and_modes():
    model = nn.Sequential(nn.BatchNorm1d(4, eps=1e-3, momentum=0.2), nn.Sequential(nn.BatchNorm2d(3, affine=False)))
    model[1].eval()
    converted = convert_sync_batchnorm(model)
    assert converted is model and type(model[0]) is type(model[1][0]) is CrossRankBatchNorm
    assert (model[0].eps, model[0].momentum, model[0].training, model[1][0].training) == (1e-3, 0.2, True, False)
    assert model[1][0].weight is None and not model[1][0].affine
    single = nn.BatchNorm1d(4)
    assert convert_sync_batchnorm(single).weight is single.weight
    assert "eps=0.001" in repr(model)


def test_without_processes_it_is_plain_batch_norm():
    plain = nn.BatchNorm2d(3)
    twin = convert_sync_batchnorm(nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(twin(x), plain(x)) and torch.equal(twin.running_var, plain.running_var)
    with pytest.raises(ValueError, match=r"\(N, 3, ...\), got shape \(4, 2\)"):
        twin(torch.ones(4, 2))


def test_layers_that_do_more_than_normalise_are_refused():
    class BatchNormAndMore(nn.BatchNorm2d):
        pass

    with pytest.raises(MSBRegError, match=r"layer .1.*BatchNormAndMore"):
        convert_sync_batchnorm(nn.Sequential(nn.ReLU(), BatchNormAndMore(3)))


def test_a_layer_under_two_names_stays_one():
    model = nn.Module()
    model.a = nn.BatchNorm1d(3)
    model.b = model.a
    convert_sync_batchnorm(model)
    assert type(model.a) is CrossRankBatchNorm and model.b is model.a


def test_one_row_leaves_the_running_variance_finite(device):
    layer = CrossRankBatchNorm(3).to(device)
    layer(torch.ones(1, 3, device=device))
    assert layer.running_var.isfinite().all()


def test_timms_normalisation_with_an_activation_keeps_it(device):
    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4, act_layer=nn.SiLU)).to(device)
    twin = convert_sync_batchnorm(copy.deepcopy(model))
    assert isinstance(twin[1], CrossRankBatchNorm) and twin.state_dict().keys() == model.state_dict().keys()
    x = torch.randn(8, 3, 6, 6, device=device)
    for training in (True, False):
        torch.testing.assert_close(twin.train(training)(x), model.train(training)(x))
        torch.testing.assert_close(twin.state_dict(), model.state_dict())
    assert (twin(x) < 0).any() and twin(x).min() > -0.3  # as SiLU leaves it


@pytest.mark.parametrize("affine", [True, False])
def test_compiled_it_has_the_same_gradients(device, affine):
    torch._dynamo.reset()
    x = torch.randn(16, 5, 3, 3, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    weight = torch.linspace(-1, 2, x.numel(), device=device).view_as(x)
    layer = CrossRankBatchNorm(5, affine=affine).to(device)
    inputs = (x, *layer.parameters())
    backend = "inductor" if device == "cuda" else "aot_eager"
    compiled, eager = (
        torch.autograd.grad((run(x) * weight).sum(), inputs) for run in (torch.compile(layer, backend=backend), layer)
    )
    assert all(torch.allclose(a, b, atol=1e-4) and b.abs().max() > 1e-3 for a, b in zip(compiled, eager, strict=True))
