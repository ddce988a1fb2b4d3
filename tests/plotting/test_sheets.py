"""Sheets of images: nothing covers another, nothing is cut, none is wider than a page."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import maskdistill as md
from maskdistill import plotting
from maskdistill.data import MultiCrop
from maskdistill.plotting.style import PAGE, fitted, inches
from tests.plotting.shown import GRID, IMAGES, SCENES, attention, beyond, overlapping

LONG = "vit_tiny_patch16_224", "deit3_small_patch16_224", "asymmetric, block masks 0.4"
VERY_LONG = (
    "ViewPolicy(student_global=BlockMasker(0.4).sometimes(0.5), student_local=RandomMasker(0.2))"
)


def pictures(count: int, height: int = 32) -> Any:
    return IMAGES[:1, :, :height].repeat(count, 1, 1, 1)


@pytest.mark.parametrize(
    ("count", "names"),
    [(1, LONG), (1, (VERY_LONG, "b")), (8, LONG), (10, ("random weights",)), (20, LONG)],
)
def test_names_of_rows_are_whole_and_apart(count: int, names: tuple[str, ...]) -> None:
    maps = {name: attention(count) for name in names}
    figure = plotting.plot_attention(pictures(count), maps, GRID)
    labels = [axis.yaxis.label for axis in figure.axes if axis.get_ylabel()]
    assert beyond(figure) == []
    assert overlapping(figure, labels) == []
    panels = [axis.get_window_extent() for axis in figure.axes]
    for label in labels:
        box = label.get_window_extent()
        assert not any(box.x1 > p.x0 + 1 and box.y1 > p.y0 + 1 and box.y0 < p.y1 - 1
                       for p in panels)  # fmt: skip
    assert figure.get_figwidth() <= PAGE
    said = [label.get_text().replace("\n", "").replace(" ", "") for label in labels]
    assert said == [name.replace(" ", "") for name in ("image", *names)]


def test_names_of_low_rows_stand_beside_them() -> None:
    maps = {"a model with a rather long name": attention(3)}
    figure = plotting.plot_attention(pictures(3, height=8), maps, GRID)
    assert {axis.yaxis.label.get_rotation() for axis in figure.axes[::3]} == {0}
    assert beyond(figure) == []
    assert overlapping(figure, [axis.yaxis.label for axis in figure.axes]) == []


@pytest.mark.parametrize("heads", [3, 12, 16, 24])
def test_titles_of_heads_do_not_run_into_each_other(heads: int) -> None:
    figure = plotting.plot_attention_heads(IMAGES[:1], attention(1, heads), GRID, titles=["leaf"])
    titles = [axis.get_title() for axis in figure.axes]
    word = "" if heads >= 16 else "head "
    assert titles == ["image", *(f"{word}{i + 1}" for i in range(heads)), "mean"]
    assert ("numbers: heads" in figure.get_supxlabel()) == (not word)
    assert overlapping(figure, [axis.title for axis in figure.axes]) == []
    assert beyond(figure) == []
    assert figure.get_figwidth() <= PAGE


@pytest.mark.parametrize("count", [7, 20])
def test_titles_of_steps_do_not_run_into_each_other(count: int) -> None:
    steps = {i * 250_000: attention(1) for i in range(count)}
    figure = plotting.plot_attention_strip(IMAGES[:1], steps, GRID, most=20)
    assert overlapping(figure, [axis.title for axis in figure.axes]) == []
    assert beyond(figure) == []
    assert figure.get_figwidth() <= PAGE


@pytest.mark.parametrize("grid", [(32, 4), (4, 32), (64, 64), (1, 40)])
def test_maskers_of_all_grids_are_drawn_apart(grid: tuple[int, int]) -> None:
    figure = plotting.plot_masker(md.RandomMasker(0.5), grid, samples=20)
    bar = figure.axes[9]
    texts = [axis._left_title if axis.get_title(loc="left") else axis.title for axis in figure.axes]
    assert sum(bool(text.get_text()) for text in texts) == 10
    assert overlapping(figure, [*texts, *bar.get_yticklabels()]) == []
    assert beyond(figure) == []


def test_a_long_name_of_a_signal_stays_in_its_column() -> None:
    picture = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    loss = {"reconstruction_loss_of_the_last_epoch": torch.rand(1, 16)}
    masker = md.SignalMasker(0.5, "reconstruction_loss_of_the_last_epoch")
    figure = plotting.plot_masker(masker, GRID, pictures=picture, samples=20, **loss)
    assert overlapping(figure, [axis.title for axis in figure.axes]) == []


@pytest.mark.parametrize("given", [{"samples": 0}, {"batch": 0}])
def test_no_draw_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="samples and batch must be at least 1 draw"):
        plotting.plot_masker(md.RandomMasker(0.5), GRID, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("local_crops", "lines"), [(4, 1), (5, 2), (12, 3)])
def test_views_take_as_many_rows_as_they_need(local_crops: int, lines: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        crops = MultiCrop(32, 16, local_crops=local_crops)(SCENES[0][0])
    images = [crop[None] for crop in crops.images]
    policy = md.ViewPolicy(student_global=md.RandomMasker(0.5))
    masks = policy(images, 8, generator=torch.Generator().manual_seed(0))
    figure = plotting.plot_view_masks(IMAGES[0], images, masks, policy, 8, boxes=crops.boxes[None])
    assert figure.get_figwidth() <= PAGE
    assert [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()] == (
        ["student sees"] * lines + ["teacher sees"] * lines
    )
    names = ["global 1", "global 2", *(f"local {i + 1}" for i in range(local_crops))]
    titles = [axis.get_title() for axis in figure.axes[1:] if axis.get_title()]
    assert titles == names * (1 if lines == 1 else 2)
    said = [axis.get_xlabel() for axis in figure.axes[1:]]
    shares = ["50% hidden"] * 2 + ["clean"] * local_crops + ["clean"] * 2 + [""] * local_crops
    assert said == shares
    texts = [text for axis in figure.axes[1:] for text in (axis.title, axis.xaxis.label)]
    assert overlapping(figure, texts) == []
    assert beyond(figure) == []


def test_crops_of_no_or_several_images_are_refused() -> None:
    def drawn(crops: int, masks: int) -> Any:
        policy = md.ViewPolicy(student_global=md.RandomMasker(0.5))
        hidden = policy([pictures(masks)] * 2, 8)
        return plotting.plot_view_masks(IMAGES[0], [pictures(crops)] * 2, hidden, policy, 8)

    assert drawn(1, 1) is not None
    with pytest.raises(ValueError, match=r"\(1, 3, h, w\).*got \(4, 3, 32, 32\) for view 0"):
        drawn(4, 4)
    with pytest.raises(ValueError, match=r"masks must be those of one image; got \(4, 16\)"):
        drawn(1, 4)
    policy = md.ViewPolicy()
    masks = policy([pictures(1)] * 2, 8)
    with pytest.raises(ValueError, match="at least one view"):
        plotting.plot_view_masks(IMAGES[0], [], masks, policy, 8)
    with pytest.raises(ValueError, match=r"got \(3, 32, 32\)"):
        plotting.plot_view_masks(IMAGES[0], list(IMAGES[:2]), masks, policy, 8)


def test_text_is_broken_at_words_first() -> None:
    assert fitted("deit3_small_patch16_224", 0.8, 7.5) == "deit3_small_\npatch16_224"
    assert fitted("vit_small_patch16_224.dino", 1.3, 7.5) == "vit_small_patch16_224\n.dino"
    assert fitted("BlockMasker(0.4)", 9, 7.5) == "BlockMasker(0.4)"
    lines = fitted("W" * 30, 0.5, 7.5).split("\n")
    assert "".join(lines) == "W" * 30
    assert max(inches(line, 7.5) for line in lines) <= 0.5


def test_a_maskers_draws_and_its_moments_are_plotted() -> None:
    generator = torch.Generator().manual_seed(0)
    options = {"samples": 20, "batch": 10, "generator": generator}
    figure = plotting.plot_masker(md.BlockMasker(0.4), (4, 6), **options)
    assert len(figure.axes) == 8 + 3
    picture = torch.zeros(1, 3, 8, 12, dtype=torch.uint8)
    guided = md.SignalMasker(0.5, "loss", share=md.Linear(0, 1))
    moments = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    loss = torch.rand(1, 24, generator=generator)
    figure = plotting.plot_masker(
        guided, (4, 6), pictures=picture, progress=moments, loss=loss, **options
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:4] == ["image", "loss", "progress 0.0", "progress 0.2"]
    with pytest.raises(ValueError, match="one number or 6"):
        plotting.plot_masker(guided, (4, 6), pictures=picture, progress=[0.0], loss=loss, **options)
    with pytest.raises(ValueError, match="1 or 4 images"):
        plotting.plot_masker(guided, (4, 6), pictures=picture.repeat(2, 1, 1, 1), **options)
    with pytest.raises(ValueError, match="5x6 divides"):
        plotting.plot_masker(md.RandomMasker(0.5), (5, 6), pictures=picture, **options)
