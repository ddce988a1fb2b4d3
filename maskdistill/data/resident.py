"""A data set decoded once into memory, on the CPU or on an accelerator, and cut there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskdistill.data.augment import Crops, MultiCrop, as_pixels
from maskdistill.data.workers import prepare_worker

_SAMPLE = 64  # images looked at to estimate the size of all
_BATCH = 64  # images decoded together
_GATHERED = 1 << 24  # pixels whose places are computed at once


class DoesNotFitError(ValueError):
    """A data set is too large for the memory that it may take."""


class ResidentImages:
    """The pixels of a whole data set in one device's memory, 3 bytes each.

    >>> from maskdistill.data import Scenes
    >>> images = ResidentImages(Scenes(10, size=48))
    >>> len(images), images.nbytes
    (10, 69120)
    >>> crops = images.crops(MultiCrop(32, 16, 2), torch.tensor([4, 7]), torch.tensor([1, 2]))
    >>> [tuple(view.shape) for view in crops.images]
    [(2, 3, 32, 32), (2, 3, 32, 32), (2, 3, 16, 16), (2, 3, 16, 16)]

    Images may differ in size: they lie end to end, without padding. On a CPU the crops are bit by
    bit those that loader workers cut; elsewhere they are the same to about two grey levels.

    Args:
        images: of ``(RGB image, label)`` pairs; labels are ignored. Each is decoded once.
        device: where to keep and to cut them.
        workers: loader processes that decode; 0 decodes in this one.
        limit: bytes that the pixels may take; None is half of what is free now.
        progress_bar: show how far decoding is, if it takes longer than two seconds.

    Attributes:
        sizes: ``(N, 2)`` int64 on the CPU: height and width of each image.
        device: as given.

    Raises:
        ValueError: there are no images.
        DoesNotFitError: they do not fit; a ValueError.
    """

    def __init__(
        self,
        images: Dataset[tuple[Image.Image, int]],
        device: torch.device | str = "cpu",
        *,
        workers: int = 0,
        limit: int | None = None,
        progress_bar: bool = True,
    ) -> None:
        from tqdm import tqdm

        count = len(images)  # type: ignore[arg-type]
        if count < 1:
            raise ValueError("ResidentImages needs at least one image; this data set is empty.")
        self.device = torch.device(device)
        self._free = free_memory(self.device)
        if limit is None and self._free is not None:
            limit = self._free // 2
        self._limit = limit
        estimate, like = _estimate(images, count)
        self._check(estimate, f"{count:,} images, {like}")
        self._pixels = torch.empty(estimate // 3, 3, dtype=torch.uint8, device=self.device)
        loader: DataLoader[Any] = DataLoader(
            _Decoded(images),
            _BATCH,
            num_workers=workers,
            collate_fn=_end_to_end,
            worker_init_fn=prepare_worker if workers else None,
        )
        sizes, used = [], 0
        with tqdm(
            total=count, unit="image", desc="decoding", delay=2, disable=not progress_bar
        ) as bar:
            for pixels, shapes in loader:
                self._make_room(used + len(pixels), f"{count:,} images, {like}")
                self._pixels[used : used + len(pixels)] = pixels
                used += len(pixels)
                sizes.append(shapes)
                bar.update(len(shapes))
        self.sizes = torch.cat(sizes)
        self._pixels = self._pixels[:used]
        areas = self.sizes.prod(dim=1)
        self._first = areas.cumsum(0) - areas
        self._alike = bool((self.sizes == self.sizes[0]).all())

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes that the pixels take."""
        return self._pixels.numel()

    def crops(self, transform: MultiCrop, indices: Tensor, keys: Tensor) -> Crops:
        """Cut the crops of some images, on the device.

        Args:
            transform: the multi-crop augmentation.
            indices: ``(B,)`` int64 on the CPU: which images.
            keys: ``(B,)`` int64 on the CPU, from `maskdistill.data.draws.image_keys`.

        Returns:
            Crops of B images, all tensors on the device.
        """
        if self.device.type == "cpu":
            return transform.cut([self.image(index) for index in indices.tolist()], keys)
        return transform.cut_resident(self.canvas(indices), self.sizes[indices], keys)

    def image(self, index: int) -> Tensor:
        """Return one image, ``(3, H, W)`` uint8: a view of the memory, not a copy."""
        height, width = self.sizes[index].tolist()
        first = int(self._first[index])
        pixels = self._pixels[first : first + height * width]
        return pixels.view(height, width, 3).permute(2, 0, 1)

    def canvas(self, indices: Tensor) -> Tensor:
        """Copy some images side by side.

        Args:
            indices: ``(B,)`` int64 on the CPU.

        Returns:
            ``(B, H, W, 3)`` uint8 on the device, as large as the largest of them. Smaller ones lie
            in the upper left corner; their edges are continued to the right and downwards.
        """
        if self._alike:
            height, width = self.sizes[0].tolist()
            stacked = self._pixels.view(-1, height, width, 3)
            return stacked.index_select(0, self._moved(indices))
        sizes = self.sizes[indices]
        height, width = sizes.amax(dim=0).tolist()
        y, x = (torch.arange(n, device=self.device) for n in (height, width))
        canvas = self._pixels.new_empty(len(indices), height, width, 3)
        chunk = max(1, _GATHERED // (height * width))
        for start in range(0, len(indices), chunk):
            some = slice(start, start + chunk)
            first, h, w = self._moved(
                torch.cat([self._first[indices[some], None], sizes[some]], 1)
            ).T
            rows = first[:, None] + torch.minimum(y, h[:, None] - 1) * w[:, None]
            places = rows[:, :, None] + torch.minimum(x, w[:, None] - 1)[:, None]
            canvas[some] = self._pixels.index_select(0, places.flatten()).view(canvas[some].shape)
        return canvas

    def _moved(self, values: Tensor) -> Tensor:
        pinned = values.pin_memory() if self.device.type == "cuda" else values
        return pinned.to(self.device, non_blocking=True)

    def _make_room(self, pixels: int, what: str) -> None:
        if pixels <= len(self._pixels):
            return
        # The estimate was too low. Old and new lie side by side while one is copied.
        wanted = max(pixels, len(self._pixels) * 5 // 4)
        self._check(3 * (wanted + len(self._pixels)), what)
        larger = self._pixels.new_empty(wanted, 3)
        larger[: len(self._pixels)] = self._pixels
        self._pixels = larger

    def _check(self, wanted: int, what: str) -> None:
        if self._limit is None or wanted <= self._limit:
            return
        free = "" if self._free is None else f"; {_size(self._free)} are free"
        raise DoesNotFitError(
            f"{what}, take about {_size(wanted)} when decoded, more than the "
            f"{_size(self._limit)} that they may have on {self.device}{free}. Let loader workers "
            "cut the crops (--views workers), or use smaller images."
        )


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a device now, or None where nobody tells.

    >>> free_memory(torch.device("meta")) is None
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    if device.type == "cpu" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _estimate(images: Dataset[tuple[Image.Image, int]], count: int) -> tuple[int, str]:
    """Return the bytes that all images will take, and what they are like, from some of them."""
    rows = torch.linspace(0, count - 1, min(count, _SAMPLE)).round().long().tolist()
    sizes = torch.tensor([as_pixels(images[row][0]).shape[1:] for row in rows])
    height, width = sizes.float().mean(dim=0).round().int().tolist()
    alike = bool((sizes == sizes[0]).all())
    area = float(sizes.prod(dim=1).double().mean())
    # A little more than the mean of the sample, so that it need not grow.
    margin = 1.0 if alike or len(rows) == count else 1.1
    about = f"{height} x {width} pixels each" + ("" if alike else " on average")
    return 3 * round(area * count * margin), about


class _Decoded(Dataset[Tensor]):
    """The pixels of each image, ``(H, W, 3)``."""

    def __init__(self, images: Dataset[tuple[Image.Image, int]]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        return as_pixels(self.images[index][0]).permute(1, 2, 0)


def _end_to_end(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    pixels = torch.cat([image.reshape(-1, 3) for image in images])
    return pixels, torch.tensor([image.shape[:2] for image in images])


def _size(count: float) -> str:
    """Write bytes for people: 1.5 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    step = min(int(math.log10(max(count, 1)) / 3), len(units) - 1)
    return f"{count / 1000**step:.{min(step, 1)}f} {units[step]}"
