"""DINO's weighted k-nearest-neighbour classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Return the share of test images whose neighbours vote for their class.

    >>> bank, labels = torch.eye(4), torch.arange(4)
    >>> knn_accuracy(bank, labels, bank, labels, k=1)
    1.0

    Features are L2-normalised; each of the k most similar training images votes for its class with
    weight exp(similarity / temperature) (Wu et al., 2018; Caron et al., 2021).

    Args:
        train_features: ``(n, D)``.
        train_labels: ``(n,)`` int64, from 0.
        test_features: ``(m, D)``; m may be small.
        test_labels: ``(m,)``.
        k: neighbours; at most n are used.
        temperature: of the weights.
        chunk: test images at a time, which bounds the memory.

    Returns:
        Top-1 accuracy in [0, 1].

    Raises:
        ValueError: empty, misshapen or non-finite input.
    """
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or len(features) != len(labels) or not len(features):
            raise ValueError(
                f"{name}_features must be (n, D) with n >= 1 labels; got "
                f"{tuple(features.shape)} and {tuple(labels.shape)}."
            )
        if not torch.isfinite(features).all():
            raise ValueError(
                f"{name}_features hold NaN or infinite numbers; has training diverged?"
            )
    if k < 1:
        raise ValueError(f"k must be an int >= 1; got {k!r}.")
    k = min(k, len(train_features))
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    bank = F.normalize(train_features.float(), dim=1)
    correct = 0
    for features, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        similarity, nearest = (F.normalize(features.float(), dim=1) @ bank.T).topk(k, dim=1)
        # Relative to the nearest, so that no temperature overflows.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(features), classes).scatter_add_(1, train_labels[nearest], weight)
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(test_features)
