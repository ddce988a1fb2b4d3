"""Differences to a baseline, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from maskdistill.plotting.bands import spread
from maskdistill.plotting.style import (
    PAGE,
    caption,
    grey,
    ink,
    legend_above,
    legend_rows,
    new_figure,
    plain,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROW, _GAP = 0.13, 0.12
"""Inches of a policy within a measure's row, and between rows."""
_NONE = (math.nan, math.nan)
_ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


def plot_intervals(
    differences: Mapping[str, Mapping[str, Sequence[float]]],
    intervals: Mapping[str, Mapping[str, tuple[float | None, float | None]]] | None = None,
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
    each other share an axis; each other measure has its own, for its unit is its own. Where there
    is no interval, there is no bar, and the caption says so.

    Args:
        differences: policy to measure to the policy's value minus the baseline's, one per seed.
        intervals: policy to measure to the lower and upper end of the mean's interval; None takes
            95 % by Student's t, which needs SciPy. A single seed has no interval: so of one with
            two ends at that seed's value, and of an end that is None or NaN. An infinite end is
            an arrow at the end of the axis.
        baseline: its name, for the caption.
        bar: what the intervals are, for the caption; None says "its 95 % interval" of those that
            are made here, and "its interval" of those given.
        titles: measure to what is written beside its row; else the measure's name.
        units: measure to its unit; of ``"%"`` values are shares, drawn times 100.
        better: measure to ``"higher"`` or ``"lower"``, shown as an arrow.
        order: all names of a study, so that each has the same colour in all plots.
        width: inches; a paper's page by default.

    Raises:
        ValueError: no policy or measure, a policy that lacks a measure's interval, an empty
            sequence of values, or a value that is not finite.
    """
    measures = list(dict.fromkeys(m for values in differences.values() for m in values))
    if not measures:
        raise ValueError("differences must have at least one policy with one measure; got none.")
    for policy, values in differences.items():
        for measure, seeds in values.items():
            _check_values(policy, measure, seeds)
            if intervals is not None and measure not in intervals.get(policy, {}):
                raise ValueError(f"intervals lacks {measure!r} of {policy!r}.")
    units, groups = units or {}, _groups(measures, units or {})
    shown = [policy for policy in differences if differences[policy]]
    row = _ROW * len(differences) + _GAP
    above = 0.13 * (legend_rows(shown, width - 1.6) - 1)
    figure = new_figure(width, row * len(measures) + 0.32 * len(groups) + 0.6 + above)
    axes = figure.subplots(
        len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": [len(g) for g in groups]}
    )[:, 0]
    looks, drawn = styles(list(differences), order), []
    for axis, group in zip(axes, groups, strict=True):
        names, bars = [], []
        for place, measure in enumerate(group):
            arrow = _ARROWS[(better or {}).get(measure)]
            names.append((titles or {}).get(measure, measure.replace("_", " ")) + arrow)
            scale = 100.0 if units.get(measure) == "%" else 1.0
            for number, policy in enumerate(differences):
                if measure not in differences[policy]:
                    continue
                y = place + (number - (len(differences) - 1) / 2) * _ROW / row
                seeds = [scale * float(value) for value in differences[policy][measure]]
                given = intervals[policy][measure] if intervals is not None else None
                ends = _ends(seeds, given, scale)
                bars.append(_interval(axis, policy, y, seeds, ends, looks[policy]))
        _rows(axis, names, units.get(group[0], ""), any(map(_is_open, bars)))
        for one in filter(_is_open, bars):
            _lead_on(axis, one)
        drawn += bars
    handles = {one.policy: one.mark for one in drawn}
    legend_above(axes[0], {policy: handles[policy] for policy in shown}, width - 1.6)
    what = bar or ("its 95 % interval" if intervals is None else "its interval")
    to = "the baseline" if baseline is None else f"“{baseline}”"
    said = [f"difference to {to}, paired by seed; dots: seeds, mark: mean{_said(drawn, what)}"]
    if any((better or {}).values()):
        beside = " beside a name" if any(map(_is_open, drawn)) else ""
        said.append(f"arrow{beside}: the better direction")
    caption(figure, "; ".join(said))
    return figure


class _Bar(NamedTuple):
    policy: str
    y: float
    seeds: Sequence[float]
    ends: tuple[float, float]
    line: Any
    mark: Any


def _check_values(policy: str, measure: str, seeds: Sequence[float]) -> None:
    if not len(seeds):
        raise ValueError(f"{policy!r} has no value of {measure!r}; leave the measure out.")
    wrong = [float(value) for value in seeds if not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"the values of {measure!r} of {policy!r} must be finite; got {wrong[0]} in "
            f"{len(wrong)} of {len(seeds)}. Leave that seed, or the measure, out."
        )


def _ends(
    seeds: Sequence[float], given: tuple[float | None, float | None] | None, scale: float
) -> tuple[float, float]:
    """Return the ends of a bar, both NaN where there is no interval."""
    if given is None:
        return spread(seeds, "ci") if len(seeds) > 1 else _NONE
    low, high = (math.nan if end is None else scale * float(end) for end in given)
    if math.isnan(low) or math.isnan(high):
        return _NONE
    # To both ends some write the seed itself where one seed has no interval.
    if len(seeds) == 1 and math.isclose(low, high) and math.isclose(low, seeds[0]):
        return _NONE
    return low, high


def _is_open(bar: _Bar) -> bool:
    return any(map(math.isinf, bar.ends))


def _said(bars: Sequence[_Bar], what: str) -> str:
    """Return what the caption says of the bars, and of those that there are not."""
    none = [bar for bar in bars if math.isnan(bar.ends[0])]
    said = "" if len(none) == len(bars) else f", bar: {what}"
    if any(map(_is_open, bars)):
        said += " (without end where it has an arrow)"
    if any(len(bar.seeds) == 1 for bar in none):
        said += "; no interval with one seed"
    if any(len(bar.seeds) > 1 for bar in none):
        said += "; no bar: no interval"
    return said


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
    axis: Any,
    policy: str,
    y: float,
    seeds: Sequence[float],
    ends: tuple[float, float],
    look: dict[str, Any],
) -> _Bar:
    """Draw the seeds, the mean and its interval, as far as that is finite."""
    colour, mean = look["color"], sum(seeds) / len(seeds)
    line = None
    if not math.isnan(ends[0]):
        low, high = (end if math.isfinite(end) else mean for end in ends)
        (line,) = axis.plot((low, high), (y, y), color=colour, linewidth=1.4, solid_capstyle="butt")
    axis.plot(seeds, [y] * len(seeds), "o", color=ink(), markersize=2.4, mew=0, zorder=4)
    (mark,) = axis.plot(
        mean, y, linestyle="none", marker=look["marker"], color=colour, markersize=5, mew=0
    )
    return _Bar(policy, y, seeds, ends, line, mark)


def _lead_on(axis: Any, bar: _Bar) -> None:
    """Draw a bar's infinite ends: to the end of the axis, and an arrow there."""
    limits = axis.get_xlim()
    shown = list(bar.line.get_xdata())
    for side, (end, limit) in enumerate(zip(bar.ends, limits, strict=True)):
        if math.isinf(end):
            shown[side] = 0.98 * limit
            axis.plot(
                shown[side], bar.y, linestyle="none", marker=">" if side else "<", clip_on=False,
                color=bar.line.get_color(), markersize=4, mew=0, zorder=5,
            )  # fmt: skip
    bar.line.set_xdata(shown)


def _rows(axis: Any, names: Sequence[str], unit: str, is_open: bool) -> None:
    plain(axis)
    axis.axvline(0, color=grey(), linewidth=0.9, zorder=0)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    left, right = axis.get_xlim()
    reach = max(abs(left), abs(right)) * (1.25 if is_open else 1)  # room for what leads on
    axis.set_xlim(-reach, reach)
    axis.xaxis.get_major_locator().set_params(nbins=6)
    if unit:
        axis.set_xlabel("percentage points" if unit == "%" else unit, fontsize=7, labelpad=1)
