"""The engine that every exact draw ends in: the k highest scores of each row."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Mark the ``k`` highest scores of each row: ``(B, N)`` floats to ``(B, N)`` bools.

    ``k`` is one number for all rows, or ``(B,)`` int64 with a number per row. Ties never make a
    row hide more or fewer than ``k``.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(k, int):
        return mask.scatter_(1, scores.topk(k, dim=1, sorted=False).indices, True)
    order = scores.argsort(dim=1, descending=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    return mask.scatter_(1, order, rank < k[:, None])
