"""``maskdistill attention``: how well the attention finds objects, in figures and pictures."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maskdistill.commands.backbones import Backbone, common_size, open_backbones
from maskdistill.commands.said import plain_warning, waiting

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskdistill.evaluation import MaskData
    from maskdistill.models import MaskedViT

_SCENES = 500
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def attention(
    backbones: tuple[str, ...],
    /,
    data: Path | None = None,
    image_size: int | None = None,
    patch_size: int | None = None,
    model: str | None = None,
    pretrained: bool = False,
    resize: Literal["squeeze", "crop"] = "squeeze",
    split: str = "val",
    void: int | None = None,
    limit: int = 1000,
    mass: float = 0.6,
    tolerance: float = 0,
    seeds: tuple[int, ...] = (0, 1),
    discovery: bool = True,
    out: Path | None = None,
    heads: bool = False,
    style: Literal["overlay", "map"] = "overlay",
    images: int = 8,
    device: str | None = None,
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Compare the attention of backbones with object masks, next to random weights; and draw it.

    maskdistill attention runs/first --data VOCdevkit/VOC2012 --out attention.png

    A backbone is a run's folder, a file of weights (also of DINO, iBOT, DINOv2), or a timm model's
    name. Each has a table, next to the same model with random weights and a box in the middle. A
    plain folder of images has no masks to compare with, but --out draws them.

    Args:
        backbones: runs, files of weights, or names of timm models.
        data: a folder with images/ and masks/, VOC's layout, or a pack with masks; or any folder of
            images. Without it: built-in scenes.
        image_size: pixels of a side. Without it: the backbones' own.
        patch_size: pixels of a patch's side. Without it: the backbones' own.
        model: timm's name of what a file from elsewhere holds, where the file does not tell.
        pretrained: take timm's weights of named models, which may download them; else random ones.
        resize: squeeze the whole image into the square, or cut out its centre.
        split: of VOC's layout: the list in ImageSets/Segmentation.
        void: masks hold labels, of which this one is void (-1: none is); VOC's are read so anyway.
        limit: most images.
        mass: share of the attention that counts as the object.
        tolerance: pixels by which the point of greatest attention may miss the object.
        seeds: of the copies with random weights.
        discovery: also run LOST and TokenCut.
        out: a sheet to draw, .png, .pdf or .svg: all backbones over the same images.
        heads: draw each head of one backbone instead.
        style: attention over the darkened image, or its colours alone.
        images: number of images on the sheet.
        device: such as cuda:1. Without it: an accelerator, if there is one.
        threads: on the CPU. Without it: torch's own number.
        json: print the scores as JSON instead.
    """
    import torch

    _check(backbones, out, heads, images, limit, json)
    if threads is not None:
        torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = plain_warning
        opened = open_backbones(
            backbones, image_size=image_size, patch_size=patch_size, model=model,
            pretrained=pretrained, device=device,
        )  # fmt: skip
        size = common_size(opened, image_size)
        if data is not None and _is_plain(data):
            if out is None:
                raise ValueError(
                    f"{data} has images and no masks to compare with; draw them with --out."
                )
            pictures, masks, found = _plain_images(data, size, resize, images), None, {}
        else:
            with waiting("reading images"):
                masked = _open(data, size, resize, split, void, limit)
            if not json:
                print(masked.note)
            options = {"mass": mass, "tolerance": tolerance, "discovery": discovery}
            found = _measured(opened, masked, seeds, options, quiet=json)
            rows = torch.linspace(0, len(masked) - 1, min(images, len(masked))).round().long()
            pictures, masks = masked.images[rows], masked.masks[rows]
        if out is not None:
            _draw(opened, pictures, masks, heads, style, out)
    if json:
        print(_json_text(found))
    elif out is not None:
        print(f"\n{out}" if found else out)


def _check(
    backbones: Sequence[str], out: Path | None, heads: bool, images: int, limit: int, json: bool
) -> None:
    if heads and len(backbones) != 1:
        raise ValueError(f"--heads draws one backbone's; got {len(backbones)} backbones.")
    if heads and out is None:
        raise ValueError("--heads draws each head; say where with --out.")
    for name, value in (("--images", images), ("--limit", limit)):
        if value < 1:
            raise ValueError(f"{name} must be an int >= 1; got {value}.")
    if out is not None and out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--out must end in .png, .pdf or .svg; got {out}.")


# --- Images


def _is_plain(path: Path) -> bool:
    """Whether a folder holds images alone, in none of the forms that have masks."""
    masked = (path / "JPEGImages").is_dir() or (path / "masks").is_dir()
    return path.is_dir() and not masked and any(_image_files(path))


def _image_files(folder: Path) -> Iterator[Path]:
    files = (f for f in sorted(folder.rglob("*")) if f.suffix.lower() in _ENDINGS)
    return (file for file in files if not file.name.startswith("."))


