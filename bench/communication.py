"""What the singular value loss sends between processes, on paper and counted.

    python bench/communication.py                                     # the table of docs/scaling.md
    torchrun --nproc-per-node 2 bench/communication.py --count FILE   # what two gloo processes send on loopback

The count is the loopback interface's own, so that nothing else may use it meanwhile; a namespace of its own sees to
that:  unshare --user --map-root-user --net sh -c 'ip link set lo up; torchrun ...'
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from options import positive
from records import keep, provenance

from msbreg import MSBRegLoss
from msbreg.tables import markdown_table

GRAM_BYTES = 4
"""Of a float32."""
LINKS = {"NVLink 4 (8 GPUs)": 450e9, "InfiniBand NDR": 50e9}
"""Bytes a second and GPU in one direction: 900 GB/s for both directions together (NVIDIA's data sheet of the H200), and
400 Gb/s a port with a port for each GPU (NVIDIA's of the ConnectX-7)."""


def all_reduce_bytes(views: int, dim: int, world: int) -> float:
    """What each process sends in a ring all-reduce of the K D x D Gram matrices, whatever its batch."""
    return 2 * (world - 1) / world * views * dim * dim * GRAM_BYTES


def gather_bytes(views: int, batch: int, dim: int, world: int, itemsize: int) -> float:
    """What each process sends to have the embeddings of all, (K, B, D) each, and to send their gradients back."""
    return 2 * (world - 1) * views * batch * dim * itemsize


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count < 1e8 else f"{count / 1e6:,.0f}"


def table(views: int, batch: int, dim: int) -> str:
    """Markdown: bytes and times by the number of GPUs."""
    rows = []
    for world in (8, 16, 64, 256, 1024):
        link, rate = list(LINKS.items())[world > 8]
        ours, gathered = all_reduce_bytes(views, dim, world), gather_bytes(views, batch, dim, world, 2)
        sizes = [cell for sent in (ours, gathered) for cell in (megabytes(sent), f"{1e6 * sent / rate:,.0f}")]
        rows.append([f"{world:,}", f"{world * batch:,}", link, *sizes, f"{gathered / ours:,.0f}"])
    head = ["GPUs", "images", "link", "Gram matrices, MB", "µs", "embeddings in bf16, MB", "µs", "times as much"]
    return markdown_table(head, rows, text=0)


def loopback_bytes() -> int:
    """Bytes that all processes together have sent on loopback."""
    line = next(line for line in Path("/proc/self/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def count(views: int, batch: int, dim: int, calls: int) -> dict:
    """Bytes that each process of the group sends for one call of the loss, forward and backward."""
    sent = {}
    for name, group in (("group", dist.group.WORLD), ("no group", None)):
        criterion = MSBRegLoss(group=group)
        z = torch.randn(views, batch, dim, requires_grad=True)
        target = torch.randn(views, batch, dim)
        criterion(z, target).loss.backward()
        dist.barrier()
        before = loopback_bytes()
        dist.barrier()
        for _ in range(calls):
            criterion(z, target).loss.backward()
        dist.barrier()
        sent[name] = (loopback_bytes() - before) / calls / dist.get_world_size()
        dist.barrier()
    world = dist.get_world_size()
    formula = all_reduce_bytes(views, dim, world)
    return {
        "views": views, "batch": batch, "dim": dim, "processes": world, "calls": calls, "sent": sent["group"],
        "sent_without_group": sent["no group"], "formula": formula,
        "measured_over_formula": (sent["group"] - sent["no group"]) / formula,
    }  # fmt: skip


def counted(rows: list[dict]) -> str:
    """Markdown: what was sent beside the formula."""
    cells = [
        [
            f"{row['views']}, {row['batch']}, {row['dim']}",
            *(f"{row[name]:,.0f}" for name in ("formula", "sent")),
            f"{row['measured_over_formula']:.3f}",
        ]
        for row in rows
    ]
    return markdown_table(["K, B, D", "bytes a process by the formula", "counted", "ratio"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--count",
        type=Path,
        metavar="FILE",
        help="count in real processes, and write JSON there; default: print the table on paper",
    )
    parser.add_argument(
        "--calls", type=positive, default=20, help="calls that a count is the mean of; default: %(default)s"
    )
    options = parser.parse_args()
    if options.count is None:
        print(table(8, 256, 256))
        return
    dist.init_process_group("gloo")
    shapes = [(2, 64, 128), (2, 512, 128), (8, 64, 128), (2, 64, 512)]
    rows = [count(*shape, options.calls) for shape in shapes]
    if dist.get_rank() == 0:
        facts = provenance("bench/communication.py", None, torch.device("cpu"), ())
        keep({**facts, "backend": "gloo", "rows": rows}, options.count)
        print(counted(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
