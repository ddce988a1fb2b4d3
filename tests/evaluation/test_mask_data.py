"""Images with masks in the forms that they have on disk, written here."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskdistill.data import resize_for_evaluation
from maskdistill.evaluation.mask_data import open_masks

ECSSD = Path(__file__).parents[3] / "shared" / "data" / "seg_ecssd.npz"


def picture(width: int = 40, height: int = 20, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask_of(
    box: tuple[int, int, int, int], value: int = 255, size: tuple[int, int] = (40, 20)
) -> Any:
    """Return a mask of a size (width, height) with a box (left, top, right, bottom)."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = value
    return mask


def palette(labels: Any) -> Image.Image:
    image = Image.fromarray(labels.astype(np.uint8), "L").convert("P")
    image.putdata(labels.ravel().tolist())
    return image


def folder(path: Path, masks: dict[str, Any], images: dict[str, Image.Image] | None = None) -> Path:
    for name in ("images", "masks"):
        (path / name).mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(masks):
        (images or {}).get(name, picture(seed=seed)).save(path / "images" / f"{name}.png")
    for name, mask in masks.items():
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(path / "masks" / f"{name}.png")
    return path


def test_a_folder_squeezed(tmp_path: Path) -> None:
    folder(tmp_path, {"b": mask_of((10, 5, 20, 15)), "a": mask_of((0, 0, 40, 10))})
    data = open_masks(tmp_path, image_size=20)
    assert data.names == ("a", "b")
    assert data.images.shape == (2, 3, 20, 20)
    assert data.images.dtype == torch.uint8
    assert torch.equal(data.images[1], resize_for_evaluation(picture(seed=0), 20, crop=False))
    # Twice as wide as high: x is halved, y stays.
    assert [boxes.tolist() for boxes in data.boxes] == [[[0, 0, 20, 10]], [[5, 5, 10, 15]]]
    assert data.masks[1, 5:15, 5:10].all()
    assert int(data.masks[1].sum()) == 50
    assert data.ignore is None
    assert not data.left_out
    assert len(open_masks(tmp_path, image_size=20, limit=1)) == 1


def test_a_folder_cropped(tmp_path: Path) -> None:
    """The middle 20 of 40 columns are seen: one object is cut, the other outside."""
    folder(tmp_path, {"cut": mask_of((5, 2, 15, 12)), "outside": mask_of((0, 0, 9, 20))})
    data = open_masks(tmp_path, image_size=20, resize="crop")
    assert data.names == ("cut",)
    assert data.boxes[0].tolist() == [[0, 2, 5, 12]]
    assert dict(data.left_out) == {"outside": "no object in the crop"}
    assert data.images[0].tolist() == resize_crop(picture(seed=0)).tolist()


def resize_crop(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.crop((10, 0, 30, 20))).copy()).permute(2, 0, 1)


def test_images_without_an_object_are_counted(tmp_path: Path) -> None:
    folder(tmp_path, {"full": mask_of((1, 1, 9, 9)), "empty": mask_of((0, 0, 0, 0))})
    picture().save(tmp_path / "images" / "alone.jpg")
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    data = open_masks(tmp_path, image_size=20)
    assert data.names == ("full",)
    assert dict(data.left_out) == {"empty": "no object", "alone": "no mask"}
    assert data.note == "1 images of a folder of images and masks, 2 left out."


@pytest.mark.parametrize(
    "mask",
    [
        mask_of((4, 4, 12, 12), 1),
        mask_of((4, 4, 12, 12)),
        mask_of((4, 4, 12, 12)).astype(bool),
        np.stack([mask_of((4, 4, 12, 12))] * 3, axis=-1),
        np.stack([mask_of((4, 4, 12, 12))] * 3 + [np.full((20, 40), 255, np.uint8)], axis=-1),
        np.maximum(mask_of((4, 4, 12, 12)), mask_of((2, 2, 14, 14), 100)),  # a soft edge
    ],
    ids=["0 and 1", "0 and 255", "bits", "RGB", "RGBA", "soft"],
)
def test_masks_of_one_object(tmp_path: Path, mask: Any) -> None:
    data = open_masks(folder(tmp_path, {"x": mask}), image_size=20)
    assert data.boxes[0].tolist() == [[2, 4, 6, 12]]
    assert int(data.masks.sum()) == 4 * 8


def test_masks_of_labels(tmp_path: Path) -> None:
    labels = mask_of((4, 4, 12, 12), 7)
    labels[6:8, 20:24], labels[0, :] = 2, 255
    folder(tmp_path, {"x": labels.copy()})
    data = open_masks(tmp_path, image_size=20, void=255)
    assert data.boxes[0].tolist() == [[2, 4, 12, 12]], "around all objects"
    assert int(data.masks.sum()) == 4 * 8 + 2 * 2, "no labels between labels"
    assert data.ignore is not None
    assert data.ignore[0, 0].all()
    assert not (data.ignore & data.masks).any()
    assert int(open_masks(tmp_path, image_size=20, void=-1).masks[0, 0].sum()) == 20
    labels[0, :] = 0
    for mask in (labels, palette(labels)):
        with pytest.raises(ValueError, match="looks like labels.*give void=255"):
            open_masks(folder(tmp_path, {"x": mask}), image_size=20)


