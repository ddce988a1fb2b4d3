"""The order of streamed batches: complete, disjoint, and the same however it is computed."""

from __future__ import annotations

import itertools
import tarfile
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from maskdistill.data import (
    CropDataset,
    DamagedDataError,
    DamagedImageWarning,
    MultiCrop,
)
from maskdistill.data import shards as streaming
from maskdistill.data.packing import pack_shards
from maskdistill.data.shards import (
    CutCrops,
    ShardError,
    Shards,
    ShardSample,
    ShardStream,
    open_shards,
    read_shard,
)
from tests.data.test_sources import CLASSES, encoded, identity

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # few cores
]
Key = tuple[int, int]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Seven shards of 60 images, 9 or 8 in each."""
    root = tmp_path_factory.mktemp("stream")
    for split, first, count in (("train", 0, 20), ("val", 20, 2)):
        for c, wnid in enumerate(CLASSES):
            (root / "data" / split / wnid).mkdir(parents=True)
            for n in range(first, first + count):
                (root / "data" / split / wnid / f"{n:02d}.png").write_bytes(encoded(c, n))
    pack_shards(root / "data", root / "out", 7)
    return open_shards(root / "out")


def keys(batch: list[ShardSample]) -> list[Key]:
    return [(sample.epoch, sample.number) for sample in batch]


def batches(shards: Shards, batch_size: int = 3, **options: Any) -> list[list[Key]]:
    """Give the keys of each batch, from the order alone where nothing is read."""
    settings = {"start": 0, "stop": 20, "seed": 0, "streams": 2, "buffer": 5} | options
    return [keys(batch) for batch in shards.stream(batch_size, **settings)]


class Ordered(ShardStream):
    """A stream that opens no files."""

    def _decode(self, epoch: int, batch: list[Any]) -> list[Any]:
        return [ShardSample(epoch, index, None, 0) for index, _ in batch]  # type: ignore[arg-type]

    def _arrivals(self, segments: Any, wanted: set[int]) -> Any:
        for shard, first, stop in segments:
            for position in range(first, stop):
                if (index := int(self._starts[shard]) + position) in wanted:
                    yield index, None


def uneven(*counts: int) -> Shards:
    return Shards(tuple(f"{i}.tar" for i in range(len(counts))), np.array(counts))


# --- what comes


def test_samples_are_the_images_of_their_numbers(shards: Shards) -> None:
    data = shards.load()
    for sample in itertools.chain(*shards.stream(3, start=0, stop=20, seed=0, streams=2)):
        image, label = data[sample.number]
        assert identity(sample.image) == identity(image)
        assert sample.label == label


def test_crops_are_those_of_the_images_at_hand(shards: Shards) -> None:
    transform = MultiCrop(16, 8, local_crops=1)
    stream = shards.stream(3, start=19, stop=23, seed=0, streams=2)
    at_hand = CropDataset(shards.load(), transform, seed=7)
    wanted = [at_hand.batch(keys(batch)) for batch in stream]
    stream.transform = CutCrops(transform, seed=7)
    for one, other in zip(stream.loader(workers=2), wanted, strict=True):
        for view, wanted_view in zip(one.images, other.images, strict=True):
            torch.testing.assert_close(view, wanted_view, rtol=0, atol=0)
        torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("counts", "world", "streams", "batch_size"),
    [
        ((9, 8, 9, 8, 9, 8, 9), 1, 2, 3),
        ((9, 8, 9, 8, 9, 8, 9), 3, 2, 3),
        ((64,), 2, 4, 2),  # fewer shards than streams
        ((5, 0, 1, 40, 2), 2, 2, 3),  # an empty one, and one that is most of it all
        ((10,) * 16, 2, 8, 5),
    ],
)
def test_no_image_comes_twice_in_an_epoch(
    counts: tuple[int, ...], world: int, streams: int, batch_size: int
) -> None:
    data = uneven(*counts)
    met: Counter[Key] = Counter()
    for rank in range(world):
        stream = Ordered(
            data, batch_size, start=0, stop=10_000, seed=3, rank=rank, world=world,
            streams=streams, buffer=7,
        )  # fmt: skip
        stream.stop = 4 * stream.steps_per_epoch
        found = list(stream)
        assert [len(batch) for batch in found] == [batch_size] * len(stream)
        for step, batch in enumerate(found):
            assert {sample.epoch for sample in batch} == {step // stream.steps_per_epoch}
            met.update(keys(batch))
    assert set(met.values()) == {1}
    slots = world * streams
    assert len(met) == 4 * (len(data) // slots // batch_size) * batch_size * slots
    assert len(data) - len(met) / 4 < slots * (batch_size + 1)
    # Those that are left out are other ones each time.
    by_epoch = [{number for epoch, number in met if epoch == e} for e in range(4)]
    assert len(by_epoch[0]) == len(data) or len(set.union(*by_epoch)) > len(by_epoch[0])


def test_epochs_seeds_and_streams_differ() -> None:
    data = uneven(*(20,) * 8)

    def order(**options: Any) -> list[int]:
        settings = {"start": 0, "stop": 20, "seed": 0, "streams": 2, "buffer": 50} | options
        return [s.number for batch in Ordered(data, 8, **settings) for s in batch]

    assert order() == order()
    assert order() != order(seed=1)
    assert order() != order(start=20, stop=40)
    assert order()[:8] != sorted(order()[:8])


@pytest.mark.parametrize("buffer", [1, 4, 1000])
def test_the_shuffle_buffer_is_as_large_as_said(buffer: int) -> None:
    held = []

    class Watched(Ordered):
        def _arrivals(self, segments: Any, wanted: set[int]) -> Any:
            self.read = 0
            for arrival in super()._arrivals(segments, wanted):
                self.read += 1
                yield arrival

    stream = Watched(uneven(60, 60), 1, start=0, stop=120, seed=0, streams=1, buffer=buffer)
    order = []
    for given, batch in enumerate(stream):
        held.append(stream.read - given)
        order.append(batch[0].number)
    assert max(held) <= buffer
    assert max(held) > buffer / 2 or buffer > 120
    in_order = [*range(60), *range(60, 120)] if order[0] < 60 else [*range(60, 120), *range(60)]
    assert (order == in_order) == (buffer == 1)


def test_a_full_buffer_gives_every_order_alike() -> None:
    """Of 3 images in a buffer of 3, each of the 6 orders comes with probability 1/6."""
    stream = Ordered(uneven(3), 1, start=0, stop=3 * 1200, seed=0, streams=1, buffer=3)
    numbers = [batch[0].number for batch in stream]
    orders = Counter(tuple(numbers[i : i + 3]) for i in range(0, len(numbers), 3))
    assert len(orders) == 6
    # chi-square with 5 degrees of freedom: beyond 20.5 once in a thousand
    assert sum((n - 200) ** 2 / 200 for n in orders.values()) < 20.5


# --- however it is computed


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(shards: Shards, workers: int) -> None:
    # An odd start: the first worker begins with a stream other than the first.
    wanted = batches(shards, start=1, stop=23, streams=4)
    stream = shards.stream(3, start=1, stop=23, seed=0, streams=4, buffer=5)
    stream.transform = keys
    loader = stream.loader(workers=workers)
    assert loader.num_workers == 2
    assert list(loader) == wanted


def test_workers_that_do_not_divide_the_streams_are_refused(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = shards.stream(3, start=0, stop=8, seed=0, streams=4)
    assert [stream.workers(n) for n in (0, 1, 3, 4, 9)] == [0, 1, 2, 4, 4]
    third_of_three = SimpleNamespace(id=2, num_workers=3)
    monkeypatch.setattr(streaming, "get_worker_info", lambda: third_of_three)
    with pytest.raises(ValueError, match="3 workers do not divide 4 streams; take 2"):
        list(stream)


def test_a_run_goes_on_from_any_step(shards: Shards) -> None:
    everything = batches(shards, stop=25)
    steps_per_epoch = shards.stream(3, start=0, stop=1, seed=0, streams=2).steps_per_epoch
    assert steps_per_epoch == 20  # an epoch ends within
    for start in (1, 8, 19, 20, 24):
        assert batches(shards, start=start, stop=25) == everything[start:]
    for start in range(25):
        stream = Ordered(shards, 3, start=start, stop=25, seed=0, streams=2, buffer=5)
        assert [keys(batch) for batch in stream] == everything[start:]
    assert len(shards.stream(3, start=5, stop=20, seed=0)) == 15


def test_resuming_opens_only_the_shards_that_it_needs(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: dict[str, list[int]] = {}

    def watched(url: str, wanted: Any) -> Any:
        if wanted:
            opened[url] = list(wanted)
        yield from read_shard(url, wanted)

    monkeypatch.setattr(streaming, "read_shard", watched)
    steps = shards.stream(3, start=0, stop=1, seed=0, streams=1, buffer=2).steps_per_epoch
    late = steps - 2
    found = batches(shards, start=late, stop=steps, streams=1, buffer=2)
    assert len(opened) <= 2
    assert sum(map(len, opened.values())) == sum(map(len, found)) == 6


def test_parts_begin_with_a_whole_shard_where_they_can() -> None:
    """Two streams of 101 images: a part that began one image before a shard would read two."""
    for seed in range(40):
        stream = Ordered(uneven(50, 51, 51, 50), 10, start=0, stop=1, seed=seed, streams=2)
        for part in (stream._part(0, 0), stream._part(0, 1)):
            assert sum(stop - first for _, first, stop in part) == 100
            assert part[0].stop - part[0].first >= 49


# --- what cannot be, and what is damaged


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 31}, "60 images do not fill one batch of 31 in each of 2 streams of 1"),
        ({"streams": 61, "batch_size": 1}, "in each of 61 streams"),
        ({"world": 11, "rank": 10}, "of 11 processes"),
        ({"rank": 1}, "rank must lie between 0 and world - 1 = 0, not 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"streams": 0}, "streams must be at least 1"),
        ({"buffer": 0}, "buffer must be at least 1"),
    ],
)
def test_settings_that_cannot_be(shards: Shards, options: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        batches(shards, **{"batch_size": 3, **options})


@pytest.fixture
def copy(shards: Shards, tmp_path: Path) -> Path:
    for path in Path(shards.urls[0]).parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def damaged(copy: Path) -> set[int]:
    """Damage one image's pixels, and cut another shard short; give the numbers of those lost."""
    shards = open_shards(copy)
    starts = shards.counts.cumsum() - shards.counts
    lost = set()
    for shard, position, cut in ((1, 2, False), (4, 5, True)):
        path = Path(shards.urls[shard])
        content = bytearray(path.read_bytes())
        at = -1
        for _ in range(position + 1):
            at = content.index(b"\x89PNG", at + 1)
        content[at : at + 40] = bytes(40)
        path.write_bytes(content[: at + 10] if cut else content)
        last = int(shards.counts[shard]) if cut else position + 1
        lost |= {int(starts[shard]) + p for p in range(position, last)}
    return lost


