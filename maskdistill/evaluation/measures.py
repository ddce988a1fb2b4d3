"""What can be measured of a backbone: the names, what they mean, and which way is better."""

# ruff: noqa: D102  (what the bench computes is named, and kept)

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskdistill.data import normalize, resize_for_evaluation
from maskdistill.evaluation import (
    Classifier,
    attention_distances,
    attention_entropy,
    attention_maps,
    attention_spread,
    balanced_indices,
    corruption_table,
    effective_rank,
    evaluating,
    evaluation_images,
    extract_features,
    feature_spread,
    few_shot,
    head_diversity,
    knn_accuracies,
    knn_classifier,
    linear_classifier,
    linear_probe,
    logistic_regression,
    occlusion_curve,
    occlusion_stability,
    participation_ratio,
    shuffle_curve,
    uniformity,
)
from maskdistill.evaluation.attention_report import AttentionScores, attention_scores
from maskdistill.evaluation.judge import JobImages
from maskdistill.evaluation.robustness import OcclusionFill, OcclusionKind
from maskdistill.models import MaskedViT

GROUPS = (
    "knn", "linear", "logistic", "few_shot", "attention", "discovery", "occlusion", "shuffling",
    "corruptions", "stability", "health",
)  # fmt: skip
"""What is measured together."""

DEFAULT_GROUPS = ("knn", "linear", "attention", "occlusion", "stability", "health")
"""What is measured where nothing is said: seconds on small images, and no extra to install."""


@dataclass(frozen=True)
class Measure:
    """A number that is measured of a backbone.

    Attributes:
        name: in files, such as ``"knn_20"``.
        title: in tables and figures, such as ``"20-NN accuracy"``.
        unit: ``"%"`` for shares in [0, 1] that are shown times 100, ``"px"`` for pixels, else
            ``""``.
        better: which way is better; None where neither is.
        group: what it is measured with, of ``GROUPS``.
        page: its page in the documentation, below ``docs/``.
    """

    name: str
    title: str
    unit: Literal["%", "px", ""]
    better: Literal["higher", "lower"] | None
    group: str
    page: str

    def shown(self, value: float) -> str:
        """Write a value as tables show it, without the unit.

        >>> MEASURES["knn_20"].shown(0.6364), MEASURES["jaccard_best_head"].shown(0.3394)
        ('63.6', '0.339')
        """
        if self.unit == "%":
            return f"{100 * value:.1f}"
        return f"{value:.1f}" if self.unit == "px" or abs(value) >= 10 else f"{value:.3f}"


_OF_HEADS = (
    ("best_head", "best head"),
    ("mean_over_heads", "mean over heads"),
    ("head_mean", "head-mean map"),
)

