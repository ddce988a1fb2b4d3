"""WebDataset shards: finding them, loading them, and streaming batches in an order that resumes.

shards = open_shards("imagenet-shards")            # the folder that pack_shards wrote
stream = shards.stream(64, start=0, stop=1000, seed=0)
val = open_shards("imagenet-shards", split="val").load()
"""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from maskdistill.data.crops import Crops, MultiCrop, image_keys
from maskdistill.data.formats.listing import (
    IMAGE_SUFFIXES,
    DamagedImageError,
    ImageStore,
    Listing,
    decode,
    number_names,
)
from maskdistill.data.loading import derive_seed, prepare_worker, unchanged
from maskdistill.data.sources import Damage, DamagedDataError, ImageDataset
from maskdistill.data.writing import progress

__all__ = [
    "CutCrops",
    "EncodedImage",
    "ShardError",
    "ShardSample",
    "ShardStream",
    "Shards",
    "open_shards",
    "webdataset",
]

_LOST = "it is not in its shard, which is damaged or ends early"


class ShardError(OSError):
    """A shard cannot be read at all: it is missing, or its server fails; names its URL."""


# --- opening


def webdataset() -> Any:
    """Import the package webdataset, or say how to install it."""
    try:
        import webdataset  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError('Shards need webdataset: pip install "maskdistill[shards]"') from error
    return webdataset


def open_shards(
    where: str | Path | Sequence[str],
    *,
    split: str = "train",
    index: str | Path | None = None,
    max_damaged: int = 10,
) -> Shards:
    """Find shards by a folder, an index, or a pattern, without reading them.

    Example:
        >>> open_shards("imagenet-shards", split="val")  # doctest: +SKIP
        >>> open_shards("https://host/imagenet/train.json")  # doctest: +SKIP
        >>> open_shards("https://host/{00..99}.tar", index="train.json")  # doctest: +SKIP

    An index names shards and the images in each, which resuming and sharing them out need. It is
    what `pack_shards` writes, or WebDataset's `widsindex create`. Local shards without one are
    counted when they are opened, from their headers.

    Args:
        where: the folder of `pack_shards`; or an index, a path or URL that ends in .json; or
            shards: a path or URL, also with braces `{000..255}`, or `pipe:` and a command; or a
            list of them.
        split: which index of a folder, `"train"` or `"val"`.
        index: path or URL of the index of the shards that `where` names, in the same order.
        max_damaged: how many images that do not decode, or are lost in a shard that is cut short,
            to put up with.

    Raises:
        ImportError: the package webdataset is missing.
        FileNotFoundError: there is no such folder, index or local shard.
        ValueError: the index is not one or does not fit, or shards elsewhere come without one.
    """
    webdataset()
    if isinstance(where, str | Path):
        text = os.path.expanduser(where)
        if os.path.isdir(text):
            text = str(_index_in(Path(text), split))
        if text.endswith(".json"):
            if index is not None:
                raise ValueError(
                    f"{where} is an index itself; pass index={index!r} or this, not both."
                )
            urls, counts, classes = _read_index(text)
            return Shards(urls, counts, classes, max_damaged)
        urls = tuple(webdataset().shardlists.expand_urls(text))
    else:
        urls = tuple(map(str, where))
    if index is not None:
        _, counts, classes = _read_index(os.path.expanduser(index))
        if len(counts) != len(urls):
            raise ValueError(f"{index} lists {len(counts)} shards, but {len(urls)} are named.")
        return Shards(urls, counts, classes, max_damaged)
    if far := [url for url in urls if _is_remote(url)]:
        raise ValueError(
            f"{far[0]} needs an index that says how many images each shard holds: pass "
            "index=PATH_OR_URL, made by maskdistill pack --shards or by webdataset's widsindex."
        )
    bar = progress(urls, len(urls), "counting", "shard")
    return Shards(urls, np.array([_count(url) for url in bar], np.int64), (), max_damaged)


def _index_in(folder: Path, split: str) -> Path:
    path = folder / f"{split}.json"
    if not path.is_file():
        others = sorted(p.stem for p in folder.glob("*.json"))
        found = f"it has {', '.join(others)}" if others else "it has no index"
        raise FileNotFoundError(
            f"{path} does not exist ({found}). Wanted: a folder of maskdistill pack --shards, or a "
            "pattern of shards, such as 'folder/train-{000..255}.tar'."
        )
    return path


