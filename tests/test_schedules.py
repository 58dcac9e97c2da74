"""Schedules and the moving average."""

import copy
import math

import pytest
import torch
from torch import nn

from msbreg.ema import ema_update
from msbreg.schedules import ema_tau, scaled_lr, warmup_cosine


def test_warm_up_rises_linearly_from_zero_to_the_peak():
    values = [warmup_cosine(step, 100, 10, 2.0) for step in range(11)]
    assert values == pytest.approx([0.2 * step for step in range(11)])


def test_the_cosine_falls_from_the_peak_to_zero():
    assert warmup_cosine(10, 110, 10, 2.0) == 2.0
    assert warmup_cosine(35, 110, 10, 2.0) == pytest.approx(1 + math.sqrt(0.5))
    assert warmup_cosine(60, 110, 10, 2.0) == pytest.approx(1)
    assert warmup_cosine(110, 110, 10, 2.0) == warmup_cosine(1000, 110, 10, 2.0) == 0


def test_no_warm_up_starts_at_the_peak_and_all_warm_up_ends_there():
    assert warmup_cosine(0, 5, 0, 3.0) == 3.0
    assert warmup_cosine(4, 5, 5, 3.0) == pytest.approx(2.4)
    assert warmup_cosine(5, 5, 5, 3.0) == 0.0
    assert warmup_cosine(0, 1, 0, 3.0) == 3.0  # a run of one step


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="got 6 of 5 steps"):
        warmup_cosine(0, 5, 6, 1.0)


def test_ema_momentum_goes_from_base_to_one():
    assert ema_tau(0, 100) == 0.996
    assert ema_tau(50, 100, 0.99) == pytest.approx(0.995)
    assert ema_tau(100, 100, 0.9) == 1.0
    assert ema_tau(101, 100, 0.9) == 1.0
    values = [ema_tau(step, 100, 0.9) for step in range(101)]
    assert values == sorted(values)


def test_the_learning_rate_is_per_256_images():
    assert scaled_lr(0.3, 4096) == pytest.approx(4.8)


def test_ema_moves_parameters():
    online = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    target = copy.deepcopy(online)
    for parameter in online.parameters():
        nn.init.normal_(parameter)
    before = copy.deepcopy(list(target.parameters()))

    ema_update(tuple(target.parameters()), tuple(online.parameters()), 0.9)

    for new, old, follow in zip(target.parameters(), before, online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * follow)


def test_a_momentum_of_one_leaves_the_target_bit_for_bit():
    online, target = nn.Linear(3, 4), nn.Linear(3, 4)
    before = target.weight.clone()
    ema_update((target.weight,), (online.weight,), 1.0)
    assert torch.equal(target.weight, before)
