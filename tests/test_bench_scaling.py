"""The model of the step's time: it counts what the networks and torch have, and its arithmetic is that of the page."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="this needs the extra [train]")

import scaling
import torch
import torch.distributed as dist

from msbreg.batch_norm import CrossRankBatchNorm, convert_sync_batchnorm
from msbreg.models import build_backbone, mlp_head

LINKS = scaling.Links()
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "scaling.md").read_text()


@pytest.fixture(scope="module")
def counts() -> scaling.Counts:
    return scaling.count()


def step(counts, world, *, links=LINKS, views=4, batch=256, rate=None) -> float:
    """Seconds, without the loader."""
    compute = views * batch / (rate or scaling.SUPERVISED / counts.cost)
    waits = scaling.exposed(counts, links, world, views=views, backward=counts.share * compute)
    return compute + sum(waits.values())


def kept(counts, world, **options) -> str:
    return f"{step(counts, 1, **options) / step(counts, world, **options):.0%}"


def test_collectives_by_hand():
    # One machine: 7 hops of 0.6 µs up the tree and 7 down. Eight: 3 levels of machines too.
    assert LINKS.all_reduce(0, 8) == pytest.approx(1e-6 * (6.8 + 14 * 0.6))
    assert LINKS.all_reduce(0, 64) == pytest.approx(1e-6 * (6.8 + 14 * 0.6 + 6 * 5.0))
    # A gigabyte: 370 GB/s in a machine, eight ports of 46 between machines.
    assert LINKS.all_reduce(1e9, 8) - LINKS.all_reduce(0, 8) == pytest.approx(1.75 / 370)
    assert LINKS.all_reduce(1e9, 64) - LINKS.all_reduce(0, 64) == pytest.approx(2 * 63 / 64 / 368)
    assert LINKS.all_reduce(1e9, 1) == 0


def test_counts_are_those_of_the_networks(counts):
    backbone, heads = build_backbone("resnet50"), [mlp_head(2048, 4096, 256), mlp_head(256, 4096, 256)]
    online = torch.nn.ModuleList([backbone, *heads])
    assert sum(counts.buckets) == 4 * sum(weight.numel() for weight in online.parameters())
    channels = [m.num_features for m in convert_sync_batchnorm(online).modules() if isinstance(m, CrossRankBatchNorm)]
    assert sorted(counts.backward) == sorted(channels)
    assert sorted(counts.forward) == sorted([*channels, *channels[:-1]])  # the EMA network has no predictor
    assert 4 / 3 < counts.cost < 1.35 and 0.49 < counts.share < 0.5


def test_buckets_are_those_of_distributed_data_parallel(counts):
    weights = list(reversed([*build_backbone("resnet50").parameters()]))
    limits = [scaling.FIRST_BUCKET, scaling.BUCKET]
    buckets, _ = dist._compute_bucket_assignment_by_size(weights, limits)
    sizes = [sum(weights[index].nbytes for index in bucket) for bucket in buckets]
    assert scaling.fill(weight.nbytes for weight in weights) == sizes
    assert len(sizes) > 2 and len(counts.buckets) > 2


def test_what_is_hidden(counts):
    sums = [LINKS.all_reduce(size, 64) for size in counts.buckets]
    for backward, left in ((1.0, sums[-1]), (0.0, sum(sums)), (0.2 * sum(sums), 0.8 * sum(sums))):
        assert scaling.exposed(counts, LINKS, 64, views=4, backward=backward)["gradients"] == pytest.approx(left)


def test_more_gpus_wait_longer_and_more_work_waits_a_smaller_share(counts):
    worlds = [step(counts, world) for world in (1, 2, 8, 16, 64, 256, 1024)]
    assert worlds == sorted(worlds) and worlds[0] < worlds[1]
    shares = [step(counts, 64, views=views) / step(counts, 1, views=views) for views in (2, 4, 8)]
    assert shares == sorted(shares, reverse=True)
    slow = scaling.Links(nvlink=100, port=10, latency=2)
    assert step(counts, 8, links=slow) > step(counts, 8) and step(counts, 64, links=slow) > step(counts, 64)


def test_the_page_shows_what_the_script_prints(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    scaling.main()
    for part in capsys.readouterr().out.strip().split("\n\n"):
        assert part in PAGE


def test_what_was_measured_is_what_is_modelled(counts, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "count", lambda: counts)
    command = "scaling.py --views-per-second 2000 --views 8 --batch 100"

    def rows(*options: str) -> list[list[str]]:
        monkeypatch.setattr(sys, "argv", [*command.split(), *options])
        scaling.main()
        lines = capsys.readouterr().out.strip().splitlines()[-6:]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    assert [row[:3] for row in rows()][:2] == [["1", "100", "400"], ["8", "800", "400"]]
    # A loader of 200 images/s takes half a second for them, and hides all waits on one GPU or eight.
    assert [row[6:9] for row in rows("--loaded", "200")][:2] == [["500", "80%", "200"]] * 2


def test_the_page_draws_its_conclusions_from_the_model(counts):
    text = " ".join(PAGE.split())
    views = scaling.SUPERVISED / counts.cost
    small = [f"{1e6 * LINKS.all_reduce(8 * 513, world):.0f}" for world in (8, 64, 1024)]
    example = 2470 / counts.cost
    sums = len(counts.forward) + len(counts.backward)
    backward = counts.share * 1024 / views
    gathered = step(counts, 1) + 0.1419 + scaling.exposed(counts, LINKS, 1024, views=4, backward=backward)["gradients"]
    for sentence in (
        f"256 channels that is {small[0]} µs on 8 GPUs, {small[1]} on 64, {small[2]} on 1,024",
        f"{example:,.0f} views/s, 1,024 GPUs keep {kept(counts, 1024, rate=example)} instead of {kept(counts, 1024)}",
        f"Their all-reduce, {1e3 * sum(LINKS.all_reduce(size, 1024) for size in counts.buckets):.1f} ms at 1,024 GPUs, "
        f"hides behind a backward pass of {1e3 * backward:.0f} ms",
        f"by its {sums} sums a step",
        f"where {step(counts, 1) / gathered:.0%} would be kept in place of {kept(counts, 1024)}",
        f"4,096 on 64, which is 64 each, keep {kept(counts, 64, batch=64)}",
        f"at most {views / 4:,.0f} images/s, within the {scaling.LOADED:,.0f} assumed; at K = 2 it is {views / 2:,.0f}",
    ):
        assert sentence in text, sentence
