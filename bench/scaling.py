"""A model of the time of a step against the number of GPUs, for ResNet-50 at 224 pixels.

    python bench/scaling.py                                      # what docs/scaling.md shows
    python bench/scaling.py --views-per-second 3000 --views 8    # with what `msbreg bench` measured on one GPU

Sizes and numbers of messages are counted from the networks, without running them. Constants are other people's, with
their sources; docs/scaling.md says what is left out.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torchvision
from options import above_zero, positive
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from msbreg.config import Config, ModelConfig
from msbreg.methods import build_method
from msbreg.tables import markdown_table

GPUS = 8
"""Of a machine, each with a network port of its own, as in NVIDIA's DGX and HGX."""
SUPERVISED = 7010.0
"""Images/s of an H100 in supervised training: an eighth of the 56,100 that eight log in MLPerf 3.0, gradients and input
included (github.com/mlcommons/training_results_v3.0, Dell/results/XE9680x8H100-SXM-80GB/resnet/result_0.txt)."""
NVLINK, PORT = 370.0, 46.0
"""GB/s that NCCL reaches of NVLink 4 (github.com/NVIDIA/nccl-tests/issues/212) and of a 400 Gb/s port (.../290)."""
LOADED = 19000 / GPUS
"""Images/s for each GPU: what DALI asks of a Hopper GPU and 70 threads (qa/TL1_decoder_perf/test.sh), shared by all."""
JPEG = 147.9e9 / 1281167
"""Bytes of an image of ImageNet's training set: its archive over its number."""
DIM = 256
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends together, by default."""
# NCCL's own estimates for its protocol of low latency, in µs: to begin a sum along a tree, and for a hop by NVLink and
# by the network. (src/graph/tuning.cc of version 2.30.)
START, INSIDE, NETWORK = 6.8, 0.6, 5.0


class Links(NamedTuple):
    """GB/s of NVLink and of a port, and a factor on NCCL's latencies."""

    nvlink: float = NVLINK
    port: float = PORT
    latency: float = 1.0

    def all_reduce(self, size: float, world: int) -> float:
        """Seconds until every process has the sum of all processes' `size` bytes, along a tree of machines."""
        if world == 1:
            return 0.0
        hops = (min(world, GPUS) - 1) * INSIDE + math.log2(math.ceil(world / GPUS)) * NETWORK
        return 1e-6 * self.latency * (START + 2 * hops) + 2 * (world - 1) / world * size / self.rate(world)

    def rate(self, world: int) -> float:
        """Bytes/s of a process: messages enter and leave a machine by all of its ports."""
        return 1e9 * (self.nvlink if world <= GPUS else min(self.nvlink, GPUS * self.port))


class Counts(NamedTuple):
    """What a step of one process sends and computes."""

    buckets: list[int]
    """Bytes of gradients sent together, in the order in which the backward pass has them."""
    forward: list[int]
    """Channels of each batch normalisation in the forward passes, online and target."""
    backward: list[int]
    """Channels of each in the backward pass."""
    cost: float
    """Operations of a view, over those of an image in supervised training."""
    share: float
    """The backward pass's, of them."""


def count() -> Counts:
    """From the networks of the configuration imagenet-resnet50-100ep, on a device that computes nothing."""
    with torch.device("meta"):
        method = build_method(Config(model=ModelConfig(backbone="resnet50", hidden=4096, dim=DIM)))
        supervised = torchvision.models.resnet50()
        images = torch.empty(2, 3, 224, 224)

    def online() -> torch.Tensor:
        return method.predictor(method.online([images], 2)[1].flatten(0, 1))

    forward, both = operations(online), operations(lambda: online().sum().backward())
    view = both + operations(lambda: method.target([images], 2))
    channels = {name: layer.num_features for name, layer in method.named_modules() if isinstance(layer, _BatchNorm)}
    return Counts(
        buckets=fill(4 * weight.numel() for weight in reversed(list(method.parameters())) if weight.requires_grad),
        forward=list(channels.values()),
        backward=[number for name, number in channels.items() if not name.startswith("target.")],
        cost=view / operations(lambda: supervised(images).sum().backward()),
        share=(both - forward) / view,
    )