def _plain_images(folder: Path, size: int, resize: str, count: int) -> Tensor:
    """Read the first images of a folder, ``(n, 3, size, size)`` uint8."""
    import torch
    from torchvision.transforms.v2 import functional as TF

    def read(file: Path) -> Tensor:
        image = _opened(file)
        if resize == "crop":
            scale = size / min(image.size)
            image = image.resize([max(size, round(side * scale)) for side in image.size])
            pixels: Tensor = TF.center_crop(TF.pil_to_tensor(image), [size, size])
        else:
            pixels = TF.pil_to_tensor(image.resize((size, size)))
        return pixels

    files = list(_image_files(folder))[:count]
    return torch.stack([read(file) for file in files])


def _opened(file: Path) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(file) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except OSError as error:
        raise ValueError(f"{file} cannot be read as an image: {error}.") from None


def _open(
    path: Path | None, size: int, resize: Any, split: str, void: int | None, limit: int
) -> MaskData:
    from maskdistill.evaluation import open_masks

    if path is not None:
        return open_masks(path, image_size=size, resize=resize, split=split, void=void, limit=limit)
    return _scenes(size, limit)


def _scenes(size: int, limit: int) -> MaskData:
    """Return built-in scenes as images with masks."""
    import torch

    from maskdistill.data import Scenes
    from maskdistill.evaluation import MaskData, mask_boxes

    scenes = Scenes(min(limit, _SCENES), size=size, split="val")
    masks = torch.from_numpy(scenes.masks)
    return MaskData(
        torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous(),
        masks,
        None,
        list(mask_boxes(masks).float()[:, None]),
        tuple(map(str, range(len(scenes)))),
        {},
        f"{len(scenes)} built-in scenes.",
    )


# --- Scores


def _measured(
    backbones: Sequence[Backbone],
    data: MaskData,
    seeds: Sequence[int],
    options: dict[str, Any],
    quiet: bool,
) -> dict[str, Any]:
    """Measure and print each backbone; those of one form share their random weights."""
    from maskdistill.evaluation import AttentionQuality, attention_quality

    baselines: dict[object, AttentionQuality] = {}
    found = {}
    for one in backbones:
        form = one.form
        passes = 1 if form in baselines else 1 + len(seeds)
        with _counting(one.vit, one.name, passes * len(data)):
            quality = attention_quality(
                one.vit, data.images, data.masks, boxes=data.boxes, ignore=data.ignore,
                baseline=baselines.get(form, "random init"), seeds=seeds, **options,
            )  # fmt: skip
        baselines[form] = quality
        found[one.name] = {"source": one.source, **dataclasses.asdict(quality)}
        if not quiet:
            print(f"\n{one.name}\n{quality}")
    return found


@contextmanager
def _counting(vit: MaskedViT, name: str, total: int) -> Iterator[None]:
    """Show a bar on a terminal over the images that go through a model and its copies."""
    from tqdm import tqdm

    with tqdm(
        total=total, desc=name, unit="image", delay=2, disable=None, dynamic_ncols=True, leave=False
    ) as bar:

        def count(_: object, inputs: tuple[Tensor, ...]) -> None:
            bar.update(len(inputs[0]))

        # A copy of the model has a copy of its hooks, so its images count as well.
        hook = vit.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()


def _json_text(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1)


# --- Pictures


def _draw(
    backbones: Sequence[Backbone],
    images: Tensor,
    masks: Tensor | None,
    heads: bool,
    style: Literal["overlay", "map"],
    out: Path,
) -> None:
    from maskdistill import plotting
    from maskdistill.data import normalize
    from maskdistill.evaluation import evaluating

    maps, grids = {}, {}
    for one in backbones:
        with evaluating(one.vit):
            inputs = normalize(images.to(next(one.vit.parameters()).device))
            maps[one.name] = one.vit.attention(inputs).cpu()
        grids[one.name] = one.vit.grid(images.shape[2], images.shape[3])
    finest = max(grids.values())
    if heads:
        own = maps[backbones[0].name]
        figure = plotting.plot_attention_heads(images, own, finest, masks, style=style)
    else:
        maps = {name: _enlarged(maps[name], grids[name], finest, name) for name in maps}
        figure = plotting.plot_attention(images, maps, finest, masks, style=style)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def _enlarged(
    attention: Tensor, grid: tuple[int, int], finest: tuple[int, int], name: str
) -> Tensor:
    """Repeat the patches of a coarser grid, so that models of several share a sheet.

    Raises:
        ValueError: a grid that does not divide the finest.
    """
    rows, columns = finest[0] // grid[0], finest[1] // grid[1]
    if (rows * grid[0], columns * grid[1]) != finest:
        raise ValueError(
            f"{name} has {grid[0]}x{grid[1]} patches, which do not fit into another backbone's "
            f"{finest[0]}x{finest[1]}; draw them on sheets of their own."
        )
    maps = attention.unflatten(-1, grid)
    finer: Tensor = maps.repeat_interleave(rows, -2).repeat_interleave(columns, -1).flatten(-2)
    return finer
