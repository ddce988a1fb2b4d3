"""Figures of numbers over training, over occlusion, and of differences between policies."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from maskdistill.plotting.pixels import check
from maskdistill.plotting.style import (
    COLUMN,
    GREEN,
    ORANGE,
    PAGE,
    PURPLE,
    VERMILION,
    accent,
    caption,
    fitted,
    grey,
    ink,
    legend_above,
    legend_rows,
    mark_floors,
    new_figure,
    plain,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Band: TypeAlias = Literal["range", "ci"]
BANDS: tuple[str, ...] = get_args(Band)
Metrics: TypeAlias = Sequence[Mapping[str, Any]]
_DODGE = 0.09
"""Inches between marks of several names at the same step."""
_BANDS = {"range": "least to greatest seed", "ci": "95 % confidence interval of the mean"}
_NAMES = {
    "knn": "20-NN accuracy (%)",
    "loss": "loss (nats)",
    "teacher_entropy": "teacher entropy (nats)",
    "lr": "learning rate",
}


class _Curve(Protocol):
    @property
    def ratios(self) -> Sequence[float]: ...
    @property
    def accuracies(self) -> Sequence[float]: ...


Numbers: TypeAlias = Sequence[float] | NDArray[Any] | torch.Tensor
Curve: TypeAlias = "_Curve | tuple[Numbers, Numbers]"


def plot_training_bands(
    runs: Mapping[str, Sequence[Metrics]],
    key: str = "knn",
    *,
    floors: Mapping[str, float] | None = None,
    band: Band = "range",
    label: str | None = None,
    percent: bool | None = None,
    order: Sequence[str] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Plot a number over training for several policies, each with a band over its seeds.

    >>> runs = {"none": [seed_0, seed_1], "asymmetric": [other_0, other_1]}  # doctest: +SKIP
    >>> plot_training_bands(runs, "knn", floors={"random weights": 0.41})  # doctest: +SKIP

    The line is the mean at the steps that all seeds have, single seeds are faint lines. A value
    that is not finite is left out, and its step of the mean. Of a single step the mean is a mark,
    and the spread a bar.

    Args:
        runs: policy to the lines of ``metrics.jsonl`` of each seed.
        key: of the number: ``"knn"``, ``"loss"``, or any that the lines have.
        floors: names and values to beat, such as the random initialisation's.
        band: from the least to the greatest seed (``"range"``), or the mean's 95 % confidence
            interval by Student's t (``"ci"``; needs SciPy). The caption says which.
        label: of the number; None makes one from the key.
        percent: the number is a share, shown times 100; None is so for accuracies, ``knn...``.
        order: all names of a study, so that each has the same colour in all plots; None is the
            order of ``runs``.
        width: inches; a paper's column by default.

    Raises:
        ValueError: no run, a run without the key or a finite value of it, seeds that have no step
            in common, an unknown band.
    """
    percent = key.startswith("knn") if percent is None else percent
    scale = 100.0 if percent else 1.0
    lines, left_out = {}, 0
    for name, seeds in runs.items():
        if not seeds:
            raise ValueError(f"runs[{name!r}] has no seeds; leave it out, or give its metrics.")
        found = [_by_step(metrics, key, name, scale) for metrics in seeds]
        lines[name] = [values for values, _ in found]
        left_out += sum(count for _, count in found)
    unit = " (%)" if percent else ""
    said = f"{left_out} value{'s' * (left_out > 1)} left out, not finite" if left_out else ""
    figure, axis = _band_figure(lines, band, order, width, after=said)
    _label(axis, width, "step", label or _NAMES.get(key, key.replace("_", " ") + unit))
    if len({step for seeds in lines.values() for seed in seeds for step in seed}) > 1:
        axis.xaxis.get_major_locator().set_params(nbins=5)
    mark_floors(axis, _scaled(floors, scale), _axis_height(width))
    return figure


