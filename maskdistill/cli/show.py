"""``maskdistill show``: what a masker hides, in the terminal and as a picture."""

from __future__ import annotations

import os
import re
import sys
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskdistill.masking import Masker, parse_masker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HIDDEN, _VISIBLE = "██", "··"
# How often a patch is hidden, of the most; each character comes twice, for a square.
_SHADES = " .:-=+*#%@"
_DRAWS = 2000


def show(
    masker: str,
    /,
    grid: str = "14x14",
    samples: int = 4,
    seed: int = 0,
    progress: float = 0.0,
    image: Path | None = None,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Draw what a masker hides: in the terminal, and with --out as a picture.

    maskdistill show "BlockMasker(0.4).sometimes(0.5)" --grid 14x14 --out blocks.png

    A masker that needs the attention gets a round blob in the middle in its place. Of 2,000 draws
    it says how much is hidden, and how often each patch is.

    Args:
        masker: as in Python: "RandomMasker(0.3)", "BlockMasker(0.4) | GridMasker()".
        grid: patch rows and columns, such as 14x14.
        samples: draws to show.
        seed: of all draws.
        progress: of training, in [0, 1], for schedules.
        image: lay the masks of the picture over this image.
        out: a picture to write, of the kind that its name says: .png, .pdf, .svg.
        json: print the figures and the draws as JSON instead.
    """
    from maskdistill.plotting import plot_masker

    size = parse_grid(grid)
    if samples < 1:
        raise ValueError(f"--samples must be an int >= 1; got {samples}.")
    if image is not None and out is None:
        raise ValueError("--image lies below the masks of the picture; say where with --out.")
    read = parse_masker(masker)
    signals = stand_ins(read, size)
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        those: dict[str, Any] = {name: s.expand(count, -1) for name, s in signals.items()}
        return read(count, size, generator=generator, progress=progress, **those)

    masks, many = draw(samples).view(-1, *size), draw(_DRAWS).float()
    shares, chance = many.mean(dim=1), many.mean(dim=0).view(size)
    spread = {
        "mean": float(shares.mean()), "least": float(shares.min()), "most": float(shares.max())
    }  # fmt: skip
    if json:
        found = {
            "masker": repr(read),
            "grid": list(size),
            "seed": seed,
            "draws": _DRAWS,
            "hidden_share": spread,
            "hidden_probability": chance.tolist(),
            "masks": masks.int().tolist(),
        }
        print(dumps(found))
    else:
        print(f"{read!r} on {size[0]}x{size[1]} patches")
        if signals:
            print(f"(for the {min(signals)}: a round blob in the middle)")
        _print_masks(masks)
        _print_chance(spread, chance)
    if out is not None:
        pictures = None
        if image is not None:
            patch = max(1, 392 // max(size))
            pictures = read_picture(image, patch * size[0], patch * size[1])[None]
        given: dict[str, Any] = dict(signals)
        figure = plot_masker(
            read,
            size,
            pictures=pictures,
            progress=progress,
            generator=torch.Generator().manual_seed(seed),
            **given,
        )
        save_figure(figure, out)
        if not json:
            print(f"\n{out}")


def parse_grid(grid: str) -> tuple[int, int]:
    """Read ``"14x14"``, or ``"14"``, as patch rows and columns.

    >>> parse_grid("7x14")
    (7, 14)

    Raises:
        ValueError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+)\s*(?:[x,X]\s*(\d+))?\s*", grid)
    rows, columns = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= rows * columns <= 10_000:
        raise ValueError(f"--grid must be patch rows x columns, such as 14x14; got {grid!r}.")
    return rows, columns


def stand_ins(masker: Masker, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Return signals in the place of those that a network would give.

    Args:
        masker: whose needs are to be met.
        grid: patch rows and columns.

    Returns:
        ``(1, N)`` for each: a round blob in the middle, as attention to an object might be.

    Raises:
        ValueError: the masker needs something else.
    """
    unknown = sorted(masker.needs - {"attention"})
    if unknown:
        raise ValueError(
            f"{masker!r} needs {', '.join(unknown)}, which only images or a network can give. In "
            "Python, plotting.plot_masker(masker, ...) takes signals of your own."
        )
    if not masker.needs:
        return {}
    y, x = (torch.linspace(-1, 1, side) if side > 1 else torch.zeros(1) for side in grid)
    blob = torch.exp(-3 * (y[:, None] ** 2 + x[None, :] ** 2)).flatten()
    return {"attention": (blob / blob.sum())[None]}


def _print_masks(masks: Tensor) -> None:
    """Print masks ``(n, rows, columns)``, as many side by side as the terminal is wide."""
    rows, columns = masks.shape[1:]
    width = max(2 * columns, len("999/999 hidden"))
    across = max(1, min(len(masks), (_terminal_width() + 3) // (width + 3)))
    for some in masks.split(across):
        drawn = [["".join(_HIDDEN if on else _VISIBLE for on in row) for row in m] for m in some]
        counts = [f"{int(mask.sum())}/{rows * columns} hidden" for mask in some]
        print()
        for line in (*zip(*drawn, strict=True), counts):
            print("   ".join(f"{text:<{width}}" for text in line).rstrip())


def _print_chance(spread: dict[str, float], chance: Tensor) -> None:
    """Print how much is hidden, and how often each patch is, ``(rows, columns)``."""
    mean, low, high = spread["mean"], spread["least"], spread["most"]
    shown = f"always {mean:.1%}" if low == high else f"{mean:.1%}, {low:.1%} to {high:.1%}"
    print(f"\nhidden share of {_DRAWS:,} draws: {shown}")
    least, most = float(chance.min()), float(chance.max())
    print(f"a patch is hidden in {least:.0%} to {most:.0%} of them, from ' ' never to '@' most:")
    for row in (9 * chance / max(most, 1e-9)).round().int().tolist():
        print("".join(2 * _SHADES[value] for value in row).rstrip())


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):  # a pipe, or a captured stream
        return 100


# --- Pictures, for other commands too


def read_picture(path: Path, height: int, width: int, *, squeeze: bool = False) -> Tensor:
    """Read an image as ``(3, height, width)`` uint8: the middle of it, or all of it squeezed.

    Raises:
        ValueError: a file that cannot be read as an image.
    """
    import torchvision.transforms.v2.functional as TF
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from None
    if squeeze:
        size = (width, height)
    else:
        scale = max(height / image.height, width / image.width)
        size = (max(round(image.width * scale), width), max(round(image.height * scale), height))
    pixels: Tensor = TF.center_crop(TF.pil_to_tensor(image.resize(size)), [height, width])
    return pixels


def save_figure(figure: Figure, out: Path) -> None:
    """Write a figure into a folder that may not exist yet."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
