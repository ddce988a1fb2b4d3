"""Where a run's crops come from: loader workers, the device's own memory, or shards that stream."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch

from maskdistill.data.augment import Crops, MultiCrop
from maskdistill.data.gathering import cores
from maskdistill.data.loading import BatchStream, crop_batches, deaths_explained, steps_per_epoch
from maskdistill.data.resident import DoesNotFitError, ResidentImages, free_memory
from maskdistill.data.shards import Shards
from maskdistill.training.agreement import Agreement
from maskdistill.training.config import TrainingConfig
from maskdistill.training.distributed import Processes

_SHARE = 0.25
"""Of the memory that is free before the first step, when neither activations nor the optimiser's
moments are there yet: what images may take that nobody asked to have on the device."""


class Feed:
    """Hands out the crops of each step of a run, from any step on.

    Args:
        images: a data set of ``(RGB image, label)`` pairs, or ``Shards``.
        config: of the run; ``config.views`` says where crops are cut.
        processes: of the run.
        agreement: among the processes.

    Attributes:
        count: images in the data.
        steps_per_epoch: of this process, full batches alone.

    Raises:
        ValueError: fewer images than one step takes, or shards whose crops are to be cut on the
            device.
    """

    def __init__(
        self, images: Any, config: TrainingConfig, processes: Processes, agreement: Agreement
    ) -> None:
        self.images, self.config, self.processes = images, config, processes
        self._agreement = agreement
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
        """Loader processes: as set, else all cores it may use but one, shared out here."""
        if self.config.workers is not None:
            return self.config.workers
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(max(cores() // here - 1, 0), 8)

    def batches(self, transform: MultiCrop, start: int, stop: int) -> Iterator[Crops]:
        """Yield the crops of the steps from ``start`` up to but without ``stop``.

        Nothing is read before the first step is asked for, which all processes must do alike.

        Raises:
            LoaderError: while iterating: a worker died.
            DoesNotFitError: while iterating: the device has no room for ``views="device"``.
        """
        if isinstance(self.images, Shards):
            return self._from_shards(transform, start, stop)
        return self._from_images(transform, start, stop)

    def _from_images(self, transform: MultiCrop, start: int, stop: int) -> Iterator[Crops]:
        if start >= stop:  # nothing is decoded for a run that is finished
            return
        stream = BatchStream(
            self.count,
            self.config.batch_size,
            start=start,
            stop=stop,
            seed=self.config.seed,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        yield from crop_batches(
            self._resident_images() or self.images,
            transform,
            stream,
            seed=self.config.seed,
            workers=self.workers,
            device=self.processes.device,
        )

    def _resident_images(self) -> ResidentImages | None:
        """Decode the images into the device's memory, if that is wanted and they fit."""
        views, device = self.config.views, self.processes.device
        if views == "workers" or (views == "auto" and device.type != "cuda"):
            return None
        if self._resident is None:
            limit = self._careful_limit() if views == "auto" else None
            try:
                with deaths_explained(self.workers):
                    self._resident = ResidentImages(
                        self.images,
                        device,
                        workers=self.workers,
                        limit=limit,
                        progress_bar=self.processes.is_main,
                    )
            except DoesNotFitError:
                if views == "device":
                    raise
        return self._resident

    def _careful_limit(self) -> int:
        """Return how many bytes images may take by themselves: on the fullest device, for all.

        Crops cut on a CPU differ by a grey level or two, so no process cuts alone there.
        """
        free = self._agreement.gather([free_memory(self.processes.device) or 0])
        return int(min(theirs for (theirs,) in free) * _SHARE)

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
