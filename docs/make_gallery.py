"""Makes the cards of the methods, their pictures and the gallery, from the presets themselves.

    python docs/make_gallery.py

It writes docs/gallery.md, docs/methods/*.md and docs/img/methods/*.png. What is said stands in
`maskdistill/presets`; what is drawn and counted comes from the maskers, with a fixed seed.
"""

from __future__ import annotations

import io
import textwrap
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
NOTICE = "<!-- Made by docs/make_gallery.py from maskdistill/presets. -->"
"""At the end of each page: a menu shows the heading that a page begins with."""
FAMILIES = {
    "Self-distillation": ("dino", "ibot", "prototypes", "siamese"),
    "Latent targets": ("clusters", "latent", "clip"),
    "Pixels and visual words": ("pixels", "tokens"),
}
"""Headings of the gallery, each with the first objectives of its methods."""
SIGNALS = {
    "attention": "The attention is made up: the object's mask, blurred, with some noise.",
    "loss": "The predicted loss is made up: the contrast within each patch.",
    "parts": "The seven parts are made up: sectors of the object and of the ground around it.",
    "images": "The patches that are compared are those of the scene.",
}
SIZES = "[torch.randn(4, 3, 224, 224)]"


class Colourfulness(nn.Module):
    """Stands for a mask network: scores what is colourful."""

    def forward(self, images: Tensor) -> Tensor:
        """Return a map ``(B, 1, h, w)``."""
        colour = images.amax(dim=1, keepdim=True) - images.amin(dim=1, keepdim=True)
        coarse = F.adaptive_avg_pool2d(colour, GRID)
        return F.avg_pool2d(coarse, 3, stride=1, padding=1, count_include_pad=False)


def main() -> None:
    """Write everything."""
    for folder in (DOCS / "methods", DOCS / "img" / "methods"):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for path, picture in pictures():
        path.write_bytes(picture)


# ------------------------------------------------------------------------------------------------
# What is drawn


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
    """Draw the picture of each card, and the small one of the gallery."""
    folder = DOCS / "img" / "methods"
    for name in presets.NAMES:
        generator = torch.Generator().manual_seed(SEED)
        figure = plotting.plot_masker(
            masker_of(name), GRID, samples=DRAWS, generator=generator, **arguments(name)
        )
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        pixels = np.asarray(Image.open(drawn).convert("RGB"))
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


def pages() -> dict[Path, str]:
    """Return the text of every page, by its path."""
    cards = {DOCS / "methods" / f"{name}.md": card(name) for name in presets.NAMES}
    return {DOCS / "gallery.md": gallery(), **cards}


def shares(name: str) -> str:
    """Say how much is hidden: "75 %", or "15 % (0 to 50 %)"."""
    count = masker_of(name).fixed_count(GRID)
    if count is not None:
        return f"{100 * count / (GRID[0] * GRID[1]):.0f} %"
    share = 100 * hidden(name).float().mean(dim=1)
    return f"{share.mean():.0f} % ({share.min():.0f} to {share.max():.0f} %)"


def card(name: str) -> str:
    """Write the page of one method."""
    preset = build(name)
    paper, source = preset.paper, "the authors' code" if preset.paper.code else "the paper"
    links = f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
    if paper.code:
        links += f", [the code that was read]({paper.code})"
    lines = [
        f"# {preset.title}",
        f"{paper.authors}, *{paper.title}*, {paper.venue}. {links}.",
        preset.hides,
        f"![{alternative(name)}](../img/methods/{name}.png){{ .draws }}",
        caption(name),
        "## In code",
        code(name),
        f"Its arguments: [`presets.{name}`](../api.md#maskdistill.presets.{name}).",
        f"## The settings of {source}",
        "\n".join(
            ["| setting | value |", "|---|---|"]
            + [f"| {setting} | {value} |" for setting, value in preset.defaults.items()]
        ),
        f"## What differs from {source}",
        listed(preset.differences) or "Nothing: there is no mask.",
        "## What was measured",
        listed(preset.evidence) or "No figure could be read at its source, and none is quoted.",
        "[All methods side by side](../gallery.md)",
    ]
    return "\n\n".join(wrapped(line) for line in [*lines, NOTICE]) + "\n"


