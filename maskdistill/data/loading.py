"""Batches of crops that depend on the seed, the epoch and the image alone, never on the workers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from maskdistill.data.augment import Crops, MultiCrop
from maskdistill.data.draws import derive_seed, image_keys
from maskdistill.data.resident import ResidentImages
from maskdistill.data.workers import prepare_worker

__all__ = [
    "BatchStream",
    "CropDataset",
    "LoaderError",
    "crop_batches",
    "crop_loader",
    "derive_seed",
    "steps_per_epoch",
]


class LoaderError(RuntimeError):
    """A loader worker died: killed by the system, most often for memory."""


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


def crop_loader(
    dataset: CropDataset, batches: BatchStream, *, workers: int, pin_memory: bool = False
) -> DataLoader[Any]:
    """Return a loader of ``Crops`` batches; the result does not depend on the workers."""
    return DataLoader(
        _Batches(dataset),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=prepare_worker if workers else None,
    )


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
    while True:
        with deaths_explained(workers):
            crops = next(batches, None)
        if crops is None:
            return
        yield crops


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


class _Batches(Dataset[Crops]):
    """A data set whose loader gets each batch whole: cut together, never taken apart."""

    def __init__(self, crops: CropDataset) -> None:
        self.crops = crops

    def __getitems__(self, items: list[tuple[int, int]]) -> Crops:
        return self.crops.batch(items)


def _as_it_is(batch: Any) -> Any:
    return batch
