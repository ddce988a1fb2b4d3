"""k-NN against scikit-learn's idea of it, and at its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from maskdistill.evaluation import balanced_indices, knn_accuracy


def clusters(n: int, seed: int, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    return centers[labels] + 1.5 * torch.randn(n, 16, generator=generator), labels


def by_definition(
    train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], k: int
) -> float:
    correct = 0
    for feature, label in zip(*test, strict=True):
        similarity = F.cosine_similarity(train[0], feature[None])
        votes: dict[int, float] = {}
        for i in similarity.argsort(descending=True)[:k].tolist():
            vote = float((similarity[i].double() / 0.07).exp())
            votes[int(train[1][i])] = votes.get(int(train[1][i]), 0.0) + vote
        correct += max(votes, key=lambda c: votes[c]) == int(label)
    return correct / len(test[1])


@pytest.mark.parametrize("k", [1, 5, 20])
def test_is_the_definition(k: int) -> None:
    train, test = clusters(200, 0), clusters(73, 1)
    accuracy = knn_accuracy(*train, *test, k=k)
    assert accuracy == pytest.approx(by_definition(train, test, k))
    assert 0.3 < accuracy < 1.0, "neither trivial nor hopeless"
    assert knn_accuracy(*train, *test, k=k, chunk=7) == accuracy


def test_few_images_and_many_neighbours() -> None:
    train, test = clusters(10, 0), clusters(3, 1)
    assert 0 <= knn_accuracy(*train, *test, k=200) <= 1
    assert knn_accuracy(*train, *train, k=1, temperature=1e-4) == 1.0


def test_bad_input() -> None:
    features, labels = clusters(10, 0)
    with pytest.raises(ValueError, match="test_features must be"):
        knn_accuracy(features, labels, features[:0], labels[:0])
    with pytest.raises(ValueError, match="train_features must be"):
        knn_accuracy(features, labels[:-1], features, labels)
    with pytest.raises(ValueError, match="NaN"):
        knn_accuracy(features * float("nan"), labels, features, labels)
    with pytest.raises(ValueError, match="k must be"):
        knn_accuracy(features, labels, features, labels, k=0)


def test_balanced_choice() -> None:
    labels = torch.tensor([0] * 10 + [1] * 2 + [2] * 5)
    chosen = labels[balanced_indices(labels, 9)]
    assert torch.bincount(chosen).tolist() == [4, 2, 3]
    assert balanced_indices(labels, 100) == list(range(17))
