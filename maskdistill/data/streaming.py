"""Training batches from shards, in an order that depends on nothing but seed, step and ranks.

    stream = open_shards("imagenet-shards").stream(64, start=0, stop=1000, seed=0, rank=0, world=8)
    for batch in stream.loader(workers=4):
        for epoch, number, image, label in batch: ...

How the order comes about. In each epoch the shards are put in a random order and laid end to end.
That line of images is cut into world x streams equal parts. Each logical stream reads its part from
front to back through a shuffle buffer; batch t comes from stream t mod streams. The parts need no
more than the index to be known, so a resumed run opens only the shards that it still needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maskdistill.data.augment import Crops, MultiCrop
from maskdistill.data.damage import Damage, DamagedDataError
from maskdistill.data.draws import image_keys
from maskdistill.data.formats.listing import DamagedImageError, decode
from maskdistill.data.loading import derive_seed
from maskdistill.data.shards import EncodedImage, Shards, place, read_shard
from maskdistill.data.workers import prepare_worker

__all__ = ["CutCrops", "ShardSample", "ShardStream"]

_LOST = "it is not in its shard, which is damaged or ends early"


class ShardSample(NamedTuple):
    """One image of a batch.

    Attributes:
        epoch: in which it comes.
        number: its position among all images of the shards; (seed, epoch, number) decides its
            crops.
        image: RGB. Where it is damaged, that of the next readable image of the batch.
        label: of `image`; -1 in shards without classes.
    """

    epoch: int
    number: int
    image: Image.Image
    label: int


@dataclass(frozen=True)
class CutCrops:
    """Cuts the crops of a batch of samples: what `ShardStream.transform` is for in training.

    Example:
        >>> stream.transform = CutCrops(MultiCrop(224, 96), seed=0)  # doctest: +SKIP
        >>> [tuple(c.shape) for c in next(iter(stream)).images[::2]]  # doctest: +SKIP
        [(64, 3, 224, 224), (64, 3, 96, 96), ...]

    Args:
        transform: the multi-crop augmentation.
        seed: of the run.
    """

    transform: MultiCrop
    seed: int

    def __call__(self, batch: list[ShardSample]) -> Crops:
        """Return the crops, stacked view by view."""
        epochs = torch.tensor([sample.epoch for sample in batch])
        numbers = torch.tensor([sample.number for sample in batch])
        keys = image_keys(self.seed, epochs, numbers)
        return self.transform.cut([sample.image for sample in batch], keys)


class _Segment(NamedTuple):
    """Images `first` to `stop` of a shard."""

    shard: int
    first: int
    stop: int


class ShardStream(IterableDataset[Any]):
    """Yields one batch per step for a range of steps, as `BatchStream` does for data at hand.

    Example:
        >>> stream = shards.stream(64, start=0, stop=100, seed=0)  # doctest: +SKIP
        >>> batch = next(iter(stream))  # doctest: +SKIP
        >>> len(batch), batch[0].image.mode  # doctest: +SKIP
        (64, 'RGB')

    A step's batch depends on the shards' index, seed, step, batch size, streams, buffer, rank and
    world alone: not on the number of workers, nor on where a run was interrupted. In an epoch no
    image comes twice, on any rank; fewer than world x streams x (batch size + 1) images are left
    out, other ones each time. Two neighbouring parts may share a shard, of which each reads its
    own images.

    At most `buffer` encoded images are held per stream, so streams x buffer of them per process.

    Args:
        shards: of one split.
        batch_size: per process.
        start: first step.
        stop: step after the last.
        seed: of the run.
        rank: of this process.
        world: number of processes.
        streams: logical streams per process; the workers must divide them.
        buffer: images of a stream among which the next one is drawn; 1 keeps the shards' order.

    Attributes:
        steps_per_epoch: batches in an epoch, per process.
        transform: set it to a function of a batch, such as one that cuts crops; it is applied in
            the workers, and what it returns is yielded.

    Raises:
        ValueError: there are fewer images than fill one batch of every stream.
        ShardError: while iterating: a shard is missing or cannot be read.
        DamagedDataError: while iterating: more than `shards.max_damaged` images are damaged.
    """

    transform: Callable[[list[ShardSample]], Any] | None = None

    def __init__(
        self,
        shards: Shards,
        batch_size: int,
        *,
        start: int,
        stop: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        streams: int = 8,
        buffer: int = 256,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("streams", streams), ("buffer", buffer)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if not 0 <= rank < world:
            raise ValueError(f"rank must lie between 0 and world - 1 = {world - 1}, not {rank}.")
        self._slots = world * streams
        self._batches = len(shards) // self._slots // batch_size
        if self._batches < 1:
            raise ValueError(
                f"{len(shards):,} images do not fill one batch of {batch_size} in each of "
                f"{streams} streams of {world} processes; choose fewer streams or a smaller batch."
            )
        self.steps_per_epoch = self._batches * streams
        self.shards, self.batch_size = shards, batch_size
        self.start, self.stop, self.seed = start, stop, seed
        self.rank, self.world = rank, world
        self.streams, self.buffer = streams, buffer
        self._starts = shards.counts.cumsum() - shards.counts
        self._damage = Damage(len(shards), shards.max_damaged)

    def __len__(self) -> int:
        """Count the steps."""
        return self.stop - self.start

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches; in a worker, those that are its turn."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self.streams % workers:
            raise ValueError(
                f"{workers} workers do not divide {self.streams} streams; "
                f"take {self.workers(workers)}."
            )
        at_work: dict[int, Iterator[list[ShardSample]]] = {}
        # The loader asks its workers in turn, beginning with the first at the first step.
        for step in range(self.start + worker, self.stop, workers):
            stream = step % self.streams
            if stream not in at_work:
                at_work[stream] = self._read(stream, step)
            batch = next(at_work[stream])
            yield batch if self.transform is None else self.transform(batch)

    def workers(self, wanted: int) -> int:
        """Return the largest number of workers, of at most so many, that divides the streams.

        Example:
            >>> shards.stream(64, start=0, stop=9, seed=0).workers(6)  # doctest: +SKIP
            4
        """
        return max((n for n in range(1, wanted + 1) if self.streams % n == 0), default=0)

    def loader(self, *, workers: int = 0, pin_memory: bool = False) -> DataLoader[Any]:
        """Return a loader of the batches; what it gives does not depend on the workers.

        Args:
            workers: processes; lowered to a number that divides the streams.
            pin_memory: copy tensors that `transform` returns to pinned memory.
        """
        workers = self.workers(workers)
        return DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            worker_init_fn=prepare_worker if workers else None,
        )

    # --- the order

    def _part(self, epoch: int, stream: int) -> list[_Segment]:
        """Find what one stream reads in an epoch: whole shards, and pieces of two."""
        order = torch.randperm(len(self.shards.urls), generator=self._generator("shards", epoch))
        slot, images = self.rank * self.streams + stream, len(self.shards)
        begin, end = slot * images // self._slots, (slot + 1) * images // self._slots
        wanted = self._batches * self.batch_size
        counts = self.shards.counts[order.numpy()]
        edges = counts.cumsum() - counts
        # What is left over is better left out at the front, if that saves reading half a shard.
        inside = edges[(edges >= begin) & (edges <= end - wanted)]
        begin = int(inside[0]) if len(inside) else begin
        segments = []
        for shard, edge, count in zip(order.tolist(), edges.tolist(), counts.tolist(), strict=True):
            first, stop = max(begin - edge, 0), min(begin + wanted - edge, count)
            if first < stop:
                segments.append(_Segment(shard, first, stop))
        return segments

    def _order(self, epoch: int, stream: int, segments: list[_Segment]) -> list[int]:
        """Draw the order in which the images of a part leave the shuffle buffer."""
        images = [
            int(self._starts[segment.shard]) + position
            for segment in segments
            for position in range(segment.first, segment.stop)
        ]
        generator = self._generator("buffer", epoch, self.rank, stream)
        draws = torch.rand(len(images), generator=generator, dtype=torch.float64).tolist()
        held, order = images[: self.buffer], []
        for draw, following in zip(
            draws, range(self.buffer, len(images) + self.buffer), strict=True
        ):
            i = int(draw * len(held))
            order.append(held[i])
            held[i] = images[following] if following < len(images) else held[-1]
            if following >= len(images):
                held.pop()
        return order

    def _generator(self, *parts: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.seed, *parts))

    # --- reading

    def _read(self, stream: int, step: int) -> Iterator[list[ShardSample]]:
        """Yield a stream's batches from a step on, over epochs without a pause."""
        epoch, within = divmod(step, self.steps_per_epoch)
        done = within // self.streams * self.batch_size
        while True:
            segments = self._part(epoch, stream)
            order = self._order(epoch, stream, segments)[done:]
            arrivals = self._arrivals(segments, set(order))
            held: dict[int, EncodedImage | None] = {}
            for first in range(0, len(order), self.batch_size):
                batch = []
                for index in order[first : first + self.batch_size]:
                    while index not in held:
                        held.update([next(arrivals)])
                    batch.append((index, held.pop(index)))
                yield self._decode(epoch, batch)
            epoch, done = epoch + 1, 0

    def _arrivals(
        self, segments: list[_Segment], wanted: set[int]
    ) -> Iterator[tuple[int, EncodedImage | None]]:
        """Yield the wanted images in the shards' order; None stands for one that is lost."""
        for shard, first, stop in segments:
            start = int(self._starts[shard])
            positions = [p for p in range(first, stop) if start + p in wanted]
            due = iter(positions)
            for image in read_shard(self.shards.urls[shard], positions):
                for position in due:
                    lost = position != image.position
                    yield start + position, None if lost else image
                    if not lost:
                        break
            for position in due:
                yield start + position, None

    def _decode(
        self, epoch: int, batch: list[tuple[int, EncodedImage | None]]
    ) -> list[ShardSample]:
        """Decode a batch; the next readable image of it stands in for one that is not."""
        found = [self._image(index, image) for index, image in batch]
        if not any(found):
            raise DamagedDataError(
                f"no image of a batch of {len(batch)} is readable; the first is "
                f"{self._place(batch[0][0])}. The images of a batch lie close together, so this "
                "shard is cut short or damaged over a length; max_damaged does not help there. Get "
                "the shard again, then go on with --resume."
            )
        samples = []
        for i, (index, _) in enumerate(batch):
            image, label = next(one for one in found[i:] + found[:i] if one is not None)
            samples.append(ShardSample(epoch, index, image, label))
        return samples

    def _image(self, index: int, encoded: EncodedImage | None) -> tuple[Image.Image, int] | None:
        try:
            if encoded is None:
                raise DamagedImageError(_LOST)
            return decode(encoded.data), encoded.label
        except DamagedImageError as error:
            if not self._damage.is_known(index):
                self._damage.record(index, self._place(index), str(error))
            return None

    def _place(self, index: int) -> str:
        shard = int(self._starts.searchsorted(index, side="right")) - 1
        return place(self.shards.urls[shard], index - int(self._starts[shard]))


def _as_it_is(batch: Any) -> Any:
    return batch  # by default, the loader turns tuples into lists and arrays into tensors