def plot_occlusion(
    curves: Mapping[str, Curve | Sequence[Curve]],
    *,
    floors: Mapping[str, float] | None = None,
    band: Band = "range",
    label: str = "accuracy (%)",
    order: Sequence[str] | None = None,
    width: float = COLUMN,
) -> Figure:
    """Plot accuracy against the share of patches that is hidden.

    >>> curves = {"none": [curve_0, curve_1], "asymmetric": [curve_2, curve_3]}  # doctest: +SKIP
    >>> plot_occlusion(curves, floors={"chance": 1 / 11})  # doctest: +SKIP

    The legend says the area under each curve, divided by the range of ratios: the mean accuracy
    along it, and the mean over seeds.

    Args:
        curves: name to an ``OcclusionCurve``, to a pair of ratios and accuracies, both in [0, 1],
            or to a list of either, one per seed; lists, arrays and tensors will do. The order of
            the ratios does not matter; those of seeds are the same where six digits are.
        floors: names and accuracies in [0, 1] to compare with, such as chance.
        band: as for `plot_training_bands`.
        label: of the accuracy.
        order: all names of a study, so that each has the same colour in all plots.
        width: inches; a paper's column by default.

    Raises:
        ValueError: no curve, ratios and accuracies of different numbers or not finite, a ratio
            that comes twice, seeds without a common ratio, an unknown band.
    """
    lines, legend = {}, {}
    for name, given in curves.items():
        pairs = [_sorted_pairs(curve, name) for curve in _per_seed(given)]
        if not pairs:
            raise ValueError(f"curves[{name!r}] has no curve; leave it out, or give one.")
        # Of ten ratios 0.3 may be 3 / 10 in one seed and 0.1 * 3, or float32, in another.
        lines[name] = [{round(100 * x, 4): 100 * y for x, y in pair} for pair in pairs]
        area = sum(map(_area, pairs)) / len(pairs)
        legend[name] = f"{name} (area {100 * area:.1f})"
    figure, axis = _band_figure(
        lines, band, order, width, legend, before="area: mean accuracy along the curve"
    )
    _label(axis, width, "patches hidden (%)", label)
    axis.set_ylim(bottom=0)
    mark_floors(axis, _scaled(floors, 100.0), _axis_height(width), "left")
    return figure


def spread(values: Sequence[float], band: Band) -> tuple[float, float]:
    """Return the lower and upper end of a band over seeds.

    >>> spread((1.0, 2.0, 6.0), "range")
    (1.0, 6.0)
    >>> low, high = spread((1.0, 2.0, 6.0), "ci")  # mean 3, standard error 1.53, t 4.30
    >>> round(low, 2), round(high, 2)
    (-3.57, 9.57)

    Args:
        values: one per seed; of a single one both ends are that.
        band: ``"range"`` or ``"ci"``.
    """
    if band == "range" or len(values) < 2:
        return min(values), max(values)
    from scipy.special import stdtrit

    data = torch.tensor(values, dtype=torch.float64)
    mean, error = float(data.mean()), float(data.std()) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, 0.975)) * error
    return mean - reach, mean + reach


def _by_step(metrics: Metrics, key: str, name: str, scale: float) -> tuple[dict[float, float], int]:
    """Return the finite values by step, and how many others there are."""
    found = {line["step"]: line[key] for line in metrics if key in line}
    if not found:
        known = sorted({key for line in metrics for key in line} - {"step"})
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"a run of {name!r} has no line with {key!r}; its lines have {', '.join(known)}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    # JSON has no NaN: a value that was none is None there.
    finite = {
        step: scale * float(value)
        for step, value in found.items()
        if value is not None and math.isfinite(value)
    }
    if not finite:
        raise ValueError(f"a run of {name!r} has no finite {key!r}; leave the run out.")
    return finite, len(found) - len(finite)


def _per_seed(given: Any) -> list[Any]:
    """Return the curves of all seeds, of one or of several."""
    if hasattr(given, "accuracies") or (
        len(given) == 2
        and not hasattr(given[0], "accuracies")
        and len(given[0])
        and np.ndim(given[0][0]) == 0  # a number: two sequences of numbers are one curve
    ):
        return [given]
    return list(given)


def _sorted_pairs(curve: Any, name: str) -> list[tuple[float, float]]:
    """Return ratios and accuracies in the order of the ratios."""
    if hasattr(curve, "accuracies"):
        curve = (curve.ratios, curve.accuracies)
    if len(curve) != 2:
        raise ValueError(
            f"a curve of {name!r} must be a pair of ratios and accuracies; got {len(curve)} of "
            "them."
        )
    ratios, accuracies = curve
    if len(ratios) != len(accuracies) or len(ratios) < 2:
        raise ValueError(
            f"a curve of {name!r} must have as many accuracies as ratios, at least two; got "
            f"{len(accuracies)} for {len(ratios)}."
        )
    pairs = sorted((float(x), float(y)) for x, y in zip(ratios, accuracies, strict=True))
    if not all(math.isfinite(number) for pair in pairs for number in pair):
        raise ValueError(f"ratios and accuracies of {name!r} must be finite; got {pairs}.")
    ratio, count = Counter(round(x, 6) for x, _ in pairs).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"a curve of {name!r} has the ratio {ratio:g} {count} times; a ratio has one accuracy. "
            "Give several seeds as a list of curves."
        )
    return pairs


def _area(pairs: Sequence[tuple[float, float]]) -> float:
    x, y = torch.tensor(pairs, dtype=torch.float64).T
    return float(torch.trapezoid(y, x) / (x[-1] - x[0]))


def _scaled(floors: Mapping[str, float] | None, scale: float) -> dict[str, float]:
    return {name: scale * float(value) for name, value in (floors or {}).items()}


