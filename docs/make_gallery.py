"""Plots the pictures of the methods, and lists them in the gallery, from the presets themselves.

    python docs/make_gallery.py

It writes docs/img/methods/*.png, and the lists of docs/gallery.md: all between its first heading
and its last. The cards, docs/methods/*.md, are written by hand. Masks are drawn with a fixed seed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn

import maskdistill as md
from maskdistill import plotting, presets
from maskdistill.data import Scenes
from maskdistill.presets import Preset

DOCS = Path(__file__).parent
GRID = (14, 14)
PATCH = 14  # pixels, so that a picture of a scene is as large as one of a mask
SCENE, SEED = 27, 0
DRAWS = 5000
NETWORKS = ("adios", "cl_mae")
BATCHES = {"msn": 1}
"""Images per call, where one mask is shared by all of them; else the plot's own."""
FAMILIES = {
    "Self-distillation": ("dino", "ibot", "msn", "siamese"),
    "Latent targets": ("clusters", "latent", "clip"),
    "Pixels and visual words": ("pixels", "tokens"),
}
"""Headings of the gallery, each with the first objectives of its methods."""


class Colourfulness(nn.Module):
    """Stands for a mask network: scores what is colourful."""

    def forward(self, images: Tensor) -> Tensor:
        """Return a map ``(B, 1, h, w)``."""
        colour = images.amax(dim=1, keepdim=True) - images.amin(dim=1, keepdim=True)
        coarse = F.adaptive_avg_pool2d(colour, GRID)
        return F.avg_pool2d(coarse, 3, stride=1, padding=1, count_include_pad=False)


def main() -> None:
    """Write everything."""
    folder = DOCS / "img" / "methods"
    for old in folder.iterdir():
        old.unlink()
    for path, picture in pictures():
        path.write_bytes(picture)
    page = DOCS / "gallery.md"
    page.write_text(with_lists(page.read_text(encoding="utf-8")), encoding="utf-8")


# ------------------------------------------------------------------------------------------------
# What is plotted


def build(name: str) -> Preset:
    """Return a preset with its defaults."""
    return presets.ALL[name](Colourfulness()) if name in NETWORKS else presets.ALL[name]()


def masker_of(name: str) -> md.Masker:
    """Return what a preset hides from the student's global views."""
    masker = build(name).student_global or md.NoMasker()
    assert isinstance(masker, md.Masker)  # one for all global views
    return masker


@cache
def scenes(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the first built-in scenes and their objects, from the one that is shown on."""
    found = Scenes(SCENE + count, size=size, split="val", seed=0)
    images = torch.from_numpy(found.images[SCENE:]).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(found.masks[SCENE:])


@cache
def arguments(name: str) -> dict[str, Any]:
    """Return what `plot_masker` is given for a preset, besides the masker."""
    needs = masker_of(name).needs
    if name in NETWORKS:
        images, _ = scenes(200, GRID[0] * 8)
        shown, _ = scenes(4, GRID[0] * PATCH)
        return {"pictures": shown, "images": images.float() / 255}
    given: dict[str, Any] = {"batch": BATCHES[name]} if name in BATCHES else {}
    if needs:
        images, objects = scenes(1, GRID[0] * PATCH)
        made = {
            "attention": attention(objects),
            "loss": contrast(images),
            "parts": parts(objects),
            "images": images.float() / 255,
        }
        given |= {"pictures": images} | {need: made[need] for need in needs}
    if name in ("hpm", "semmae"):
        given["progress"] = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    return given


def attention(objects: Tensor) -> Tensor:
    """Make up a teacher's attention: ``(B, N)``, summing to 1."""
    generator = torch.Generator().manual_seed(SEED)
    share = F.adaptive_avg_pool2d(objects[:, None].float(), GRID)
    blurred = F.avg_pool2d(share, 3, stride=1, padding=1)
    noise = torch.rand(blurred.shape, generator=generator)
    heat: Tensor = (share + blurred + 0.3 * noise).flatten(1)
    return heat / heat.sum(dim=1, keepdim=True)


def contrast(images: Tensor) -> Tensor:
    """Return the standard deviation of the brightness in each patch: ``(B, N)``."""
    light = images.float().mean(dim=1, keepdim=True) / 255
    mean = F.adaptive_avg_pool2d(light, GRID)
    return (
        (F.adaptive_avg_pool2d(light.square(), GRID) - mean.square()).clamp_min(0).sqrt().flatten(1)
    )


def parts(objects: Tensor) -> Tensor:
    """Make up seven parts: three sectors of the object, four of the ground: ``(B, N)``."""
    inside = F.adaptive_avg_pool2d(objects[:, None].float(), GRID)[:, 0] > 0.4
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in GRID), indexing="ij")
    found = []
    for mask in inside:
        down, right = rows - rows[mask].float().mean(), columns - columns[mask].float().mean()
        turn = (torch.atan2(down, right) / (2 * torch.pi)) % 1
        thirds = (right + 0.01).sign().long() + 1  # left, middle, right of the object
        thirds = torch.where(right.abs() < 2, 1, thirds)
        found.append(torch.where(mask, thirds, 3 + (4 * turn).long().clamp_max(3)))
    return torch.stack(found).flatten(1)


