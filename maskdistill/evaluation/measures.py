"""What can be measured of a backbone, by name.

A measure is a name, what it means, which way is better, and a function of the `Bench`: the backbone
and its images, with what several measures share computed once. Measures that come out of one
computation are a group. To add one, write its function at the end of the catalogue below, under
`_group`; tables, reports and the command line go by it.
"""

from __future__ import annotations

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

from maskdistill.data.crops import resize_for_evaluation
from maskdistill.evaluation.attention_report import (
    AttentionScores,
    attention_scores,
    attention_statistics,
)
from maskdistill.evaluation.features import Classifier, evaluation_images, extract_features
from maskdistill.evaluation.health import (
    effective_rank,
    feature_spread,
    participation_ratio,
    uniformity,
)
from maskdistill.evaluation.judge import JobImages
from maskdistill.evaluation.knn import knn_accuracies, knn_classifier
from maskdistill.evaluation.probes import (
    few_shot,
    linear_classifier,
    linear_probe,
    logistic_regression,
)
from maskdistill.evaluation.robustness import (
    OcclusionFill,
    OcclusionKind,
    attention_maps,
    occlusion_curve,
    occlusion_stability,
    shuffle_curve,
)
from maskdistill.models import MaskedViT
from maskdistill.models.probing import evaluating

Unit: TypeAlias = Literal["%", "px", ""]
Better: TypeAlias = Literal["higher", "lower"] | None


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
    unit: Unit
    better: Better
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


Curve: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""Places, and the value at each."""


class UnavailableError(Exception):
    """These images, or this model, cannot give a group; the message says why."""


@dataclass(frozen=True)
class Found:
    """What a group gives: values and curves by name, and why some of its measures are left out."""

    values: dict[str, float]
    curves: dict[str, Curve] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A backbone and the images it is measured on; the arguments are those of `measure`."""

    vit: MaskedViT
    images: JobImages
    size: int
    groups: Sequence[str] = ()
    train_limit: int = 5000
    val_limit: int = 2000
    guide: Tensor | MaskedViT | None = None
    classifier: Literal["knn", "linear"] = "knn"
    fill: OcclusionFill = "black"
    seed: int = 0
    cache: str | Path | None = None
    batch_size: int = 256

    @cached_property
    def rows(self) -> dict[str, list[int]]:
        """The chosen images, ``"train"`` and ``"val"``."""
        return self.images.balanced(self.train_limit, self.val_limit)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of chosen images, and of those with an object."""
        masks = {} if self.images.val_masks is None else {"masks": len(self.masked[0])}
        return {**{split: len(rows) for split, rows in self.rows.items()}, **masks}

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        """Features and labels of the training images, on the backbone's device."""
        return self._embedded("train")

    @cached_property
    def val(self) -> tuple[Tensor, Tensor]:
        """The same of the validation images."""
        return self._embedded("val")

    def _embedded(self, split: str) -> tuple[Tensor, Tensor]:
        features, labels = extract_features(
            self.vit, getattr(self.images, split), self.size,
            indices=self.rows[split], batch_size=self.batch_size, cache=self.cache,
        )  # fmt: skip
        device = next(self.vit.parameters()).device
        return features.to(device), labels.to(device)

    @cached_property
    def pixels(self) -> tuple[Tensor, Tensor]:
        """Validation images as they are classified, cropped, ``(n, 3, S, S)``; and labels."""
        return evaluation_images(self.images.val, self.size, indices=self.rows["val"])

    @cached_property
    def whole(self) -> Tensor:
        """Validation images as the masks show them, not cropped, ``(n, 3, S, S)``."""
        return self.images.whole(self.rows["val"], self.size)

    @cached_property
    def masked(self) -> tuple[Tensor, Tensor]:
        """Which of the chosen validation images have an object, and its mask, ``(k, S, S)``."""
        if self.images.val_masks is None:
            raise UnavailableError("the images have no object masks.")
        masks = torch.from_numpy(self.images.val_masks[self.rows["val"]])
        masks = F.interpolate(masks[:, None].float(), size=(self.size, self.size))[:, 0] > 0.5
        rows = masks.flatten(1).any(dim=1).nonzero()[:, 0]
        return rows, masks[rows]

    @cached_property
    def classify(self) -> Classifier:
        """The classifier of changed images, fitted on clean training images."""
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
        for row in self.rows["val"]:
            mask = Image.fromarray(self.images.val_masks[row]).convert("RGB")
            # A mask is of the whole image, whose size and shape decide on the crop.
            mask = mask.resize(self.images.val[row][0].size, Image.Resampling.NEAREST)
            cropped.append(resize_for_evaluation(mask, self.size)[:1].float() / 255)
        grid = self.vit.grid(self.size, self.size)
        return F.adaptive_avg_pool2d(torch.stack(cropped), grid).flatten(1)

    @cached_property
    def scores(self) -> AttentionScores:
        """The attention against the object masks, with LOST and TokenCut where they are wanted."""
        rows, masks = self.masked
        return attention_scores(
            self.vit, self.whole[rows], masks,
            discovery="discovery" in self.groups, batch_size=min(self.batch_size, 32),
        )  # fmt: skip

    def require_attention(self) -> None:
        """Refuse a model whose attention cannot be read, before anything is computed."""
        try:
            with evaluating(self.vit):
                device = next(self.vit.parameters()).device
                self.vit.attention(torch.zeros(1, 3, self.size, self.size, device=device))
        except ValueError as error:
            raise UnavailableError(str(error)) from error