def operations(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def fill(sizes: Iterable[int]) -> list[int]:
    """Bytes of the buckets: each is sent once it holds its limit or more."""
    buckets = [0]
    for size in sizes:
        if buckets[-1] >= (BUCKET if len(buckets) > 1 else FIRST_BUCKET):
            buckets.append(0)
        buckets[-1] += size
    return buckets


def exposed(counts: Counts, links: Links, world: int, *, views: int, backward: float) -> dict[str, float]:
    """Seconds of a step in which nothing is computed, by their cause, where the backward pass takes `backward`."""
    sums = [links.all_reduce(size, world) for size in counts.buckets]
    # Sums of numbers and of squares, and how many, in float64; then two sums for the gradient, in float32.
    statistics = [8 * (2 * c + 1) for c in counts.forward] + [4 * 2 * c for c in counts.backward]
    return {
        "gradients": max(sums[-1], sum(sums) - backward),
        "batch norm": sum(links.all_reduce(size, world) for size in statistics),
        "Gram": links.all_reduce(4 * views * DIM**2, world),
    }


def table(counts: Counts, links: Links, *, views: int, batch: int, rate: float, loaded: float) -> str:
    """Markdown: a step by the number of GPUs, each of which computes `rate` views/s and loads `loaded` images/s."""
    compute = views * batch / rate
    waits = exposed(counts, links, 1, views=views, backward=counts.share * compute)
    names = ["GPUs", "images", "compute, ms", *waits, "step, ms", "of ideal", "images/s a GPU", "read, GB/s"]
    rows = []
    for world in (1, 8, 16, 64, 256, 1024):
        waits = exposed(counts, links, world, views=views, backward=counts.share * compute)
        step = max(compute + sum(waits.values()), batch / loaded)
        cells = [f"{world:,}", f"{world * batch:,}", f"{1e3 * compute:.0f}"]
        cells += [f"{1e3 * wait:.2f}" for wait in waits.values()]
        cells += [f"{1e3 * step:.0f}", f"{compute / step:.0%}", f"{batch / step:,.0f}"]
        rows.append([*cells, f"{JPEG * world * batch / step / 1e9:.1f}"])
    return markdown_table(names, rows, text=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=positive, default=4, help="K, views of an image; default: %(default)s")
    parser.add_argument("--batch", type=positive, default=256, help="images a GPU; default: %(default)s")
    for name, default, meaning in (
        ("--loaded", LOADED, "images/s that the loader gives each GPU"),
        ("--nvlink", NVLINK, "GB/s in a machine, nccl-tests' bus bandwidth"),
        ("--port", PORT, "GB/s of each GPU's network port"),
        ("--latency", 1.0, "factor on NCCL's estimates of its latencies"),
    ):
        parser.add_argument(name, type=above_zero, default=default, help=f"{meaning}; default: %(default)s")
    parser.add_argument(
        "--views-per-second", type=above_zero, help=f"of one GPU; default: {SUPERVISED:,.0f} over the cost of a view"
    )
    options = parser.parse_args()
    counts = count()
    buckets = [f"{size / 1e6:.1f}" for size in counts.buckets]
    print(f"{sum(counts.buckets) / 1e6:.1f} MB of gradients in {len(buckets)} buckets: {', '.join(buckets)}")
    print(f"batch norm: {len(counts.forward)} sums forward, {len(counts.backward)} backward")
    print(f"a view costs {counts.cost:.3f} supervised images, {counts.share:.1%} of it in the backward pass\n")
    links = Links(options.nvlink, options.port, options.latency)
    rate = options.views_per_second or SUPERVISED / counts.cost
    print(table(counts, links, views=options.views, batch=options.batch, rate=rate, loaded=options.loaded))


if __name__ == "__main__":
    main()
