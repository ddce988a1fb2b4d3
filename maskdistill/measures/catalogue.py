"""What can be measured of a backbone: the names, what they mean, and which way is better."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

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
