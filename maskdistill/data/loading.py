"""Batches of crops that depend on the seed, the epoch and the image alone, never on the workers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from maskdistill.data.augment import Crops, MultiCrop, collate_crops


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that differs wherever any part differs.

    >>> derive_seed(0, "masks", 1) == derive_seed(0, "masks", 1) != derive_seed(0, "masks", 2)
    True
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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
        epoch, index = item
        image, _ = self.images[index]
        # torchvision draws from the global generator: lend it a state of our own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "crops", epoch, index))
            return self.transform(image)


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
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_crops,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if workers else None,
    )


def _one_thread(worker: int) -> None:
    # Workers that each use all cores for one small image only get in each other's way.
    torch.set_num_threads(1)
