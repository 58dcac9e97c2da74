"""When a run has gone astray."""

from types import SimpleNamespace

import pytest

pytest.importorskip("jsonargparse", reason="this needs the extra [train]")

import torch
from torch import nn

from msbreg.loss_watch import LossWatch

BAD = float("nan")


def watch(*losses: float, others: tuple[int, ...] = ()) -> LossWatch:
    """Of a rank that saw these losses, beside `others`, the longest rows of bad ones that the other ranks saw."""
    processes = SimpleNamespace(
        device=torch.device("cpu"), world=1 + len(others), gather=lambda number: [int(number), *others]
    )
    seen = LossWatch(processes)
    for loss in losses:
        seen.see(torch.tensor(loss))
    return seen


@pytest.mark.parametrize(
    ("losses", "others", "said"),
    [
        ((1.0, BAD, BAD, 1.0, BAD), (), None),
        ((1.0, BAD, float("inf"), -float("inf"), 1.0), (), "was not finite in 3 steps in a row"),
        ((1.0,), (3, 0, 5), "was not finite in 3 steps in a row on ranks 1, 3"),
        ((BAD, BAD, BAD), (0,), "was not finite in 3 steps in a row on rank 0"),
    ],
)
def test_three_bad_losses_in_a_row_are_told_with_their_ranks(losses, others, said):
    assert watch(*losses, others=others).gone_astray() == said


@pytest.mark.parametrize(
    ("losses", "weight", "healthy"), [((BAD, 1.0), 1.0, True), ((1.0, BAD), 1.0, False), ((1.0,), BAD, False)]
)
def test_the_last_loss_and_all_weights_count(losses, weight, healthy):
    network = nn.Linear(2, 1)
    nn.init.constant_(network.bias, weight)
    assert watch(*losses).healthy(network) is healthy
