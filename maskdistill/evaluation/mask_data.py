"""Images with object masks, from a folder, in VOC's layout, or from a pack."""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from maskdistill.data.formats.listing import IMAGE_SUFFIXES
from maskdistill.evaluation.discovery import mask_boxes

_Array = npt.NDArray[np.uint8]
_Bools = npt.NDArray[np.bool_]
_VOC_VOID = 255
_ARRAYS = ("data", "offsets", "mask_data", "mask_offsets")


@dataclass(frozen=True)
class MaskData:
    """Images and their objects, as the model is to see them; made by ``open_masks``.

    Attributes:
        images: ``(n, 3, size, size)`` uint8.
        masks: ``(n, size, size)`` bool, True on any object.
        ignore: ``(n, size, size)`` bool, True on void pixels; None where the data have none.
        boxes: of each image ``(k, 4)`` float32, k >= 1: left, top, right, bottom in pixels of the
            images here; right and bottom are outside.
        names: of the images, ``(n,)``.
        left_out: names of images that are not here, and why.
        note: what was read, in a sentence.
    """

    images: Tensor
    masks: Tensor
    ignore: Tensor | None
    boxes: list[Tensor]
    names: tuple[str, ...]
    left_out: Mapping[str, str]
    note: str

    def __len__(self) -> int:
        """Count the images."""
        return len(self.names)


class _Entry(NamedTuple):
    """An image and its mask on disk; what may be absent is None."""

    name: str
    image: Callable[[], Image.Image]
    mask: Callable[[], Image.Image]
    boxes: Callable[[], Tensor | None]


def open_masks(
    path: str | Path,
    *,
    image_size: int = 224,
    resize: Literal["squeeze", "crop"] = "squeeze",
    split: str = "val",
    void: int | None = None,
    limit: int | None = None,
) -> MaskData:
    """Read images and object masks, resized alike.

    >>> data = open_masks("VOCdevkit/VOC2012", split="val")  # doctest: +SKIP
    >>> data.images.shape, data.masks.shape, len(data.boxes)  # doctest: +SKIP
    (torch.Size([1449, 3, 224, 224]), torch.Size([1449, 224, 224]), 1449)

    Three forms are known. A folder with ``images/`` and ``masks/``, files of the same stems. VOC's,
    with ``JPEGImages``, ``SegmentationObject`` or ``SegmentationClass``,
    ``ImageSets/Segmentation/SPLIT.txt``, and the boxes of ``Annotations`` where they are there. One
    ``.npz`` file with the arrays ``data``, ``offsets``, ``mask_data`` and ``mask_offsets``: encoded
    files end to end.

    An image may have many objects: its mask marks them all, and it has the box of each where the
    data tell them apart (VOC), else one box around the whole mask. Images without an object, or
    without a mask file, are left out, and ``left_out`` names them.

    Args:
        path: the folder or file.
        image_size: pixels of a side.
        resize: ``"squeeze"`` the whole image into the square, or ``"crop"``: its shorter side to
            the size, and the centre cut out. Images are resized bicubically, masks by the nearest
            pixel.
        split: for VOC's layout: the list in ``ImageSets/Segmentation``; without lists, all masks.
        void: how to read the masks of a folder or pack. None: an object pixel has at least half of
            the mask's greatest value, for masks of 0 and 1, of 0 and 255, or with soft edges. A
            number: masks hold labels; all but 0 are objects, and this one is void (-1: none is).
            VOC's are labels with 255 in any case.
        limit: reads so many images only; None is all.

    Raises:
        ValueError: none of these forms, a mask of another size than its image, a file that cannot
            be read, or nothing that has an object. The message names the file.
    """
    from torchvision.transforms import functional as TF  # takes longer to import than torch

    path = Path(path)
    if image_size < 1 or resize not in ("squeeze", "crop") or (limit is not None and limit < 1):
        raise ValueError(
            "image_size must be >= 1, resize 'squeeze' or 'crop', and limit None or >= 1; got "
            f"{image_size!r}, {resize!r} and {limit!r}."
        )
    left_out: dict[str, str] = {}
    if (path / "JPEGImages").is_dir():
        form, entries, void = "VOC's layout", _voc(path, split, left_out), _VOC_VOID
    elif (path / "images").is_dir() and (path / "masks").is_dir():
        form, entries = "a folder of images and masks", _folder(path, left_out)
    elif path.is_file() and path.suffix == ".npz":
        form, entries = "a pack", _pack(path)
    else:
        raise ValueError(
            f"{path} is in no form that open_masks knows: a folder with images/ and masks/, VOC's "
            "with JPEGImages/, or one .npz file with the arrays " + ", ".join(_ARRAYS) + "."
        )
    names: list[str] = []
    images, masks, voids, boxes = [], [], [], []
    for entry in entries:
        if limit is not None and len(names) == limit:
            break
        image, mask = entry.image().convert("RGB"), entry.mask()
        if mask.mode in ("LA", "PA", "RGBA"):  # how opaque it is says nothing
            mask = mask.convert({"LA": "L", "PA": "P", "RGBA": "RGB"}[mask.mode])
        if image.size != mask.size:
            raise ValueError(
                f"{path}: the mask of {entry.name} has {mask.size[0]}x{mask.size[1]} pixels, its "
                f"image {image.size[0]}x{image.size[1]}; they must be alike."
            )
        values = _resized(mask, image_size, resize, Image.Resampling.NEAREST)
        read = _reader(np.asarray(mask), mask.mode, void, entry.name)
        objects, ignored = read(np.asarray(values))
        found = None
        if objects.any():
            found = _boxes(entry, read(np.asarray(mask))[0], image_size, resize)
        if found is None or not len(found):
            seen = "" if resize == "squeeze" else " in the crop"
            left_out[entry.name] = f"no object{seen}"
            continue
        picture = _resized(image, image_size, resize, Image.Resampling.BICUBIC)
        names.append(entry.name)
        images.append(TF.pil_to_tensor(picture))
        masks.append(torch.from_numpy(objects))
        if void is not None:
            voids.append(torch.from_numpy(ignored))
        boxes.append(found)
    if not names:
        raise ValueError(
            f"{path} ({form}) has no image with an object; {len(left_out)} were left out"
            + "".join(f" (the first: {name}, {why})" for name, why in list(left_out.items())[:1])
            + "."
        )
    # Only here: a crop may have lost the void pixels of all.
    ignore = torch.stack(voids) if any(bool(v.any()) for v in voids) else None
    note = f"{len(names):,} images of {form}, {len(left_out):,} left out."
    return MaskData(
        torch.stack(images), torch.stack(masks), ignore, boxes, tuple(names), left_out, note
    )