def _read_index(where: str) -> tuple[tuple[str, ...], NDArray[np.int64], tuple[str, ...]]:
    try:
        with webdataset().gopen(where) as file:
            content = json.loads(file.read())
        shards = [(str(entry["url"]), int(entry["nsamples"])) for entry in content["shardlist"]]
        classes = tuple(map(str, content.get("classes", ())))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no index {where}.") from None
    except OSError as error:
        raise ShardError(f"The index {where} cannot be read ({error}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where} is not an index of shards ({type(error).__name__}: {error}). Wanted: JSON "
            'with "shardlist": [{"url": ..., "nsamples": ...}, ...].'
        ) from error
    if not shards or min(count for _, count in shards) < 0:
        raise ValueError(f"{where} lists no shards, or one with fewer than 0 images.")
    # A command is the user's to give. In a file that came from elsewhere it is somebody else's.
    if commands := [url for url, _ in shards if url.startswith("pipe:")]:
        raise ValueError(
            f"{where} names a command, {commands[0]!r}, which is not run. If you trust it, pass "
            "the commands themselves, with index= for the counts."
        )
    urls = tuple(_beside(where, url) for url, _ in shards)
    return urls, np.array([count for _, count in shards], np.int64), classes


def _beside(index: str, url: str) -> str:
    if _is_remote(url) or os.path.isabs(url):
        return url
    return urljoin(index, url) if _is_remote(index) else str(Path(index).parent / url)


def _is_remote(url: str) -> bool:
    # The module of that name is hidden by a function of that name.
    schemes = import_module("webdataset.gopen").gopen_schemes
    return url.partition(":")[0] in set(schemes) - {"file"}


# --- what there is


@dataclass(frozen=True, eq=False)
class Shards:
    """The shards of one split, in the order of their index, and how many images each holds.

    Image i is the i-th when the shards are read one after the other: the number that decides its
    crops, whatever the order in which it is met.

    Attributes:
        urls: of the shards.
        counts: images in each, (shards,).
        classes: names; empty if the index has none.
        max_damaged: how many images that do not decode, or are lost, to put up with.
    """

    urls: tuple[str, ...]
    counts: NDArray[np.int64]
    classes: tuple[str, ...] = ()
    max_damaged: int = 10

    def __post_init__(self) -> None:
        if self.max_damaged < 0:
            raise ValueError(f"max_damaged must be 0 or more, not {self.max_damaged}.")

    def __len__(self) -> int:
        """Count the images of all shards."""
        return int(self.counts.sum())

    def stream(self, batch_size: int, **settings: Any) -> ShardStream:
        """Return the batches of a range of training steps; the settings are `ShardStream`'s."""
        return ShardStream(self, batch_size, **settings)

    def load(self, limit: int | None = None) -> ImageDataset:
        """Read images into memory, encoded, for what needs to reach each of them: evaluation.

        Args:
            limit: at most so many, the first ones; None takes all. Lost ones are left out.

        Raises:
            ShardError: a shard cannot be read.
            DamagedDataError: more than `max_damaged` images are lost, or all.
        """
        wanted = len(self) if limit is None else min(limit, len(self))
        damage = Damage(wanted, self.max_damaged)
        found, places, rows = list[EncodedImage](), list[str](), list[int]()
        for url, count in progress(
            zip(self.urls, self.counts.tolist(), strict=True), len(self.urls), "loading", "shard"
        ):
            part = range(min(count, wanted - len(found)))
            there = {image.position: image for image in read_shard(url, part)}
            for position in part:
                places.append(place(url, position))
                if position in there:
                    rows.append(len(found))
                else:
                    damage.record(
                        len(found), places[-1], _LOST, outcome="It is left out", stacklevel=3
                    )
                found.append(there.get(position, EncodedImage(position, b"", -1)))
        if wanted and not rows:
            raise DamagedDataError(f"None of the {wanted:,} images is readable: {places[0]}, ...")
        labels = np.array([image.label for image in found], np.int64)
        present = labels.max(initial=-1) + 1
        listing = Listing(
            store=_MemoryStore([image.data for image in found], places),
            names=places,
            labels=labels,
            classes=self.classes or number_names(int(present)),
            splits=np.full(len(labels), ""),
        )
        kept = np.array(rows, np.int64)
        return ImageDataset(listing, kept, labels[kept], damage)


class _MemoryStore(ImageStore):
    """Encoded images in memory."""

    def __init__(self, images: Sequence[bytes], places: Sequence[str]) -> None:
        self._images, self._places = images, places

    def encoded(self, index: int) -> bytes:
        return self._images[index]

    def place(self, index: int) -> str:
        return self._places[index]


# --- streaming


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
    """Cuts the crops of a batch of samples: what `ShardStream.transform` is for in training."""

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


