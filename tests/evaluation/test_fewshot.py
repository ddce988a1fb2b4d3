"""Few-shot episodes against a plain loop, and where there are too few images for one."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdistill.data import open_data
from maskdistill.evaluation.probes import (
    RAVI_TEST_CLASSES,
    _episodes,
    _logistic,
    _nearest_centroid,
    _rows_by_class,
    few_shot,
    rows_of_classes,
)

DATA = Path(__file__).parents[3] / "shared" / "data"


def clusters(n: int, classes: int = 8, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, 12, generator=generator)
    labels = torch.arange(n) % classes
    return centers[labels] + noise * torch.randn(n, 12, generator=generator), labels


# --- The episodes


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(4, 12), min_size=3, max_size=7), st.integers(2, 3), st.integers(0, 99))
def test_episodes_draw_without_replacement(counts: list[int], ways: int, seed: int) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    rows, numbers = _rows_by_class(labels)
    assert numbers.tolist() == counts
    drawn = _episodes(rows, numbers, ways, 4, torch.Generator().manual_seed(seed))
    assert drawn.shape[1:] == (ways, 4)
    own = labels[drawn]
    assert (own == own[:, :, :1]).all(), "one class per way"
    for episode in drawn:
        assert len(set(episode.flatten().tolist())) == ways * 4
        assert len({int(labels[way[0]]) for way in episode}) == ways


def test_every_image_is_drawn_as_often() -> None:
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 12)
    rows, numbers = _rows_by_class(labels)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([_episodes(rows, numbers, 2, 3, generator) for _ in range(60)])
    share = torch.bincount(drawn.flatten(), minlength=20) / len(drawn)
    expected = torch.tensor([2 / 3 * 3 / 4] * 8 + [2 / 3 * 3 / 12] * 12)
    torch.testing.assert_close(share, expected, atol=0.03, rtol=0)


# --- The classifiers


@pytest.mark.parametrize("center", [False, True])
def test_is_the_mean_of_a_plain_loop(center: bool) -> None:
    features, labels = clusters(200, noise=1.5)
    features += 2
    base = features.mean(dim=0) if center else None
    found = few_shot(features, labels, shots=5, queries=6, episodes=7, center=base, seed=3)
    rows, counts = _rows_by_class(labels)
    drawn = _episodes(rows, counts, 5, 11, torch.Generator().manual_seed(3))[:7]
    accuracies = []
    for episode in drawn:
        hits = []
        centroids = [
            torch.stack([F.normalize(features[i] - (base if center else 0), dim=0)
                         for i in way[:5].tolist()]).mean(dim=0) for way in episode
        ]  # fmt: skip
        for number, way in enumerate(episode):
            for i in way[5:].tolist():
                x = F.normalize(features[i] - (base if center else 0), dim=0)
                distances = torch.stack([(x - c).norm() for c in centroids])
                hits.append(float(distances.argmin() == number))
        accuracies.append(sum(hits) / len(hits))
    assert found.episodes.tolist() == pytest.approx(accuracies)
    assert found.accuracy == pytest.approx(sum(accuracies) / 7)
    assert 0.3 < found.accuracy < 0.95, "neither trivial nor hopeless"


def test_logistic_regression_per_episode() -> None:
    pytest.importorskip("sklearn")
    features, labels = clusters(400, noise=1.5)
    one, five = (
        few_shot(features, labels, shots=shots, episodes=30, classifier="logistic")
        for shots in (1, 5)
    )
    assert 0.3 < one.accuracy < five.accuracy < 1
    support = torch.eye(4)[torch.stack([torch.randperm(4) for _ in range(3)])][:, :, None]
    query = support.roll(1, dims=1) + 0.1 * torch.randn(3, 4, 9, 4)
    assert torch.equal(_logistic(support, query), _nearest_centroid(support, query))


def test_centring_takes_away_what_all_share() -> None:
    features, labels = clusters(400, noise=1.5)
    plain = few_shot(features, labels, episodes=100)
    moved = few_shot(features + 30, labels, episodes=100, center=features.mean(0) + 30)
    assert moved.accuracy == pytest.approx(
        few_shot(features, labels, episodes=100, center=features.mean(0)).accuracy, abs=0.01
    )
    assert few_shot(features + 30, labels, episodes=100).accuracy < plain.accuracy


# --- The numbers


def test_the_interval_covers_the_long_run() -> None:
    """19 of 20 intervals hold the mean of very many episodes; here at least 33 of 40."""
    features, labels = clusters(160, noise=2.0)
    truth = few_shot(features, labels, episodes=5000, queries=5, seed=999).accuracy
    runs = [few_shot(features, labels, episodes=50, queries=5, seed=seed) for seed in range(40)]
    covered = sum(abs(run.accuracy - truth) <= run.interval for run in runs)
    assert 33 <= covered <= 40
    assert 0.005 < runs[0].interval < 0.1


def test_the_same_seed_has_the_same_episodes() -> None:
    features, labels = clusters(200)
    short, long = (few_shot(features, labels, episodes=n, seed=1).episodes for n in (30, 150))
    assert torch.equal(long[:30], short)
    assert len(long) == 150
    assert not torch.equal(few_shot(features, labels, episodes=30, seed=2).episodes, short)
    assert torch.equal(few_shot(features, 3 * labels - 9, episodes=30, seed=1).episodes, short)


# --- What it refuses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": 9}, "9 ways needs 9 classes; the labels have 8"),
        ({"queries": 30}, r"takes 1 \+ 30 images of a class, and class 0 has 25"),
        ({"ways": 1}, "ways must be"),
        ({"shots": 0}, "shots must be"),
        ({"queries": 0}, "queries must be"),
        ({"episodes": 1}, "episodes must be"),
        ({"classifier": "svm"}, "classifier must be"),
        ({"center": torch.zeros(3)}, r"center must be \(12,\)"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    features, labels = clusters(200)
    with pytest.raises(ValueError, match=message):
        few_shot(features, labels, **changes)


def test_refuses_features_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(200)
    with pytest.raises(ValueError, match="features hold NaN"):
        few_shot(features.clone().fill_(float("nan")), labels)
    with pytest.raises(ValueError, match="features must be"):
        few_shot(features, labels[:-1])
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"maskdistill\[eval\]"):
        few_shot(features, labels, classifier="logistic")


# --- Ravi's classes


def test_rows_of_classes() -> None:
    assert rows_of_classes(torch.tensor([2, 0, 1, 2]), ["a", "b", "c"], ["c", "a"]) == [0, 1, 3]
    with pytest.raises(ValueError, match="1 of the 2 wanted classes are not in the data.*'d'"):
        rows_of_classes([0], ["a", "b"], ["a", "d"])


@pytest.mark.skipif(not DATA.is_dir(), reason="the data for measurements are not here")
def test_ravis_test_classes_are_those_of_the_files() -> None:
    with (DATA / "mini_imagenet_csv" / "test.csv").open() as file:
        listed = {row["label"] for row in csv.DictReader(file)}
    assert listed == set(RAVI_TEST_CLASSES)
    data = open_data(DATA / "mini_imagenet_csv")
    rows = rows_of_classes(data.train.labels, data.classes, RAVI_TEST_CLASSES)
    assert {data.classes[data.train.labels[row]] for row in rows} == listed
    assert len(rows) == len(data.train) // 5
