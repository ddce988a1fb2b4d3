"""Curves with bands over seeds: training, and accuracy under occlusion."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from maskdistill.plotting.pixels import check
from maskdistill.plotting.style import (
    COLUMN,
    caption,
    fitted,
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
    """Draw a number over training for several policies, each with a band over its seeds.

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
        percent: the number is a share, drawn times 100; None is so for accuracies, ``knn...``.
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
        found = [_series(metrics, key, name, scale) for metrics in seeds]
        lines[name] = [_finite(values, key, name) for values in found]
        left_out += sum(map(len, found)) - sum(map(len, lines[name]))
    unit = " (%)" if percent else ""
    said = f"{left_out} value{'s' * (left_out > 1)} left out, not finite" if left_out else ""
    figure, axis = _band_figure(
        lines, band, order, width, {name: name for name in lines}, after=said
    )
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
    """Draw accuracy against the share of patches that is hidden.

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
    lines, names = {}, {}
    for name, given in curves.items():
        pairs = [_pair(curve, name) for curve in _per_seed(given)]
        if not pairs:
            raise ValueError(f"curves[{name!r}] has no curve; leave it out, or give one.")
        # Of ten ratios 0.3 may be 3 / 10 in one seed and 0.1 * 3, or float32, in another.
        lines[name] = [{round(100 * x, 4): 100 * y for x, y in pair} for pair in pairs]
        area = sum(map(_area, pairs)) / len(pairs)
        names[name] = f"{name} (area {100 * area:.1f})"
    figure, axis = _band_figure(
        lines, band, order, width, names, "area: mean accuracy along the curve"
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


def _series(metrics: Metrics, key: str, name: str, scale: float) -> dict[float, float]:
    # JSON has no NaN: a value that was none is None there.
    found = {
        line["step"]: math.nan if line[key] is None else scale * float(line[key])
        for line in metrics
        if key in line
    }
    if not found:
        known = sorted({key for line in metrics for key in line} - {"step"})
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"a run of {name!r} has no line with {key!r}; its lines have {', '.join(known)}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    return found


def _finite(values: dict[float, float], key: str, name: str) -> dict[float, float]:
    found = {step: value for step, value in values.items() if math.isfinite(value)}
    if not found:
        raise ValueError(f"a run of {name!r} has no finite {key!r}; leave the run out.")
    return found


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


def _pair(curve: Any, name: str) -> list[tuple[float, float]]:
    """Return ratios and accuracies in the order of the ratios."""
    if not hasattr(curve, "accuracies") and len(curve) != 2:
        raise ValueError(
            f"a curve of {name!r} must be a pair of ratios and accuracies; got {len(curve)} of "
            "them."
        )
    ratios, accuracies = (curve.ratios, curve.accuracies) if hasattr(curve, "accuracies") else curve
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
    names: Mapping[str, str],
    said: str = "",
    after: str = "",
) -> tuple[Figure, Any]:
    """Draw mean, band and single seeds of each name: ``{x: y}`` per seed."""
    check("band", band, BANDS)
    if not lines:
        raise ValueError("there is nothing to draw: give at least one name.")
    looks = styles(list(lines), order)
    looks = styles(list(lines), order)
    figure = new_figure(width, 0.7 * width + 0.13 * legend_rows(list(names.values()), width - 0.5))
    axis = plain(figure.subplots())
    shared = {name: _common(seeds, name) for name, seeds in lines.items()}
    single = [name for name, steps in shared.items() if len(steps) == 1]
    handles = {}
    for name, seeds in lines.items():
        if name in single:
            aside = (single.index(name) - (len(single) - 1) / 2) * _DODGE
            handles[names[name]] = _draw_bar(axis, shared[name][0], seeds, band, looks[name], aside)
        else:
            handles[names[name]] = _draw_band(axis, shared[name], seeds, band, looks[name])
    if len(single) == len(lines) and len({shared[name][0] for name in single}) == 1:
        axis.set_xticks([shared[single[0]][0]])
    legend_above(axis, handles, width - 0.5)
    counts = sorted({len(seeds) for seeds in lines.values()})
    seeds_said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    several = [name for name, seeds in lines.items() if len(seeds) > 1]
    parts = [said]
    if several:
        kinds = {name in single for name in several}
        mean, spread_ = (" or ".join(pair[kind] for kind in sorted(kinds))
                         for pair in (("line", "mark"), ("band", "bar")))  # fmt: skip
        parts.append(f"{mean}: mean of {seeds_said} seeds, {spread_}: {_BANDS[band]}")
    if any(parts := [part for part in (*parts, after) if part]):
        caption(figure, "; ".join(parts))
    return figure, axis


def _common(seeds: Sequence[Mapping[float, float]], name: str) -> list[float]:
    """Return the steps that all seeds have."""
    common = sorted(set.intersection(*(set(seed) for seed in seeds)))
    if not common:
        raise ValueError(f"the seeds of {name!r} have no step in common to average over.")
    return common


def _draw_band(
    axis: Any,
    steps: Sequence[float],
    seeds: Sequence[Mapping[float, float]],
    band: Band,
    look: Mapping[str, Any],
) -> Any:
    """Draw the mean as a line, the spread as a band, and single seeds; return the line."""
    rows = [[seed[x] for seed in seeds] for x in steps]
    if len(seeds) > 1:
        low, high = zip(*(spread(row, band) for row in rows), strict=True)
        axis.fill_between(steps, low, high, color=look["color"], alpha=0.16, linewidth=0)
        for seed in seeds:
            axis.plot(
                sorted(seed), [seed[x] for x in sorted(seed)], color=look["color"],
                linewidth=0.5, alpha=0.45,
            )  # fmt: skip
    (line,) = axis.plot(
        steps, [sum(row) / len(row) for row in rows], linewidth=1.3, markersize=3.2,
        markevery=max(1, len(steps) // 8), **look,
    )  # fmt: skip
    return line


def _draw_bar(
    axis: Any,
    step: float,
    seeds: Sequence[Mapping[float, float]],
    band: Band,
    look: Mapping[str, Any],
    aside: float,
) -> Any:
    """Draw the mean at the only step as a mark, and the spread as a bar; return the mark."""
    from matplotlib.transforms import ScaledTranslation

    values = [seed[step] for seed in seeds]
    ends = spread(values, band)
    axis.update_datalim([(step, end) for end in ends])  # what lies beside its step has no limits
    axis.autoscale_view()
    beside = axis.transData + ScaledTranslation(aside, 0, axis.figure.dpi_scale_trans)
    for seed in seeds if len(seeds) > 1 else ():  # seeds may have steps that others lack
        if len(seed) > 1:
            axis.plot(
                sorted(seed), [seed[x] for x in sorted(seed)], color=look["color"],
                linewidth=0.5, alpha=0.45,
            )  # fmt: skip
    if len(seeds) > 1:
        axis.vlines(step, *ends, color=look["color"], linewidth=1.2, transform=beside)
    (mark,) = axis.plot(
        [step], [sum(values) / len(values)], linewidth=1.3, markersize=4,
        **{**look, "linestyle": "none"}, transform=beside,
    )  # fmt: skip
    return mark