_ALL = (
    *(
        Measure(f"knn_{k}", f"{k}-NN accuracy", "%", "higher", "knn", "evaluation/knn.md")
        for k in (10, 20, 100, 200)
    ),
    Measure("linear", "linear probe", "%", "higher", "linear", "evaluation/linear.md"),
    Measure(
        "logistic", "logistic regression", "%", "higher", "logistic", "evaluation/linear.md"
    ),
    *(
        Measure(
            f"few_shot_{n}", f"5-way {n}-shot", "%", "higher", "few_shot", "evaluation/few-shot.md"
        )
        for n in (1, 5)
    ),
    *(
        Measure(
            f"jaccard_{name}", f"Jaccard, {title}", "", "higher", "attention",
            "evaluation/attention.md",
        )
        for name, title in _OF_HEADS
    ),
    *(
        Measure(
            f"pointing_{name}", f"pointing game, {title}", "%", "higher", "attention",
            "evaluation/attention.md",
        )
        for name, title in _OF_HEADS
    ),
    Measure(
        "attention_entropy", "attention entropy", "", None, "attention", "evaluation/attention.md"
    ),
    Measure("head_diversity", "head diversity", "", None, "attention", "evaluation/attention.md"),
    Measure(
        "attention_spread", "attention spread", "px", None, "attention", "evaluation/attention.md"
    ),
    Measure(
        "attention_distance", "mean attention distance", "px", None, "attention",
        "evaluation/attention.md",
    ),
    *(
        Measure(
            f"corloc_{name}", f"CorLoc, {title}", "%", "higher", "discovery",
            "evaluation/discovery.md",
        )
        for name, title in (
            ("attention", "attention's box"), ("lost", "LOST"), ("token_cut", "TokenCut"),
        )
    ),
    *(
        Measure(
            f"occlusion_{kind}", f"accuracy under occlusion, {title}", "%", "higher", "occlusion",
            "evaluation/robustness.md",
        )
        for kind, title in (
            ("random", "random"), ("salient", "salient first"), ("background", "background first"),
        )
    ),
    Measure(
        "shuffling", "accuracy on shuffled tiles", "%", "higher", "shuffling",
        "evaluation/robustness.md",
    ),
    Measure(
        "corruptions", "accuracy under corruption", "%", "higher", "corruptions",
        "evaluation/robustness.md",
    ),
    Measure(
        "stability_random", "attention stays under occlusion (IoU)", "", "higher", "stability",
        "evaluation/robustness.md",
    ),
    Measure(
        "effective_rank", "effective rank (RankMe)", "", None, "health", "evaluation/health.md"
    ),
    Measure(
        "participation_ratio", "participation ratio", "", None, "health", "evaluation/health.md"
    ),
    Measure("feature_spread", "feature spread", "", None, "health", "evaluation/health.md"),
    Measure("uniformity", "uniformity", "", None, "health", "evaluation/health.md"),
)  # fmt: skip

MEASURES = {one.name: one for one in _ALL}
"""All measures by name, in the order of tables."""


def measures_named(names: Iterable[str]) -> tuple[Measure, ...]:
    """Return the measures of these names and groups, in the order of tables.

    >>> [one.name for one in measures_named(["few_shot", "knn_20"])]
    ['knn_20', 'few_shot_1', 'few_shot_5']

    Args:
        names: of measures, of groups, or ``"all"``.

    Raises:
        ValueError: a name that is none, or no name.
    """
    wanted = set(names)
    unknown = sorted(wanted - MEASURES.keys() - {*GROUPS, "all"})
    if unknown:
        close = difflib.get_close_matches(unknown[0], [*GROUPS, *MEASURES, "all"], n=2)
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"there is no measure {unknown[0]!r}. {hint}Groups: {', '.join(GROUPS)}; or all; or "
            "single ones, such as knn_20 or jaccard_best_head."
        )
    if not wanted:
        raise ValueError(f"name at least one measure; groups are {', '.join(GROUPS)}.")
    return tuple(one for one in _ALL if wanted & {one.name, one.group, "all"})


