"""Curves with bands over seeds: training, and accuracy under occlusion."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args

import torch

from maskdistill.plotting.pixels import check
from maskdistill.plotting.style import (
    COLUMN,
    caption,
    grey,
    legend_above,
    legend_rows,
    new_figure,
    plain,
    styles,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Band: TypeAlias = Literal["range", "ci"]
BANDS: tuple[str, ...] = get_args(Band)
Metrics: TypeAlias = Sequence[Mapping[str, Any]]
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


Curve: TypeAlias = "_Curve | tuple[Sequence[float], Sequence[float]]"


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

    The line is the mean at the steps that all seeds have, single seeds are faint lines.

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
        ValueError: no run, a run without the key, seeds that have no step in common, an unknown
            band.
    """
    percent = key.startswith("knn") if percent is None else percent
    scale = 100.0 if percent else 1.0
    lines = {}
    for name, seeds in runs.items():
        if not seeds:
            raise ValueError(f"runs[{name!r}] has no seeds; leave it out, or give its metrics.")
        lines[name] = [_series(metrics, key, name, scale) for metrics in seeds]
    unit = " (%)" if percent else ""
    figure, axis = _band_figure(lines, band, order, width, {name: name for name in lines})
    _floors(axis, floors, scale)
    axis.set_xlabel("step")
    axis.set_ylabel(label or _NAMES.get(key, key.replace("_", " ") + unit))
    axis.xaxis.get_major_locator().set_params(nbins=5)
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
            or to a list of either, one per seed.
        floors: names and accuracies in [0, 1] to compare with, such as chance.
        band: as for `plot_training_bands`.
        label: of the accuracy.
        order: all names of a study, so that each has the same colour in all plots.
        width: inches; a paper's column by default.

    Raises:
        ValueError: no curve, ratios and accuracies of different numbers, seeds without a common
            ratio, an unknown band.
    """
    lines, names = {}, {}
    for name, given in curves.items():
        pairs = [_pair(curve, name) for curve in _per_seed(given)]
        if not pairs:
            raise ValueError(f"curves[{name!r}] has no curve; leave it out, or give one.")
        lines[name] = [{100 * x: 100 * y for x, y in zip(*pair, strict=True)} for pair in pairs]
        area = sum(_area(*pair) for pair in pairs) / len(pairs)
        names[name] = f"{name} (area {100 * area:.1f})"
    figure, axis = _band_figure(
        lines, band, order, width, names, "area: mean accuracy along the curve"
    )
    _floors(axis, floors, 100.0, "left")
    axis.set_xlabel("patches hidden (%)")
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
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
    found = {line["step"]: scale * line[key] for line in metrics if line.get(key) is not None}
    if not found:
        known = sorted({key for line in metrics for key in line} - {"step"})
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"a run of {name!r} has no line with {key!r}; its lines have {', '.join(known)}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    return found


def _per_seed(given: Any) -> list[Any]:
    """Return the curves of all seeds, of one or of several."""
    if hasattr(given, "accuracies") or (
        isinstance(given, tuple) and len(given) == 2 and isinstance(given[0][0], float | int)
    ):
        return [given]
    return list(given)


def _pair(curve: Any, name: str) -> tuple[list[float], list[float]]:
    ratios, accuracies = (curve.ratios, curve.accuracies) if hasattr(curve, "accuracies") else curve
    if len(ratios) != len(accuracies) or len(ratios) < 2:
        raise ValueError(
            f"a curve of {name!r} must have as many accuracies as ratios, at least two; got "
            f"{len(accuracies)} for {len(ratios)}."
        )
    return list(ratios), list(accuracies)


def _area(ratios: list[float], accuracies: list[float]) -> float:
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (ratios, accuracies))
    return float(torch.trapezoid(y, x) / (x[-1] - x[0]))


def _band_figure(
    lines: Mapping[str, Sequence[Mapping[float, float]]],
    band: Band,
    order: Sequence[str] | None,
    width: float,
    names: Mapping[str, str],
    said: str = "",
) -> tuple[Figure, Any]:
    """Draw mean, band and single seeds of each name: ``{x: y}`` per seed."""
    check("band", band, BANDS)
    if not lines:
        raise ValueError("there is nothing to draw: give at least one name.")
    looks = styles(list(lines), order)
    figure = new_figure(width, 0.7 * width + 0.13 * legend_rows(list(names.values()), width - 0.5))
    axis = plain(figure.subplots())
    handles, most = {}, max(len(seeds) for seeds in lines.values())
    for name, seeds in lines.items():
        common = sorted(set.intersection(*(set(seed) for seed in seeds)))
        if not common:
            raise ValueError(f"the seeds of {name!r} have no step in common to average over.")
        rows = [[seed[x] for seed in seeds] for x in common]
        look = looks[name]
        if len(seeds) > 1:
            low, high = zip(*(spread(row, band) for row in rows), strict=True)
            axis.fill_between(common, low, high, color=look["color"], alpha=0.16, linewidth=0)
            for seed in seeds:
                axis.plot(
                    sorted(seed), [seed[x] for x in sorted(seed)], color=look["color"],
                    linewidth=0.5, alpha=0.45,
                )  # fmt: skip
        (handles[names[name]],) = axis.plot(
            common, [sum(row) / len(row) for row in rows], linewidth=1.3, markersize=3.2,
            markevery=max(1, len(common) // 8), **look,
        )  # fmt: skip
    legend_above(axis, handles, width - 0.5)
    counts = sorted({len(seeds) for seeds in lines.values()})
    seeds_said = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [said] if said else []
    if most > 1:
        parts.append(f"line: mean of {seeds_said} seeds, band: {_BANDS[band]}")
    if parts:
        caption(figure, "; ".join(parts))
    return figure, axis


def _floors(
    axis: Any, floors: Mapping[str, float] | None, scale: float, side: str = "right"
) -> None:
    """Draw values to compare with as dotted lines, named on the side where curves are far."""
    for number, (name, value) in enumerate((floors or {}).items()):
        axis.axhline(
            scale * value, color=grey(), linewidth=0.9, linestyle=(":", "--", "-.")[number % 3],
            zorder=1,
        )  # fmt: skip
        axis.annotate(
            name, (float(side == "right"), scale * value), xycoords=("axes fraction", "data"),
            xytext=(2 if side == "left" else 0, 1.5), textcoords="offset points", ha=side,
            va="bottom", fontsize=6, color=grey(),
        )  # fmt: skip