# --- The forms


def _folder(path: Path, left_out: dict[str, str]) -> Iterator[_Entry]:
    images, masks = _by_stem(path / "images"), _by_stem(path / "masks")
    for stem, file in images.items():
        if stem in masks:
            yield _Entry(stem, _opener(file), _opener(masks[stem]), lambda: None)
        else:
            left_out[stem] = "no mask"


def _by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith("."):
            continue
        if file.stem in files:
            raise ValueError(
                f"{folder} has both {files[file.stem].name} and {file.name}; images and masks are "
                "matched by their stems, so each may be there once."
            )
        files[file.stem] = file
    return files


def _voc(path: Path, split: str, left_out: dict[str, str]) -> Iterator[_Entry]:
    kinds = [path / name for name in ("SegmentationObject", "SegmentationClass")]
    folder = next((kind for kind in kinds if kind.is_dir()), None)
    if folder is None:
        raise ValueError(f"{path} has neither SegmentationObject/ nor SegmentationClass/.")
    lists = path / "ImageSets" / "Segmentation"
    if lists.is_dir():
        chosen = lists / f"{split}.txt"
        if not chosen.is_file():
            known = ", ".join(sorted(file.stem for file in lists.glob("*.txt"))) or "none"
            raise ValueError(f"{lists} has no {split}.txt; there are: {known}.")
        names = chosen.read_text(encoding="utf-8").split()
    else:
        names = sorted(file.stem for file in folder.glob("*.png"))
    instances = folder.name == "SegmentationObject"
    for name in names:
        mask = folder / f"{name}.png"
        if not mask.is_file():
            left_out[name] = "no mask"
            continue
        note = path / "Annotations" / f"{name}.xml"
        image = _opener(path / "JPEGImages" / f"{name}.jpg")
        yield _Entry(name, image, _opener(mask), _voc_boxes(note, mask, instances))


