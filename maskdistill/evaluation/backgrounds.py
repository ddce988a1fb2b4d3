"""The backgrounds challenge: how much of the accuracy comes from what is behind the object."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from maskdistill.evaluation.features import accuracy, extract_features
from maskdistill.evaluation.probes import Classifier, knn_classifier

VARIANTS = (
    "original", "mixed_same", "mixed_rand", "mixed_next", "only_fg", "no_fg", "only_bg_b",
    "only_bg_t",
)  # fmt: skip
"""The folders of ImageNet-9. ``mixed_*``: the object on a background of its own class, of a random
class, of the next class. ``only_fg``: the object on black. ``no_fg``: the object cut out in its
shape. ``only_bg_b``, ``only_bg_t``: its box blacked out, or filled with background."""


class Backgrounds(NamedTuple):
    """The folders of ImageNet-9 that are there.

    Attributes:
        variants: data sets of (RGB image, label) pairs, by name, in the order of `VARIANTS`.
        train: the training images of ``original``, if they are there.
        classes: names of the class folders; labels index into them.
    """

    variants: dict[str, Dataset[tuple[Image.Image, int]]]
    train: Dataset[tuple[Image.Image, int]] | None
    classes: tuple[str, ...]


class BackgroundAccuracies(NamedTuple):
    """Accuracy on each variant of ImageNet-9.

    Attributes:
        accuracies: top-1 in [0, 1] by variant, of those that are there.
        gap: BG-Gap, mixed_same - mixed_rand: what a fitting background is worth; None if one of
            the two is not there.
    """

    accuracies: dict[str, float]
    gap: float | None


def open_backgrounds(path: str | Path) -> Backgrounds:
    """Open the folders of the backgrounds challenge, as many of them as are there.

    >>> data = open_backgrounds("bg_challenge")  # doctest: +SKIP
    >>> list(data.variants), data.train is None, len(data.classes)  # doctest: +SKIP
    (['original', 'mixed_same', 'mixed_rand'], True, 9)

    Xiao et al., 2020. Images lie in ``VARIANT/val/CLASS/``, training images in
    ``original/train/CLASS/``, where they have been downloaded.

    Args:
        path: the folder with the variants in it.

    Raises:
        ValueError: no variant there, a class without images, or variants with different classes.
    """
    root = Path(path)
    variants = {
        name: _folder(root / name / "val") for name in VARIANTS if (root / name / "val").is_dir()
    }
    if not variants:
        raise ValueError(
            f"{root} holds no variant of ImageNet-9: a folder such as "
            f"{root / 'mixed_same' / 'val'} was expected. The variants are {', '.join(VARIANTS)}."
        )
    train = _folder(root / "original" / "train") if (root / "original" / "train").is_dir() else None
    name, first = next(iter(variants.items()))
    others = {**variants, "original/train": train} if train else variants
    for other, images in others.items():
        if images is not None and images.classes != first.classes:
            raise ValueError(
                f"{other} has the classes {', '.join(images.classes)}, but {name} has "
                f"{', '.join(first.classes)}; the labels would not mean the same."
            )
    return Backgrounds(dict(variants), train, tuple(first.classes))


def background_challenge(
    backbone: nn.Module,
    data: Backgrounds,
    image_size: int,
    *,
    train: Dataset[tuple[Image.Image, int]] | None = None,
    fit: Callable[[Tensor, Tensor], Classifier] = knn_classifier,
    batch_size: int = 256,
    workers: int = 0,
) -> BackgroundAccuracies:
    """Measure the accuracy on each variant with one classifier, fitted on original images.

    >>> data = open_backgrounds("bg_challenge")  # doctest: +SKIP
    >>> background_challenge(vit, data, 224).gap  # doctest: +SKIP
    0.087

    Xiao et al., 2020, for a backbone without a classifier of its own: a 20-NN vote, or
    ``fit=linear_classifier``, over the nine classes. Published figures are of networks trained or
    fine-tuned with labels, and do not compare.

    Args:
        backbone: a ``MaskedViT``, or a network that gives ``(B, D)``.
        data: as `open_backgrounds` gives it.
        image_size: pixels of a side.
        train: images to fit the classifier on, labelled as ``data.classes``; None takes
            ``data.train``, and if that is not there, the validation images of ``original``, with a
            warning: their objects are those of the other variants, so all accuracies are too high,
            and that on ``original`` itself is left out.
        fit: makes a classifier of features and labels.
        batch_size: images per forward.
        workers: loader processes.

    Raises:
        ValueError: nothing to fit the classifier on.
    """
    fitted_on = train if train is not None else data.train
    measured = dict(data.variants)
    if fitted_on is None:
        fitted_on = measured.pop("original", None)
        if fitted_on is None or not measured:
            raise ValueError(
                "there are no images to fit the classifier on beside those to measure on: give "
                "train=, or put the original images into original/train or original/val."
            )
        warnings.warn(
            "the classifier is fitted on original/val, for there is no original/train. The other "
            "variants show the same objects, so their accuracies are too high; compare models with "
            "each other only.",
            stacklevel=2,
        )

    def features_of(images: Dataset[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor]:
        return extract_features(
            backbone, images, image_size, batch_size=batch_size, workers=workers
        )

    classify = fit(*features_of(fitted_on))
    found = {}
    for name, images in measured.items():
        features, labels = features_of(images)
        found[name] = accuracy(classify(features), labels)
    gap = None
    if "mixed_same" in found and "mixed_rand" in found:
        gap = found["mixed_same"] - found["mixed_rand"]
    return BackgroundAccuracies(found, gap)


def _folder(path: Path) -> ImageFolder:
    try:
        return ImageFolder(str(path))
    except FileNotFoundError as error:  # also a folder without classes, or a class without images
        raise ValueError(f"{path} is no folder of classes with images in each: {error}") from error
