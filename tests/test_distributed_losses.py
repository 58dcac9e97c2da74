"""Real gloo processes: what they compute together is what one process computes on the joined batch."""

import copy
import multiprocessing
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from msbreg import BrownianLoss, MMCRLoss, MSBRegLoss, SingularValueLoss, functional, plain
from msbreg.batch_norm import convert_sync_batchnorm
from msbreg.distributed import all_reduce_sum, rank, world_size
from msbreg.functional import nuclear_norm

VIEWS, ROWS, FEATURES = 3, 16, 5  # rows of all processes together
CASES = {
    "eigh": {"solver": "eigh", "dim": 6},
    "newton_schulz": {"solver": "newton_schulz", "dim": 6},
    "wide": {"solver": "newton_schulz", "dim": 24},  # fewer rows than dimensions, even together
    "wide_eigh": {"solver": "eigh", "dim": 24},
    "whitening": {"spectrum": "whitening", "dim": 6},
    "coding_rate": {"spectrum": "coding_rate", "dim": 24},
    "leave_one_out": {"leave_one_out": True, "per": "view", "dim": 6},
}
NORMS = {"nuclear norm": 6, "nuclear norm wide": 24}


def gaussian(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mine(x, group, axis):
    """The part of x that this process holds."""
    return x.chunk(world_size(group), dim=axis)[rank(group)]


def spread(model, group):
    return model if group is None else nn.parallel.DistributedDataParallel(model, process_group=group)


def loss_and_gradient(group, loss_group, *, dim, **options):
    """One forward and backward pass through a linear layer; gradients averaged by DistributedDataParallel."""
    model = nn.Linear(FEATURES, dim, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(gaussian(dim, FEATURES, seed=1))
        model.bias.copy_(gaussian(dim, seed=2))
    criterion = MSBRegLoss(lambda_s=0.3, **options, seed=5, group=loss_group)
    criterion.step.fill_(4)
    x = mine(gaussian(VIEWS, ROWS, FEATURES, seed=3), group, 1)
    ddp = spread(model, group)
    out = criterion(ddp(x), mine(gaussian(VIEWS, ROWS, dim, seed=4), group, 1))
    out.loss.backward()
    return {"values": torch.stack(out).detach(), "weight": model.weight.grad, "bias": model.bias.grad}


def nuclear_norm_and_gradient(group, dim):
    m = mine(gaussian(VIEWS, ROWS, dim, seed=6), group, 1).clone().requires_grad_()
    values = nuclear_norm(m, smoothing=0.1, group=group)
    (gradient,) = torch.autograd.grad((values * torch.arange(1, VIEWS + 1)).sum(), m)
    return {"values": values.detach(), "gradient": gradient}


def network(convolutional, dtype=torch.float64):
    torch.manual_seed(0)
    if convolutional:
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False)).to(
            dtype
        )
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), nn.ReLU(), nn.Linear(4, 3)).to(dtype)


def batch_norm(group, convolutional, convert=convert_sync_batchnorm):
    """Two training steps and one evaluation of a network with batch normalisation."""
    model = network(convolutional)
    if group is not None:
        model = convert(model, group)
    ddp = spread(model, group)
    shape = (ROWS, 2, 5, 5) if convolutional else (ROWS, 6)
    for step in range(2):
        model.zero_grad()
        x = (mine(gaussian(*shape, seed=step) + 3, group, 0)).requires_grad_()
        y = ddp(x)
        (y * mine(gaussian(*y.shape[:0], ROWS, *y.shape[1:], seed=9), group, 0)).flatten(1).sum(1).mean().backward()
    results = {"output": y.detach(), "input_gradient": x.grad, "evaluated": model.eval()(x).detach()}
    results |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    results |= {name: buffer.clone() for name, buffer in model.named_buffers()}
    return results


def without_scale(z_hat, options):
    """The broken twin: the gradient that autograd through a plain all_reduce would give."""
    value, weight = SPECTRAL_LOSS(z_hat, options)
    return value, weight / world_size(options.group)


SPECTRAL_LOSS = plain._spectral_loss


def everything(group):
    results = {name: loss_and_gradient(group, group, **options) for name, options in CASES.items()}
    results["local spectrum"] = loss_and_gradient(group, None, **CASES["eigh"])
    for name, dim in NORMS.items():
        results[name] = nuclear_norm_and_gradient(group, dim)
    results["batch norm 1d"] = batch_norm(group, convolutional=False)
    results["batch norm 2d"] = batch_norm(group, convolutional=True)
    if group is not None:
        with mock.patch.object(plain, "_spectral_loss", without_scale):
            results["twin without scale"] = loss_and_gradient(group, group, **CASES["eigh"])
        results["twin without synchronisation"] = batch_norm(group, convolutional=True, convert=lambda model, _: model)
        results["sum"] = all_reduce_sum(torch.tensor([1.0, rank(group)]), group)
        results["warned"] = {name: warned(call) for name, call in modules(group).items()}
    return results


def modules(group):
    """Calls of modules, and of some that see their own rows alone."""
    z = gaussian(2, 8, 4, seed=0)
    return {
        "alone": lambda: SingularValueLoss()(z),
        "alone, all losses": lambda: MSBRegLoss()(z, z),
        "alone, MMCR": lambda: MMCRLoss()(z),
        "with a group": lambda: SingularValueLoss(group=group)(z),
        "without singular values": lambda: MSBRegLoss(lambda_s=0.0)(z, z),
    }


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "sees the embeddings" in str(warning.message)]