# --- The catalogue

Measuring: TypeAlias = Callable[[Bench], Found]
_MEASURING: dict[str, Measuring] = {}
_BY_DEFAULT: list[str] = []
_EMBEDDING: set[str] = set()

MEASURES: dict[str, Measure] = {}
"""All measures by name, in the order of tables."""


def _group(
    page: str,
    *measures: tuple[str, str, Unit, Better],
    default: bool = False,
    embeds: bool = True,
) -> Callable[[Measuring], Measuring]:
    """Enter a function of the bench as a group of its own name.

    Args:
        page: where the documentation describes its measures, below ``docs/evaluation``.
        measures: name, title, unit and better way of each, as in `Measure`.
        default: whether it is measured where nothing is said: that takes seconds on small images,
            and no extra to install.
        embeds: whether it needs the features of all images, which are computed once for all groups.
    """

    def enter(function: Measuring) -> Measuring:
        name = function.__name__.removeprefix("_")
        _MEASURING[name] = function
        MEASURES.update({own[0]: Measure(*own, name, f"evaluation/{page}") for own in measures})
        if default:
            _BY_DEFAULT.append(name)
        if embeds:
            _EMBEDDING.add(name)
        return function

    return enter


@_group(
    "knn.md",
    *((f"knn_{k}", f"{k}-NN accuracy", "%", "higher") for k in (10, 20, 100, 200)),
    default=True,
)
def _knn(bench: Bench) -> Found:
    found = knn_accuracies(*bench.train, *bench.val)
    return Found({f"knn_{k}": accuracy for k, accuracy in found.items()})


@_group("linear.md", ("linear", "linear probe", "%", "higher"), default=True)
def _linear(bench: Bench) -> Found:
    return Found({"linear": linear_probe(*bench.train, *bench.val, seed=bench.seed).accuracy})


@_group("linear.md", ("logistic", "logistic regression", "%", "higher"))
def _logistic(bench: Bench) -> Found:
    found = logistic_regression(*bench.train, *bench.val, seed=bench.seed)
    return Found({"logistic": found.accuracy})


_SHOTS, _QUERIES, _WAYS = (1, 5), 15, 5


@_group("few-shot.md", *((f"few_shot_{n}", f"5-way {n}-shot", "%", "higher") for n in _SHOTS))
def _few_shot(bench: Bench) -> Found:
    features, labels = bench.val
    classes, each = labels.unique(return_counts=True)
    least = max(_SHOTS) + _QUERIES
    enough = torch.isin(labels, classes[each >= least])
    if len(labels[enough].unique()) < _WAYS:
        raise UnavailableError(
            f"episodes of {_WAYS} classes need {least} validation images of each; "
            f"{int((each >= least).sum())} of {len(classes)} classes have so many among the "
            f"{len(labels):,} that were taken."
        )
    split = features[enough], labels[enough]
    values = {}
    for shots in _SHOTS:
        found = few_shot(*split, ways=_WAYS, shots=shots, queries=_QUERIES, seed=bench.seed)
        values[f"few_shot_{shots}"] = found.accuracy
    return Found(values)


_OF_HEADS = {
    "best_head": "best head", "mean_over_heads": "mean over heads", "head_mean": "head-mean map",
}  # fmt: skip


@_group(
    "attention.md",
    *((f"jaccard_{name}", f"Jaccard, {of}", "", "higher") for name, of in _OF_HEADS.items()),
    *(
        (f"pointing_{name}", f"pointing game, {of}", "%", "higher")
        for name, of in _OF_HEADS.items()
    ),
    ("attention_entropy", "attention entropy", "", None),
    ("head_diversity", "head diversity", "", None),
    ("attention_spread", "attention spread", "px", None),
    ("attention_distance", "mean attention distance", "px", None),
    default=True,
    embeds=False,
)
def _attention(bench: Bench) -> Found:
    bench.require_attention()
    skipped = {}
    if bench.images.val_masks is None:
        skipped["attention"] = "the images have no object masks; only what needs none was measured."
        found = attention_statistics(bench.vit, bench.whole)
    else:
        found = asdict(bench.scores)
    found["attention_entropy"] = found.pop("entropy")
    values = {n: v for n, v in found.items() if v is not None and not n.startswith("corloc_")}
    return Found(values, {}, skipped)


