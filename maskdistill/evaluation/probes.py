"""Linear probes, logistic regression and few-shot episodes on features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.evaluation.features import (
    Classifier,
    check_classifiable,
    check_labelled,
    check_split,
)

LEARNING_RATES = tuple(10 ** (-3 + i / 3) for i in range(13))
"""From 0.001 to 10, three per decade; for a batch of 256, as in DINO."""
INVERSE_PENALTIES = tuple(10.0**i for i in range(-5, 3))
"""scikit-learn's C, from 1e-5 to 100."""

_MOMENTUM = 0.9
_PART = 16_384  # images to classify at a time


@dataclass(frozen=True, eq=False)
class LinearClassifier:
    """A trained linear classifier.

    >>> classifier = LinearClassifier(torch.eye(2), torch.zeros(2), torch.tensor([3, 7]))
    >>> classifier.predict(torch.tensor([[0.1, 0.9]]))
    tensor([7])

    Attributes:
        weight: ``(C, D)``, for features as they are given: a standardisation is already in it.
        bias: ``(C,)``.
        classes: ``(C,)``, the label of each row.
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Return the labels, ``(n,)``, of features ``(n, D)``; refuses other widths and NaN."""
        check_classifiable(features, self.weight.shape[1])
        parts = features.to(self.weight.device).split(_PART)
        own = self.weight.dtype
        scores = (F.linear(part.to(own), self.weight, self.bias) for part in parts)
        return self.classes[torch.cat([part.argmax(dim=1) for part in scores])]

    def accuracy_on(self, features: Tensor, labels: Tensor) -> float:
        """Return the share of features ``(n, D)`` that get their labels ``(n,)``."""
        hits = self.predict(features) == labels.to(self.classes.device)
        return float(hits.double().mean())


@dataclass(frozen=True, eq=False)
class LinearProbe(LinearClassifier):
    """What a linear probe reached, and with which settings.

    Attributes:
        accuracy: top-1 on the test images, in [0, 1].
        learning_rate: the chosen one, for a batch of 256.
        weight_decay: the chosen one.
        holdout_accuracies: on the held-out training images, by (learning rate, weight decay).
    """

    accuracy: float
    learning_rate: float
    weight_decay: float
    holdout_accuracies: dict[tuple[float, float], float]


