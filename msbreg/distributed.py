"""Sums over the processes of a group."""

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available() and not dist.is_initialized():
    # Its functions have for a default the group of all processes as it is when they are imported, which optimizers do.
    # That would keep the group's threads when it is destroyed, and one of them that has a tensor to release as the
    # interpreter ends aborts the process. While there is no group, there is none to keep.
    import torch.distributed.nn

__all__ = ["Shared", "all_gather_rows", "all_reduce_sum", "rank", "world_size"]


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows, (N, ...), of all processes, which have as many each, one after the other; x itself for None."""
    if group is None:
        return x
    everyone = [torch.empty_like(x) for _ in range(world_size(group))]
    dist.all_gather(everyone, x.contiguous(), group=group)
    return torch.cat(everyone)


class Shared:
    """A module's process group, which cannot be copied, and which copies of the module share."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        # Processes that a group leaves out have a number in its place.
        if not (group is None or isinstance(group, (dist.ProcessGroup, int))):
            hint = "; give what its get_group() returns" if hasattr(group, "get_group") else ""
            raise TypeError(f"expected group to be a process group or None, got {type(group).__name__}{hint}")
        self.group = group

    def __deepcopy__(self, memo: object) -> "Shared":
        return self

    def __getstate__(self) -> dict[str, None]:
        if self.group is not None:
            raise TypeError(
                "a module with a process group cannot be saved whole: save its state_dict, or set its group to None"
            )
        return {"group": None}


def world_size(group: dist.ProcessGroup | None) -> int:
    """Processes in the group, which this one must belong to; 1 for None, which stands for this process alone."""
    return 1 if group is None else _member(dist.get_world_size(group))


def rank(group: dist.ProcessGroup | None) -> int:
    """This process's number in the group; 0 for None."""
    return 0 if group is None else _member(dist.get_rank(group))


def _member(number: int) -> int:
    """What torch says of a group, which is -1 to processes outside it."""
    if number < 0:
        raise ValueError("expected a group that this process belongs to, got one of other processes")
    return number


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of x over the processes of the group; x itself for None. x is not changed and carries no gradient."""
    if group is None:
        return x
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total
