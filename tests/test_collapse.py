"""The numbers that give a collapse away, in one process and in several."""

import ast
import math

import pytest
import torch
from test_processes import run_ranks

from msbreg.collapse import embedding_statistics

FLAT = torch.cat([torch.eye(8), -torch.eye(8)])
"""16 rows that are spread as evenly as can be in 8 dimensions."""
POINT = torch.ones(16, 8)


def test_embeddings_that_are_spread_out_and_embeddings_that_are_not():
    spread = embedding_statistics(3 * torch.stack([FLAT, FLAT]))
    healthy = {"effective_rank": 8, "singular_max": 1, "singular_min": 1, "centroid_norm": 0}
    assert spread == pytest.approx({"embedding_std": math.sqrt(32 / 31), **healthy}, abs=1e-5)
    collapsed = {"effective_rank": 1, "singular_max": math.sqrt(8), "singular_min": 0, "centroid_norm": 1}
    found = embedding_statistics(torch.stack([POINT, POINT]).bfloat16())
    assert found == pytest.approx({"embedding_std": 0, **collapsed}, abs=1e-2)


STATISTICS = """
import sys, torch
from msbreg.collapse import embedding_statistics
from msbreg.processes import Processes
views = torch.load(sys.argv[1])
with Processes("cpu") as processes:
    print(embedding_statistics(views.chunk(processes.world, dim=1)[processes.rank], processes.group))
"""


@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 6, 20)])
def test_statistics_are_those_of_all_processes(shape, tmp_path, free_port):
    views = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.save(views, tmp_path / "views.pt")
    expected = embedding_statistics(views)
    assert embedding_statistics(views[:, : shape[1] // 2])["effective_rank"] < expected["effective_rank"] - 0.1
    for said in run_ranks(STATISTICS, [[str(tmp_path / "views.pt")]] * 2, free_port):
        assert ast.literal_eval(said) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_statistics_of_what_is_not_finite_are_quiet():
    found = embedding_statistics(torch.full((2, 4, 3), torch.nan))
    assert all(math.isnan(value) for value in found.values())


def test_the_spectrum_is_that_of_the_first_view():
    found = embedding_statistics(torch.stack([torch.eye(8)[[0, 0, 0, 0, 1]], FLAT[:5]]))  # singular values 2 and 1
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3)
    assert found["singular_max"] == pytest.approx(2)