def _axis_height(width: float) -> float:
    """Return about how many inches high the axis of a figure of so many inches is."""
    return 0.7 * width - 0.58


def _label(axis: Any, width: float, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(fitted(y, max(0.8, _axis_height(width)), 8))


def _band_figure(
    lines: Mapping[str, Sequence[Mapping[float, float]]],
    band: Band,
    order: Sequence[str] | None,
    width: float,
    legend: Mapping[str, str] | None = None,
    before: str = "",
    after: str = "",
) -> tuple[Figure, Any]:
    """Return a figure and its axis with mean, band and single seeds of each name.

    Args:
        lines: name to ``{x: y}`` of each seed.
        band: as in `plot_training_bands`.
        order: as in `plot_training_bands`.
        width: inches.
        legend: name to its text in the legend; None is the name.
        before: begins the caption.
        after: ends the caption.
    """
    check("band", band, BANDS)
    if not lines:
        raise ValueError("there is nothing to plot: give at least one name.")
    looks = styles(list(lines), order)
    texts = [name if legend is None else legend[name] for name in lines]
    figure = new_figure(width, 0.7 * width + 0.13 * legend_rows(texts, width - 0.5))
    axis = plain(figure.subplots())
    shared = {name: _common(seeds, name) for name, seeds in lines.items()}
    single = [name for name, steps in shared.items() if len(steps) == 1]
    handles = {}
    for text, (name, seeds) in zip(texts, lines.items(), strict=True):
        for seed in seeds if len(seeds) > 1 else ():  # seeds may have steps that others lack
            if len(seed) > 1:
                x, y = zip(*sorted(seed.items()), strict=True)
                axis.plot(x, y, color=looks[name]["color"], linewidth=0.5, alpha=0.45)
        if name in single:
            aside = (single.index(name) - (len(single) - 1) / 2) * _DODGE
            handles[text] = _mean_and_bar(axis, shared[name][0], seeds, band, looks[name], aside)
        else:
            handles[text] = _mean_and_band(axis, shared[name], seeds, band, looks[name])
    if len(single) == len(lines) and len({shared[name][0] for name in single}) == 1:
        axis.set_xticks([shared[single[0]][0]])
    legend_above(axis, handles, width - 0.5)
    parts = [part for part in (before, _band_said(lines, single, band), after) if part]
    if parts:
        caption(figure, "; ".join(parts))
    return figure, axis


def _band_said(lines: Mapping[str, Sequence[Any]], single: Sequence[str], band: Band) -> str:
    """Return what a caption says of the means and of their spread; nothing of one seed each."""
    kinds = {name in single for name, seeds in lines.items() if len(seeds) > 1}
    if not kinds:
        return ""
    counts = sorted({len(seeds) for seeds in lines.values()})
    seeds_said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    mean = " or ".join(("line", "mark")[kind] for kind in sorted(kinds))
    ends = " or ".join(("band", "bar")[kind] for kind in sorted(kinds))
    return f"{mean}: mean of {seeds_said} seeds, {ends}: {_BANDS[band]}"


def _common(seeds: Sequence[Mapping[float, float]], name: str) -> list[float]:
    """Return the steps that all seeds have."""
    common = sorted(set.intersection(*(set(seed) for seed in seeds)))
    if not common:
        raise ValueError(f"the seeds of {name!r} have no step in common to average over.")
    return common


def _mean_and_band(
    axis: Any,
    steps: Sequence[float],
    seeds: Sequence[Mapping[float, float]],
    band: Band,
    look: Mapping[str, Any],
) -> Any:
    """Plot the mean as a line and the spread as a band; return the line."""
    rows = [[seed[x] for seed in seeds] for x in steps]
    if len(seeds) > 1:
        low, high = zip(*(spread(row, band) for row in rows), strict=True)
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.16, linewidth=0)
    (line,) = axis.plot(
        steps, [sum(row) / len(row) for row in rows], linewidth=1.3, markersize=3.2,
        markevery=max(1, len(steps) // 8), **look,
    )  # fmt: skip
    return line


def _mean_and_bar(
    axis: Any,
    step: float,
    seeds: Sequence[Mapping[float, float]],
    band: Band,
    look: Mapping[str, Any],
    aside: float,
) -> Any:
    """Plot the mean at the only step as a mark, and the spread as a bar; return the mark."""
    from matplotlib.transforms import ScaledTranslation

    values = [seed[step] for seed in seeds]
    ends = spread(values, band)
    axis.update_datalim([(step, end) for end in ends])  # what lies beside its step has no limits
    axis.autoscale_view()
    beside = axis.transData + ScaledTranslation(aside, 0, axis.figure.dpi_scale_trans)
    if len(seeds) > 1:
        axis.vlines(step, *ends, color=look["color"], linewidth=1.2, transform=beside)
    (mark,) = axis.plot(
        [step], [sum(values) / len(values)], linewidth=1.3, markersize=4,
        **{**look, "linestyle": "none"}, transform=beside,
    )  # fmt: skip
    return mark


# --- Differences to a baseline

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
    """Plot paired differences to a baseline: a row per measure, a line per policy.

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
        units: measure to its unit; of ``"%"`` values are shares, shown times 100.
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
    looks, every_bar = styles(list(differences), order), []
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
                bars.append(_difference_bar(axis, policy, y, seeds, ends, looks[policy]))
        _rows(axis, names, units.get(group[0], ""), any(map(_is_open, bars)))
        for one in filter(_is_open, bars):
            _extend_open_ends(axis, one)
        every_bar += bars
    handles = {one.policy: one.mark for one in every_bar}
    legend_above(axes[0], {policy: handles[policy] for policy in shown}, width - 1.6)
    what = bar or ("its 95 % interval" if intervals is None else "its interval")
    to = "the baseline" if baseline is None else f"“{baseline}”"
    said = [
        f"difference to {to}, paired by seed; dots: seeds, mark: mean{_bars_said(every_bar, what)}"
    ]
    if any((better or {}).values()):
        beside = " beside a name" if any(map(_is_open, every_bar)) else ""
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


def _bars_said(bars: Sequence[_Bar], what: str) -> str:
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


def _difference_bar(
    axis: Any,
    policy: str,
    y: float,
    seeds: Sequence[float],
    ends: tuple[float, float],
    look: dict[str, Any],
) -> _Bar:
    """Plot the seeds, the mean and its interval, as far as that is finite."""
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


def _extend_open_ends(axis: Any, bar: _Bar) -> None:
    """Plot a bar's infinite ends: to the end of the axis, and an arrow there."""
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


# --- A run's own curves


def plot_curves(
    metrics: Sequence[Mapping[str, Any]],
    floors: Mapping[str, float] | None = None,
    uniform_loss: float | None = None,
) -> Figure:
    """Plot a run's loss, k-NN accuracy and signs of collapse over its steps.

    >>> plot_curves(read_metrics(run / "metrics.jsonl")).savefig("curves.pdf")  # doctest: +SKIP

    Args:
        metrics: lines of ``metrics.jsonl``, each with ``step`` and any numbers; a line without a
            number, or with None, has no point of it.
        floors: names and k-NN accuracies to beat, such as the random initialisation's.
        uniform_loss: ln(out_dim), where the loss ends on collapse.
    """
    floors = {name: float(value) for name, value in (floors or {}).items()}
    rows = legend_rows(["teacher", *floors], 2.0)
    figure = new_figure(6.9, 2.3 + 0.13 * max(0, rows - 2))
    loss, knn, spread = figure.subplots(1, 3)

    def points(name: str) -> tuple[list[float], list[float]]:
        lines = [line for line in metrics if line.get(name) is not None]
        return [line["step"] for line in lines], [line[name] for line in lines]

    few = "o" if len(points("loss")[0]) < 3 else None  # a line of one point shows nothing
    look: dict[str, Any] = {"linewidth": 1.2, "marker": few, "markersize": 3}
    losses = {
        "loss": loss.plot(*points("loss"), color=accent(), **look)[0],
        "teacher entropy": loss.plot(
            *points("teacher_entropy"), color=GREEN, linestyle=(0, (4, 1.5)), **look
        )[0],
    }
    if uniform_loss is not None:
        losses["uniform"] = loss.axhline(uniform_loss, color=grey(), linewidth=0.8, linestyle=":")
    loss.set_ylabel("nats")
    steps, accuracy = points("knn")
    percent = [100 * value for value in accuracy]
    accuracies = {
        "teacher": knn.plot(
            steps, percent, color=accent(), linewidth=1.2, marker="o", markersize=3
        )[0]
    }
    for number, (name, floor) in enumerate(floors.items()):
        accuracies[name] = knn.axhline(
            100 * floor, linewidth=0.9, color=(VERMILION, PURPLE, ORANGE)[number // 3 % 3],
            linestyle=("--", ":", "-.")[number % 3],
        )  # fmt: skip
    shown = [y for y in (*percent, *(100 * f for f in floors.values())) if math.isfinite(y)]
    knn.set_ylim(0, 1.1 * max([*shown, 1.0]))
    knn.set_ylabel("20-NN accuracy (%)")
    spread.plot(*points("feature_spread"), color=accent(), **look)
    spread.set_ylim(0, 1.02)
    spread.set_ylabel("feature spread")
    for axis in (loss, knn, spread):
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(nbins=4)
        plain(axis)
    legend_above(loss, losses, 2.0)
    legend_above(knn, accuracies, 2.0)
    return figure