Curve: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Places, and the value at each."""
Found: TypeAlias = tuple[dict[str, float], dict[str, Curve], dict[str, str]]
"""Values, curves, and what was left out."""


class NotToBeHadError(Exception):
    """These images, or this model, cannot give a group; the message says why."""


@dataclass(frozen=True)
class Bench:
    """A backbone and the images it is measured on; what is computed is kept."""

    vit: MaskedViT
    images: JobImages
    size: int
    groups: tuple[str, ...]
    train_limit: int
    val_limit: int
    guide: Tensor | MaskedViT | None
    classifier: Literal["knn", "linear"]
    fill: OcclusionFill
    seed: int
    cache: str | Path | None
    batch_size: int

    @cached_property
    def train_rows(self) -> list[int]:
        return balanced_indices(torch.from_numpy(self.images.train_labels), self.train_limit)

    @cached_property
    def val_rows(self) -> list[int]:
        return balanced_indices(torch.from_numpy(self.images.val_labels), self.val_limit)

    @property
    def counts(self) -> dict[str, int]:
        masks = {} if self.images.val_masks is None else {"masks": len(self.masked[0])}
        return {"train": len(self.train_rows), "val": len(self.val_rows), **masks}

    @cached_property
    def device(self) -> torch.device:
        return next(self.vit.parameters()).device

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        return self._embedded("train", self.train_rows)

    @cached_property
    def val(self) -> tuple[Tensor, Tensor]:
        return self._embedded("val", self.val_rows)

    def _embedded(self, split: Literal["train", "val"], rows: list[int]) -> tuple[Tensor, Tensor]:
        features, labels = extract_features(
            self.vit, getattr(self.images, split), self.size,
            indices=rows, batch_size=self.batch_size, cache=self.cache,
        )  # fmt: skip
        return features.to(self.device), labels.to(self.device)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Validation images as they are classified, cropped: ``(n, 3, S, S)``; and labels."""
        return evaluation_images(self.images.val, self.size, indices=self.val_rows)

    @cached_property
    def whole(self) -> Tensor:
        """Validation images as the masks show them, not cropped, ``(n, 3, S, S)``."""
        return evaluation_images(self.images.val, self.size, indices=self.val_rows, crop=False)[0]

    @cached_property
    def masked(self) -> tuple[Tensor, Tensor]:
        """Which of the chosen validation images have an object, and its mask, ``(k, S, S)``."""
        assert self.images.val_masks is not None
        masks = torch.from_numpy(self.images.val_masks[self.val_rows])
        masks = F.interpolate(masks[:, None].float(), size=(self.size, self.size))[:, 0] > 0.5
        rows = masks.flatten(1).any(dim=1).nonzero()[:, 0]
        return rows, masks[rows]

    @cached_property
    def classify(self) -> Classifier:
        fit = knn_classifier if self.classifier == "knn" else linear_classifier
        return fit(*self.train)

    @cached_property
    def saliency(self) -> Tensor | None:
        """What is salient in the cropped validation images, ``(n, N)``."""
        if isinstance(self.guide, MaskedViT):
            return attention_maps(self.guide, self.pixels[0], batch_size=self.batch_size)
        return self._objects() if self.guide is None else self.guide

    def _objects(self) -> Tensor | None:
        """Return each patch's share of object, cropped as the images are."""
        if self.images.val_masks is None:
            return None
        cropped = []
        for row in self.val_rows:
            mask = Image.fromarray(self.images.val_masks[row]).convert("RGB")
            # A mask is of the whole image, whose size and shape decide on the crop.
            mask = mask.resize(self.images.val[row][0].size, Image.Resampling.NEAREST)
            cropped.append(resize_for_evaluation(mask, self.size)[:1].float() / 255)
        grid = self.vit.grid(self.size, self.size)
        return F.adaptive_avg_pool2d(torch.stack(cropped), grid).flatten(1)

    @cached_property
    def scores(self) -> AttentionScores:
        rows, masks = self.masked
        return attention_scores(
            self.vit, self.whole[rows], masks,
            discovery="discovery" in self.groups, batch_size=min(self.batch_size, 32),
        )  # fmt: skip

    def require_attention(self) -> None:
        """Refuse a model whose attention cannot be read, before anything is computed."""
        try:
            with evaluating(self.vit):
                blank = torch.zeros(1, 3, self.size, self.size, device=self.device)
                self.vit.attention(blank)
        except ValueError as error:
            raise NotToBeHadError(str(error)) from error


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


