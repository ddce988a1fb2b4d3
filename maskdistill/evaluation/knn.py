"""DINO's weighted k-nearest-neighbour vote: accuracies, and a classifier of features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.evaluation.features import (
    Classifier,
    check_classifiable,
    check_labelled,
    check_split,
)

_BANK = 16_384
"""Training images at a time, which bounds the memory together with ``chunk``."""


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

    `knn_accuracies` of one k; the arguments and errors are its own.
    """
    found = knn_accuracies(
        train_features,
        train_labels,
        test_features,
        test_labels,
        ks=(k,),
        temperature=temperature,
        chunk=chunk,
    )
    return found[k]


@torch.no_grad()
def knn_accuracies(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, float]:
    """Return for several k the share of test images whose neighbours vote for their class.

    >>> bank, labels = torch.eye(4), torch.arange(4)
    >>> knn_accuracies(bank, labels, bank, labels, ks=(1, 2))
    {1: 1.0, 2: 1.0}

    Features are L2-normalised; each of the k most similar training images votes for its class with
    weight exp(similarity / temperature) (Wu et al., 2018, equation 6; Caron et al., 2021). All k
    share one search, and neither all similarities nor a copy of the bank is ever in memory.

    Args:
        train_features: ``(n, D)``, the bank.
        train_labels: ``(n,)``, any whole numbers; they may skip some.
        test_features: ``(m, D)``; m may be small. Where one of the two is on an accelerator, the
            work is done there.
        test_labels: ``(m,)``. An image of a class that is not in the bank counts as wrong.
        ks: numbers of neighbours; at most n are used.
        temperature: of the weights, above 0.
        chunk: test images at a time, which bounds the memory: about 100 kB each.

    Returns:
        Top-1 accuracy in [0, 1] by k, in the order of ``ks``.

    Raises:
        ValueError: empty, misshapen or non-finite input, no class in common, or a k below 1.
    """
    check_split(train_features, train_labels, test_features, test_labels)
    _check_settings(ks, temperature, chunk)
    device = test_features.device if test_features.is_cuda else train_features.device
    steps = sorted({min(k, len(train_features)) for k in ks})
    correct = torch.zeros(len(steps), dtype=torch.int64, device=device)
    votes = _votes(test_features, train_features, train_labels, ks, temperature, chunk, device)
    for predicted, labels in zip(votes, test_labels.split(chunk), strict=True):
        correct += (predicted == labels.to(device)).sum(dim=1)
    share = dict(zip(steps, (correct.double() / len(test_features)).tolist(), strict=True))
    return {k: share[min(k, len(train_features))] for k in ks}


def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Classifier:
    """Return the vote of `knn_accuracies` as a function of features.

    >>> classify = knn_classifier(torch.eye(3), torch.tensor([5, 7, 9]), k=1)
    >>> classify(torch.tensor([[0.1, 0.9, 0.0]]))
    tensor([7])

    Args:
        train_features: ``(n, D)``, of clean images.
        train_labels: ``(n,)``, any whole numbers.
        k: neighbours; at most n are used.
        temperature: of the weights exp(similarity / temperature).
        chunk: images at a time, which bounds the memory.

    Returns:
        A function ``(B, D) -> (B,)``, which works on the device of ``train_features``.

    Raises:
        ValueError: empty, misshapen or non-finite features, or k or temperature out of range.
    """
    check_labelled("train_", train_features, train_labels)
    _check_settings((k,), temperature, chunk)

    @torch.no_grad()
    def classify(features: Tensor) -> Tensor:
        check_classifiable(features, train_features.shape[1])
        votes = _votes(
            features, train_features, train_labels, (k,), temperature, chunk, train_features.device
        )
        return torch.cat([predicted[0] for predicted in votes])

    return classify


def _check_settings(ks: Sequence[int], temperature: float, chunk: int) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"each k must be an int >= 1; got {', '.join(map(str, ks)) or 'none'}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature!r}.")
    if chunk < 1:
        raise ValueError(f"chunk must be an int >= 1; got {chunk!r}.")


def _votes(
    features: Tensor,
    bank: Tensor,
    labels: Tensor,
    ks: Sequence[int],
    temperature: float,
    chunk: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield the labels that features get, ``(steps, chunk)``: a row for each k, ascending."""
    classes, voted = labels.to(device).unique(return_inverse=True)
    steps = sorted({min(k, len(bank)) for k in ks})
    for part in features.split(chunk):
        similarity, nearest = _search(part.to(device), bank, steps[-1])
        # Relative to the nearest, so that no temperature overflows.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), len(classes), device=device)
        before, found = 0, []
        for k in steps:  # what the nearer ones voted stays
            votes.scatter_add_(1, voted[nearest[:, before:k]], weight[:, before:k])
            found.append(classes[votes.argmax(dim=1)])
            before = k
        yield torch.stack(found)


def _search(features: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the cosine similarities and the rows of the k nearest, the nearest first."""
    queries = F.normalize(features.float(), dim=1)
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty_like(best, dtype=torch.int64)
    for first in range(0, len(bank), _BANK):
        part = F.normalize(bank[first : first + _BANK].to(queries.device).float(), dim=1)
        found, at = (queries @ part.T).topk(min(k, len(part)), dim=1, sorted=False)
        best, rows = torch.cat([best, found], dim=1), torch.cat([rows, at + first], dim=1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        rows = rows.gather(1, order)
    return best, rows