def wrapped(paragraph: str) -> str:
    """Break a paragraph or list into lines of the length that other pages have."""
    paragraph = paragraph.replace(" %", "\N{NO-BREAK SPACE}%")
    if paragraph.startswith(("#", "```", "|", "<", "---", "-   ")):
        return paragraph
    return "\n".join(
        textwrap.fill(
            line,
            100,
            subsequent_indent="  " if line.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in paragraph.splitlines()
    )


def listed(sentences: tuple[str, ...]) -> str:
    """Write a list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def alternative(name: str) -> str:
    """Describe a picture for those who do not see it."""
    return (
        f"Draws of {build(name).title} on {GRID[0]} by {GRID[1]} patches, a map of how often each "
        f"patch is hidden, and a histogram of the share that is hidden: {shares(name)}."
    )


def caption(name: str) -> str:
    """Explain a picture."""
    masker, given = masker_of(name), arguments(name)
    text = f"Dark patches are hidden. The map and the histogram are of {DRAWS:,} draws"
    if name in NETWORKS:
        return (
            f"*{text} over 200 scenes. The network is a stand-in, which scores what is colourful; "
            "each image is shown above its mask.*"
        )
    if "progress" in given:
        text += " at the end of training"
    if masker.needs:
        text += f", all for the one scene that is shown. {SIGNALS[min(masker.needs)]}"
    else:
        text += "."
    if name in BATCHES:
        text += " The draws on top are one batch."
    return f"*{text}*"


def code(name: str) -> str:
    """Write code that builds a preset, prints it and draws."""
    preset = build(name)
    views = SIZES + (" * 2" if preset.global_crops == 2 else "")
    if preset.local_views:
        views += " + [torch.randn(4, 3, 96, 96)] * 8"
    rows = 4 * preset.global_crops
    made = {
        "attention": ("attention", f"torch.rand({rows}, 196)", "stands for the teacher's"),
        "loss": ("loss", f"torch.rand({rows}, 196)", "stands for the predicted one"),
        "parts": (
            "parts",
            f"torch.randint(7, ({rows}, 196))",
            "stands for those of a part learner",
        ),
    }
    if name == "milan":
        made["attention"] = (*made["attention"][:2], "stands for CLIP's")
    given = [made[need] for need in sorted(preset.needs) if need in made]
    call, lines = f"md.presets.{name}()", ["import torch", "import maskdistill as md", ""]
    if name in NETWORKS:
        call = f"md.presets.{name}(Network())"
        lines += [
            "class Network(torch.nn.Module):    # stands for one that is trained",
            "    def forward(self, images):",
            "        return images.mean(dim=1, keepdim=True)",
            "",
        ]
    lines += [f"preset = {call}", "print(preset)"]
    blocks = ["```python", *lines, "```", "", "```text", str(preset), "```", ""]
    if name in NETWORKS:
        blocks[blocks.index(str(preset))] = str(preset).replace("<Colourfulness>", "<Network>")
    arguments = "".join(f", {need}={need}" for need, _, _ in given)
    blocks += [
        "```python",
        f"crops = {views}",
        *(f"{need} = {value}    # {why}" for need, value, why in given),
        f"masks = preset(crops, patch_size=16{arguments})",
    ]
    if preset.maskers:
        blocks.append("assert masks.student[0].shape == (4, 196)")
    else:
        blocks.append("assert masks.student[0] is None")
    return "\n".join([*blocks, "```"])


def gallery() -> str:
    """Write the page that shows all methods side by side."""
    lines = [
        "---\nhide:\n  - toc\n---",
        "# Gallery of methods",
        "Published masking methods, each a value: `md.presets.ibot()` is the policy with its "
        "masker, and knows how the mask is applied, which objective it belongs to, its paper, the "
        "paper's settings, and what is done otherwise here. Behind each picture is a card.",
        f"A picture shows three draws that hide something, on {GRID[0]} x {GRID[1]} patches, dark "
        "where hidden, and at the right how often each patch is hidden, from never "
        "(dark blue) to always (yellow). The numbers are the mean share that is hidden, and in "
        f"brackets the least and the most of {DRAWS:,} draws. Masks that follow an image are drawn "
        "on a built-in scene with a made-up signal.",
        "Presets say what is hidden, from whom and how. Of the objectives that are named, this "
        "library has DINO's.",
    ]
    for family, objectives in FAMILIES.items():
        lines.append(f"## {family}")
        lines.append('<div class="grid cards gallery" markdown>')
        for name in presets.NAMES:
            preset = build(name)
            if preset.objectives[0] in objectives:
                lines.append(entry(name, preset))
        lines.append("</div>")
    lines += [
        "## What holds for all",
        "- Counts are rounded to the nearest patch. Most of the authors' code rounds down, and "
        "the cards say where.\n"
        "- Every draw is the image's own, unless a card says otherwise.\n"
        "- A figure stands on a card only if it was read in the paper or the authors' repository; "
        "they are theirs, on their data, and not comparable from card to card.",
        "This page, the cards and the pictures are made by one command:",
        "```console\npython docs/make_gallery.py\n```",
        NOTICE,
    ]
    return "\n\n".join(wrapped(line) for line in lines) + "\n"


def entry(name: str, preset: Preset) -> str:
    """Write one entry of the gallery."""
    how = " · ".join(
        [shares(name), *([preset.apply] if preset.maskers else []), " + ".join(preset.objectives)]
    )
    return (
        f"-   [![{alternative(name)}](img/methods/{name}-small.png)](methods/{name}.md)\n\n"
        f"    [**{preset.title}**](methods/{name}.md) `presets.{name}`\n\n"
        f"    {how}"
    )


if __name__ == "__main__":
    main()
