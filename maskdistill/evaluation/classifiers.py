"""Classifiers of features, as functions: fitted once, on clean images, then asked of any others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Classifier: TypeAlias = Callable[[Tensor], Tensor]
"""From features ``(B, D)`` to predicted labels ``(B,)``."""


def knn_classifier(
    train_features: Tensor,
    train_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> Classifier:
    """Return DINO's weighted k-NN classifier as a function of features.

    >>> classify = knn_classifier(torch.eye(3), torch.tensor([5, 7, 9]), k=1)
    >>> classify(torch.tensor([[0.1, 0.9, 0.0]]))
    tensor([7])

    The same votes as `knn_accuracy` (Wu et al., 2018; Caron et al., 2021).

    Args:
        train_features: ``(n, D)``, of clean images.
        train_labels: ``(n,)`` int64, any numbers.
        k: neighbours; at most n are used.
        temperature: of the weights exp(similarity / temperature).
        chunk: images at a time, which bounds the memory.

    Returns:
        A function ``(B, D) -> (B,)``, which works on the device of ``train_features``.

    Raises:
        ValueError: empty, misshapen or non-finite features, or k or temperature out of range.
    """
    _check_training(train_features, train_labels)
    if k < 1 or not temperature > 0:
        raise ValueError(
            f"k must be an int >= 1 and temperature positive; got k={k!r} and "
            f"temperature={temperature!r}."
        )
    k = min(k, len(train_features))
    bank = F.normalize(train_features.float(), dim=1)
    classes, positions = train_labels.to(bank.device).unique(return_inverse=True)

    @torch.no_grad()
    def classify(features: Tensor) -> Tensor:
        found = []
        for part in _checked(features, bank).split(chunk):
            similarity, nearest = (F.normalize(part, dim=1) @ bank.T).topk(k, dim=1)
            # Relative to the nearest, so that no temperature overflows.
            weight = ((similarity - similarity[:, :1]) / temperature).exp()
            votes = torch.zeros(len(part), len(classes), device=bank.device)
            votes.scatter_add_(1, positions[nearest], weight)
            found.append(classes[votes.argmax(dim=1)])
        return torch.cat(found)

    return classify


def linear_classifier(
    train_features: Tensor, train_labels: Tensor, *, inverse_penalty: float = 1.0
) -> Classifier:
    """Return scikit-learn's logistic regression on standardised features, as a function.

    >>> features, labels = torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 3, 3])
    >>> linear_classifier(features, labels)(torch.tensor([[0.5], [6.0]]))
    tensor([0, 3])

    For a head that is trained already, write the function yourself:
    ``lambda features: head(features).argmax(dim=1)``.

    Args:
        train_features: ``(n, D)``, of clean images; standardised by their own mean and deviation,
            as are later the features that are classified.
        train_labels: ``(n,)`` int64, any numbers, of at least two classes.
        inverse_penalty: scikit-learn's ``C``, positive.

    Returns:
        A function ``(B, D) -> (B,)``, which works on the device of ``train_features``.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: empty, misshapen or non-finite features, one class alone, or a penalty out of
            range.
    """
    _check_training(train_features, train_labels)
    if not inverse_penalty > 0:
        raise ValueError(f"inverse_penalty must be positive; got {inverse_penalty!r}.")
    if len(train_labels.unique()) < 2:
        raise ValueError("a linear classifier needs at least two classes; all labels are the same.")
    try:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "linear_classifier needs scikit-learn: pip install 'maskdistill[eval]'."
        ) from error
    train = train_features.detach().double()
    deviation, mean = torch.std_mean(train, dim=0, correction=0)
    deviation = deviation.clamp_min(1e-12)  # a constant feature says nothing, and breaks nothing
    model = LogisticRegression(C=inverse_penalty, max_iter=5000)
    model.fit(((train - mean) / deviation).cpu().numpy(), train_labels.cpu().numpy())
    weight, bias = (
        torch.as_tensor(values, dtype=torch.float64, device=train.device)
        for values in (model.coef_, model.intercept_)
    )
    if len(weight) == 1:  # of two classes scikit-learn keeps the second one's score alone
        weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
    weight = weight / deviation
    bias = bias - weight @ mean
    classes = torch.as_tensor(model.classes_, device=train.device)

    @torch.no_grad()
    def classify(features: Tensor) -> Tensor:
        scores = F.linear(_checked(features, train).double(), weight, bias)
        return classes[scores.argmax(dim=1)]

    return classify


def _check_training(features: Tensor, labels: Tensor) -> None:
    if features.ndim != 2 or labels.ndim != 1 or len(features) != len(labels) or not len(labels):
        raise ValueError(
            f"train_features must be (n, D) with n >= 1 labels (n,); got {tuple(features.shape)} "
            f"and {tuple(labels.shape)}."
        )
    if not torch.isfinite(features).all():
        raise ValueError("train_features hold NaN or infinite numbers; has training diverged?")


def _checked(features: Tensor, trained_on: Tensor) -> Tensor:
    """Return features to classify as float32 on the classifier's device."""
    width = trained_on.shape[1]
    if features.ndim != 2 or features.shape[1] != width or not len(features):
        raise ValueError(
            f"the classifier was fitted on features of width {width} and takes (B, {width}) with "
            f"B >= 1; got {tuple(features.shape)}."
        )
    if not torch.isfinite(features).all():
        raise ValueError(
            "the features to classify hold NaN or infinite numbers; has training diverged?"
        )
    return features.to(trained_on.device, torch.float32)
