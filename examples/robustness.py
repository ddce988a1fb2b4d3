"""How a backbone takes occlusion, disorder and corruption, next to the same one at random.

    python examples/robustness.py
    python examples/robustness.py --weights runs/mine --data mini-imagenet
    python examples/robustness.py --weights runs/a --guide runs/b --json a.json

Without --weights the backbone is random, and with --data left out the images are scenes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.utils.data import Dataset

import maskdistill as md
from maskdistill.data import Scenes, open_data
from maskdistill.evaluation import balanced_indices
from maskdistill.evaluation.attention_report import reinitialised
from maskdistill.evaluation.backbones import load_backbone
from maskdistill.evaluation.classifiers import Classifier, knn_classifier, linear_classifier
from maskdistill.evaluation.corruptions import corruption_table
from maskdistill.evaluation.health import effective_rank, feature_spread
from maskdistill.evaluation.pixels import evaluation_images
from maskdistill.evaluation.robustness import (
    KINDS,
    OcclusionFill,
    attention_maps,
    occluded_features,
    occlusion_curve,
)
from maskdistill.evaluation.shuffling import shuffle_curve
from maskdistill.evaluation.stability import occlusion_stability


@dataclass(frozen=True)
class Settings:
    """What to measure, and on what."""

    weights: Path | None = None
    """The backbone: a run's folder or a file of weights; None is a random one."""
    guide: Path | None = None
    """Weights of the model whose attention says what is salient; None takes the backbone's own.
    Compared models must have the same."""
    data: Path | None = None
    """Images in any form that open_data reads; None draws scenes."""
    model: str = "vit_tiny_patch16_224"
    """Name of a timm model, for random weights and for files that do not say."""
    image_size: int = 64
    """Pixels of a side."""
    patch_size: int = 8
    """Pixels of a patch's side."""
    train: int = 5000
    """Most clean images that the classifier is fitted on."""
    test: int = 1000
    """Most images that are measured on."""
    classifier: Literal["knn", "linear"] = "knn"
    """20 nearest neighbours, or scikit-learn's logistic regression."""
    fill: OcclusionFill = "black"
    """What takes the place of hidden patches."""
    seed: int = 0
    """Of what is hidden, of the noise, and of random weights."""
    device: str = "cpu"
    """Where the backbone runs."""
    threads: int | None = None
    """CPU threads; None is torch's own number."""
    json: Path | None = None
    """Where to write the numbers."""


def main(settings: Settings) -> None:
    """Measure the backbone, and the same one with random weights."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    train, test = images_of(settings)
    guide = backbone(settings, settings.guide or settings.weights)
    attention = attention_maps(guide, test[0])
    results = {"random": measure(settings, backbone(settings, None), train, test, attention)}
    if settings.weights is not None:
        vit = backbone(settings, settings.weights)
        results["trained"] = measure(settings, vit, train, test, attention)
    for name, result in results.items():
        print(f"\n{name} weights ({result['seconds']:.0f} s)")
        for key, value in result.items():
            print(f"  {key:24s} {_short(value)}")
    if settings.json is not None:
        settings.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


def backbone(settings: Settings, weights: Path | None) -> md.MaskedViT:
    """Load a backbone, or return the same model with random weights."""
    apply: Literal["drop", "pixel"] = "drop" if settings.fill == "drop" else "pixel"
    if settings.weights is None and weights is None:
        vit = load_backbone(
            settings.model, image_size=settings.image_size, patch_size=settings.patch_size,
            apply=apply, seed=settings.seed,
        )  # fmt: skip
    else:
        vit = load_backbone(weights or settings.weights or "", apply=apply)
        if weights is None:
            vit = reinitialised(vit, settings.seed)
    return vit.to(settings.device)


def images_of(settings: Settings) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the pixels and labels of the training and of the test images."""
    train: Dataset[Any]
    val: Dataset[Any]
    if settings.data is None:
        scenes = Scenes(settings.train), Scenes(settings.test, split="val")
        train, val, labels = *scenes, tuple(s.labels for s in scenes)
    else:
        data = open_data(settings.data)
        train, val, labels = data.train, data.val, (data.train.labels, data.val.labels)
    limits = (settings.train, settings.test)
    chosen = [
        balanced_indices(torch.as_tensor(of), limit)
        for of, limit in zip(labels, limits, strict=True)
    ]
    return (
        evaluation_images(train, settings.image_size, indices=chosen[0]),
        evaluation_images(val, settings.image_size, indices=chosen[1]),
    )


def measure(
    settings: Settings,
    vit: md.MaskedViT,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    attention: Tensor,
) -> dict[str, Any]:
    """Return every number of one backbone."""
    start = time.perf_counter()
    features = occluded_features(vit, train[0])
    fit = knn_classifier if settings.classifier == "knn" else linear_classifier
    classify: Classifier = fit(features, train[1])
    curves = occlusion_curve(
        vit, classify, *test, kinds=KINDS, fill=settings.fill, attention=attention,
        seed=settings.seed,
    )  # fmt: skip
    table = corruption_table(vit, classify, *test, seed=settings.seed)
    result: dict[str, Any] = {
        "clean accuracy": table.clean,
        "effective rank": float(effective_rank(features)),
        "feature spread": float(feature_spread(features)),
    }
    for kind, curve in curves.items():
        result[f"occluded, {kind}"] = list(curve.accuracies)
        result[f"area, {kind}"] = curve.area
    sides = [n for n in (2, 4, 8, 16) if settings.image_size % n == 0]
    result["shuffled"] = shuffle_curve(vit, classify, *test, pieces=sides, seed=settings.seed)
    if settings.fill != "drop":
        stable = occlusion_stability(vit, test[0], fill=settings.fill, seed=settings.seed)
        result["attention stays (IoU)"] = {r: s.overlap for r, s in stable["random"].items()}
    result["corrupted"] = table.accuracies
    result["corrupted, mean"] = table.mean
    result["severities of"] = table.table
    result["seconds"] = time.perf_counter() - start
    return result


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(entry)}" for key, entry in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(_short(entry) for entry in value)
    return str(value)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