@dataclass(eq=False, repr=False)
class ShardStream(IterableDataset[Any]):
    """Yields one batch per step for a range of steps, as `BatchStream` does for data at hand.

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
        buffer: images of a stream among which the next one is chosen; 1 keeps the shards' order.
        transform: function of a batch, such as `CutCrops`; it is applied in the workers, and what
            it returns is yielded.

    Attributes:
        steps_per_epoch: batches in an epoch, per process.

    Raises:
        ValueError: there are fewer images than fill one batch of every stream.
        ShardError: while iterating: a shard is missing or cannot be read.
        DamagedDataError: while iterating: more than `shards.max_damaged` images are damaged.
    """

    shards: Shards
    batch_size: int
    _: KW_ONLY
    start: int
    stop: int
    seed: int
    rank: int = 0
    world: int = 1
    streams: int = 8
    buffer: int = 256
    transform: Callable[[list[ShardSample]], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "streams", "buffer"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        if not 0 <= self.rank < self.world:
            raise ValueError(
                f"rank must lie between 0 and world - 1 = {self.world - 1}, not {self.rank}."
            )
        images, self._slots = len(self.shards), self.world * self.streams
        self._batches = images // self._slots // self.batch_size
        if self._batches < 1:
            raise ValueError(
                f"{images:,} images do not fill one batch of {self.batch_size} in each of "
                f"{self.streams} streams of {self.world} processes; choose fewer streams or a "
                "smaller batch."
            )
        self.steps_per_epoch = self._batches * self.streams
        self._starts = self.shards.counts.cumsum() - self.shards.counts
        self._damage = Damage(images, self.shards.max_damaged)

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
        """Return the largest number of workers, of at most so many, that divides the streams."""
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
            collate_fn=unchanged,
            pin_memory=pin_memory,
            worker_init_fn=prepare_worker,
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
        """Choose the order in which the images of a part leave the shuffle buffer."""
        images = [
            int(self._starts[segment.shard]) + position
            for segment in segments
            for position in range(segment.first, segment.stop)
        ]
        generator = self._generator("buffer", epoch, self.rank, stream)
        random = torch.rand(len(images), generator=generator, dtype=torch.float64).tolist()
        held, order = images[: self.buffer], []
        for following, u in enumerate(random, start=self.buffer):
            i = int(u * len(held))
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


# --- reading one shard


class EncodedImage(NamedTuple):
    """One image of a shard: its position there, its bytes and its class; -1 without a class."""

    position: int
    data: bytes
    label: int


def place(url: str, position: int) -> str:
    """Say where an image lies, for people."""
    return f"{url}, image {position}"


def read_shard(url: str, wanted: range | Sequence[int]) -> Iterator[EncodedImage]:
    """Read some images of a shard, in its order, and no further than the last of them.

    Images that are lost, because the shard is cut short or damaged, or that have no image file, are
    not among what is yielded.

    Args:
        url: of the shard.
        wanted: positions of the images, from 0.

    Raises:
        ShardError: there is no such shard, or reading it failed, as opposed to its content.
    """
    if not len(wanted):
        return
    positions, last = set(wanted), max(wanted)
    for position, group in enumerate(_groups(url)):
        if position in positions and (found := _image_of(position, group)) is not None:
            yield found
        if position >= last:
            return


def _image_of(position: int, group: dict[str, bytes]) -> EncodedImage | None:
    data = next((group[suffix] for suffix in group if f".{suffix}" in IMAGE_SUFFIXES), None)
    if data is None:
        return None
    label = group.get("cls", b"-1").strip()
    return EncodedImage(position, data, int(label) if label.lstrip(b"-").isdigit() else -1)


def _count(url: str) -> int:
    return sum(1 for _ in _groups(url, contents=False))


def _groups(url: str, contents: bool = True) -> Iterator[dict[str, bytes]]:
    """Yield the files of each sample by their suffixes, until the shard or what is whole ends."""
    wds = webdataset()
    try:
        stream = wds.gopen(url)
    except OSError as error:
        raise ShardError(f"The shard {url} cannot be opened ({error}).") from error
    read, key, group = 0, "", dict[str, bytes]()
    finished = False
    try:
        try:
            # Errors of tarfile are the content's; what is whole before them is used.
            with contextlib.suppress(tarfile.TarError, EOFError, zlib.error):
                for member, data in _members(stream, contents):
                    base, suffix = wds.tariterators.base_plus_ext(member.name)
                    if base is None or member.name.startswith("__"):
                        continue
                    read += 1
                    if base != key and group:
                        yield group
                        group = {}
                    key = base
                    group[suffix.lower()] = data
            finished = True
        except OSError as error:
            raise ShardError(f"Reading the shard {url} failed ({error}).") from error
        if group:
            yield group
    finally:
        _close(stream, url, finished)


def _members(stream: Any, contents: bool) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # else it remembers all
            if not member.isreg():
                continue
            data = b""
            if contents:
                file = archive.extractfile(member)
                data = b"" if file is None else file.read()  # a ReadError where it is cut short
            yield member, data


def _close(stream: Any, url: str, finished: bool) -> None:
    """Close a shard; a command that ends in failure gave less than the shard."""
    try:
        stream.close()
    except OSError as error:
        if finished:  # one that was stopped half way may complain
            raise ShardError(f"Reading the shard {url} failed ({error}).") from error
