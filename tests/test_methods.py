"""What a training step computes: losses, gradients, target network, recomputed chunks of views."""

import copy
import os

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from msbreg.batch_norm import convert_sync_batchnorm
from msbreg.config import Config
from msbreg.losses import MSBRegLoss
from msbreg.methods import Encoder, MSBReg, build_method

BATCH = 6


def small_config(**options) -> Config:
    config = Config()
    config.model.hidden, config.model.dim = 24, 8
    for name, value in options.items():
        group, option = name.split("__")
        assert hasattr(getattr(config, group), option)
        setattr(getattr(config, group), option, value)
    return config


def views(count: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(count * BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def build(config: Config, group=None):
    torch.manual_seed(0)
    return build_method(config, group).train()


def test_byol_is_the_symmetric_cosine_loss():
    method = build(small_config(method__name="byol"))
    twin = copy.deepcopy(method)
    out = method([views(2)], BATCH)
    _, z = twin.online([views(2)], BATCH)
    p = twin.predictor(z.flatten(0, 1)).unflatten(0, (2, BATCH))
    with torch.no_grad():
        _, t = twin.target([views(2)], BATCH)
    expected = 2 - cosine_similarity(p[0], t[1], dim=1).mean() - cosine_similarity(p[1], t[0], dim=1).mean()
    torch.testing.assert_close(out.loss, expected)
    assert out.terms.keys() == {"centroid"}


def test_simsiam_is_the_symmetric_cosine_loss_with_stopped_targets():
    method = build(small_config(method__name="simsiam"))
    twin = copy.deepcopy(method)
    method([views(2)], BATCH).loss.backward()
    _, z = twin.online([views(2)], BATCH)
    p = twin.predictor(z.flatten(0, 1)).unflatten(0, (2, BATCH))
    t = z.detach()
    (2 - cosine_similarity(p[0], t[1], dim=1).mean() - cosine_similarity(p[1], t[0], dim=1).mean()).backward()
    for (name, mine), theirs in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name, rtol=1e-4, atol=1e-6)


def test_simsiams_heads_are_its_own():
    """Those of its code, builder.py: the projector ends in a norm without parameters, the predictor is narrow."""
    method = build(small_config(method__name="simsiam"))
    last, predictor = method.online.projector[-1], method.predictor
    assert isinstance(last, nn.BatchNorm1d) and last.num_features == 8 and not last.affine
    shapes = {name: tuple(weight.shape) for name, weight in predictor.named_parameters()}
    assert shapes == {"0.weight": (2, 8), "1.weight": (2,), "1.bias": (2,), "3.weight": (8, 2), "3.bias": (8,)}
    embeddings = method([views(2)], BATCH).embeddings.flatten(0, 1)
    torch.testing.assert_close(embeddings.mean(dim=0), torch.zeros(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("disperse", ["projector", "predictor"])
def test_total_is_the_weighted_sum_of_the_terms(disperse):
    config = small_config(data__views=3, method__disperse=disperse)
    out = build(config)([views(3)], BATCH)
    total = out.terms["centroid"] + 0.004 * out.terms["singular_value"] + 0.5 * out.terms["brownian"]
    torch.testing.assert_close(out.loss.detach(), total)
    assert out.embeddings.shape == (3, BATCH, 8)
    assert not out.embeddings.requires_grad and not out.features.requires_grad


def test_options_reach_the_networks_and_their_loss():
    options = {"lambda_m": 0.7, "lambda_s": 0.1, "lambda_b": 0.2, "leave_one_out": True, "spectrum": "whitening"}
    of_the_method = {f"method__{name}": value for name, value in options.items()}
    method = build(small_config(**of_the_method, run__seed=7, model__predictor=False, model__view_chunk=3))
    assert {name: getattr(method.criterion, name) for name in options} == options
    assert method.criterion.seed == 7 and method.predictor is None and method.online.view_chunk == 3
    assert build(small_config()).predictor is not None


def test_dispersion_acts_on_the_tensor_it_is_told_to():
    terms = {
        disperse: build(small_config(method__disperse=disperse))([views(2)], BATCH).terms["singular_value"]
        for disperse in ("projector", "predictor")
    }
    assert terms["projector"] != terms["predictor"]


def test_target_follows_the_online_network_and_gets_no_gradient():
    method = build(small_config())
    before = [weight.clone() for weight in method.target.parameters()]
    method([views(2)], BATCH).loss.backward()
    assert all(weight.grad is None for weight in method.target.parameters())
    with torch.no_grad():
        for weight in method.online.parameters():
            weight.add_(1.0)
    method.after_step(0.9)
    for old, new, online in zip(before, method.target.parameters(), method.online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * online)


def test_targets_of_a_network_with_dropout_and_stochastic_depth_are_the_same_each_time():
    method = build(small_config(model__backbone="efficientnet_b0"))
    target, images = method.target, torch.randn(2 * BATCH, 3, 64, 64)
    (features, t), (features_again, t_again) = target([images], BATCH), target([images], BATCH)
    assert torch.equal(features, features_again) and torch.equal(t, t_again)
    assert all(layer.num_batches_tracked == 2 for layer in target.modules() if isinstance(layer, _BatchNorm))
    assert all(layer.training for layer in method.online.modules())
    assert not any(layer.training for layer in method.eval().modules())


def test_dropout_within_a_batch_norm_of_the_target_is_off():
    """As timm's BatchNormAct2d may have it."""
    norm = nn.BatchNorm2d(3)
    norm.drop = nn.Dropout()
    encoder = Encoder(nn.Sequential(norm, nn.Flatten()), nn.Identity())
    target = MSBReg(encoder, None, MSBRegLoss()).train().target.backbone[0]
    assert target.training and not target.drop.training


def test_views_of_two_sizes_and_targets_of_the_first_size_alone():
    method = build(small_config(data__views=4))
    small = torch.randn(2 * BATCH, 3, 8, 8)
    out = method([views(2), small], BATCH)
    assert out.embeddings.shape == (4, BATCH, 8)
    out.loss.backward()


def test_noise_differs_between_steps_and_is_kept_by_the_state_dict():
    method = build(small_config())
    twin = copy.deepcopy(method)
    first = [method([views(2)], BATCH).terms["brownian"] for _ in range(2)]
    assert first[0] != first[1]
    twin.load_state_dict(method.state_dict())
    torch.testing.assert_close(twin([views(2)], BATCH).terms["brownian"], method([views(2)], BATCH).terms["brownian"])


def without_norms() -> Encoder:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Encoder(backbone, nn.Linear(5, 4))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_recomputed_chunks_of_views_give_the_same_gradients(chunk):
    gradients = []
    for view_chunk in (0, chunk):
        encoder = without_norms()
        encoder.view_chunk = view_chunk
        features, embeddings = encoder([views(4)], BATCH)
        (features.square().sum() + embeddings.cos().sum()).backward()
        gradients.append([weight.grad for weight in encoder.parameters()])
    for whole, chunked in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-4, atol=1e-5)


def test_recomputing_counts_each_batch_once_in_the_running_statistics():
    config = small_config(data__views=4, model__view_chunk=1)
    trained, watched = build(config), build(config)
    trained([views(4)], BATCH).loss.backward()
    with torch.no_grad():
        watched([views(4)], BATCH)
    for (name, one), other in zip(trained.named_buffers(), watched.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    norm = trained.online.backbone.layers[1]
    assert norm.momentum == 0.1 and norm.num_batches_tracked == 4


def gradients_of_a_rank(rank: int, world: int, config: Config, port: int, results) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    group = torch.distributed.group.WORLD
    method = convert_sync_batchnorm(build(config, group), group)
    model = DistributedDataParallel(method, broadcast_buffers=False)
    mine = views(2).unflatten(0, (2, BATCH)).unflatten(1, (world, -1))[:, rank].flatten(0, 1)
    out = model([mine], BATCH // world)
    out.loss.backward()
    if rank == 0:
        results.put({name: p.grad.numpy() for name, p in method.named_parameters() if p.grad is not None})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["msbreg", "byol", "simsiam"])
def test_gradients_of_two_processes_are_those_of_one_on_the_joined_batch(name, free_port):
    config = small_config(method__name=name, method__lambda_s=0.5)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    multiprocessing.start_processes(
        gradients_of_a_rank, (2, config, free_port, results), nprocs=2, start_method="spawn", join=False
    )
    together = results.get()
    alone = build(config)
    alone([views(2)], BATCH).loss.backward()
    largest = 0.0
    for weight_name, weight in alone.named_parameters():
        if weight.grad is not None:
            largest = max(largest, float(weight.grad.abs().max()))
            torch.testing.assert_close(
                torch.from_numpy(together[weight_name]), weight.grad, msg=weight_name, rtol=2e-3, atol=2e-5
            )
    assert largest > 1e-3
