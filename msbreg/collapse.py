"""The numbers that give a collapse of the embeddings away."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from msbreg.distributed import all_gather_rows, all_reduce_sum, world_size
from msbreg.linalg import entropy_rank, singular_values

__all__ = ["embedding_statistics"]


@torch.no_grad()
def embedding_statistics(embeddings: Tensor, group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """How spread out the embeddings of a step are; each says a healthy value from a collapsed one.

    Args:
        embeddings: (K, B, D), any floating dtype; normalised to unit rows here.
        group: processes that have as many images each, N in all; None for this one alone.

    Returns:
        embedding_std: mean standard deviation of a dimension times sqrt(D): 1 spread out, 0 collapsed to a point.
        effective_rank: of the first view's (N, D) matrix, 1 to min(N, D).
        singular_max, singular_min: its extreme singular values over those of a flat spectrum, which has 1 and 1.
        centroid_norm: length of the mean embedding: 0 spread out, 1 collapsed to a point.
    """
    rows = normalize(embeddings.float(), dim=-1).double()  # sums of squares, less the squared mean, leave digits
    views, _, dim = rows.shape
    count = rows.shape[1] * world_size(group)
    mean, square = all_reduce_sum(torch.stack((rows, rows.square())).sum((1, 2)), group) / (views * count)
    if group is None or count <= dim:
        values = singular_values(all_gather_rows(rows[0], group))
    else:  # D² numbers, however many rows there are
        gram = all_reduce_sum(rows[0].mT @ rows[0], group)
        finite = gram.isfinite().all()
        values = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0)).clamp_min(0).sqrt()
        values = torch.where(finite, values, torch.nan)
    values = values * math.sqrt(min(count, dim) / count)
    variance = (square - mean.square()).clamp_min(0) * (views * count / (views * count - 1))
    statistics = {
        "embedding_std": variance.sqrt().mean() * math.sqrt(dim),
        "effective_rank": entropy_rank(values),
        "singular_max": values.max(),
        "singular_min": values.min(),
        "centroid_norm": mean.norm(),
    }
    return dict(zip(statistics, torch.stack(list(statistics.values())).tolist(), strict=True))
