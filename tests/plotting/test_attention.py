"""Figures of attention."""

from __future__ import annotations

from typing import Any

import pytest

from maskdistill import plotting
from maskdistill.plotting.attention import chosen_steps
from tests.plotting.shown import (
    GRID,
    IMAGES,
    MASKS,
    attention,
)


def test_a_row_per_model_and_a_column_per_image() -> None:
    figure = plotting.plot_attention(IMAGES, {"a": attention(), "b": attention()}, GRID, MASKS)
    rows = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert len(figure.axes) == 12
    assert rows == ["image", "a", "b"]
    assert "own maximum; blue outline: object mask" in figure.get_supxlabel().replace("\n", " ")
    assert (
        "outline" not in plotting.plot_attention(IMAGES, {"a": attention()}, GRID).get_supxlabel()
    )


def test_one_scale_shows_that_one_model_attends_less() -> None:
    weak = attention() / 10

    def shown(scale: Any) -> list[float]:
        figure = plotting.plot_attention(
            IMAGES[:1], {"a": attention()[:1], "weak": weak[:1]}, GRID, scale=scale
        )
        return [float(axis.images[0].get_array().mean()) for axis in figure.axes[1:]]

    strong, same = shown("own")
    assert strong == same
    strong, dark = shown("image")
    assert dark < strong / 3
    assert shown("image") == shown("all")


def test_each_head_and_their_mean_are_drawn() -> None:
    given = attention(2, heads=5)
    figure = plotting.plot_attention_heads(
        IMAGES[:2], given, GRID, titles=["cat", "dog"], style="map"
    )
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", *(f"head {i}" for i in range(1, 6)), "mean"]
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == ["cat", "dog"]
    shown = figure.axes[7 + 6].images[0].get_array()
    wanted = plotting.attention_pixels(
        IMAGES[1], given[1].mean(dim=0), GRID, look="map", size=shown.shape[0]
    )
    assert (shown == wanted).all()


def test_a_strip_has_the_steps_in_order() -> None:
    given = {step: attention(seed=step) for step in (400, 0, 100)}
    figure = plotting.plot_attention_strip(IMAGES, given, GRID)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["image", "step 0", "step 100", "step 400"]
    assert len(figure.axes) == 16


def test_of_many_steps_the_first_and_last_are_kept() -> None:
    steps = dict.fromkeys(range(0, 1000, 10), 0)
    assert chosen_steps(steps, 5) == [0, 250, 500, 740, 990]
    assert chosen_steps(steps, 200) == sorted(steps)
    with pytest.raises(ValueError, match="at least 2"):
        chosen_steps(steps, 1)
    with pytest.raises(ValueError, match="at least one step"):
        chosen_steps({}, 5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: plotting.plot_attention(IMAGES, {}, GRID), "at least one model"),
        (lambda: plotting.plot_attention(IMAGES, {"a": attention(3)}, GRID), "'a' must be .*got"),
        (lambda: plotting.plot_attention(IMAGES, {"a": attention()}, (2, 4)), "2x4 patches"),
        (lambda: plotting.plot_attention(IMAGES, {"a": attention()}, GRID, MASKS[:2]), "masks"),
        (
            lambda: plotting.plot_attention(IMAGES, {"a": attention()}, GRID, style="heat"),  # type: ignore[arg-type]
            "style must be one of overlay, map",
        ),
        (
            lambda: plotting.plot_attention(IMAGES, {"a": attention()}, GRID, scale="max"),  # type: ignore[arg-type]
            "scale must be one of own, image, all",
        ),
        (lambda: plotting.plot_attention_heads(IMAGES[0], attention(), GRID), "images must"),
        (lambda: plotting.plot_attention_heads(IMAGES, attention(), GRID, titles=["x"]), "titles"),
    ],
)  # fmt: skip
def test_attention_that_does_not_fit_is_refused(call: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