@cache
def hidden(name: str) -> Tensor:
    """Draw from a preset: ``(DRAWS, N)`` bool."""
    masker, given = masker_of(name), arguments(name)
    generator = torch.Generator().manual_seed(SEED)
    batch = given.get("batch", 50)
    progress = given.get("progress", [0.0])[-1]
    signals = {need: given[need] for need in masker.needs}
    rows = []
    for start in range(0, DRAWS, batch):
        turn = torch.arange(start, start + batch)
        those: dict[str, Any] = {
            need: signal[turn % len(signal)] for need, signal in signals.items()
        }
        rows.append(masker(batch, GRID, generator=generator, progress=progress, **those))
    return torch.cat(rows)


def pictures() -> Iterator[tuple[Path, bytes]]:
    """Plot the picture of each card, and the small one of the gallery."""
    folder = DOCS / "img" / "methods"
    for name in presets.NAMES:
        generator = torch.Generator().manual_seed(SEED)
        figure = plotting.plot_masker(
            masker_of(name), GRID, samples=DRAWS, generator=generator, **arguments(name)
        )
        saved = io.BytesIO()
        figure.savefig(saved, format="png")
        pixels = np.asarray(Image.open(saved).convert("RGB"))
        yield folder / f"{name}.png", compressed(pixels)
        yield folder / f"{name}-small.png", compressed(strip(name))


def strip(name: str) -> Any:
    """Return the pixels of three draws and the map of how often each patch is hidden."""
    masks, given = hidden(name), arguments(name)
    picture = given.get("pictures")
    # Of the first draws those that hide something come first: the number beside says how many.
    first = masks[:50][masks[:50].any(dim=1).argsort(descending=True, stable=True)]
    if name in NETWORKS:
        first = masks
    panels = []
    for index in range(3):
        row = first[index * (4 if name in BATCHES else 1)]
        image = None if picture is None else picture[index % len(picture)]
        panels.append(plotting.masked_pixels(image, row, GRID, size=GRID[0] * PATCH))
    chance = masks.float().mean(dim=0).reshape(GRID).numpy()
    heat = (255 * colormaps["viridis"](chance)[..., :3]).round().astype(np.uint8)
    panels.append(heat.repeat(PATCH, 0).repeat(PATCH, 1))
    gap = np.full((GRID[0] * PATCH, 8, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


@cache
def palette() -> Image.Image:
    """Choose the 256 colours of all pictures, so that colour bars stay what they are."""
    maps = [
        colormaps["viridis"](np.linspace(0, 1, 96)),
        colormaps["inferno"](np.linspace(0, 1, 36)),
    ]
    greys = np.linspace(0, 1, 24)[:, None].repeat(3, 1)
    blues = np.linspace((1, 1, 1), (0, 0.447, 0.698), 8)  # of the histogram, and its edges
    plain = np.concatenate([*(colours[:, :3] for colours in maps), greys, blues])
    shown, _ = scenes(4, GRID[0] * PATCH)
    scene = Image.fromarray(shown.permute(0, 2, 3, 1).flatten(0, 1).numpy())
    # Of hidden and visible patches, as they are drawn.
    masker = plotting.masked_pixels(None, torch.arange(4) == 0, (2, 2), size=2 * PATCH)
    drawn = np.unique(masker.reshape(-1, 3), axis=0)
    rest = scene.quantize(256 - len(plain) - len(drawn)).getpalette() or []
    fixed = Image.new("P", (1, 1))
    fixed.putpalette(
        [*drawn.flatten().tolist(), *(255 * plain).round().astype(int).flatten().tolist(), *rest]
    )
    return fixed


def compressed(pixels: Any) -> bytes:
    """Return a PNG in the colours of the palette."""
    image = Image.fromarray(pixels).quantize(palette=palette(), dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------
# What is written


def with_lists(page: str) -> str:
    """Return the text of the gallery with its lists made anew."""
    before, rest = page.split(f"## {next(iter(FAMILIES))}\n", 1)
    after = rest[rest.rindex("## ") :]
    return before + lists() + after


def lists() -> str:
    """Write the methods of each family, each with its picture and the share that it hides."""
    lines = []
    for family, objectives in FAMILIES.items():
        lines += [f"## {family}", '<div class="grid cards gallery" markdown>']
        built = {name: build(name) for name in presets.NAMES}
        lines += [
            entry(name, preset)
            for name, preset in built.items()
            if preset.objectives[0] in objectives
        ]
        lines.append("</div>")
    return "\n\n".join(lines).replace(" %", "\N{NO-BREAK SPACE}%") + "\n\n"


def entry(name: str, preset: Preset) -> str:
    """Write one entry of the gallery."""
    share = shares(name)
    picture = (
        f"Draws of {preset.title} on {GRID[0]} by {GRID[1]} patches, a map of how often each "
        f"patch is hidden, and a histogram of the share that is hidden: {share}."
    )
    how = [share, *([preset.apply] if preset.maskers else []), " + ".join(preset.objectives)]
    return (
        f"-   [![{picture}](img/methods/{name}-small.png)](methods/{name}.md)\n\n"
        f"    [**{preset.title}**](methods/{name}.md) `presets.{name}`\n\n"
        f"    {' · '.join(how)}"
    )


def shares(name: str) -> str:
    """Say how much is hidden: "75 %", or "15 % (0 to 50 %)"."""
    count = masker_of(name).fixed_count(GRID)
    if count is not None:
        return f"{100 * count / (GRID[0] * GRID[1]):.0f} %"
    share = 100 * hidden(name).float().mean(dim=1)
    return f"{share.mean():.0f} % ({share.min():.0f} to {share.max():.0f} %)"


if __name__ == "__main__":
    main()
