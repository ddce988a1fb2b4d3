"""k-NN against other implementations of it, and at its edges."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskdistill.evaluation import balanced_indices, knn_accuracy
from maskdistill.evaluation import knn as knn_module
from maskdistill.evaluation.knn import knn_accuracies

ROOT = Path(__file__).parents[2]
CLONE = ROOT.parent / "peers" / "dino"
KS = (1, 5, 20, 100)


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


# --- All k in one search


def test_all_k_are_the_definition() -> None:
    train, test = clusters(150, 0), clusters(60, 1)
    found = knn_accuracies(*train, *test, ks=(20, 1, 5))
    assert 0.3 < found[20] < 1.0, "neither trivial nor hopeless"
    assert list(found) == [20, 1, 5]
    assert found == {k: pytest.approx(by_definition(train, test, k)) for k in (20, 1, 5)}


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90), st.integers(1, 40), st.integers(1, 9), st.integers(1, 50),
    st.integers(1, 50), st.integers(0, 99),
)  # fmt: skip
def test_chunks_change_nothing(
    n: int, m: int, classes: int, chunk: int, bank: int, seed: int
) -> None:
    """Neither that of the test images nor that of the bank; and k may be larger than either."""
    train, test = clusters(n, seed, classes), clusters(m, seed + 1, classes)
    if not set(train[1].tolist()) & set(test[1].tolist()):
        return
    whole = knn_accuracies(*train, *test, ks=KS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn_module, "_BANK", bank)
        assert knn_accuracies(*train, *test, ks=KS, chunk=chunk) == whole
    assert whole[100] == knn_accuracy(*train, *test, k=n if n < 100 else 100)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-(2**40), 2**40), min_size=5, max_size=5, unique=True))
def test_labels_are_only_names(names: list[int]) -> None:
    train, test = clusters(80, 0), clusters(30, 1)
    renamed = torch.tensor(names)
    assert knn_accuracies(*train, *test, ks=KS) == knn_accuracies(
        train[0], renamed[train[1]], test[0], renamed[test[1]], ks=KS
    )


def test_neither_scale_nor_half_precision_matter_much() -> None:
    train, test = clusters(200, 0), clusters(73, 1)
    found = knn_accuracies(*train, *test, ks=KS)
    scales = torch.rand(200, 1) + 0.5
    assert knn_accuracies(train[0] * scales, train[1], test[0] * 8, test[1], ks=KS) == found
    half = knn_accuracies(train[0].half(), train[1], test[0].half(), test[1], ks=KS)
    assert half == {k: pytest.approx(value, abs=0.03) for k, value in found.items()}


def test_a_class_that_is_not_in_the_bank_is_wrong() -> None:
    train, test = clusters(50, 0), clusters(50, 1)
    known = train[1] != 4
    found = knn_accuracy(train[0][known], train[1][known], *test)
    inside = test[1] != 4
    alone = knn_accuracy(train[0][known], train[1][known], test[0][inside], test[1][inside])
    assert found == pytest.approx(alone * 0.8)


def test_settings_out_of_range() -> None:
    train = clusters(10, 0)
    for wrong in ({"ks": ()}, {"ks": (5, 0)}, {"temperature": 0.0}, {"chunk": 0}):
        with pytest.raises(ValueError, match="must be|at least"):
            knn_accuracies(*train, *train, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no class in common"):
        knn_accuracies(*train, train[0], train[1] + 5)


# --- Against others


def benchmark() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples/benchmarks"))
        return importlib.import_module("knn")


def test_agrees_with_scikit_learn() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")

    def weights(distances: np.ndarray) -> np.ndarray:
        weight: np.ndarray = np.exp((1 - distances) / 0.07)
        return weight

    train, test = clusters(500, 0), clusters(200, 1)
    for k, found in knn_accuracies(*train, *test, ks=KS).items():
        model = neighbors.KNeighborsClassifier(k, weights=weights, metric="cosine")
        model.fit(train[0].double().numpy(), train[1].numpy())
        assert found == pytest.approx(model.score(test[0].double().numpy(), test[1].numpy()))


@pytest.mark.skipif(
    not (CLONE / "eval_knn.py").is_file(), reason="no clone of facebookresearch/dino"
)
def test_agrees_with_dinos_own() -> None:
    """The original wants normalised features, at least 100 test images, labels below 1000, and no
    more neighbours than there are."""
    original = benchmark().knn_classifier_of(CLONE)
    train, test = clusters(700, 0), clusters(250, 1)
    banks = F.normalize(train[0], dim=1), train[1], F.normalize(test[0], dim=1), test[1]
    for k, found in knn_accuracies(*train, *test, ks=(5, 20, 100, 200)).items():
        assert found == pytest.approx(original(*banks, k, 0.07)[0] / 100)
    with pytest.raises(ValueError, match="range"):
        original(*banks[:2], banks[2][:50], banks[3][:50], 20, 0.07)
    assert knn_accuracy(*banks[:2], banks[2][:50], banks[3][:50]) > 0.3


def test_the_benchmark_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = benchmark()
    script.BANK, script.QUERIES, script.WIDTH = 300, 110, 8
    clone = ["--dino", str(CLONE)] if (CLONE / "eval_knn.py").is_file() else []
    monkeypatch.setattr(sys, "argv", ["knn.py", "--threads", "1", *clone])
    script.main()
    printed = capsys.readouterr().out
    assert printed.startswith("maskdistill: ")
    assert "k=200: " in printed
    assert not clone or "greatest difference: 0.00e+00" in printed
