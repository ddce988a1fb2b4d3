"""The groups of measures, each a function of a bench: values, curves, and what was left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import asdict

import torch

from maskdistill.data import normalize
from maskdistill.evaluation import (
    attention_distances,
    attention_entropy,
    attention_spread,
    corruption_table,
    effective_rank,
    evaluating,
    feature_spread,
    few_shot,
    head_diversity,
    knn_accuracies,
    linear_probe,
    logistic_regression,
    occlusion_curve,
    occlusion_stability,
    participation_ratio,
    shuffle_curve,
    uniformity,
)
from maskdistill.evaluation.robustness import OcclusionKind
from maskdistill.measures.bench import Bench, Found, NotToBeHadError

_SHOTS, _QUERIES, _WAYS = (1, 5), 15, 5


def features(bench: Bench) -> Found:
    """Embed the images; nothing is found yet."""
    _ = bench.train, bench.val  # kept, for the groups that follow
    return {}, {}, {}


def _knn(bench: Bench) -> Found:
    found = knn_accuracies(*bench.train, *bench.val)
    return {f"knn_{k}": accuracy for k, accuracy in found.items()}, {}, {}


def _linear(bench: Bench) -> Found:
    return {"linear": linear_probe(*bench.train, *bench.val, seed=bench.seed).accuracy}, {}, {}


def _logistic(bench: Bench) -> Found:
    found = logistic_regression(*bench.train, *bench.val, seed=bench.seed)
    return {"logistic": found.accuracy}, {}, {}


def _few_shot(bench: Bench) -> Found:
    features, labels = bench.val
    classes, each = labels.unique(return_counts=True)
    least = max(_SHOTS) + _QUERIES
    enough = torch.isin(labels, classes[each >= least])
    if len(labels[enough].unique()) < _WAYS:
        raise NotToBeHadError(
            f"episodes of {_WAYS} classes need {least} validation images of each; "
            f"{int((each >= least).sum())} of {len(classes)} classes have so many among the "
            f"{len(labels):,} that were taken."
        )
    values = {
        f"few_shot_{shots}": few_shot(
            features[enough], labels[enough], ways=_WAYS, shots=shots, queries=_QUERIES,
            seed=bench.seed,
        ).accuracy
        for shots in _SHOTS
    }  # fmt: skip
    return values, {}, {}


def _attention(bench: Bench) -> Found:
    bench.require_attention()
    if bench.images.val_masks is None:
        reason = "the images have no object masks; only what needs none was measured."
        return _attention_alone(bench), {}, {"attention": reason}
    scores = asdict(bench.scores)
    found = {
        {"entropy": "attention_entropy"}.get(name, name): value
        for name, value in scores.items()
        if value is not None and not name.startswith("corloc_")
    }
    return found, {}, {}


@torch.no_grad()
def _attention_alone(bench: Bench) -> dict[str, float]:
    """Measure what attention is like where no masks say what it should be."""
    vit, grid = bench.vit, bench.vit.grid(bench.size, bench.size)
    inputs = bench.whole.split(32)
    with evaluating(vit):
        maps = torch.cat([vit.attention(normalize(part.to(bench.device))) for part in inputs])
    maps = maps.float()
    found = {
        "attention_entropy": attention_entropy(maps),
        "head_diversity": head_diversity(maps),
        "attention_spread": attention_spread(maps, grid, vit.patch_size),
    }
    with contextlib.suppress(ValueError):  # no plain ViT
        each = [attention_distances(vit, normalize(part))[-1] * len(part) for part in inputs]
        found["attention_distance"] = torch.stack(each).sum(dim=0) / len(bench.whole)
    return {name: float(values.mean()) for name, values in found.items()}


def _discovery(bench: Bench) -> Found:
    if bench.images.val_masks is None:
        raise NotToBeHadError("the images have no object masks.")
    bench.require_attention()
    names = ("corloc_attention", "corloc_lost", "corloc_token_cut")
    scores = {name: getattr(bench.scores, name) for name in names}
    reason = "the model has no keys to read."
    left_out = {name: reason for name, value in scores.items() if value is None}
    return {name: value for name, value in scores.items() if value is not None}, {}, left_out


def _occlusion(bench: Bench) -> Found:
    kinds: list[OcclusionKind] = ["random"]
    left_out = {}
    if bench.saliency is not None:
        kinds += ["salient", "background"]
    else:
        reason = "nothing says what is salient: the images have no masks, and no guide was given."
        left_out = {f"occlusion_{kind}": reason for kind in ("salient", "background")}
    found = occlusion_curve(
        bench.vit, bench.classify, *bench.pixels, kinds=kinds, fill=bench.fill,
        attention=bench.saliency, seed=bench.seed, batch_size=bench.batch_size,
    )  # fmt: skip
    values = {f"occlusion_{kind}": curve.area for kind, curve in found.items()}
    curves = {f"occlusion_{kind}": (c.ratios, c.accuracies) for kind, c in found.items()}
    return values, curves, left_out


def _shuffling(bench: Bench) -> Found:
    pieces = [count for count in (2, 4, 8, 16) if bench.size % count == 0]
    if not pieces:
        raise NotToBeHadError(f"images of {bench.size} pixels cannot be cut into equal tiles.")
    found = shuffle_curve(
        bench.vit, bench.classify, *bench.pixels, pieces=pieces, seed=bench.seed,
        batch_size=bench.batch_size,
    )  # fmt: skip
    mean = sum(found[count] for count in pieces) / len(pieces)
    curve = tuple(map(float, found)), tuple(found.values())
    return {"shuffling": mean}, {"shuffling": curve}, {}


def _corruptions(bench: Bench) -> Found:
    found = corruption_table(
        bench.vit, bench.classify, *bench.pixels, seed=bench.seed, batch_size=bench.batch_size
    )
    places = tuple(map(float, found.severities))
    curves = {f"corruption_{name}": (places, row) for name, row in found.accuracies.items()}
    return {"corruptions": found.mean}, curves, {}


def _stability(bench: Bench) -> Found:
    if bench.fill == "drop":
        raise NotToBeHadError("patches that are dropped leave no attention to compare.")
    bench.require_attention()
    found = occlusion_stability(
        bench.vit, bench.pixels[0], fill=bench.fill, seed=bench.seed, batch_size=bench.batch_size
    )["random"]
    overlaps = tuple(one.overlap for one in found.values())
    curve = tuple(found), overlaps
    return {"stability_random": sum(overlaps) / len(overlaps)}, {"stability_random": curve}, {}


def _health(bench: Bench) -> Found:
    features = bench.val[0]
    found = {
        "effective_rank": effective_rank(features),
        "participation_ratio": participation_ratio(features),
        "feature_spread": feature_spread(features),
    }
    if len(features) > 1:
        found["uniformity"] = uniformity(features)
    return {name: float(value) for name, value in found.items()}, {}, {}


MEASURED_BY: dict[str, Callable[[Bench], Found]] = {
    "knn": _knn, "linear": _linear, "logistic": _logistic, "few_shot": _few_shot,
    "attention": _attention, "discovery": _discovery, "occlusion": _occlusion,
    "shuffling": _shuffling, "corruptions": _corruptions, "stability": _stability,
    "health": _health,
}  # fmt: skip

NEED_FEATURES = MEASURED_BY.keys() - {"attention", "discovery", "stability"}
"""Groups that embed the images, which is done once for all of them."""