def worker(number, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=world)
    torch.save(everything(dist.group.WORLD), f"{folder}/{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4])
def processes(request, tmp_path_factory):
    """What each of the processes computed."""
    folder = tmp_path_factory.mktemp("gloo")
    # A server that has imported torch once forks the processes: none of them has to.
    multiprocessing.set_forkserver_preload(["torch", "pytest", "msbreg"])
    mp.start_processes(worker, (request.param, str(folder)), nprocs=request.param, start_method="forkserver")
    return [torch.load(folder / f"{i}.pt") for i in range(request.param)]


@pytest.fixture(scope="module")
def alone():
    """What one process computes on the joined batch."""
    return everything(None)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_averaged_gradients_are_those_of_one_process(processes, alone, case):
    for result in processes:
        assert close(result[case]["weight"], alone[case]["weight"])
        assert close(result[case]["bias"], alone[case]["bias"])


@pytest.mark.parametrize("case", CASES)
def test_values(processes, alone, case):
    """L_S is the global value in each process; L_M and L_B are local, and their average is global: so is the noise."""
    values = torch.stack([result[case]["values"] for result in processes])
    assert close(values.mean(0), alone[case]["values"])
    assert close(values[:, 2], alone[case]["values"][2].expand(len(values)))
    assert values[:, 3].std() > 1e-3


@pytest.mark.parametrize("twin", ["twin without scale", "local spectrum"])
def test_the_check_catches_wrong_gradients(processes, alone, twin):
    assert not torch.allclose(processes[0][twin]["weight"], alone["eigh"]["weight"], rtol=1e-2)


def test_a_module_that_sees_its_own_rows_alone_says_so(processes):
    counts = {name: len(messages) for name, messages in processes[0]["warned"].items()}
    assert counts == {name: int(name.startswith("alone")) for name in counts}
    assert "MMCRLoss sees the embeddings of its own process alone" in processes[0]["warned"]["alone, MMCR"][0]
    assert not any(map(warned, modules(None).values()))  # this process is the only one


def test_noise_has_global_image_numbers_without_a_group_too(processes, alone):
    values = torch.stack([result["local spectrum"]["values"] for result in processes])
    assert close(values.mean(0)[3], alone["eigh"]["values"][3])


@pytest.mark.parametrize("case", NORMS)
def test_nuclear_norm(processes, alone, case):
    world = len(processes)
    joined = torch.cat([result[case]["gradient"] for result in processes], dim=1)
    assert close(joined / world, alone[case]["gradient"])
    assert all(close(result[case]["values"], alone[case]["values"]) for result in processes)


@pytest.mark.parametrize("case", ["batch norm 1d", "batch norm 2d"])
def test_batch_norm(processes, alone, case):
    world, expected = len(processes), alone[case]
    for name, value in expected.items():
        each = [result[case][name] for result in processes]
        if name in ("output", "evaluated"):
            assert close(torch.cat(each), value), name
        elif name == "input_gradient":
            assert close(torch.cat(each) / world, value), name
        else:
            assert all(close(x, value) for x in each), name


def test_the_check_catches_batch_norm_that_is_not_synchronised(processes, alone):
    got = processes[0]["twin without synchronisation"]
    for name in ("gradient of 0.weight", "1.running_mean"):
        assert not torch.allclose(got[name], alone["batch norm 2d"][name], rtol=1e-2)


def test_sum(processes):
    world = len(processes)
    assert all(result["sum"].tolist() == [world, world * (world - 1) / 2] for result in processes)


def test_no_group_is_one_process():
    x = torch.ones(3)
    assert (world_size(None), rank(None)) == (1, 0)
    assert all_reduce_sum(x, None) is x


def test_svd_needs_all_rows():
    with pytest.raises(ValueError, match="with a process group, got 'svd'"):
        functional.singular_value_loss(torch.ones(4, 3), solver="svd", group=object())


def test_a_group_is_shared_by_copies_and_must_be_of_this_process(free_port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port}", rank=0, world_size=1)
    try:
        z, criterion = torch.randn(2, 6, 4), MSBRegLoss(seed=3, group=dist.group.WORLD)
        criterion(z, z)
        twin = copy.deepcopy(nn.Sequential(nn.Linear(2, 2), criterion))[1]
        assert twin.group is criterion.group and twin.step is not criterion.step and twin.step == 1
        assert twin(z, z).loss == criterion(z, z).loss
        others = dist.GroupMember.NON_GROUP_MEMBER  # what torch gives to a process that is not in a new group
        for loss in (MSBRegLoss(group=others), BrownianLoss(group=others), SingularValueLoss(group=others)):
            with pytest.raises(ValueError, match="a group that this process belongs to"):
                loss(*[z] * (1 + isinstance(loss, MSBRegLoss)))
            assert "over a group of other processes" in repr(loss)
        rows = distribute_tensor(z, init_device_mesh("cpu", (1,)), [Shard(1)])
        with pytest.raises(TypeError, match=r"got a DTensor: pass .* x.to_local\(\), and the process group"):
            criterion(rows, z)
    finally:
        dist.destroy_process_group()
