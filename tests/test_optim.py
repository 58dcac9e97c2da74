"""LARS against a plain twin, and which parameters decay."""

import copy

import pytest
import torch
from torch import nn

from msbreg.errors import MSBRegError
from msbreg.optim import LARS, build_optimizer, parameter_groups


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def gradients(module: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def plain_lars(w, g, m, *, lr, momentum, decay, eta, adapt):
    """One step for one tensor, written as in the paper; returns the new weights and momentum."""
    u = g + decay * w
    norm_w, norm_u = float(w.norm()), float(u.norm())
    ratio = eta * norm_w / norm_u if adapt and norm_w > 0 and norm_u > 0 else 1.0
    m = momentum * m + ratio * u
    return w - lr * m, m


def test_lars_equals_its_plain_twin_over_several_steps():
    module = network()
    nn.init.normal_(module[3].weight, std=0.01)  # weights, and at the last step gradients, that are shorter than 1
    optimizer = build_optimizer("lars", module, lr=0.5, weight_decay=0.1, momentum=0.8)
    twins = [(parameter.detach().clone(), torch.zeros_like(parameter)) for parameter in module.parameters()]
    for step, lr in enumerate([0.5, 0.25, 1.0]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        gradients(module, step, 0.01**step)
        for index, parameter in enumerate(module.parameters()):
            tensor = parameter.ndim > 1
            twins[index] = plain_lars(
                *(twins[index][0], parameter.grad, twins[index][1]),
                lr=lr, momentum=0.8, decay=0.1 if tensor else 0.0, eta=1e-3, adapt=tensor,
            )  # fmt: skip
        optimizer.step()
        for parameter, (expected, _) in zip(module.parameters(), twins, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)


def test_lars_takes_plain_steps_where_a_norm_is_zero():
    for value, gradient in ((0.0, 2.0), (3.0, 0.0)):
        w = nn.Parameter(torch.full((2, 2), value))
        w.grad = torch.full((2, 2), gradient)
        LARS([w], lr=0.1).step()
        torch.testing.assert_close(w.detach(), torch.full((2, 2), value - 0.1 * gradient))


def test_lars_passes_over_parameters_without_a_gradient_and_returns_the_closures_loss():
    used, unused, alone = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    optimizer = LARS([{"params": [used, unused]}, {"params": [alone]}], lr=0.1)

    def closure():
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4.0
    assert torch.equal(unused, torch.ones(2, 2)) and torch.equal(alone, torch.ones(2, 2))
    assert not torch.equal(used, torch.ones(2, 2))


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_a_saved_state_goes_on_bit_for_bit(name):
    module = network()
    optimizer = build_optimizer(name, module, lr=0.5, weight_decay=0.1)
    gradients(module, 0)
    optimizer.step()
    copied = copy.deepcopy(module)
    resumed = build_optimizer(name, copied, lr=123.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, stepper in ((module, optimizer), (copied, resumed)):
        gradients(model, 1)
        stepper.step()
    for a, b in zip(module.parameters(), copied.parameters(), strict=True):
        assert torch.equal(a, b)


def test_biases_and_norms_neither_decay_nor_adapt_and_frozen_parameters_are_left_out():
    module = network()
    module[0].requires_grad_(False)
    tensors, vectors = parameter_groups(module, 0.1)
    assert [id(w) for w in tensors["params"]] == [id(module[3].weight)]
    assert {id(w) for w in vectors["params"]} == {id(module[1].weight), id(module[1].bias), id(module[3].bias)}
    assert (tensors["weight_decay"], tensors["adapt"]) == (0.1, True)
    assert (vectors["weight_decay"], vectors["adapt"]) == (0.0, False)


def test_scales_of_any_shape_and_what_a_network_excepts_do_not_decay():
    """As ConvNeXt's layer scales, (C, 1, 1), and Swin's tables of positions."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_scale = nn.Parameter(torch.ones(3, 1, 1))
            self.table, self.weight = nn.Parameter(torch.ones(5, 2)), nn.Parameter(torch.ones(3, 3))

        def no_weight_decay(self):
            return {"table", "one that there is not"}

    tensors, vectors = parameter_groups(nn.Sequential(Block()), 0.1)
    assert [w.shape for w in tensors["params"]] == [(3, 3)]
    assert {w.shape for w in vectors["params"]} == {(3, 1, 1), (5, 2)}


def test_what_a_network_wants_at_a_constant_rate_has_groups_of_its_own():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)

        def constant_rate(self):
            return {"second.weight", "second.bias"}

    pair = Pair()
    groups = parameter_groups(nn.Sequential(pair), 0.1)
    assert [id(w) for group in groups for w in group["params"]] == [id(w) for w in pair.parameters()]
    assert [group.get("constant", False) for group in groups] == [False, False, True, True]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]


def test_a_group_without_parameters_is_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(MSBRegError, match="got 'adam'"):
        build_optimizer("adam", network(), lr=0.1)


def test_the_momentum_of_a_run_is_byols():
    for name in ("lars", "sgd"):
        assert {group["momentum"] for group in build_optimizer(name, network(), lr=0.1).param_groups} == {0.9}
    assert {group["betas"] for group in build_optimizer("adamw", network(), lr=0.1).param_groups} == {(0.9, 0.999)}
    assert LARS(network().parameters(), lr=0.1).defaults["momentum"] == 0.9
