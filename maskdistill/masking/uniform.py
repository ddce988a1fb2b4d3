"""Maskers that know nothing of the image: every patch is as likely to be hidden as any other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from maskdistill.masking import constraints
from maskdistill.masking.base import Masker, ScoreMasker
from maskdistill.masking.context import MaskContext, top_k
from maskdistill.masking.ratios import PerImage, Ratio, scalar_at


@dataclass(frozen=True, repr=False)
class RandomMasker(ScoreMasker):
    """Hides patches chosen uniformly without replacement.

    >>> RandomMasker(0.5)(4, (7, 7)).sum(dim=1)
    tensor([25, 25, 25, 25])

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: ratio out of range.

    The random masking of MAE (He et al., 2022), drawn per image, and of the asymmetric recipe
    (arXiv 2506.10582).
    """

    def scores(self, context: MaskContext) -> Tensor:
        return context.rand(context.batch, context.patches)


@dataclass(frozen=True, repr=False)
class BernoulliMasker(Masker):
    """Hides each patch by a coin toss of its own, so that rows hide different numbers.

    >>> BernoulliMasker(0.5)(4, (7, 7)).shape
    torch.Size([4, 49])

    Args:
        p: probability that a patch is hidden, in [0, 1]; a number, a schedule, or one per image.

    Raises:
        ValueError: p out of range.
    """

    p: Ratio

    constraints = {"p": constraints.ratio}

    def draw(self, context: MaskContext) -> Tensor:
        p: float | Tensor
        if isinstance(self.p, PerImage):
            p = self.p.sample(context.batch, context.rand, context.progress)[:, None]
        else:
            p = scalar_at(self.p, context.progress)
        return context.rand(context.batch, context.patches) < p


@dataclass(frozen=True, repr=False)
class NoMasker(Masker):
    """Hides nothing: the neutral element of ``|``, useful in a ``Mixture``.

    >>> NoMasker()(2, (1, 3))
    tensor([[False, False, False],
            [False, False, False]])
    """

    @property
    def exact(self) -> bool:
        """True: every row hides 0 patches."""
        return True

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int:
        """Return 0."""
        return 0

    def draw(self, context: MaskContext) -> Tensor:
        return torch.zeros(context.batch, context.patches, dtype=torch.bool, device=context.device)


@dataclass(frozen=True, repr=False)
class GridMasker(Masker):
    """Shows so many patches in each square cell of the grid, always the same or random ones.

    >>> GridMasker()(1, (4, 4)).view(4, 4)
    tensor([[False,  True, False,  True],
            [ True,  True,  True,  True],
            [False,  True, False,  True],
            [ True,  True,  True,  True]])
    >>> GridMasker(random=True).fixed_count((14, 14))
    147

    Args:
        cell: patches along a side of a cell. Cells at the right and lower edge are cut where the
            grid ends, and show what they have, if it is less than ``visible``.
        visible: patches shown in each cell.
        random: draw the visible patches anew in each cell; ``False`` shows each cell's first.

    Raises:
        ValueError: an argument out of range.

    The fixed form is MAE's grid-wise masking (He et al., 2022, Fig. 6), which hides 3 of 4 patches;
    the random one is the uniform sampling of UM-MAE (Li et al., 2022).
    """

    cell: int = 2
    visible: int = 1
    random: bool = False

    constraints = {"cell": constraints.whole(1), "visible": constraints.whole(0)}

    def check_parameters(self) -> None:
        if self.visible > self.cell**2:
            raise ValueError(
                f"GridMasker: a cell of {self.cell}x{self.cell} patches cannot show {self.visible}."
            )

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int:
        """Return the count, which depends on the grid alone."""

        def sides(length: int) -> list[int]:
            return [min(self.cell, length - i) for i in range(0, length, self.cell)]

        return sum(max(h * w - self.visible, 0) for h in sides(grid[0]) for w in sides(grid[1]))

    def draw(self, context: MaskContext) -> Tensor:
        (height, width), size = context.grid, self.cell
        rows, columns = -(-height // size), -(-width // size)
        inside = torch.zeros(
            rows * size, columns * size, dtype=torch.float32, device=context.device
        )
        inside[:height, :width] = 1
        inside = inside.unflatten(0, (rows, size)).unflatten(2, (columns, size))
        inside = inside.transpose(1, 2).flatten(2).flatten(0, 1)  # (cells, size * size)
        if self.random:
            order = context.rand(context.batch * rows * columns, size * size)
        else:
            order = torch.linspace(
                1, 0, size * size + 1, dtype=torch.float32, device=context.device
            )[:-1]
        # Places outside the grid come last, so that a cut cell shows what it has.
        scores = inside.repeat(context.batch, 1) * (1 + order)
        shown = top_k(scores, self.visible).view(context.batch, rows, columns, size, size)
        mask = ~shown.transpose(2, 3).reshape(context.batch, rows * size, columns * size)
        return mask[:, :height, :width].flatten(1)


@dataclass(frozen=True, repr=False)
class CheckerboardMasker(Masker):
    """Hides every second square, like the black squares of a chessboard.

    >>> CheckerboardMasker(random=False)(1, (2, 4)).view(2, 4)
    tensor([[ True, False,  True, False],
            [False,  True, False,  True]])

    Args:
        size: patches along a side of a square.
        random: toss a coin for each image, whether the black or the white squares are hidden.

    Raises:
        ValueError: size out of range.
    """

    size: int = 1
    random: bool = True

    constraints = {"size": constraints.whole(1)}

    def fixed_count(self, grid: tuple[int, int], progress: float = 0.0) -> int | None:
        """Return the count, unless black and white differ and the coin decides."""
        black = sum(
            (row // self.size + column // self.size) % 2 == 0
            for row in range(grid[0])
            for column in range(grid[1])
        )
        if self.random and 2 * black != grid[0] * grid[1]:
            return None
        return black

    def draw(self, context: MaskContext) -> Tensor:
        row = torch.arange(context.grid[0], device=context.device) // self.size
        column = torch.arange(context.grid[1], device=context.device) // self.size
        black = (row[:, None] + column) % 2 == 0
        if self.random:
            return black.flatten() ^ (context.rand(context.batch, 1) < 0.5)
        return black.flatten().repeat(context.batch, 1)


Color = Literal["red", "green", "blue", "purple"]


@dataclass(frozen=True, repr=False)
class ColorNoiseMasker(ScoreMasker):
    """Hides where noise of a colour is highest: blobs of a size, or patches that keep apart.

    >>> ColorNoiseMasker(0.75, "green")(8, (14, 14)).sum(dim=1).unique()
    tensor([147])

    White noise W is filtered by Gaussians G of two widths:

    - ``"red"``, low frequencies, G_coarse * W: large blobs;
    - ``"green"``, middle frequencies, G_fine * W - G_coarse * W: blobs of one size;
    - ``"blue"``, high frequencies, W - G_fine * W: patches that keep apart from each other;
    - ``"purple"``, all but the middle, W - G_fine * W + G_coarse * W.

    Every image draws noise of its own, larger than the grid, so that edges are like the middle. But
    blobs as large as the grid crowd out others within it: red noise at ratio 0.75 hides the centre
    in 0.77 of the draws and a corner in 0.73.

    Args:
        ratio: share of patches to hide, in [0, 1]; a number, a schedule, or one per image.
        color: ``"red"``, ``"green"``, ``"blue"`` or ``"purple"``.
        fine: standard deviation of the narrower Gaussian, in patches.
        coarse: standard deviation of the wider one, in patches.

    Raises:
        ValueError: an argument out of range.

    ColorMAE (Hinojosa et al., 2024), where green was best. It cuts its masks from files of noise
    whose widths are not published: the defaults here are our choice.
    """

    color: Color = "green"
    fine: float = 1.0
    coarse: float = 2.0

    constraints = {
        "color": constraints.one_of(*get_args(Color)),
        "fine": constraints.number,
        "coarse": constraints.number,
    }

    def check_parameters(self) -> None:
        if not 0 < self.fine < self.coarse < math.inf:
            raise ValueError(
                "ColorNoiseMasker: fine and coarse must be widths in patches, 0 < fine < coarse; "
                f"got {self.fine!r} and {self.coarse!r}."
            )

    def scores(self, context: MaskContext) -> Tensor:
        margin = math.ceil(3 * self.coarse)
        height, width = context.grid
        noise = context.rand(context.batch, height + 2 * margin, width + 2 * margin) - 0.5

        def blurred(sigma: float) -> Tensor:
            down, across = (_gaussian(n, margin, sigma, context.device) for n in context.grid)
            return down @ noise @ across.T

        white = noise[:, margin : margin + height, margin : margin + width]
        match self.color:
            case "red":
                field = blurred(self.coarse)
            case "green":
                field = blurred(self.fine) - blurred(self.coarse)
            case "blue":
                field = white - blurred(self.fine)
            case "purple":
                field = white - blurred(self.fine) + blurred(self.coarse)
        return field.flatten(1)


def _gaussian(length: int, margin: int, sigma: float, device: torch.device) -> Tensor:
    """Return the matrix that blurs ``length + 2 * margin`` numbers to the ``length`` inner ones."""
    inner = torch.arange(length, device=device)[:, None] + margin
    distance = torch.arange(length + 2 * margin, device=device) - inner
    # Cut off at the margin for every row alike, and normalised.
    weight = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= margin)
    return (weight / weight.sum(dim=1, keepdim=True)).to(torch.float32)