@dataclass(frozen=True, eq=False)
class LogisticRegression(LinearClassifier):
    """What scikit-learn's logistic regression reached, and with which penalty.

    Attributes:
        accuracy: top-1 on the test images, in [0, 1].
        c: the chosen inverse strength of the penalty.
        holdout_accuracies: on the held-out training images, by C.
    """

    accuracy: float
    c: float
    holdout_accuracies: dict[float, float]


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = (0.0,),
    epochs: int = 100,
    batch_size: int = 256,
    holdout: float = 0.1,
    standardise: bool = True,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear classifier with many learning rates at once, and test the best of them.

    >>> generator = torch.Generator().manual_seed(0)
    >>> labels = torch.arange(400) % 4
    >>> features = torch.eye(4)[labels] + 0.2 * torch.randn(400, 4, generator=generator)
    >>> rates = (1e-3, 1e-2, 1e-1, 1.0)
    >>> parts = features[:300], labels[:300], features[300:], labels[300:]
    >>> probe = linear_probe(*parts, learning_rates=rates, epochs=10)
    >>> probe.accuracy > 0.9, tuple(probe.weight.shape)
    (True, (4, 4))

    SGD with momentum 0.9 and a cosine to 0 on cross-entropy, from zero weights, as in DINO's
    ``eval_linear`` (Caron et al., 2021), but on features that stay as they are: no augmentation.
    All settings see the same batches and are one weight matrix. The setting is chosen by the
    accuracy on a part of the training images, then by the loss there; the classifier is then
    trained anew on all of them, and meets the test images once.

    Args:
        train_features: ``(n, D)``; the work is done on their device.
        train_labels: ``(n,)``, any whole numbers.
        test_features: ``(m, D)``.
        test_labels: ``(m,)``. An image of a class that is not trained on counts as wrong.
        learning_rates: to try, for a batch of 256; scaled linearly with the batch.
        weight_decays: to try with each of them; biases do not decay.
        epochs: passes over the images.
        batch_size: images per step; more than there are is all of them.
        holdout: share of each class's training images that the choice is made on, in (0, 1).
        standardise: give each dimension mean 0 and variance 1 over the training images. A range of
            learning rates fits one scale of features; without it a comparison of two backbones
            would also compare their scales. ``False`` is DINO's.
        seed: of the held-out images and the order of the others.

    Raises:
        ValueError: bad features or labels, fewer than two classes, or settings out of range.
    """
    check_split(train_features, train_labels, test_features, test_labels)
    rates, decays = list(learning_rates), list(weight_decays)
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"learning_rates must be numbers above 0, at least one; got {rates}.")
    if not decays or not all(0 <= decay < math.inf for decay in decays):
        raise ValueError(f"weight_decays must be numbers >= 0, at least one; got {decays}.")
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be an int >= 1; got {value!r}.")
    settings = [(rate, decay) for rate in rates for decay in decays]
    classes, targets = _numbered(train_labels)
    held_out = _held_out(targets, holdout, seed)
    plan = _Plan(epochs, batch_size, standardise, seed)

    # With one setting there is nothing to choose, but its held-out accuracy is still worth telling.
    tried = _train(train_features[~held_out], targets[~held_out], len(classes), settings, plan)
    accuracies, losses = _score(tried, train_features[held_out], targets[held_out])
    best = max(range(len(settings)), key=lambda i: (accuracies[i], -losses[i]))
    _warn_at_end(settings, accuracies, best)
    final = _train(train_features, targets, len(classes), [settings[best]], plan)
    classifier = LinearClassifier(final.weight[0], final.bias[0], classes)
    return LinearProbe(
        **vars(classifier),
        accuracy=classifier.accuracy_on(test_features, test_labels),
        learning_rate=settings[best][0],
        weight_decay=settings[best][1],
        holdout_accuracies=dict(zip(settings, accuracies, strict=True)),
    )


class _Plan(NamedTuple):
    epochs: int
    batch_size: int
    standardise: bool
    seed: int


class _Trained(NamedTuple):
    weight: Tensor  # (R, C, D), for features as they are
    bias: Tensor  # (R, C)


def _numbered(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes, ``(C,)``, and each label's place among them, ``(n,)``."""
    classes, targets = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"a classifier needs at least two classes; all {len(labels)} training labels are "
            f"{int(classes[0])}."
        )
    return classes, targets


def _held_out(targets: Tensor, share: float, seed: int) -> Tensor:
    """Choose this share of each class, ``(n,)`` bool: at least one image, but never the only one.

    Raises:
        ValueError: a share that is none, or classes of one image each.
    """
    if not 0 < share < 1:
        raise ValueError(f"holdout must be a share in (0, 1); got {share!r}.")
    on_cpu = targets.cpu()  # where the draw is the same whatever the device
    order = torch.randperm(len(on_cpu), generator=torch.Generator().manual_seed(seed))
    by_class = order[on_cpu[order].sort(stable=True).indices]  # classes in turn, each shuffled
    counts = torch.bincount(on_cpu)
    wanted = (share * counts + 0.5).long().clamp(min=1).minimum(counts - 1)
    starts = (counts.cumsum(0) - counts)[on_cpu[by_class]]
    place = torch.arange(len(on_cpu)) - starts
    mask = torch.zeros(len(on_cpu), dtype=torch.bool)
    mask[by_class] = place < wanted[on_cpu[by_class]]
    if not mask.any():
        raise ValueError(
            f"the setting is chosen on held-out training images, but each of the {len(counts)} "
            "classes has only one; a probe needs two of at least one class. few_shot takes one."
        )
    return mask.to(targets.device)