@_group(
    "discovery.md",
    ("corloc_attention", "CorLoc, attention's box", "%", "higher"),
    ("corloc_lost", "CorLoc, LOST", "%", "higher"),
    ("corloc_token_cut", "CorLoc, TokenCut", "%", "higher"),
    embeds=False,
)
def _discovery(bench: Bench) -> Found:
    _ = bench.masked  # without masks there is nothing to discover
    bench.require_attention()
    scores = {n: v for n, v in asdict(bench.scores).items() if n.startswith("corloc_")}
    reason = "the model has no keys to read."
    return Found(
        {name: value for name, value in scores.items() if value is not None},
        {},
        {name: reason for name, value in scores.items() if value is None},
    )


@_group(
    "robustness.md",
    ("occlusion_random", "accuracy under occlusion, random", "%", "higher"),
    ("occlusion_salient", "accuracy under occlusion, salient first", "%", "higher"),
    ("occlusion_background", "accuracy under occlusion, background first", "%", "higher"),
    default=True,
)
def _occlusion(bench: Bench) -> Found:
    kinds: list[OcclusionKind] = ["random"]
    skipped = {}
    if bench.saliency is not None:
        kinds += ["salient", "background"]
    else:
        reason = "nothing says what is salient: the images have no masks, and no guide was given."
        skipped = {f"occlusion_{kind}": reason for kind in ("salient", "background")}
    found = occlusion_curve(
        bench.vit, bench.classify, *bench.pixels, kinds=kinds, fill=bench.fill,
        attention=bench.saliency, seed=bench.seed, batch_size=bench.batch_size,
    )  # fmt: skip
    values = {f"occlusion_{kind}": curve.area for kind, curve in found.items()}
    curves = {f"occlusion_{kind}": (c.ratios, c.accuracies) for kind, c in found.items()}
    return Found(values, curves, skipped)


@_group("robustness.md", ("shuffling", "accuracy on shuffled tiles", "%", "higher"))
def _shuffling(bench: Bench) -> Found:
    pieces = [count for count in (2, 4, 8, 16) if bench.size % count == 0]
    if not pieces:
        raise UnavailableError(f"images of {bench.size} pixels cannot be cut into equal tiles.")
    found = shuffle_curve(
        bench.vit, bench.classify, *bench.pixels, pieces=pieces, seed=bench.seed,
        batch_size=bench.batch_size,
    )  # fmt: skip
    mean = sum(found[count] for count in pieces) / len(pieces)
    curve = tuple(map(float, found)), tuple(found.values())
    return Found({"shuffling": mean}, {"shuffling": curve})


@_group(
    "robustness.md",
    ("stability_random", "attention stays under occlusion (IoU)", "", "higher"),
    default=True,
    embeds=False,
)
def _stability(bench: Bench) -> Found:
    if bench.fill == "drop":
        raise UnavailableError("patches that are dropped leave no attention to compare.")
    bench.require_attention()
    found = occlusion_stability(
        bench.vit, bench.pixels[0], fill=bench.fill, seed=bench.seed, batch_size=bench.batch_size
    )["random"]
    overlaps = tuple(one.overlap for one in found.values())
    curve = tuple(found), overlaps
    return Found({"stability_random": sum(overlaps) / len(overlaps)}, {"stability_random": curve})


@_group(
    "health.md",
    ("effective_rank", "effective rank (RankMe)", "", None),
    ("participation_ratio", "participation ratio", "", None),
    ("feature_spread", "feature spread", "", None),
    ("uniformity", "uniformity", "", None),
    default=True,
)
def _health(bench: Bench) -> Found:
    features = bench.val[0]
    functions = [effective_rank, participation_ratio, feature_spread]
    if len(features) > 1:
        functions.append(uniformity)
    return Found({function.__name__: float(function(features)) for function in functions})


GROUPS = tuple(_MEASURING)
"""What is measured together."""
DEFAULT_GROUPS = tuple(_BY_DEFAULT)
"""What is measured where nothing is said."""


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
    return tuple(one for one in MEASURES.values() if wanted & {one.name, one.group, "all"})


# --- Measuring


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
    progress: Callable[[str, int, int], None] | None = None,
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
        classifier: what occlusion and shuffling are classified by: 20 nearest neighbours, or
            scikit-learn's logistic regression.
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
    parts = [name for name in GROUPS if name in groups]
    if _EMBEDDING & set(groups):
        parts.insert(0, "features")
    for number, name in enumerate(parts):
        if progress is not None:
            progress(name, number, len(parts))
        start = time.perf_counter()
        if name == "features":
            _ = bench.train, bench.val  # kept, for the groups that follow
        else:
            try:
                found = _MEASURING[name](bench)
            except UnavailableError as reason:
                done.skipped[name] = str(reason)
                continue
            done.values.update(found.values)
            done.curves.update(found.curves)
            done.skipped.update(found.skipped)
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
