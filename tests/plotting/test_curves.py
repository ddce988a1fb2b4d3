"""Curves, bands and intervals show the numbers they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from maskdistill import plotting
from maskdistill.plotting.curves import spread
from tests.plotting.shown import (
    curve,
    metrics,
    overlapping,
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


TENTHS = [i / 10 for i in range(10)]
FALLING = [0.6 - i / 20 for i in range(10)]


def test_the_order_of_ratios_does_not_matter() -> None:
    mixed = [3, 1, 0, 2, 9, 8, 7, 6, 5, 4]
    shuffled = [TENTHS[i] for i in mixed], [FALLING[i] for i in mixed]
    for given in ((TENTHS, FALLING), (TENTHS[::-1], FALLING[::-1]), shuffled):
        lines = lines_of(plotting.plot_occlusion({"x": given}).axes[0])
        assert list(lines) == ["x (area 37.5)"]
        assert list(lines["x (area 37.5)"].get_xdata()) == pytest.approx(range(0, 100, 10))


@pytest.mark.parametrize(
    "ratios",
    [
        list(np.linspace(0, 0.9, 10)),
        np.arange(0, 1, 0.1),
        np.array(TENTHS, np.float32),
        torch.tensor(TENTHS),
    ],
)
def test_seeds_share_the_ratios_that_differ_by_rounding(ratios: Any) -> None:
    figure = plotting.plot_occlusion({"x": [(TENTHS, FALLING), (ratios, FALLING)]})
    assert len(lines_of(figure.axes[0])["x (area 37.5)"].get_xdata()) == 10


@pytest.mark.parametrize(
    "given",
    [
        (np.array([0, 1], np.float32), np.array([0.5, 0.25], np.float32)),
        (np.arange(2), [0.5, 0.25]),
        (torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.25])),
        [[0, 1], [0.5, 0.25]],
        [[[0, 1], [0.5, 0.25]]],
        [(torch.tensor([0, 1]), [0.5, 0.25])] * 2,
        np.array([[0, 1], [0.5, 0.25]]),
    ],
)
def test_numbers_come_in_all_forms(given: Any) -> None:
    line = lines_of(plotting.plot_occlusion({"x": given}).axes[0])["x (area 37.5)"]
    assert list(line.get_xdata()) == [0, 100]
    assert line.get_ydata() == pytest.approx([50, 25])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), None])
def test_what_is_not_finite_is_left_out_in_any_order_of_the_seeds(wrong: Any) -> None:
    seeds = [metrics(0.4, 0.5, 0.6), metrics(0.4, wrong, 0.8), metrics(0.2, 0.3, 0.4)]
    shown = []
    for order in ([0, 1, 2], [1, 0, 2], [2, 0, 1]):
        figure = plotting.plot_training_bands({"a": [seeds[i] for i in order]})
        axis = figure.axes[0]
        line = lines_of(axis)["a"]
        assert list(line.get_xdata()) == [0, 200]
        assert line.get_ydata() == pytest.approx([100 / 3, 60])
        shown.append(sorted(map(tuple, axis.collections[0].get_paths()[0].vertices)))
        said = figure.get_supxlabel().replace("\n", " ")
        assert said.endswith("1 value left out, not finite")
    assert shown[0] == shown[1] == shown[2]


def test_the_spread_at_a_single_step_is_a_bar() -> None:
    runs = {"a": [metrics(0.4), metrics(0.6)], "b": [metrics(0.3), metrics(0.5)]}
    figure = plotting.plot_training_bands(runs)
    axis = figure.axes[0]
    assert [[tuple(end) for end in bar.get_segments()[0]] for bar in axis.collections] == [
        [(0, 40), (0, 60)], [(0, 30), (0, 50)]
    ]  # fmt: skip
    assert [list(line.get_ydata()) for line in lines_of(axis).values()] == [[50], [40]]
    low, high = axis.get_ylim()
    assert low < 30
    assert high > 60
    # The bars stand beside each other.
    places = [bar.get_transform().transform((0, 50))[0] for bar in axis.collections]
    assert places[1] > places[0] + 10
    assert figure.get_supxlabel() == "mark: mean of 2 seeds, bar: least to greatest seed"
    assert list(axis.get_xticks()) == [0]
    figure = plotting.plot_training_bands({**runs, "c": [metrics(0.1, 0.2)] * 2})
    said = figure.get_supxlabel().replace("\n", " ")
    assert said == "line or mark: mean of 2 seeds, band or bar: least to greatest seed"


LONG = "ViewPolicy(student_global=BlockMasker(0.4).sometimes(0.5), student_local=RandomMasker(0.2))"


@pytest.mark.parametrize("name", [LONG, "W" * 90, "vit_small_patch16_224.dino_" * 3])
def test_long_names_leave_the_plot_its_place(name: str) -> None:
    short = plotting.plot_training_bands({"a": [metrics(0.1, 0.2)], "b": [metrics(0.3, 0.2)]})
    figure = plotting.plot_training_bands({name: [metrics(0.1, 0.2)], "b": [metrics(0.3, 0.2)]})
    for drawn in (short, figure):
        drawn.canvas.draw()  # warns where there is no room for the axes
    axis, other = figure.axes[0], short.axes[0]
    assert axis.bbox.width > 0.97 * other.bbox.width
    assert axis.bbox.height > 0.95 * other.bbox.height
    legend = axis.get_legend()
    assert legend.get_window_extent().x1 <= figure.bbox.width
    assert legend.get_window_extent().y1 <= figure.bbox.height + 3
    assert legend.get_texts()[0].get_text().replace("\n", "") in (name, name.replace(", ", ","))
    assert axis.yaxis.label.get_window_extent().y0 > 0


def test_a_long_label_is_broken() -> None:
    figure = plotting.plot_training_bands(
        {"a": [metrics(0.1, 0.2)]}, label="accuracy of the nearest neighbours, in per cent"
    )
    figure.canvas.draw()
    box = figure.axes[0].yaxis.label.get_window_extent()
    assert box.y0 > 0
    assert box.y1 < figure.bbox.height


@pytest.mark.parametrize(
    "floors",
    [
        {"random weights": 0.481, "raw pixels": 0.484},
        {"random weights": 0.484, "raw pixels": 0.481, "chance": 0.482},
        {"a": 0.5, "b": 0.501, "c": 0.52, "d": 0.521, "e": 0.55, "f": 0.56, "g": 0.5602},
        {"top": 0.57, "next": 0.569},
    ],
)
def test_names_of_near_floors_do_not_cover_each_other(floors: dict[str, float]) -> None:
    for figure in (
        plotting.plot_training_bands({"none": [metrics(0.5, 0.52, 0.56)]}, floors=floors),
        plotting.plot_occlusion({"none": curve(0.6)}, floors=floors),
    ):
        axis = figure.axes[0]
        assert overlapping(figure, axis.texts) == []
        lines = [line for line in axis.lines if list(line.get_xdata()) == [0, 1]]
        assert len(lines) == len(floors)
        # From the bottom to the top they are in the order of their lines.
        names = sorted(axis.texts, key=lambda text: text.get_window_extent().y0)
        assert [text.get_text() for text in names] == sorted(floors, key=lambda n: floors[n])
        assert max(text.get_window_extent().y1 for text in axis.texts) < axis.bbox.y1 + 8


def test_a_name_is_not_struck_through_by_the_next_line() -> None:
    floors = {"random weights": 0.52, "raw pixels": 0.522}
    figure = plotting.plot_training_bands({"none": [metrics(0.5, 0.56)]}, floors=floors)
    figure.canvas.draw()
    axis = figure.axes[0]
    for value in (52, 52.2):
        y = axis.transData.transform((0, value))[1]
        assert not any(
            text.get_window_extent().y0 < y < text.get_window_extent().y1 for text in axis.texts
        )


def test_a_runs_curves_have_every_floor_and_skip_what_is_none() -> None:
    floors = {f"floor {i}": i / 10 for i in range(1, 8)}
    lines = [*metrics(0.4, 0.5), {"step": 200, "knn": None}, {"step": 300, "knn": float("nan")}]
    figure = plotting.plot_curves([*lines, {"step": 300, "loss": None}], floors)
    knn = figure.axes[1]
    levels = [line for line in knn.lines if list(line.get_xdata()) == [0, 1]]
    assert [line.get_ydata()[0] for line in levels] == pytest.approx(range(10, 80, 10))
    looks = {(line.get_color(), str(line.get_linestyle())) for line in levels}
    assert len(looks) == 7
    assert [text.get_text() for text in knn.get_legend().get_texts()] == ["teacher", *floors]
    assert list(knn.lines[0].get_xdata()) == [0, 100, 300]
    figure.canvas.draw()
    assert knn.get_legend().get_window_extent().y1 <= figure.bbox.height + 3


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
        (lambda: plotting.plot_training_bands({}), "nothing to plot"),
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
        (lambda: plotting.plot_occlusion({}), "nothing to plot"),
        (lambda: plotting.plot_occlusion({"a": []}), "has no curve"),
        (lambda: plotting.plot_occlusion({"a": ((0.0, 0.5), (0.1,))}), "as many accuracies"),
        (lambda: plotting.plot_occlusion({"a": ((0.5, 0.5), (0.1, 0.1))}), "ratio 0.5 2 times"),
        (lambda: plotting.plot_occlusion({"a": [((0, 1), (0, 1), (0, 1))]}), "pair .*got 3"),
        (lambda: plotting.plot_occlusion({"a": ((0, 1), (0.1, float("nan")))}), "'a' must be fin"),
        (
            lambda: plotting.plot_training_bands({"a": [[{"step": 0, "knn": None}]]}),
            "'a' has no finite 'knn'",
        ),
        (lambda: plotting.plot_intervals({}), "at least one policy"),
        (lambda: plotting.plot_intervals({"a": {"knn": ()}}), "no value of 'knn'"),
        (lambda: plotting.plot_intervals({"a": {"knn": (0.1,)}}, {}), "intervals lacks 'knn'"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_drawn_are_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
