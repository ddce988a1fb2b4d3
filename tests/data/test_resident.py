"""Images kept in memory, batches of crops from either place, and workers that die."""

from __future__ import annotations

import os
import signal
from typing import Literal

import pytest
import torch
from PIL import Image
from torch import Tensor

from maskdistill.data import BatchStream, Crops, MultiCrop
from maskdistill.data import loading as resident
from maskdistill.data.loading import LoaderError, ResidentImages, crop_batches
from tests.data.pictures import gradient

TRANSFORM = MultiCrop(16, 8, 2)


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Gradients of different sizes, or of the same one."""

    def __init__(self, count: int = 12, same: bool = False, fatal: int = -1) -> None:
        self.count, self.same, self.fatal = count, same, fatal

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index == self.fatal and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return (
            gradient(30, 24) if self.same else gradient(20 + 3 * (index % 12), 40 - index % 12)
        ), 0


def stream(steps: int = 4) -> BatchStream:
    return BatchStream(12, 4, start=0, stop=steps, seed=0)


def batches(where: Literal["workers", "device"], workers: int, **kind: bool) -> list[Crops]:
    loaded = crop_batches(
        Pictures(**kind), TRANSFORM, stream(), seed=5, where=where, workers=workers
    )
    return list(loaded)


def assert_same(a: list[Crops], b: list[Crops]) -> None:
    assert len(a) == len(b) == 4
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.boxes, y.boxes)
        assert torch.equal(x.flipped, y.flipped)
        assert all(torch.equal(p, q) for p, q in zip(x.images, y.images, strict=True))


def test_neither_workers_nor_place_matter() -> None:
    reference = batches("workers", 0)
    for where, workers in (("workers", 2), ("workers", 1), ("device", 0), ("device", 2)):
        assert_same(batches(where, workers), reference)  # type: ignore[arg-type]
    crops = reference[0]
    assert [tuple(view.shape) for view in crops.images[1:3]] == [(4, 3, 16, 16), (4, 3, 8, 8)]
    assert all(view.dtype == torch.uint8 and view.is_contiguous() for view in crops.images)
    other = crop_batches(Pictures(), TRANSFORM, stream(), seed=6)
    assert not torch.equal(next(iter(other)).boxes, crops.boxes)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("gathered", [1, 1 << 24])
def test_the_canvas(same: bool, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How images are laid side by side on an accelerator."""
    monkeypatch.setattr(resident, "_GATHERED", gathered)
    source = Pictures(same=same)
    images = ResidentImages(source)
    assert images.nbytes == 3 * int(images.sizes.prod(dim=1).sum())
    picked = torch.tensor([7, 0, 3, 7])
    canvas = images.canvas(picked)
    assert canvas.shape[1:3] == tuple(images.sizes[picked].amax(dim=0))
    for row, index in zip(canvas, picked.tolist(), strict=True):
        height, width = images.sizes[index].tolist()
        assert torch.equal(row[:height, :width].permute(2, 0, 1), images.image(index))
        assert (width, height) == source[index][0].size
        beyond = row[height - 1 :, width - 1 :]
        assert torch.equal(beyond, row[height - 1, width - 1].expand_as(beyond))


@pytest.mark.parametrize("same", [False, True])
def test_the_devices_way_is_the_workers(same: bool) -> None:
    images, keys = ResidentImages(Pictures(same=same)), torch.arange(12)
    # Solarisation turns a difference of one level into one of 255.
    plain = [v for v in range(4) if v != 1]
    cpu = images.crops(TRANSFORM, keys, keys)
    device = TRANSFORM.cut_resident(images.canvas(keys), images.sizes, keys)
    assert torch.equal(cpu.boxes, device.boxes)
    for v in plain:
        off = (cpu.images[v].int() - device.images[v].int()).abs().float()
        assert float(off.mean()) < 0.3
        assert float((off > 3).float().mean()) < 0.005


def test_more_than_the_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"12 images, 24 x 30 pixels each, take about 25\.9 kB"):
        ResidentImages(Pictures(same=True), limit=20_000)
    assert ResidentImages(Pictures(same=True), limit=25_920).nbytes == 25_920
    with pytest.raises(ValueError, match="at least one image"):
        ResidentImages(Pictures(count=0))


def test_an_estimate_that_was_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_SAMPLE", 1)  # the first image, the smallest but one
    monkeypatch.setattr(resident, "_BATCH", 2)
    images = ResidentImages(Pictures(count=12))
    for index, (image, _) in enumerate(Pictures(count=12)[i] for i in range(12)):
        assert torch.equal(images.image(index), resident.as_pixels(image))
    with pytest.raises(ValueError, match="12 images, 40 x 20 pixels each"):
        ResidentImages(Pictures(count=12), limit=30_000)


def test_free_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "free_memory", lambda device: 30_000)
    with pytest.raises(ValueError, match=r"more than the 15\.0 kB .* on cpu; 30\.0 kB are free"):
        ResidentImages(Pictures(same=True))


@pytest.mark.parametrize("where", ["workers", "device"])
def test_a_worker_that_dies(where: Literal["workers", "device"]) -> None:
    source = Pictures(count=200, fatal=101)
    with pytest.raises(LoaderError, match=r"worker died \(.*pid.*--workers \(now 2\).*shm"):
        for _ in crop_batches(
            source, TRANSFORM, BatchStream(200, 50, start=0, stop=4, seed=0), seed=0,
            where=where, workers=2,
        ):  # fmt: skip
            pass


class Interrupted(Pictures):
    """Ctrl-C, which goes to the workers too, comes while they decode."""

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if torch.utils.data.get_worker_info():
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


def test_the_main_process_decides_when_workers_end() -> None:
    assert len(ResidentImages(Interrupted(), workers=1)) == 12


class Broken(Pictures):
    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise RuntimeError(f"no image {index}")


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_stay_what_they_are(workers: int) -> None:
    with pytest.raises(RuntimeError, match="no image") as caught:
        list(crop_batches(Broken(), TRANSFORM, stream(), seed=0, workers=workers))
    assert not isinstance(caught.value, LoaderError)


def test_an_unknown_place() -> None:
    with pytest.raises(ValueError, match='must be "workers" or "device"'):
        crop_batches(Pictures(), TRANSFORM, stream(), seed=0, where="gpu")  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("where", ["workers", "device"])
def test_on_cuda(where: Literal["workers", "device"]) -> None:
    def steady(x: Tensor) -> Tensor:
        return x.cpu().float().mean(dim=(1, 2, 3))

    loaded = list(
        crop_batches(Pictures(), TRANSFORM, stream(), seed=5, where=where, workers=1, device="cuda")
    )
    for a, b in zip(loaded, batches("workers", 0), strict=True):
        assert torch.equal(a.boxes.cpu(), b.boxes)
        assert a.images[0].is_cuda == (where == "device")
        assert where == "device" or a.images[0].is_pinned()
        torch.testing.assert_close(steady(a.images[0]), steady(b.images[0]), atol=1.0, rtol=0)
