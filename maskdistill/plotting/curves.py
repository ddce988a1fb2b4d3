"""Figures of numbers over training, over occlusion, and of differences between policies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from maskdistill.plotting.style import (
    GREEN,
    ORANGE,
    PURPLE,
    VERMILION,
    accent,
    grey,
    legend_above,
    legend_rows,
    new_figure,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_curves(
    metrics: Sequence[Mapping[str, Any]],
    floors: Mapping[str, float] | None = None,
    uniform_loss: float | None = None,
) -> Figure:
    """Draw a run's loss, k-NN accuracy and signs of collapse over its steps.

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

    def series(name: str) -> tuple[list[float], list[float]]:
        lines = [line for line in metrics if line.get(name) is not None]
        return [line["step"] for line in lines], [line[name] for line in lines]

    few = "o" if len(series("loss")[0]) < 3 else None  # a line of one point shows nothing
    look: dict[str, Any] = {"linewidth": 1.2, "marker": few, "markersize": 3}
    losses = {
        "loss": loss.plot(*series("loss"), color=accent(), **look)[0],
        "teacher entropy": loss.plot(
            *series("teacher_entropy"), color=GREEN, linestyle=(0, (4, 1.5)), **look
        )[0],
    }
    if uniform_loss is not None:
        losses["uniform"] = loss.axhline(uniform_loss, color=grey(), linewidth=0.8, linestyle=":")
    loss.set_ylabel("nats")
    steps, accuracy = series("knn")
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
    spread.plot(*series("feature_spread"), color=accent(), **look)
    spread.set_ylim(0, 1.02)
    spread.set_ylabel("feature spread")
    for axis in (loss, knn, spread):
        axis.set_xlabel("step")
        axis.xaxis.get_major_locator().set_params(nbins=4)
        plain(axis)
    legend_above(loss, losses, 2.0)
    legend_above(knn, accuracies, 2.0)
    return figure