def _voc_boxes(note: Path, mask: Path, instances: bool) -> Callable[[], Tensor | None]:
    """Return what reads an image's boxes: as annotated, else around each instance, else None."""

    def read() -> Tensor | None:
        if note.is_file():
            try:
                corners = [
                    [float(box.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax")]
                    for box in ElementTree.parse(note).getroot().findall("object/bndbox")
                ]
            except (ElementTree.ParseError, ValueError) as error:
                raise ValueError(f"{note} cannot be read: {error}.") from error
            # VOC counts from 1 and includes the last pixel; here right and bottom are outside.
            return torch.tensor(corners).reshape(-1, 4) - torch.tensor([1.0, 1.0, 0.0, 0.0])
        if not instances:
            return None
        labels = torch.from_numpy(np.array(_opener(mask)()))
        each = [n for n in labels.unique().tolist() if n not in (0, _VOC_VOID)]
        return mask_boxes(torch.stack([labels == n for n in each])).float() if each else None

    return read


def _pack(path: Path) -> Iterator[_Entry]:
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in _ARRAYS if name not in arrays]
        if missing:
            raise ValueError(f"{path} lacks the arrays {', '.join(missing)}.")
        data, offsets, mask_data, mask_offsets = (arrays[name] for name in _ARRAYS)
        ids = arrays["id"] if "id" in arrays else np.arange(len(offsets) - 1)
    if len(offsets) != len(mask_offsets) or len(ids) != len(offsets) - 1:
        raise ValueError(
            f"{path} has {len(offsets) - 1} images, {len(mask_offsets) - 1} masks and {len(ids)} "
            "ids; there must be as many of each."
        )
    for i, name in enumerate(ids):
        what = f"{path}, image {name}"
        image = _decoder(data[offsets[i] : offsets[i + 1]], what)
        mask = _decoder(mask_data[mask_offsets[i] : mask_offsets[i + 1]], f"{what} (mask)")
        yield _Entry(
            f"{name:04d}" if name.dtype.kind in "iu" else str(name), image, mask, _no_boxes
        )


def _no_boxes() -> Tensor | None:
    return None


def _opener(file: Path) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        if not file.is_file():
            raise ValueError(f"{file} is missing.")
        return _decoder(np.frombuffer(file.read_bytes(), np.uint8), str(file))()

    return read


def _decoder(encoded: _Array, what: str) -> Callable[[], Image.Image]:
    def read() -> Image.Image:
        try:
            image = Image.open(io.BytesIO(encoded.tobytes()))
            image.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{what} cannot be read as an image: {error}.") from error
        return image

    return read


# --- Pixels


def _resized(
    image: Image.Image, size: int, resize: str, interpolation: Image.Resampling
) -> Image.Image:
    """Resize an image or a mask, the one as the other."""
    from torchvision.transforms import functional as TF

    if resize == "squeeze":
        squeezed: Image.Image = TF.resize(image, [size, size], interpolation)
        return squeezed
    cropped: Image.Image = TF.center_crop(TF.resize(image, [size], interpolation), [size])
    return cropped


def _reader(
    whole: _Array, mode: str, void: int | None, name: str
) -> Callable[[_Array], tuple[_Bools, _Bools]]:
    """Return what finds object and void pixels in a mask's values, resized or not."""
    if whole.ndim != 2 and void is not None:
        raise ValueError(
            f"the mask of {name} is in colour ({mode}), which holds no labels; save it with a "
            "palette or in grey."
        )
    greatest = max(1, int(whole.max()))
    if void is None and (mode == "P" or (greatest < 128 and len(np.unique(whole)) > 2)):
        raise ValueError(
            f"the mask of {name} looks like labels (mode {mode}, greatest value {greatest}) and "
            "not like one object; give void=255, or void=-1 if no label means void."
        )

    def read(values: _Array) -> tuple[_Bools, _Bools]:
        if void is not None:
            ignored: _Bools = values == void
            return (values != 0) & ~ignored, ignored
        brightest = values if values.ndim == 2 else values.max(axis=-1)
        objects: _Bools = brightest.astype(np.int64) * 2 >= greatest
        return objects, np.zeros_like(objects)

    return read


def _boxes(entry: _Entry, objects: _Bools, size: int, resize: str) -> Tensor:
    """Return the boxes of an image in its pixels after resizing, those that are left in it.

    Args:
        entry: the image.
        objects: ``(H, W)``, before resizing, which may lose what is thin.
        size: pixels of a side after it.
        resize: how.
    """
    height, width = objects.shape
    x, y, left, top = size / width, size / height, 0.0, 0.0
    if resize == "crop":
        x = y = size / min(width, height)
        left, top = (width * x - size) / 2, (height * y - size) / 2
    boxes = entry.boxes()
    if boxes is None:  # around what is seen
        rows = slice(int(top / y), math.ceil((top + size) / y))
        columns = slice(int(left / x), math.ceil((left + size) / x))
        seen = np.zeros_like(objects)
        seen[rows, columns] = objects[rows, columns]
        if not seen.any():
            return torch.empty(0, 4)
        boxes = mask_boxes(torch.from_numpy(seen)[None]).float()
    scaled = boxes * torch.tensor([x, y, x, y]) - torch.tensor([left, top, left, top])
    scaled = scaled.clamp(0, size)
    return scaled[(scaled[:, 2:] - scaled[:, :2] > 0).all(dim=1)]
