"""Classifiers as functions: they vote as k-NN accuracy does, and separate as scikit-learn does."""

from __future__ import annotations

import pytest
import torch

from maskdistill.evaluation import knn_accuracy, knn_classifier, linear_classifier


def clusters(n: int, seed: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 12, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    return centers[labels] + 1.2 * torch.randn(n, 12, generator=generator), labels


def test_votes_as_knn_accuracy_does() -> None:
    train, (features, labels) = clusters(200, 0), clusters(101, 1)
    classify = knn_classifier(*train, chunk=7)
    share = (classify(features) == labels).double().mean().item()
    assert share == pytest.approx(knn_accuracy(*train, features, labels))
    assert 0.3 < share < 1.0, "neither trivial nor hopeless"


def test_labels_may_skip_numbers() -> None:
    features, labels = clusters(80, 0)
    names = torch.tensor([3, 1000, 7, 42])
    predicted = knn_classifier(features, names[labels], k=1)(features)
    assert predicted.equal(names[labels])


@pytest.mark.parametrize("classes", [2, 4])
def test_linear_is_scikit_learns(classes: int) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    pre = pytest.importorskip("sklearn.preprocessing")
    pipe = pytest.importorskip("sklearn.pipeline")
    features, labels = clusters(120, 0, classes)
    features[:, 3] = 100 * features[:, 3] + 50  # scales must not matter
    features[:, 5] = 7.0  # nor a feature that says nothing
    names = torch.tensor([5, 2, 9, 70])[labels]
    test = clusters(90, 1, classes)[0]
    test[:, 3] = 100 * test[:, 3] + 50
    test[:, 5] = 7.0
    model = pipe.make_pipeline(pre.StandardScaler(), linear.LogisticRegression(max_iter=5000))
    model.fit(features.numpy(), names.numpy())
    predicted = linear_classifier(features, names)(test)
    assert (predicted.numpy() == model.predict(test.numpy())).mean() > 0.98
    assert len(predicted.unique()) == classes


def test_bad_input() -> None:
    features, labels = clusters(20, 0)
    for make in (knn_classifier, linear_classifier):
        with pytest.raises(ValueError, match=r"train_features must be \(n, D\)"):
            make(features, labels[:-1])
        with pytest.raises(ValueError, match="diverged"):
            make(features * float("nan"), labels)
        with pytest.raises(ValueError, match="takes"):
            make(features, labels)(features[:, :5])
        with pytest.raises(ValueError, match="to classify hold NaN"):
            make(features, labels)(features * float("nan"))
    with pytest.raises(ValueError, match="k must be"):
        knn_classifier(features, labels, k=0)
    with pytest.raises(ValueError, match="temperature"):
        knn_classifier(features, labels, temperature=0.0)
    with pytest.raises(ValueError, match="two classes"):
        linear_classifier(features, labels * 0)
    with pytest.raises(ValueError, match="inverse_penalty"):
        linear_classifier(features, labels, inverse_penalty=0.0)
