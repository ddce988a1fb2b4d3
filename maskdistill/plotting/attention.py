"""Figures of class-token attention: models, heads, and steps of training beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from maskdistill.plotting.pixels import Look
from maskdistill.plotting.sheet import Scale, Sheet, brightest, check_sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_attention(
    images: Tensor,
    maps: Mapping[str, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None = None,
    *,
    style: Look = "map",
    scale: Scale = "own",
) -> Figure:
    """Draw class-token attention over images, one row per model.

    >>> plot_attention(images, {"before": a, "after": b}, (8, 8))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one column each.
        maps: title to ``(B, heads, N)`` attention; drawn averaged over heads.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
        style: ``"map"``, the attention's colours alone, or ``"overlay"`` over the darkened image.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps (``"image"``), or of all (``"all"``), for models whose attention differs in how
            much it is concentrated.

    Raises:
        ValueError: attention or masks that do not fit the images or the grid, an unknown choice.
    """
    check_sheet(images, maps, grid, masks, style, scale)
    means = {title: attention.float().mean(dim=1) for title, attention in maps.items()}
    sheet = Sheet(len(maps) + 1, len(images), images, titles=["image", *maps])
    for column in range(len(images)):
        mask = None if masks is None else masks[column]
        sheet.image(0, column, column, mask)
        values = [mean[column] for mean in means.values()]
        for row, tops in enumerate(brightest(values, means.values(), scale)):
            sheet.attention(row + 1, column, column, values[row], grid, style, tops, mask)
    return sheet.finish("attention averaged over heads", scale, masks)


def plot_attention_heads(
    images: Tensor,
    attention: Tensor,
    grid: tuple[int, int],
    masks: Tensor | None = None,
    *,
    titles: Sequence[str] | None = None,
    style: Look = "overlay",
    scale: Scale = "own",
) -> Figure:
    """Draw the class-token attention of each head, one row per image.

    >>> plot_attention_heads(images, vit.attention(normalize(images)), (14, 14))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one row each.
        attention: ``(B, heads, N)``; one column per head, and their mean.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
        titles: of the images, written beside them.
        style: ``"overlay"`` over the darkened image, or ``"map"``, the colours alone.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps (``"image"``), or of all (``"all"``).

    Raises:
        ValueError: attention, masks or titles that do not fit the images or the grid, an unknown
            choice.
    """
    check_sheet(images, {"attention": attention}, grid, masks, style, scale)
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"titles must be one per image, {len(images)}; got {len(titles)}.")
    heads = attention.shape[1]
    values = attention.float()
    sheet = Sheet(len(images), heads + 2, images, titles=titles)
    for row in range(len(images)):
        mask = None if masks is None else masks[row]
        sheet.image(row, 0, row, mask)
        shown = [*values[row], values[row].mean(dim=0)]
        for column, top in enumerate(brightest(shown, [values], scale)):
            sheet.attention(row, column + 1, row, shown[column], grid, style, top, mask)
    sheet.titles(["image", *(f"head {i + 1}" for i in range(heads)), "mean"], "head")
    return sheet.finish("class-token attention", scale, masks)


def plot_attention_strip(
    images: Tensor,
    attention: Mapping[int, Tensor],
    grid: tuple[int, int],
    masks: Tensor | None = None,
    *,
    style: Look = "overlay",
    scale: Scale = "own",
    most: int = 7,
) -> Figure:
    """Draw how class-token attention changes over training: a column per step, a row per image.

    >>> plot_attention_strip(images, {0: before, 100: later, 400: last}, (4, 4))  # doctest: +SKIP

    Args:
        images: ``(B, 3, H, W)`` uint8; one row each.
        attention: step to ``(B, heads, N)``; drawn averaged over heads, in the order of the steps.
        grid: patch rows and columns.
        masks: ``(B, H, W)`` bool object masks, drawn as outlines, where there are any.
        style: ``"overlay"`` over the darkened image, or ``"map"``, the colours alone.
        scale: what has the brightest colour: the maximum of each map (``"own"``), of an image's
            maps (``"image"``), or of all (``"all"``).
        most: steps to draw, at least 2; of more, the first, the last, and evenly spread ones
            between.

    Raises:
        ValueError: no step, attention or masks that do not fit the images or the grid, an unknown
            choice.
    """
    steps = chosen_steps(attention, most)
    check_sheet(
        images, {f"step {step}": attention[step] for step in steps}, grid, masks, style, scale
    )
    means = [attention[step].float().mean(dim=1) for step in steps]
    sheet = Sheet(len(images), len(steps) + 1, images)
    for row in range(len(images)):
        mask = None if masks is None else masks[row]
        sheet.image(row, 0, row, mask)
        values = [mean[row] for mean in means]
        for column, top in enumerate(brightest(values, means, scale)):
            sheet.attention(row, column + 1, row, values[column], grid, style, top, mask)
    sheet.titles(["image", *(f"step {step:,}" for step in steps)], "step")
    return sheet.finish("attention averaged over heads", scale, masks)


def chosen_steps(attention: Mapping[int, Any], most: int) -> list[int]:
    """Return the steps in order; of too many, the first, the last and evenly spread ones.

    Raises:
        ValueError: no step, or fewer than 2 to choose.
    """
    if not attention:
        raise ValueError("attention must have at least one step; got none.")
    if most < 2:
        raise ValueError(f"most must be at least 2 steps, the first and the last; got {most!r}.")
    steps = sorted(attention)
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