Progress: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """What was measured of one backbone.

    Attributes:
        values: by the name of the measure; shares are in [0, 1].
        curves: by name, such as ``"occlusion_random"``: places, and the value at each.
        seconds: that each group took; ``"features"`` is the embedding, which several groups share,
            and ``"attention"`` takes LOST and TokenCut along where both groups are measured.
        skipped: groups and measures that these images or this model cannot give, and why.
        images: how many there were: ``"train"``, ``"val"``, and ``"masks"`` where there are any.
    """

    values: dict[str, float]
    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain dicts and lists, for ``json.dumps``.

        >>> Measured({"knn_20": 0.5}, {"shuffling": ((1.0, 2.0), (0.5, 0.4))}).to_json()["curves"]
        {'shuffling': [[1.0, 2.0], [0.5, 0.4]]}
        """
        curves = {name: [list(part) for part in curve] for name, curve in self.curves.items()}
        return {**asdict(self), "curves": curves}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Measured:
        """Return what ``to_json`` wrote.

        >>> Measured.from_json({"values": {"knn_20": 0.5}}).values
        {'knn_20': 0.5}

        Raises:
            ValueError: entries that are missing or unknown, or curves that are none.
        """
        try:
            entries = {name: dict(entry) for name, entry in found.items()}
            curves = entries.pop("curves", {})
            entries["curves"] = {
                name: (tuple(places), tuple(values)) for name, (places, values) in curves.items()
            }
            return cls(**entries)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"these are no measured values, as Measured.to_json writes them: {error}."
            ) from error


def measure(
    vit: MaskedViT,
    images: JobImages,
    image_size: int,
    *,
    groups: Sequence[str] = DEFAULT_GROUPS,
    train_limit: int = 5000,
    val_limit: int = 2000,
    guide: Tensor | MaskedViT | None = None,
    classifier: Literal["knn", "linear"] = "knn",
    fill: OcclusionFill = "black",
    seed: int = 0,
    cache: str | Path | None = None,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> Measured:
    """Measure a frozen backbone on a job's images, with the protocols of `maskdistill.evaluation`.

    >>> images, _ = open_images(config, 32)  # doctest: +SKIP
    >>> measured = measure(load_backbone("runs/first"), images, 32)  # doctest: +SKIP
    >>> measured.values["knn_20"], measured.curves["occlusion_random"]  # doctest: +SKIP

    Classifiers are fitted on training images and their settings chosen there; the validation images
    choose nothing. The same arguments give the same numbers.

    Args:
        vit: runs in evaluation mode, where it is.
        images: to measure on.
        image_size: pixels of a side of what the backbone sees.
        groups: what to measure, of ``GROUPS``.
        train_limit: most training images, evenly over the classes.
        val_limit: most validation images.
        guide: whose attention says what is salient, the same for all backbones that are compared:
            a model, or ``(n, N)`` of the n validation images that are chosen, in their order. None
            takes the object masks, each patch's share of object, where the images have them;
            without any, salient and background occlusion are left out.
        classifier: what occlusion, shuffling and corruptions are classified by: 20 nearest
            neighbours, or scikit-learn's logistic regression.
        fill: what takes the place of occluded patches.
        seed: of episodes, held-out images, occlusion and noise.
        cache: folder for features, as in `extract_features`.
        batch_size: images per forward.
        progress: called with the group that begins (``"features"`` is one), how many are done, and
            how many there are; a last time with ``""``.

    Raises:
        ImportError: a group or classifier that needs scikit-learn, which is not installed.
        ValueError: unknown groups, images or features that cannot be measured, a guide of another
            shape.
    """
    _check(groups, classifier)
    bench = Bench(
        vit, images, image_size, tuple(groups), train_limit, val_limit, guide, classifier, fill,
        seed, cache, batch_size,
    )  # fmt: skip
    done = Measured({}, images=bench.counts)
    parts = [(name, MEASURED_BY[name]) for name in GROUPS if name in groups]
    if set(groups) & NEED_FEATURES:
        parts.insert(0, ("features", features))
    for number, (name, measured_by) in enumerate(parts):
        if progress is not None:
            progress(name, number, len(parts))
        start = time.perf_counter()
        try:
            values, curves, left_out = measured_by(bench)
        except NotToBeHadError as reason:
            done.skipped[name] = str(reason)
            continue
        done.values.update(values)
        done.curves.update(curves)
        done.skipped.update(left_out)
        done.seconds[name] = time.perf_counter() - start
    if progress is not None:
        progress("", len(parts), len(parts))
    return done


def _check(groups: Sequence[str], classifier: str) -> None:
    measures_named(groups)
    if other := [name for name in groups if name not in GROUPS]:
        raise ValueError(f"{other[0]!r} is no group; those are {', '.join(GROUPS)}.")
    if classifier not in ("knn", "linear"):
        raise ValueError(f"classifier must be 'knn' or 'linear'; got {classifier!r}.")
    wanting = [name for name in groups if name == "logistic"]
    if classifier == "linear":
        wanting.append("the linear classifier")
    if wanting and importlib.util.find_spec("sklearn") is None:
        raise ImportError(f"{wanting[0]} needs scikit-learn: pip install 'maskdistill[eval]'.")