def _standardisation(features: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
    """Return what to subtract from features and then multiply them with, ``(D,)`` each."""
    if not wanted:
        return features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    # A dimension that does not vary says nothing; rounding must not be blown up to mean something.
    constant = deviation <= 1e-6 * mean.abs().clamp(min=1e-30)
    return mean, torch.where(constant, torch.zeros_like(mean), 1 / deviation.clamp(min=1e-30))


def _train(
    features: Tensor,
    targets: Tensor,
    classes: int,
    settings: Sequence[tuple[float, float]],
    plan: _Plan,
) -> _Trained:
    """Train one classifier per setting, all on the same batches."""
    features = features.float()
    shift, scale = _standardisation(features, plan.standardise)
    device, (count, width), runs = features.device, features.shape, len(settings)
    batch = min(plan.batch_size, count)
    # One column per run and class, so that a step is two matrix products.
    repeated = torch.tensor(settings, device=device).repeat_interleave(classes, dim=0)
    rate, decay = repeated[:, 0] * batch / 256, repeated[:, 1]
    weight = torch.zeros(width, runs * classes, device=device)
    bias = torch.zeros(runs * classes, device=device)
    speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    generator = torch.Generator().manual_seed(plan.seed)
    steps_per_epoch = math.ceil(count / batch)
    step, steps = 0, plan.epochs * steps_per_epoch
    for _ in range(plan.epochs):
        for rows in torch.randperm(count, generator=generator).to(device).split(batch):
            x = (features[rows] - shift) * scale
            logits = torch.addmm(bias, x, weight).view(len(rows), runs, classes)
            error = logits.softmax(dim=-1)
            own = targets[rows].view(-1, 1, 1).expand(-1, runs, 1)
            error.scatter_add_(-1, own, error.new_full((), -1.0).expand(own.shape))
            error = error.view(len(rows), -1) / len(rows)
            now = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            speed.mul_(_MOMENTUM).addmm_(x.T, error).add_(weight * decay)
            bias_speed.mul_(_MOMENTUM).add_(error.sum(dim=0))
            weight.sub_(speed * now)
            bias.sub_(bias_speed * now)
            step += 1
    weight = weight * scale[:, None]
    bias = bias - shift @ weight
    return _Trained(weight.T.reshape(runs, classes, width), bias.view(runs, classes))


def _score(trained: _Trained, features: Tensor, targets: Tensor) -> tuple[list[float], list[float]]:
    """Return the accuracy and the loss of each run; a run that diverged has 0 and infinity."""
    runs, classes, _ = trained.weight.shape
    hits = torch.zeros(runs, dtype=torch.float64, device=features.device)
    losses = torch.zeros_like(hits)
    part = max(1, _PART // runs)
    for x, wanted in zip(features.split(part), targets.split(part), strict=True):
        logits = F.linear(x.float(), trained.weight.flatten(0, 1), trained.bias.flatten())
        logits = logits.view(len(x), runs, classes).transpose(1, 2)  # classes second, as F wants
        own = wanted[:, None].expand(-1, runs)
        hits += (logits.argmax(dim=1) == own).sum(dim=0)
        losses += F.cross_entropy(logits, own, reduction="none").double().sum(dim=0)
    finite = losses.isfinite()
    hits, losses = hits.where(finite, 0), losses.where(finite, math.inf)
    return (hits / len(targets)).tolist(), (losses / len(targets)).tolist()


def _warn_at_end(
    settings: Sequence[tuple[float, float]], accuracies: Sequence[float], best: int
) -> None:
    """Warn if a learning rate beyond the range might be better than all in it."""
    rates = sorted({rate for rate, _ in settings})
    ends = {rates[0], rates[-1]}
    inner = [a for (rate, _), a in zip(settings, accuracies, strict=True) if rate not in ends]
    if settings[best][0] in ends and inner and accuracies[best] > max(inner):
        side = "lowest" if settings[best][0] == rates[0] else "highest"
        warnings.warn(
            f"the best learning rate, {settings[best][0]:g}, is the {side} of those tried; one "
            "beyond may be better. Widen learning_rates.",
            UserWarning,
            stacklevel=4,  # the caller of linear_probe, through torch.no_grad
        )


def logistic_regression(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    cs: Sequence[float] = INVERSE_PENALTIES,
    holdout: float = 0.1,
    standardise: bool = True,
    max_iter: int = 1000,
    seed: int = 0,
) -> LogisticRegression:
    """Fit scikit-learn's logistic regression: the optimum that the linear probe should reach.

    >>> found = logistic_regression(*train, *test)  # doctest: +SKIP
    >>> found.accuracy, found.c  # doctest: +SKIP
    (0.412, 0.001)

    L-BFGS with an L2 penalty, in float64 on the CPU. C is chosen on the same held-out training
    images as in `linear_probe`, and the classifier then fitted to all of them. It has no learning
    rate and no epochs, and so checks those of the probe.

    Args:
        train_features: ``(n, D)``.
        train_labels: ``(n,)``, any whole numbers.
        test_features: ``(m, D)``.
        test_labels: ``(m,)``.
        cs: inverse strengths of the penalty to try; smaller is stronger. The penalty is set against
            the sum over images, so the best one falls with their number.
        holdout: share of each class's training images that the choice is made on, in (0, 1).
        standardise: as in `linear_probe`; here it says what the penalty is measured in.
        max_iter: greatest number of L-BFGS's iterations; scikit-learn warns where it was too few.
        seed: of the held-out images.

    Raises:
        ImportError: without scikit-learn.
        ValueError: bad features or labels, fewer than two classes, or settings out of range.
    """
    check_split(train_features, train_labels, test_features, test_labels)
    _check_penalties("cs", cs)
    classes, targets = (tensor.cpu() for tensor in _numbered(train_labels))
    held_out = _held_out(targets, holdout, seed)
    features = train_features.cpu().double()

    def fit(rows: Tensor, c: float) -> LinearClassifier:
        weight, bias = _logistic_fit(features[rows], targets[rows], c, standardise, max_iter)
        return LinearClassifier(weight.float(), bias.float(), classes)

    labels = classes[targets]
    accuracies = [fit(~held_out, c).accuracy_on(features[held_out], labels[held_out]) for c in cs]
    # Of equals the strongest penalty.
    best = max(range(len(cs)), key=lambda i: (accuracies[i], -cs[i]))
    classifier = fit(torch.ones_like(held_out), cs[best])
    return LogisticRegression(
        **vars(classifier),
        accuracy=classifier.accuracy_on(test_features, test_labels),
        c=cs[best],
        holdout_accuracies=dict(zip(cs, accuracies, strict=True)),
    )


def linear_classifier(
    train_features: Tensor, train_labels: Tensor, *, inverse_penalty: float = 1.0
) -> Classifier:
    """Return a logistic regression of one fixed penalty as a function of features.

    >>> features, labels = torch.tensor([[0.0], [1.0], [4.0], [5.0]]), torch.tensor([0, 0, 3, 3])
    >>> linear_classifier(features, labels)(torch.tensor([[0.5], [6.0]]))
    tensor([0, 3])

    For a head that is trained already, write the function yourself:
    ``lambda features: head(features).argmax(dim=1)``.

    Args:
        train_features: ``(n, D)``, of clean images; standardised as in `linear_probe`.
        train_labels: ``(n,)``, any whole numbers, of at least two classes.
        inverse_penalty: scikit-learn's ``C``, positive.

    Returns:
        A function ``(B, D) -> (B,)``, which works on the device of ``train_features``.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: empty, misshapen or non-finite features, one class alone, or a penalty out of
            range.
    """
    check_labelled("train_", train_features, train_labels)
    _check_penalties("inverse_penalty", (inverse_penalty,))
    classes, targets = (tensor.cpu() for tensor in _numbered(train_labels))
    features = train_features.detach().cpu().double()
    weight, bias = _logistic_fit(features, targets, inverse_penalty, True, 5000)
    device = train_features.device
    # In float64, for features whose spread is small against their mean.
    return LinearClassifier(weight.to(device), bias.to(device), classes.to(device)).predict


def _check_penalties(name: str, values: Sequence[float]) -> None:
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError(f"{name} must be numbers above 0, at least one; got {list(values)}.")


def _logistic_model(**settings: Any) -> Any:
    """Return scikit-learn's logistic regression, not fitted."""
    try:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "logistic regression needs scikit-learn: pip install 'maskdistill[eval]'."
        ) from error
    return LogisticRegression(**settings)


def _logistic_fit(
    features: Tensor, targets: Tensor, c: float, standardise: bool, max_iter: int
) -> tuple[Tensor, Tensor]:
    """Fit to float64 features and targets 0, 1, ... on the CPU: ``(C, D)`` weights, ``(C,)`` bias.

    The standardisation is in the weights.
    """
    shift, scale = _standardisation(features, standardise)
    model = _logistic_model(C=c, max_iter=max_iter)
    model.fit(((features - shift) * scale).numpy(), targets.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(weight) == 1:  # of two classes scikit-learn keeps the second one's score alone
        weight, bias = (torch.cat([torch.zeros_like(t), t]) for t in (weight, bias))
    weight = weight * scale
    return weight, bias - weight @ shift


# --- Few-shot


RAVI_TEST_CLASSES = (
    "n01930112", "n01981276", "n02099601", "n02110063", "n02110341", "n02116738", "n02129165",
    "n02219486", "n02443484", "n02871525", "n03127925", "n03146219", "n03272010", "n03544143",
    "n03775546", "n04146614", "n04149813", "n04418357", "n04522168", "n07613480",
)  # fmt: skip
"""WordNet ids of mini-ImageNet's 20 test classes in the split of Ravi & Larochelle (2017)."""

_TOGETHER = 100  # episodes; a constant, so that the episodes depend on the seed alone


class FewShot(NamedTuple):
    """Accuracy over episodes.

    Attributes:
        accuracy: mean over episodes, in [0, 1].
        interval: half the width of its 95 % interval: accuracy ± interval. It is over episodes of
            these images; another training run would differ by more.
        episodes: ``(episodes,)``, the accuracy of each. The same seed, labels and numbers give the
            same episodes, so two backbones can be compared episode by episode.
    """

    accuracy: float
    interval: float
    episodes: Tensor


@torch.no_grad()
def few_shot(
    features: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    classifier: Literal["centroid", "logistic"] = "centroid",
    center: Tensor | None = None,
    seed: int = 0,
) -> FewShot:
    """Classify images of a few classes after seeing one or five of each, many times over.

    >>> features = torch.eye(6).repeat_interleave(20, dim=0)  # 6 classes of 20 images
    >>> few_shot(features, torch.arange(120) // 20, episodes=10).accuracy
    1.0

    An episode takes ``ways`` random classes, and of each ``shots`` images to learn from and
    ``queries`` others to classify (Vinyals et al., 2016). Features are L2-normalised;
    ``"centroid"`` takes the class whose mean is nearest (SimpleShot, Wang et al., 2019),
    ``"logistic"`` scikit-learn's logistic regression with its C of 1 (Tian et al., 2020).

    Args:
        features: ``(n, D)``.
        labels: ``(n,)``, any whole numbers.
        ways: classes of an episode, at least 2.
        shots: images of each that have labels.
        queries: images of each that are classified.
        episodes: how many, at least 2.
        classifier: ``"centroid"`` or ``"logistic"``.
        center: ``(D,)``, subtracted before the normalisation: the mean of the features of the
            classes that were trained on, never of these (SimpleShot's CL2N). None subtracts nothing
            (its L2N).
        seed: of the episodes, which are the same on every device.

    Raises:
        ImportError: ``"logistic"`` without scikit-learn.
        ValueError: too few classes, too few images in a class, or features that are none.
    """
    check_labelled("", features, labels)
    for name, value, least in (
        ("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1), ("episodes", episodes, 2),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} must be an int >= {least}; got {value!r}.")
    if classifier not in ("centroid", "logistic"):
        raise ValueError(f"classifier must be 'centroid' or 'logistic'; got {classifier!r}.")
    if center is not None and center.shape != features.shape[1:]:
        raise ValueError(
            f"center must be ({features.shape[1]},), one mean per dimension; got "
            f"{tuple(center.shape)}."
        )
    rows, counts = _rows_by_class(labels.cpu())
    _check_enough(counts, labels, ways, shots, queries)
    generator = torch.Generator().manual_seed(seed)
    classify = _nearest_centroid if classifier == "centroid" else _logistic
    shift = 0 if center is None else center.to(features.device).float()
    found = []
    for first in range(0, episodes, _TOGETHER):
        chosen = _episodes(rows, counts, ways, shots + queries, generator)[: episodes - first]
        x = F.normalize(features[chosen.to(features.device)].float() - shift, dim=-1)
        predicted = classify(x[:, :, :shots], x[:, :, shots:])
        own = torch.arange(ways, device=x.device).view(1, -1, 1)
        found.append((predicted == own).double().mean(dim=(1, 2)))
    accuracies = torch.cat(found).cpu()
    interval = 1.96 * accuracies.std(correction=1) / len(accuracies) ** 0.5
    return FewShot(float(accuracies.mean()), float(interval), accuracies)


def rows_of_classes(
    labels: Sequence[int] | Tensor, classes: Sequence[str], wanted: Sequence[str]
) -> list[int]:
    """Return which images are of some classes, by the classes' names.

    >>> rows_of_classes([0, 1, 2, 1], ["ant", "bee", "cow"], ["bee", "cow"])
    [1, 2, 3]

    ``rows_of_classes(data.val.labels, data.classes, RAVI_TEST_CLASSES)`` picks Ravi's test images
    out of mini-ImageNet as `maskdistill.data.open_data` opens it.

    Args:
        labels: ``(n,)``, positions in ``classes``.
        classes: names of all classes.
        wanted: names of those to pick.

    Raises:
        ValueError: a wanted class that is not among the classes.
    """
    number_of = {name: number for number, name in enumerate(classes)}
    missing = [name for name in wanted if name not in number_of]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} wanted classes are not in the data, such as "
            f"{missing[0]!r}; it has {len(classes)}: {', '.join(list(classes)[:3])}, ..."
        )
    numbers = {number_of[name] for name in wanted}
    return [row for row, label in enumerate(torch.as_tensor(labels).tolist()) if label in numbers]


def _rows_by_class(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each class's rows, ``(C, most)``, filled up with 0, and their numbers, ``(C,)``."""
    _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
    by_class = inverse.sort(stable=True).indices.split(counts.tolist())
    return torch.nn.utils.rnn.pad_sequence(list(by_class), batch_first=True), counts


def _check_enough(counts: Tensor, labels: Tensor, ways: int, shots: int, queries: int) -> None:
    if len(counts) < ways:
        raise ValueError(
            f"an episode of {ways} ways needs {ways} classes; the labels have {len(counts)}."
        )
    if int(counts.min()) < shots + queries:
        least = labels.unique()[counts.argmin()]
        raise ValueError(
            f"an episode takes {shots} + {queries} images of a class, and class {int(least)} has "
            f"{int(counts.min())}. Ask for fewer queries, or leave the class out."
        )


def _episodes(
    rows: Tensor, counts: Tensor, ways: int, images: int, generator: torch.Generator
) -> Tensor:
    """Choose the rows of some episodes, ``(episodes, ways, images)``, none twice in an episode."""
    classes = torch.rand(_TOGETHER, len(counts), generator=generator).topk(ways, dim=1).indices
    keys = torch.rand(_TOGETHER, ways, rows.shape[1], generator=generator)
    keys[torch.arange(rows.shape[1]) >= counts[classes][..., None]] = -1  # what fills up
    return rows[classes].gather(2, keys.topk(images, dim=2).indices)


def _nearest_centroid(support: Tensor, query: Tensor) -> Tensor:
    """Return which class each query is of: ``(E, ways, shots, D)`` and ``(E, ways, Q, D)``."""
    centroids = support.mean(dim=2)
    # |q - c|² less |q|², which is the same for all centroids.
    products = torch.einsum("ewqd,ecd->ewqc", query, centroids)
    return (2 * products - centroids.square().sum(dim=-1)[:, None, None]).argmax(dim=-1)


def _logistic(support: Tensor, query: Tensor) -> Tensor:
    ways, shots, width = support.shape[1:]
    targets = torch.arange(ways).repeat_interleave(shots).numpy()
    predicted = [
        torch.from_numpy(
            _logistic_model(max_iter=1000)
            .fit(known.reshape(-1, width).numpy(), targets)
            .predict(unknown.reshape(-1, width).numpy())
        ).view(ways, -1)
        for known, unknown in zip(support.cpu().double(), query.cpu().double(), strict=True)
    ]
    return torch.stack(predicted).to(query.device)
