"""torch.compile, a region at a time.

A network is compiled block by block rather than whole. Blocks that are alike are compiled once, which makes eight
compilations of the sixteen blocks of a ResNet-50. And each block hands over its gradients as soon as it has them, so
that DistributedDataParallel sends them while the blocks before are still at work; a network compiled whole hands over
all of them at its end.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["compile_regions", "regions"]

GRAPHS_OF_ONE_BLOCK = 64
"""A block's code is compiled once for each shape it runs on, with and without a gradient: more often than the 8 times
after which torch gives up and runs it as it is."""


def compile_regions(network: nn.Module) -> None:
    """Compiles the `regions` of a network in place; names of parameters do not change.

    Args:
        network: its regions must see tensors of few shapes, each of which is compiled for itself.
    """
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, GRAPHS_OF_ONE_BLOCK)
    settings.optimize_ddp = False  # which would cut regions at the ends of DDP's buckets: whole ones are small enough
    for region in regions(network):
        if type(region).forward is nn.Sequential.forward:
            region._compiled_call_impl = torch.compile(_call_of(region), dynamic=False)
        else:
            region.compile(dynamic=False)


def _call_of(region: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the region does when it is called, as a function of ours: of torch's, torch 2.11 compiles nothing."""

    def call(x: Tensor) -> Tensor:
        return region._call_impl(x)

    return call


def regions(network: nn.Module) -> list[nn.Module]:
    """What is compiled as one: the blocks that a sequence or list of blocks holds; a whole network that has none.

    A block is a module with parts. A ResNet's regions are its residual blocks, while its first layers, which are in no
    sequence, are left as they are; a perceptron, whose sequence holds layers, is one region.
    """
    if isinstance(network, (nn.Sequential, nn.ModuleList)):
        blocks = [child for child in network if any(child.children())]
        if blocks:
            return blocks
    found = [region for child in network.children() if any(child.children()) for region in regions(child)]
    return found or [network]
