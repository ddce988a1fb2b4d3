"""Differences to a baseline, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from maskdistill.plotting.bands import spread
from maskdistill.plotting.style import (
    PAGE,
    caption,
    grey,
    ink,
    legend_above,
    new_figure,
    plain,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _GAP = 0.13, 0.12
"""Inches of a policy within a measure's row, and between rows."""
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


def plot_intervals(
    differences: Mapping[str, Mapping[str, Sequence[float]]],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
    *,
    baseline: str | None = None,
    bar: str | None = None,
    titles: Mapping[str, str] | None = None,
    units: Mapping[str, str] | None = None,
    better: Mapping[str, str | None] | None = None,
    order: Sequence[str] | None = None,
    width: float = PAGE,
) -> Figure:
    """Draw paired differences to a baseline: a row per measure, a line per policy.

    >>> differences = {"asymmetric": {"knn_20": (0.021, 0.034, 0.018)}}
    >>> figure = plot_intervals(differences, baseline="none", units={"knn_20": "%"})

    Dots are seeds, the bar is the interval, the large mark the mean. Measures in % that follow
    each other share an axis; each other measure has its own, for its unit is its own.

    Args:
        differences: policy to measure to the policy's value minus the baseline's, one per seed.
        intervals: policy to measure to the lower and upper end of the mean's interval; None takes
            95 % by Student's t, which needs SciPy and two seeds.
        baseline: its name, for the caption.
        bar: what the intervals are, for the caption; None says "its 95 % interval" of those that
            are made here, and "its interval" of those given.
        titles: measure to what is written beside its row; else the measure's name.
        units: measure to its unit; of ``"%"`` values are shares, drawn times 100.
        better: measure to ``"higher"`` or ``"lower"``, shown as an arrow.
        order: all names of a study, so that each has the same colour in all plots.
        width: inches; a paper's page by default.

    Raises:
        ValueError: no policy or measure, a policy that lacks a measure's interval, or an empty
            sequence of values.
    """
    measures = list(dict.fromkeys(m for values in differences.values() for m in values))
    if not measures:
        raise ValueError("differences must have at least one policy with one measure; got none.")
    for policy, values in differences.items():
        for measure, seeds in values.items():
            if not len(seeds):
                raise ValueError(f"{policy!r} has no value of {measure!r}; leave the measure out.")
            if intervals is not None and measure not in intervals.get(policy, {}):
                raise ValueError(f"intervals lacks {measure!r} of {policy!r}.")
    units, groups = units or {}, _groups(measures, units or {})
    row = _ROW * len(differences) + _GAP
    figure = new_figure(width, row * len(measures) + 0.32 * len(groups) + 0.6)
    axes = figure.subplots(
        len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": [len(g) for g in groups]}
    )[:, 0]
    looks, handles = styles(list(differences), order), {}
    for axis, group in zip(axes, groups, strict=True):
        names = []
        for place, measure in enumerate(group):
            arrow = _ARROWS[(better or {}).get(measure)]
            names.append((titles or {}).get(measure, measure.replace("_", " ")) + arrow)
            scale = 100.0 if units.get(measure) == "%" else 1.0
            for number, policy in enumerate(differences):
                if measure not in differences[policy]:
                    continue
                y = place + (number - (len(differences) - 1) / 2) * _ROW / row
                seeds = [scale * value for value in differences[policy][measure]]
                given = intervals[policy][measure] if intervals is not None else None
                ends = (
                    spread(seeds, "ci") if given is None else (scale * given[0], scale * given[1])
                )
                handles[policy] = _interval(axis, y, seeds, ends, looks[policy])
        _rows(axis, names, units.get(group[0], ""))
    legend_above(axes[0], {p: handles[p] for p in differences if p in handles}, width - 1.6)
    arrows = "; arrow: the better direction" if any((better or {}).values()) else ""
    what = bar or ("its 95 % interval" if intervals is None else "its interval")
    to = "the baseline" if baseline is None else f"“{baseline}”"
    said = f"difference to {to}, paired by seed; dots: seeds, mark: mean, bar: {what}"
    caption(figure, said + arrows)
    return figure


def _groups(measures: Sequence[str], units: Mapping[str, str]) -> list[list[str]]:
    """Return the measures that share an axis: those in % that follow each other."""
    groups: list[list[str]] = []
    for measure in measures:
        if groups and units.get(measure) == "%" == units.get(groups[-1][0]):
            groups[-1].append(measure)
        else:
            groups.append([measure])
    return groups


def _interval(
    axis: Any, y: float, seeds: Sequence[float], ends: tuple[float, float], look: dict[str, Any]
) -> Any:
    """Draw the seeds, the mean and its interval; return the mean's mark."""
    colour = look["color"]
    axis.plot(ends, (y, y), color=colour, linewidth=1.4, solid_capstyle="butt")
    axis.plot(seeds, [y] * len(seeds), "o", color=ink(), markersize=2.4, mew=0, zorder=4)
    (mark,) = axis.plot(
        sum(seeds) / len(seeds), y, linestyle="none", marker=look["marker"], color=colour,
        markersize=5, mew=0,
    )  # fmt: skip
    return mark


def _rows(axis: Any, names: Sequence[str], unit: str) -> None:
    plain(axis)
    axis.axvline(0, color=grey(), linewidth=0.9, zorder=0)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    left, right = axis.get_xlim()
    reach = max(abs(left), abs(right))
    axis.set_xlim(-reach, reach)
    axis.xaxis.get_major_locator().set_params(nbins=6)
    if unit:
        axis.set_xlabel("percentage points" if unit == "%" else unit, fontsize=7, labelpad=1)
