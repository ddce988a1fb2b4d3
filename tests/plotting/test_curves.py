"""Curves, bands and intervals show the numbers they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maskdistill import plotting
from maskdistill.plotting.bands import spread
from tests.plotting.shown import (
    curve,
    metrics,
)


def test_spread_is_students_interval() -> None:
    values = (0.61, 0.64, 0.59, 0.66)
    quantile = 3.182446  # of t with 3 degrees of freedom at 0.975, from a table
    mean, reach = np.mean(values), quantile * np.std(values, ddof=1) / 2
    assert spread(values, "ci") == pytest.approx((mean - reach, mean + reach), rel=1e-6)
    assert spread(values, "range") == (0.59, 0.66)
    assert spread((0.5,), "ci") == (0.5, 0.5)


def lines_of(axis: Any) -> dict[str, Any]:
    legend = axis.get_legend()
    marked = [line for line in axis.lines if line.get_marker() not in ("None", "none", None)]
    return dict(zip([text.get_text() for text in legend.get_texts()], marked, strict=True))


def test_bands_are_of_the_seeds() -> None:
    runs = {
        "none": [metrics(0.4, 0.5, 0.6), metrics(0.2, 0.5, 0.8)],
        "asymmetric": [metrics(0.1, 0.3)],
    }
    figure = plotting.plot_training_bands(runs, floors={"random weights": 0.25})
    axis = figure.axes[0]
    lines = lines_of(axis)
    assert lines["none"].get_ydata() == pytest.approx([30, 50, 70])
    assert lines["asymmetric"].get_ydata() == pytest.approx([10, 30])
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(20)
    assert corners[:, 1].max() == pytest.approx(80)
    assert "mean of 1 to 2 seeds, band: least to greatest seed" in figure.get_supxlabel().replace(
        "\n", " "
    )
    assert axis.get_ylabel() == "20-NN accuracy (%)"
    assert [text.get_text() for text in axis.texts] == ["random weights"]
    figure = plotting.plot_training_bands(runs, band="ci")
    assert "95 % confidence interval" in figure.get_supxlabel().replace("\n", " ")
    figure = plotting.plot_training_bands({"one": [metrics(1.5, 1.2, key="loss")]}, "loss")
    assert lines_of(figure.axes[0])["one"].get_ydata() == pytest.approx([1.5, 1.2])
    assert figure.get_supxlabel() == ""


def test_seeds_are_averaged_where_all_have_a_step() -> None:
    other = [{"step": 100, "knn": 0.7}, {"step": 150, "knn": 0.9}]
    figure = plotting.plot_training_bands({"none": [metrics(0.4, 0.5), other]})
    line = lines_of(figure.axes[0])["none"]
    assert list(line.get_xdata()) == [100]
    assert line.get_ydata() == pytest.approx([60])


def test_a_name_keeps_its_colour_in_all_plots() -> None:
    order = ["none", "asymmetric", "symmetric"]
    every = plotting.plot_occlusion({name: curve(0.5) for name in order})
    one = plotting.plot_training_bands({"symmetric": [metrics(0.1, 0.2)]}, order=order)
    colours = [line.get_color() for line in lines_of(every.axes[0]).values()]
    assert [line.get_color() for line in lines_of(one.axes[0]).values()] == [colours[2]]
    with pytest.raises(ValueError, match="order lacks 'symmetric'"):
        plotting.plot_occlusion({"symmetric": curve(0.5)}, order=["none"])


def test_occlusion_curves_come_in_three_forms() -> None:
    from maskdistill.evaluation.robustness import OcclusionCurve

    ratios, accuracies = curve(0.5)
    whole = OcclusionCurve(ratios, tuple(range(10)), accuracies, 0.5, 0.275, ())
    figure = plotting.plot_occlusion(
        {
            "pair": curve(0.5),
            "curve": whole,
            "seeds": [whole, curve(0.7)],
            "lists": ([0.0, 0.5], [1, 0]),
        }
    )
    lines = lines_of(figure.axes[0])
    # Of a straight line down to a tenth: 0.5 * (1 + 0.1) / 2.
    assert list(lines) == [
        "pair (area 27.5)", "curve (area 27.5)", "seeds (area 33.0)", "lists (area 50.0)"
    ]  # fmt: skip
    assert lines["seeds (area 33.0)"].get_ydata()[0] == pytest.approx(60)
    assert lines["pair (area 27.5)"].get_xdata() == pytest.approx([10 * i for i in range(10)])


def test_intervals_show_seeds_mean_and_ends() -> None:
    given = {"asymmetric": {"knn_20": (0.01, 0.03), "effective_rank": (-2.0, 4.0)}}
    ends = {"asymmetric": {"knn_20": (-0.02, 0.06), "effective_rank": (-5.0, 7.0)}}
    figure = plotting.plot_intervals(
        given,
        ends,
        units={"knn_20": "%"},
        titles={"knn_20": "20-NN"},
        better={"knn_20": "lower"},
        bar="90 % of something",
    )
    assert "bar: 90 % of something" in figure.get_supxlabel()
    knn, rank = figure.axes
    bar, seeds, mean, _ = knn.lines
    assert list(bar.get_xdata()) == pytest.approx([-2, 6])
    assert list(seeds.get_xdata()) == pytest.approx([1, 3])
    assert list(mean.get_xdata()) == pytest.approx([2])
    assert [text.get_text() for text in knn.get_yticklabels()] == ["20-NN ↓"]
    assert [text.get_text() for text in rank.get_yticklabels()] == ["effective rank"]
    assert knn.get_xlabel() == "percentage points"
    assert list(rank.lines[0].get_xdata()) == pytest.approx([-5, 7])
    assert knn.get_xlim()[0] == -knn.get_xlim()[1]
    own = plotting.plot_intervals({"a": {"knn": (0.01, 0.02, 0.04)}}).axes[0].lines[0]
    assert list(own.get_xdata()) == pytest.approx(list(spread((0.01, 0.02, 0.04), "ci")))


def test_measures_in_percent_share_an_axis() -> None:
    names = ("a", "b", "rank", "entropy", "c")
    figure = plotting.plot_intervals(
        {"x": dict.fromkeys(names, (0.1, 0.2))}, units=dict.fromkeys("abc", "%")
    )
    labels = [[text.get_text() for text in axis.get_yticklabels()] for axis in figure.axes]
    assert labels == [["a", "b"], ["rank"], ["entropy"], ["c"]]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plotting.plot_training_bands({}), "nothing to draw"),
        (lambda: plotting.plot_training_bands({"a": []}), "has no seeds"),
        (lambda: plotting.plot_training_bands({"a": [metrics(1.0)]}, "kn"), "'kn'; .*mean 'knn'"),
        (
            lambda: plotting.plot_training_bands({"a": [metrics(1.0), [{"step": 7, "knn": 1.0}]]}),
            "no step in common",
        ),
        (
            lambda: plotting.plot_training_bands({"a": [metrics(1.0)]}, band="std"),  # type: ignore[arg-type]
            "range, ci; got 'std'",
        ),
        (lambda: plotting.plot_occlusion({}), "nothing to draw"),
        (lambda: plotting.plot_occlusion({"a": []}), "has no curve"),
        (lambda: plotting.plot_occlusion({"a": ((0.0, 0.5), (0.1,))}), "as many accuracies"),
        (lambda: plotting.plot_intervals({}), "at least one policy"),
        (lambda: plotting.plot_intervals({"a": {"knn": ()}}), "no value of 'knn'"),
        (lambda: plotting.plot_intervals({"a": {"knn": (0.1,)}}, {}), "intervals lacks 'knn'"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_drawn_are_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
