"""Few-shot classification of classes that were not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskdistill.evaluation.features import check_labelled

RAVI_TEST_CLASSES = (
    "n01930112", "n01981276", "n02099601", "n02110063", "n02110341", "n02116738", "n02129165",
    "n02219486", "n02443484", "n02871525", "n03127925", "n03146219", "n03272010", "n03544143",
    "n03775546", "n04146614", "n04149813", "n04418357", "n04522168", "n07613480",
)  # fmt: skip
"""WordNet ids of mini-ImageNet's 20 test classes in the split of Ravi & Larochelle (2017)."""

_TOGETHER = 100  # episodes; a constant, so that what is drawn depends on the seed alone


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

    An episode draws ``ways`` classes, and of each ``shots`` images to learn from and ``queries``
    others to classify (Vinyals et al., 2016). Features are L2-normalised; ``"centroid"`` takes the
    class whose mean is nearest (SimpleShot, Wang et al., 2019), ``"logistic"`` scikit-learn's
    logistic regression with its C of 1 (Tian et al., 2020).

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
        chosen = _draw(rows, counts, ways, shots + queries, generator)[: episodes - first]
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


def _draw(
    rows: Tensor, counts: Tensor, ways: int, images: int, generator: torch.Generator
) -> Tensor:
    """Draw the rows of some episodes, ``(episodes, ways, images)``, none twice in an episode."""
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
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(
            "few_shot's logistic classifier needs scikit-learn: pip install 'maskdistill[eval]'."
        ) from error
    ways, shots, width = support.shape[1:]
    targets = torch.arange(ways).repeat_interleave(shots).numpy()
    predicted = [
        torch.from_numpy(
            LogisticRegression(max_iter=1000)
            .fit(known.reshape(-1, width).numpy(), targets)
            .predict(unknown.reshape(-1, width).numpy())
        ).view(ways, -1)
        for known, unknown in zip(support.cpu().double(), query.cpu().double(), strict=True)
    ]
    return torch.stack(predicted).to(query.device)