def voc(path: Path, kind: str = "SegmentationObject", notes: bool = True) -> Path:
    labels = mask_of((4, 4, 12, 12), 1)
    labels[5:10, 30:36], labels[3, 4:12] = 2, 255
    for name in ("JPEGImages", kind, "ImageSets/Segmentation", "Annotations"):
        (path / name).mkdir(parents=True)
    for name in ("2007_01", "2007_02"):
        picture().save(path / "JPEGImages" / f"{name}.jpg")
    palette(labels).save(path / kind / "2007_01.png")
    palette(0 * labels).save(path / kind / "2007_02.png")
    (path / "ImageSets/Segmentation/val.txt").write_text("2007_01\n2007_02\n")
    boxes = [(5, 4, 12, 12), (31, 6, 36, 10)]  # counted from 1, the last pixel inside
    if notes:
        objects = "".join(
            f"<object><name>cat</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
            f"<ymax>{d}</ymax></bndbox></object>"
            for a, b, c, d in boxes
        )
        (path / "Annotations/2007_01.xml").write_text(f"<annotation>{objects}</annotation>")
    return path


def test_voc(tmp_path: Path) -> None:
    data = open_masks(voc(tmp_path), image_size=20)
    assert data.names == ("2007_01",)
    assert data.boxes[0].tolist() == [[2, 3, 6, 12], [15, 5, 18, 10]], "as annotated"
    assert dict(data.left_out) == {"2007_02": "no object"}
    assert data.ignore is not None
    assert data.ignore[0].nonzero().tolist() == [[3, x] for x in range(2, 6)]
    assert int(data.masks.sum()) == 4 * 8 + 3 * 5


def test_voc_without_annotations(tmp_path: Path) -> None:
    """Then the boxes are around the instances; or around all, if only classes are there."""
    data = open_masks(voc(tmp_path / "object", notes=False), image_size=20)
    assert data.boxes[0].tolist() == [[2, 4, 6, 12], [15, 5, 18, 10]]
    data = open_masks(voc(tmp_path / "class", "SegmentationClass", notes=False), image_size=20)
    assert data.boxes[0].tolist() == [[2, 4, 18, 12]]
    with pytest.raises(ValueError, match=r"no train.txt; there are: val"):
        open_masks(tmp_path / "class", split="train")


def encoded(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def pack(file: Path, images: list[bytes], masks: list[bytes], **extra: Any) -> Path:
    arrays: dict[str, Any] = {}
    for name, parts in (("", images), ("mask_", masks)):
        arrays[f"{name}data"] = np.frombuffer(b"".join(parts), np.uint8)
        arrays[f"{name}offsets"] = np.cumsum([0, *map(len, parts)])
    np.savez(file, **arrays, **extra)
    return file


def test_a_pack(tmp_path: Path) -> None:
    images = [encoded(picture(seed=seed), "PNG") for seed in range(2)]
    masks = [encoded(Image.fromarray(mask_of((4 * i, 0, 20, 8))), "PNG") for i in range(2)]
    data = open_masks(pack(tmp_path / "a.npz", images, masks, id=np.array([3, 9])), image_size=20)
    assert data.names == ("0003", "0009")
    assert data.boxes[1].tolist() == [[2, 0, 10, 8]]
    assert torch.equal(data.images[1], resize_for_evaluation(picture(seed=1), 20, crop=False))
    assert open_masks(tmp_path / "a.npz").names == data.names
    with pytest.raises(ValueError, match="2 images, 1 masks"):
        open_masks(pack(tmp_path / "b.npz", images, masks[:1]))
    with pytest.raises(ValueError, match=r"image 1 \(mask\) cannot be read"):
        open_masks(pack(tmp_path / "c.npz", images, [masks[0], b"nothing"]))
    np.savez(tmp_path / "d.npz", data=np.zeros(3))
    with pytest.raises(ValueError, match="lacks the arrays offsets, mask_data"):
        open_masks(tmp_path / "d.npz")


def test_bad_input_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="in no form that open_masks knows"):
        open_masks(tmp_path)
    other = mask_of((0, 0, 4, 4), size=(20, 20))
    with pytest.raises(ValueError, match="mask of x has 20x20 pixels, its image 40x20"):
        open_masks(folder(tmp_path / "size", {"x": other}))
    with pytest.raises(ValueError, match="no image with an object; 1 were left out"):
        open_masks(folder(tmp_path / "empty", {"x": mask_of((0, 0, 0, 0))}))
    twice = folder(tmp_path / "twice", {"x": mask_of((0, 0, 4, 4))})
    picture().save(twice / "images" / "x.jpg")
    with pytest.raises(ValueError, match=r"both x.jpg and x.png"):
        open_masks(twice)
    broken = folder(tmp_path / "broken", {"x": mask_of((0, 0, 4, 4))})
    (broken / "images" / "x.png").write_bytes(b"\x89PNG and no more")
    with pytest.raises(ValueError, match=r"x.png cannot be read"):
        open_masks(broken)
    missing = voc(tmp_path / "missing")
    (missing / "JPEGImages/2007_01.jpg").unlink()
    with pytest.raises(ValueError, match=r"2007_01.jpg is missing"):
        open_masks(missing)
    (voc(tmp_path / "xml") / "Annotations/2007_01.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"2007_01.xml cannot be read"):
        open_masks(tmp_path / "xml")
    with pytest.raises(ValueError, match="image_size must be"):
        open_masks(tmp_path, image_size=0)


@pytest.mark.skipif(not ECSSD.is_file(), reason=f"{ECSSD} is not here")
def test_ecssd() -> None:
    """Its boxes are ours, also of what is too thin for the resized masks."""
    data = open_masks(ECSSD, image_size=64, limit=20)
    with np.load(ECSSD) as arrays:
        sizes, boxes = arrays["size_wh"][:20], arrays["box"][:20]
    expected = torch.from_numpy(boxes / np.tile(sizes, 2) * 64)
    torch.testing.assert_close(torch.cat(data.boxes), expected.float())
    assert data.names[:2] == ("0001", "0002")
