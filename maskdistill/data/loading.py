"""Batches of crops that depend on the seed, the epoch and the image alone, never on the workers.

`crop_batches` is the one door: `BatchStream` says which images, `CropDataset` cuts them in loader
workers, and `ResidentImages` on the device that holds their pixels.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from maskdistill.data.crops import (
    Crops,
    MultiCrop,
    as_pixels,
    derive_seed,
    image_keys,
    to_device,
)
from maskdistill.data.writing import progress

__all__ = [
    "BatchStream",
    "CropDataset",
    "DoesNotFitError",
    "LoaderError",
    "ResidentImages",
    "crop_batches",
    "crop_loader",
    "derive_seed",
    "steps_per_epoch",
]


def crop_batches(
    images: Dataset[tuple[Image.Image, int]] | ResidentImages,
    transform: MultiCrop,
    stream: BatchStream,
    *,
    seed: int,
    where: Literal["workers", "device"] = "workers",
    workers: int = 0,
    device: torch.device | str = "cpu",
) -> Iterable[Crops]:
    """Yield the crops of each batch of a stream, cut on the CPU or on the device.

    >>> from maskdistill.data import Scenes
    >>> stream = BatchStream(10, 4, start=0, stop=2, seed=0)
    >>> batches = crop_batches(Scenes(10, 48), MultiCrop(32, 16, 2), stream, seed=0)
    >>> [tuple(batch.images[0].shape) for batch in batches]
    [(4, 3, 32, 32), (4, 3, 32, 32)]

    Args:
        images: of ``(RGB image, label)`` pairs, or those already resident on the device.
        transform: the multi-crop augmentation.
        stream: which images, batch by batch.
        seed: of the run.
        where: ``"workers"`` decodes and cuts in loader processes. ``"device"`` decodes all images
            once, in the beginning, keeps them in the device's memory, and cuts them there.
        workers: loader processes; 0 works in this one. With ``"device"``, those that decode.
        device: where training runs.

    Returns:
        uint8 crops: in pinned CPU memory if the device is CUDA, or on the device if they are cut
        there. What they show depends on the seed, the epoch and the image; never on ``workers``.

    Raises:
        ValueError: ``where`` is unknown, or the images do not fit the device's memory.
        LoaderError: while iterating, if a worker died.
    """
    device = torch.device(device)
    if where not in ("workers", "device"):
        raise ValueError(f'where must be "workers" or "device", not {where!r}.')
    if isinstance(images, ResidentImages):
        return _from_memory(images, transform, stream, seed)
    if where == "device":
        with deaths_explained(workers):
            resident = ResidentImages(images, device, workers=workers)
        return _from_memory(resident, transform, stream, seed)
    dataset = CropDataset(images, transform, seed)
    pinned = device.type == "cuda"
    return _from_workers(crop_loader(dataset, stream, workers=workers, pin_memory=pinned), workers)


def _from_memory(
    images: ResidentImages, transform: MultiCrop, stream: BatchStream, seed: int
) -> Iterator[Crops]:
    for items in stream:
        epochs, indices = torch.tensor(items).unbind(dim=1)
        yield images.crops(transform, indices, image_keys(seed, epochs, indices))


def _from_workers(loader: DataLoader[Any], workers: int) -> Iterator[Crops]:
    batches = iter(loader)
    try:
        with deaths_explained(workers):
            yield from batches
    finally:
        if workers:  # left to the garbage collector, it waits five seconds for each after an error
            batches._shutdown_workers()  # type: ignore[attr-defined]


# --- which images


class BatchStream(Sampler[list[tuple[int, int]]]):
    """Yields batches of (epoch, index) for a range of steps, over epochs without a pause.

    Each epoch is a new permutation; what does not fill a batch is left for the next epoch. A step's
    batch depends on seed, step and rank alone, so a resumed run sees the same data.

    Args:
        images: number of images.
        batch_size: per process.
        start: first step.
        stop: step after the last.
        seed: of the run.
        rank: of this process.
        world: number of processes.

    Raises:
        ValueError: fewer images than one step takes.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        *,
        start: int,
        stop: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(images, batch_size, world)
        self.images, self.batch_size = images, batch_size
        self.start, self.stop, self.seed = start, stop, seed
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield one batch per step."""
        order, of_epoch = torch.empty(0, dtype=torch.long), -1
        for step in range(self.start, self.stop):
            epoch, i = divmod(step, self.steps_per_epoch)
            if epoch != of_epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
                order, of_epoch = torch.randperm(self.images, generator=generator), epoch
            first = (i * self.world + self.rank) * self.batch_size
            yield [(epoch, int(j)) for j in order[first : first + self.batch_size]]

    def __len__(self) -> int:
        return self.stop - self.start


def steps_per_epoch(images: int, batch_size: int, world: int = 1) -> int:
    """Return the full batches in an epoch.

    Raises:
        ValueError: there is not even one.
    """
    steps = images // (batch_size * world)
    if steps < 1:
        raise ValueError(
            f"{images} images do not fill one step of {batch_size} x {world} images; "
            "choose a smaller batch size."
        )
    return steps


# --- cut in loader workers


class CropDataset(Dataset[Crops]):
    """Images to crops; the item ``(epoch, index)`` is always the same crops.

    Args:
        images: of ``(RGB image, label)`` pairs; labels are ignored.
        transform: the multi-crop augmentation.
        seed: of the run.
    """

    def __init__(
        self, images: Dataset[tuple[Image.Image, int]], transform: MultiCrop, seed: int
    ) -> None:
        self.images = images
        self.transform = transform
        self.seed = seed

    def __getitem__(self, item: tuple[int, int]) -> Crops:
        """Return the crops of image ``index`` in ``epoch``."""
        return self.__getitems__([item])[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> list[Crops]:
        """Return the crops of several images, for a loader with a collate function of its own."""
        batch = self.batch(items)
        rows = zip(zip(*batch.images, strict=True), batch.boxes, batch.flipped, strict=True)
        return [Crops(list(views), boxes, flipped) for views, boxes, flipped in rows]

    def batch(self, items: list[tuple[int, int]]) -> Crops:
        """Return the crops of several images, stacked view by view.

        Args:
            items: ``(epoch, index)`` of each image.
        """
        epochs, indices = torch.tensor(items).unbind(dim=1)
        images = [_image(self.images[index], index) for _, index in items]
        return self.transform.cut(images, image_keys(self.seed, epochs, indices))


def _image(item: Any, index: int) -> Image.Image:
    """Return the image of an item, refusing what a data set of tensors or without labels gives."""
    if not isinstance(item, (tuple, list)) or not item or not isinstance(item[0], Image.Image):
        raise TypeError(
            f"the data set must give (image, label) pairs with a PIL image; item {index} is "
            f"{_described(item)}. Wrap it in a Dataset whose items are such pairs."
        )
    return item[0]


def _described(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"({', '.join(type(part).__name__ for part in item)})"
    return f"of type {type(item).__name__}"


def crop_loader(
    dataset: CropDataset, batches: BatchStream, *, workers: int, pin_memory: bool = False
) -> DataLoader[Any]:
    """Return a loader of ``Crops`` batches; the result does not depend on the workers."""
    return DataLoader(
        _Batches(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=unchanged,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker,
    )


class _Batches(Dataset[Crops]):
    """A data set whose loader gets each batch whole: cut together, never taken apart."""

    def __init__(self, crops: CropDataset) -> None:
        self.crops = crops

    def __getitems__(self, items: list[tuple[int, int]]) -> Crops:
        return self.crops.batch(items)


def unchanged(batch: Any) -> Any:
    """Collate nothing: by default a loader turns tuples into lists and arrays into tensors."""
    return batch


# --- cut on the device that holds their pixels

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
        progress_bar: show how far decoding is, on a terminal.

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
            worker_init_fn=prepare_worker,
        )
        bar = progress(loader, len(loader), "decoding", "batch") if progress_bar else loader
        sizes, used = [], 0
        for pixels, shapes in bar:
            self._make_room(used + len(pixels), f"{count:,} images, {like}")
            self._pixels[used : used + len(pixels)] = pixels
            used += len(pixels)
            sizes.append(shapes)
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
            keys: ``(B,)`` int64 on the CPU, from `maskdistill.data.crops.image_keys`.

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
            return stacked.index_select(0, to_device(indices, self.device))
        sizes = self.sizes[indices]
        height, width = sizes.amax(dim=0).tolist()
        y, x = (torch.arange(n, device=self.device) for n in (height, width))
        canvas = self._pixels.new_empty(len(indices), height, width, 3)
        chunk = max(1, _GATHERED // (height * width))
        for start in range(0, len(indices), chunk):
            some = slice(start, start + chunk)
            layout = torch.cat([self._first[indices[some], None], sizes[some]], dim=1)
            first, h, w = to_device(layout, self.device).T
            rows = first[:, None] + torch.minimum(y, h[:, None] - 1) * w[:, None]
            places = rows[:, :, None] + torch.minimum(x, w[:, None] - 1)[:, None]
            canvas[some] = self._pixels.index_select(0, places.flatten()).view(canvas[some].shape)
        return canvas

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


# --- workers


class LoaderError(RuntimeError):
    """A loader worker died: killed by the system, most often for memory."""


@contextlib.contextmanager
def deaths_explained(workers: int) -> Iterator[None]:
    """Turn torch's error about a loader worker that died, inside, into a `LoaderError`."""
    try:
        yield
    except RuntimeError as error:
        # An error of the data set's own comes as itself, with "DataLoader worker process" in it.
        if not re.search(r"DataLoader worker \(pid", str(error)):
            raise
        raise LoaderError(
            f"a loader worker died ({str(error).split('. ')[0].strip()}). Mostly the memory ran "
            f"out: lower --workers (now {workers}) or the batch size. A bus error means that "
            "/dev/shm is too small: in a container, give it more (docker run --shm-size)."
        ) from error


GRACE = 60.0
"""Seconds that a worker goes on after SIGTERM."""


def prepare_worker(worker: int) -> None:
    """Set a loader's worker up; its ``worker_init_fn``.

    Ctrl-C goes to all processes in the terminal, ``torchrun`` passes SIGTERM on to the group of
    each process, and a scheduler may signal every process of a job. The main process, which
    finishes its step and saves, needs its workers until then. So only SIGTERM ends one, and not
    before ``GRACE``, since nobody can tell who sent it: a loader sends it to workers that hang.
    """
    # Workers that each use all cores for one small image only get in each other's way.
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # A handler in Python waits for the main thread, which may hang; its wake-up call does not.
    signal.signal(signal.SIGTERM, _note)
    heard, call = os.pipe()
    os.set_blocking(call, False)
    signal.set_wakeup_fd(call, warn_on_full_buffer=False)
    threading.Thread(target=_end_after_grace, args=(heard,), daemon=True).start()


def _note(number: int, frame: object) -> None:
    """Do nothing: the thread has heard it."""


def _end_after_grace(heard: int) -> None:
    os.read(heard, 1)
    time.sleep(GRACE)
    os._exit(0)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
