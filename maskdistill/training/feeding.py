"""Where a run's crops come from: loader workers, the device's own memory, or shards that stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from maskdistill.data.augment import Crops, MultiCrop
from maskdistill.data.loading import BatchStream, crop_batches, deaths_explained, steps_per_epoch
from maskdistill.data.resident import DoesNotFitError, ResidentImages
from maskdistill.data.shards import Shards
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Processes


class Feed:
    """Hands out the crops of each step of a run, from any step on.

    Args:
        images: a data set of ``(RGB image, label)`` pairs, or ``Shards``.
        config: of the run; ``config.views`` says where crops are cut.
        processes: of the run.

    Attributes:
        count: images in the data.
        steps_per_epoch: of this process, full batches alone.

    Raises:
        ValueError: fewer images than one step takes, or shards whose crops are to be cut on the
            device.
    """

    def __init__(self, images: Any, config: TrainingConfig, processes: Processes) -> None:
        self.images, self.config, self.processes = images, config, processes
        self.count = len(images)
        self._resident: ResidentImages | None = None
        if isinstance(images, Shards):
            if config.views == "device":
                raise ValueError(
                    "shards stream, so their crops cannot be cut out of the device's memory; leave "
                    "out --views device."
                )
            self.steps_per_epoch = self._shard_stream(0, 1).steps_per_epoch
        else:
            self.steps_per_epoch = steps_per_epoch(self.count, config.batch_size, processes.world)

    @property
    def workers(self) -> int:
        """Loader processes: as set, else all cores but one, shared by the processes here."""
        if self.config.workers is not None:
            return self.config.workers
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(max((os.cpu_count() or 1) // here - 1, 0), 8)

    def batches(self, transform: MultiCrop, start: int, stop: int) -> Iterator[Crops]:
        """Yield the crops of the steps from ``start`` up to but without ``stop``.

        Raises:
            LoaderError: while iterating: a worker died.
        """
        device = self.processes.device
        if isinstance(self.images, Shards):
            return self._from_shards(transform, start, stop)
        stream = BatchStream(
            self.count,
            self.config.batch_size,
            start=start,
            stop=stop,
            seed=self.config.seed,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        return iter(
            crop_batches(
                self._resident_images() or self.images,
                transform,
                stream,
                seed=self.config.seed,
                workers=self.workers,
                device=device,
            )
        )

    def _resident_images(self) -> ResidentImages | None:
        """Decode the images into the device's memory, if that is wanted and they fit."""
        views, device = self.config.views, self.processes.device
        if views == "workers" or (views == "auto" and device.type != "cuda"):
            return None
        if self._resident is None:
            try:
                with deaths_explained(self.workers):
                    self._resident = ResidentImages(
                        self.images,
                        device,
                        workers=self.workers,
                        progress_bar=self.processes.is_main,
                    )
            except DoesNotFitError:
                if views == "device":
                    raise
        return self._resident

    def _shard_stream(self, start: int, stop: int) -> Any:
        return self.images.stream(
            self.config.batch_size,
            start=start,
            stop=stop,
            seed=self.config.seed,
            rank=self.processes.rank,
            world=self.processes.world,
        )

    def _from_shards(self, transform: MultiCrop, start: int, stop: int) -> Iterator[Crops]:
        from maskdistill.data.streaming import CutCrops

        stream = self._shard_stream(start, stop)
        stream.transform = CutCrops(transform, self.config.seed)
        pinned = self.processes.device.type == "cuda"
        with deaths_explained(self.workers):
            yield from stream.loader(workers=self.workers, pin_memory=pinned)


def moved(crops: Crops, device: torch.device) -> Crops:
    """Return crops on a device; those that lie there already stay."""
    images, boxes, flipped = crops
    return Crops(
        [image.to(device, non_blocking=True) for image in images],
        boxes.to(device, non_blocking=True),
        flipped.to(device, non_blocking=True),
    )