def test_an_image_that_its_shard_lacks_shifts_no_other(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for n in range(6):
            (tmp_path / "file").write_bytes(encoded(0, n))
            archive.add(tmp_path / "file", f"{n}.txt" if n in (1, 2) else f"{n}.png")
    stream = open_shards(str(tmp_path / "a.tar")).stream(6, start=0, stop=3, seed=0, streams=1)
    with pytest.warns(DamagedImageWarning, match="image [12] .it is not in its shard"):
        found = list(stream)
    for sample in itertools.chain(*found):
        assert sample.number in (1, 2) or identity(sample.image) == (0, sample.number)
        assert sample.label == -1


@pytest.mark.filterwarnings("ignore::maskdistill.data.DamagedImageWarning")
def test_a_readable_image_of_the_batch_stands_in(copy: Path, shards: Shards) -> None:
    lost = damaged(copy)
    whole = shards.load()

    def pictures(start: int = 0, workers: int = 0) -> list[list[tuple[Key, Key, int]]]:
        stream = open_shards(copy).stream(5, start=start, stop=20, seed=0, streams=2, buffer=5)
        stream.transform = lambda batch: [
            ((s.epoch, s.number), identity(s.image), s.label) for s in batch
        ]
        return list(stream.loader(workers=workers))

    found = pictures()
    assert [[key for key, *_ in batch] for batch in found] == batches(shards, 5)
    stood_in = 0
    for batch in found:
        for i, ((_, number), picture, label) in enumerate(batch):
            following = [n for (_, n), *_ in batch[i:] + batch[:i]]
            shown = next(n for n in following if n not in lost)
            assert (picture, label) == (identity(whole[shown][0]), whole.labels[shown])
            stood_in += number in lost
    assert stood_in >= len(lost) >= 3
    assert pictures(workers=2) == found
    assert pictures(start=7) == found[7:]


def test_damage_is_reported_once_and_counted(copy: Path) -> None:
    lost = damaged(copy)
    stream = open_shards(copy).stream(3, start=0, stop=40, seed=0, streams=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _ = list(stream), list(stream)
    messages = [str(w.message) for w in caught if w.category is DamagedImageWarning]
    assert len(messages) == len(lost)
    assert sum("train-000001.tar, image 2 (not a kind" in m for m in messages) == 1
    assert sum("train-000004.tar" in m and "ends early" in m for m in messages) == len(lost) - 1
    strict = open_shards(copy, max_damaged=1).stream(3, start=0, stop=40, seed=0, streams=2)
    with (
        pytest.warns(DamagedImageWarning),
        pytest.raises(DamagedDataError, match="2 images are damaged, more than max_damaged=1"),
    ):
        list(strict)


def test_a_batch_without_a_readable_image(copy: Path) -> None:
    for path in copy.glob("train*.tar"):
        path.write_bytes(path.read_bytes()[:600])
    stream = open_shards(copy, max_damaged=60).stream(3, start=0, stop=4, seed=0, streams=2)
    with (
        pytest.warns(DamagedImageWarning),
        pytest.raises(
            DamagedDataError, match=r"no image of a batch of 3 is readable; .*tar.*Get the shard"
        ),
    ):
        list(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_stops_the_run_with_its_name(copy: Path, workers: int) -> None:
    (copy / "train-000003.tar").unlink()
    stream = open_shards(copy).stream(3, start=0, stop=40, seed=0, streams=2)
    stream.transform = keys
    batches = iter(stream.loader(workers=workers))
    with pytest.raises(ShardError, match="train-000003.tar cannot be opened"):
        list(batches)
    if workers:  # left to the garbage collector, it waits five seconds for each worker
        batches._shutdown_workers()
