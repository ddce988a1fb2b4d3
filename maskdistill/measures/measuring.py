"""Measures a backbone on a job's images, group by group."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from maskdistill.evaluation.robustness import OcclusionFill
from maskdistill.judge import JobImages
from maskdistill.measures.bench import Bench, Curve, NotToBeHadError
from maskdistill.measures.catalogue import DEFAULT_GROUPS, GROUPS, measures_named
from maskdistill.measures.groups import MEASURED_BY, NEED_FEATURES, features
from maskdistill.models import MaskedViT

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

    >>> images, _ = open_images(config)  # doctest: +SKIP
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
