"""Cutting: both ways against Pillow's resized_crop, and against each other."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from maskdistill.data import crops as resampling
from maskdistill.data.crops import cut, cut_batch
from tests.data.pictures import scenes, to_pillow

BOXES = [
    [0, 0, 150, 110], [10, 5, 64, 64], [100, 90, 7, 5], [40, 20, 80, 60], [149, 109, 1, 1],
    [0, 3, 97, 1], [30, 30, 16, 16], [3, 1, 140, 105],
]  # fmt: skip
SIZES = [16, 37, 64]


def pictures() -> Tensor:
    """Scenes of 110 x 150 pixels, the last one noise."""
    x = scenes(3, 150)[:, :, :110].contiguous()
    x[2] = torch.randint(0, 256, x[2].shape, generator=torch.Generator().manual_seed(0)).byte()
    return x


def by_pillow(x: Tensor, box: list[int], flip: bool, size: int) -> Tensor:
    left, top, width, height = box
    crop = TF.resized_crop(
        to_pillow(x), top, left, height, width, [size, size], InterpolationMode.BICUBIC
    )
    return TF.pil_to_tensor(TF.hflip(crop) if flip else crop)  # type: ignore[no-any-return]


def assert_close(got: Tensor, want: Tensor) -> None:
    """Two ways of rounding twice: two levels apart at most, and hardly anywhere more than one."""
    off = (got.int() - want.int()).abs()
    assert int(off.max()) <= 2
    assert float((off > 1).float().mean()) < 0.01
    assert float(off.float().mean()) < 0.2


@pytest.mark.parametrize("size", SIZES)
def test_one_by_one_as_pillow(size: int) -> None:
    for x in pictures():
        interleaved = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        for i, box in enumerate(BOXES):
            want = by_pillow(x, box, bool(i % 2), size)
            for layout in (x, interleaved):
                out = torch.empty(3, size, size, dtype=torch.uint8)
                cut(layout, box, bool(i % 2), size, out)
                assert_close(out, want)


@pytest.mark.parametrize(("size", "memory"), [*((size, 1 << 28) for size in SIZES), (37, 1)])
def test_in_batch_as_pillow(size: int, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "_MEMORY", memory)
    x = pictures()
    boxes = torch.tensor([BOXES, BOXES[::-1], BOXES])
    flips = torch.arange(len(BOXES)).remainder(2).bool().expand(3, -1)
    out = cut_batch(x.permute(0, 2, 3, 1), boxes, flips, size)
    assert out.shape == (len(BOXES), 3, 3, size, size)
    for i in range(3):
        for v, box in enumerate(boxes[i].tolist()):
            want = by_pillow(x[i], box, bool(flips[i, v]), size)
            assert_close(out[v, i], want)


def test_what_is_beside_a_smaller_image_does_not_show() -> None:
    x = pictures().permute(0, 2, 3, 1)
    wide = torch.full((3, 130, 170, 3), 255, dtype=torch.uint8)
    wide[:, :110, :150] = x
    boxes, flips = torch.tensor([BOXES] * 3), torch.zeros(3, len(BOXES), dtype=torch.bool)
    apart = cut_batch(wide, boxes, flips, 32).int() - cut_batch(x, boxes, flips, 32).int()
    assert int(apart.abs().max()) <= 1  # sums in another order


def test_a_crop_of_the_right_size_is_copied() -> None:
    x = pictures()[2]
    out = torch.empty(3, 16, 16, dtype=torch.uint8)
    cut(x, [30, 40, 16, 16], True, 16, out)
    assert torch.equal(out, x[:, 40:56, 30:46].flip(-1))


def test_the_filter_is_pillows() -> None:
    """A single white pixel shows the weights themselves."""
    x = torch.zeros(3, 24, 24, dtype=torch.uint8)
    x[:, 12, 13] = 255
    for size in (6, 17, 50):
        want = TF.pil_to_tensor(to_pillow(x).resize((size, size), Image.Resampling.BICUBIC))
        box = torch.tensor([[[0, 0, 24, 24]]])
        got = cut_batch(x.permute(1, 2, 0)[None], box, torch.zeros(1, 1, dtype=torch.bool), size)
        assert int((got[0, 0].int() - want.int()).abs().max()) <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    x = pictures().permute(0, 2, 3, 1)
    boxes, flips = torch.tensor([BOXES] * 3), torch.ones(3, len(BOXES), dtype=torch.bool)
    there = cut_batch(x.cuda(), boxes.cuda(), flips.cuda(), 32).cpu()
    assert int((there.int() - cut_batch(x, boxes, flips, 32).int()).abs().max()) <= 1
