"""The probe against scikit-learn's optimum, against plain SGD, and on what it must refuse."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskdistill.evaluation.probes import (
    LEARNING_RATES,
    LinearClassifier,
    _held_out,
    _Plan,
    _train,
    linear_probe,
    logistic_regression,
)

Split = tuple[Tensor, Tensor]


def clusters(n: int, seed: int, classes: int = 5, width: int = 16, noise: float = 2.0) -> Split:
    """Overlapping classes, with dimensions that go together, as in real features."""
    fixed = torch.Generator().manual_seed(9)
    centers = torch.randn(classes, width, generator=fixed)
    mix = torch.eye(width) + 0.5 * torch.randn(width, width, generator=fixed) / width**0.5
    own = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    return centers[labels] + noise * torch.randn(n, width, generator=own) @ mix, labels


# --- Against scikit-learn


@pytest.mark.parametrize(("n", "classes", "noise"), [(3000, 10, 4.0), (2000, 2, 4.0)])
def test_reaches_scikit_learns_optimum(n: int, classes: int, noise: float) -> None:
    pytest.importorskip("sklearn")
    train, test = (
        clusters(count, seed, classes, noise=noise) for count, seed in ((n, 0), (9000, 1))
    )
    probe = linear_probe(*train, *test, epochs=50)
    optimum = logistic_regression(*train, *test)
    assert 0.3 < optimum.accuracy < 0.95, "neither hopeless nor trivial"
    assert probe.accuracy == pytest.approx(optimum.accuracy, abs=0.005)


def test_the_scale_of_features_does_not_matter() -> None:
    """Small numbers around a large mean, as a random ViT gives them, are as good as any."""
    pytest.importorskip("sklearn")
    train, test = clusters(1000, 0), clusters(2000, 1)
    probe, optimum = linear_probe(*train, *test, epochs=20), logistic_regression(*train, *test)
    scale, shift = torch.logspace(-3, 2, 16), torch.linspace(-1, 1, 16)
    moved = [(x * scale + shift, y) for x, y in (train, test)]
    assert linear_probe(*moved[0], *moved[1], epochs=20).accuracy == pytest.approx(
        probe.accuracy, abs=0.002
    )
    assert logistic_regression(*moved[0], *moved[1]).accuracy == pytest.approx(
        optimum.accuracy, abs=0.002
    )
    raw = [linear_probe(*data, epochs=20, standardise=False, learning_rates=(0.1,)).accuracy
           for data in ((*train, *test), (*moved[0], *moved[1]))]  # fmt: skip
    assert raw[1] < raw[0] - 0.05, "which is why it is the default"


def test_the_classifier_takes_features_as_they_are() -> None:
    """The standardisation is in the weights, and a dimension that does not vary is harmless."""
    train, test = clusters(400, 0), clusters(200, 1)
    constant = [(torch.cat([3 * x + 7, torch.full((len(x), 1), 0.1)], dim=1), y)
                for x, y in (train, test)]  # fmt: skip
    found: list[LinearClassifier] = [linear_probe(*constant[0], *constant[1], epochs=10)]
    pytest.importorskip("sklearn")
    found.append(logistic_regression(*constant[0], *constant[1]))
    for classifier in found:
        assert classifier.weight[:, -1].tolist() == [0] * 5
        logits = constant[1][0] @ classifier.weight.T + classifier.bias
        accuracy = float((logits.argmax(1) == test[1]).double().mean())
        assert classifier.accuracy == pytest.approx(accuracy)  # type: ignore[attr-defined]
        assert accuracy > 0.4


# --- Against plain SGD


def test_runs_at_once_are_runs_alone() -> None:
    """Each is torch's own SGD on the same batches."""
    features, labels = clusters(70, 0)
    rates, decays = (0.05, 2.0), (0.0, 0.01)
    grid = [(rate, decay) for rate in rates for decay in decays]
    together = _train(features, labels, 5, grid, _Plan(3, 16, False, 0))
    for run, (rate, decay) in enumerate(grid):
        layer = torch.nn.Linear(16, 5)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(
            [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias]}],
            lr=rate * 16 / 256, momentum=0.9,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 5)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            for rows in torch.randperm(70, generator=generator).split(16):
                optimizer.zero_grad()
                F.cross_entropy(layer(features[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(
            together.weight[run], layer.weight.detach(), rtol=2e-4, atol=1e-5
        )
        torch.testing.assert_close(together.bias[run], layer.bias.detach(), rtol=2e-4, atol=1e-5)


# --- The choice


def test_the_test_images_have_no_say() -> None:
    train, test = clusters(600, 0), clusters(300, 1)
    probe = linear_probe(*train, *test, epochs=5)
    other = linear_probe(*train, test[0].flip(0) * 3, test[1], epochs=5)
    assert other.accuracy != probe.accuracy
    assert other.learning_rate == probe.learning_rate
    assert other.holdout_accuracies == probe.holdout_accuracies
    assert torch.equal(other.weight, probe.weight)
    assert tuple(probe.holdout_accuracies) == tuple((rate, 0.0) for rate in LEARNING_RATES)
    best = max(probe.holdout_accuracies.values())
    assert probe.holdout_accuracies[probe.learning_rate, probe.weight_decay] == best


def test_a_choice_at_the_end_of_the_range_is_told() -> None:
    train, test = clusters(300, 0), clusters(100, 1)
    with pytest.warns(UserWarning, match="is the highest of those tried") as caught:
        linear_probe(*train, *test, epochs=9, learning_rates=(1e-6, 1e-5, 1.0))
    assert caught[0].filename == __file__, "told to whoever called"
    with pytest.warns(UserWarning, match="is the lowest of those tried"):
        linear_probe(*train, *test, epochs=2, learning_rates=(0.1, 1e3, 1e4), weight_decays=(1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        easy = clusters(300, 0, noise=0.01)
        probe = linear_probe(*easy, *easy, epochs=2)
    assert probe.accuracy == 1, "all are as good, so none is at an end"


def test_a_run_that_diverges_is_not_chosen() -> None:
    train, test = clusters(300, 0), clusters(100, 1)
    probe = linear_probe(*train, *test, epochs=20, learning_rates=(1e-2, 1e5), weight_decays=(10,))
    assert probe.learning_rate == 1e-2
    assert probe.holdout_accuracies[1e5, 10] == 0
    assert probe.weight.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.floats(0.01, 0.99),
    st.integers(0, 9),
)
def test_every_class_gives_its_share(counts: list[int], share: float, seed: int) -> None:
    targets = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    targets = targets[torch.randperm(len(targets))]
    if max(counts) == 1:
        with pytest.raises(ValueError, match="has only one"):
            _held_out(targets, share, seed)
        return
    mask = _held_out(targets, share, seed)
    for number, count in enumerate(counts):
        held = int(mask[targets == number].sum())
        wanted = int(torch.tensor(share) * count + 0.5)
        assert held == min(max(wanted, 1), count - 1)
    assert torch.equal(mask, _held_out(targets, share, seed))


def test_another_seed_holds_out_others() -> None:
    targets = torch.arange(100) % 4
    assert not torch.equal(_held_out(targets, 0.2, 0), _held_out(targets, 0.2, 1))


@pytest.mark.parametrize("names", [[3, 1000, -5, 7, 12]])
def test_labels_are_only_names(names: list[int]) -> None:
    train, test = clusters(300, 0), clusters(100, 1)
    renamed = torch.tensor(names)
    probe = linear_probe(train[0], renamed[train[1]], test[0], renamed[test[1]], epochs=5)
    assert probe.accuracy > 0.4
    assert set(probe.predict(test[0]).tolist()) <= set(names)
    assert probe.classes.tolist() == sorted(names)


def test_same_seed_same_probe() -> None:
    train, test = clusters(300, 0), clusters(100, 1)
    state = torch.get_rng_state()
    first, second = (linear_probe(*train, *test, epochs=3, seed=4) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert not torch.equal(first.weight, linear_probe(*train, *test, epochs=3, seed=5).weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": ()}, "learning_rates must be"),
        ({"learning_rates": (0.1, 0.0)}, "learning_rates must be"),
        ({"weight_decays": (-1.0,)}, "weight_decays must be"),
        ({"epochs": 0}, "epochs must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"holdout": 1.0}, "holdout must be a share"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    train = clusters(30, 0)
    with pytest.raises(ValueError, match=message):
        linear_probe(*train, *train, **changes)


def test_data_that_cannot_be_classified() -> None:
    x, y = clusters(30, 0)
    with pytest.raises(ValueError, match="at least two classes; all 30 training labels are 0"):
        linear_probe(x, torch.zeros_like(y), x, y)
    with pytest.raises(ValueError, match="train_features hold NaN"):
        linear_probe(x * float("nan"), y, x, y)
    with pytest.raises(ValueError, match="no class in common"):
        linear_probe(x, y, x, y + 5)


def test_logistic_regression_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = clusters(30, 0)
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match="cs must be"):
        logistic_regression(x, y, x, y, cs=(0.0,))
    with pytest.raises(ValueError, match="at least two classes"):
        logistic_regression(x, y * 0, x, y)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match=r"maskdistill\[eval\]"):
        logistic_regression(x, y, x, y)
