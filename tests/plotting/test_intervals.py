"""Differences with their intervals, and with the intervals that there are not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from maskdistill import plotting
from maskdistill.plotting.curves import plot_intervals

NAN, INF = math.nan, math.inf


def caption_of(figure: Any) -> str:
    return str(figure.get_supxlabel().replace("\n", " "))


def bars_of(figure: Any) -> list[list[float]]:
    """Return the ends of the bars: the lines without marks that are level."""
    lines = [line for axis in figure.axes for line in axis.lines if line.get_marker() == "None"]
    return [list(x.get_xdata()) for x in lines if len(set(x.get_ydata())) == 1]


def arrows_of(figure: Any) -> list[str]:
    return [line.get_marker() for line in figure.axes[0].lines if line.get_marker() in ("<", ">")]


@pytest.mark.parametrize("ends", [None, (0.02, 0.02), (NAN, NAN), (None, None), (None, 0.1)])
def test_a_single_seed_has_no_bar_and_the_caption_says_so(ends: Any) -> None:
    intervals = None if ends is None else {"a": {"knn": ends}}
    figure = plot_intervals({"a": {"knn": [0.02]}}, intervals)
    assert bars_of(figure) == []
    assert caption_of(figure).endswith("mark: mean; no interval with one seed")


def test_bars_and_no_bars_are_both_in_the_caption() -> None:
    given = {"a": {"knn": (0.02,), "rank": (1.0, 2.0)}}
    figure = plot_intervals(given, {"a": {"knn": (0.02, 0.02), "rank": (0.0, 3.0)}})
    assert bars_of(figure) == [[0, 3]]
    assert caption_of(figure).endswith("bar: its interval; no interval with one seed")
    figure = plot_intervals(given, {"a": {"knn": (0.0, 0.04), "rank": (NAN, 3.0)}})
    assert bars_of(figure) == [[0, 0.04]]
    assert caption_of(figure).endswith("bar: its interval; no bar: no interval")
    same = plot_intervals({"a": {"knn": (0.02, 0.02)}})  # two seeds that agree have an interval
    assert bars_of(same) == [[0.02, 0.02]]
    assert caption_of(same).endswith("bar: its 95 % interval")


def test_an_infinite_end_is_an_arrow_at_the_end_of_the_axis() -> None:
    seeds = {"a": {"knn": (0.01, 0.03)}}
    figure = plot_intervals(seeds, {"a": {"knn": (-INF, INF)}}, units={"knn": "%"})
    left, right = figure.axes[0].get_xlim()
    assert bars_of(figure) == [[pytest.approx(left, rel=0.03), pytest.approx(right, rel=0.03)]]
    assert arrows_of(figure) == ["<", ">"]
    assert "without end where it has an arrow" in caption_of(figure)
    figure = plot_intervals(
        seeds, {"a": {"knn": (-0.05, INF)}}, units={"knn": "%"}, better={"knn": "higher"}
    )
    left, right = figure.axes[0].get_xlim()
    assert left < -5
    assert bars_of(figure) == [[pytest.approx(-5), pytest.approx(right, rel=0.03)]]
    assert arrows_of(figure) == [">"]
    assert caption_of(figure).endswith("arrow beside a name: the better direction")


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_values_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"'knn' of 'asymmetric'.*got {wrong} in 1 of 2"):
        plotting.plot_intervals({"asymmetric": {"knn": (0.01, wrong)}})
