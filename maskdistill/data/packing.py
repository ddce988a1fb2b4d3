"""One file, or shards, from any data set that `open_data` reads: `pack` and `pack_shards`.

    pack("mini-imagenet", "mini.npz")                # opens by memory map, decodes in workers
    pack_shards("imagenet", "shards", 256, size=256)  # streams, for data beyond a disk

Images are gathered in a first pass, which decodes each of them once, and written in a second.
Encoded images are copied byte by byte, unless they are to be made smaller. Nothing is ever in
memory as a whole. What is written appears under its name only when it is complete.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from maskdistill.data.formats.listing import DamagedImageError, ImageStore, Listing, decode, encode
from maskdistill.data.formats.packs import checksum
from maskdistill.data.loading import cores, prepare_worker
from maskdistill.data.sources import Damage, Division, divide, number_classes, read_listing
from maskdistill.data.writing import (
    atomic_file,
    atomic_folder,
    check_free,
    check_room,
    progress,
    room,
    sole_writer,
    to_disk,
)

__all__ = ["Packed", "pack", "pack_shards"]

_SPLITS = ("train", "val", "test")
_DATE = (1980, 1, 1, 0, 0, 0)  # the same content gives the same file
_ORDER_SEED = 0
_BATCH = 32
_FEW = 512
"""Below this many images, starting worker processes costs more than it saves."""
_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "PPM": "ppm"}


@dataclass(frozen=True)
class Packed:
    """What `pack` or `pack_shards` wrote.

    Attributes:
        path: the file, or the folder of shards.
        images: how many, training and validation together.
        classes: how many.
        bytes: of the files written.
        damaged: place and reason of each image that was left out.
        note: how the images are split, in one sentence.
    """

    path: Path
    images: int
    classes: int
    bytes: int
    damaged: tuple[str, ...]
    note: str


def pack(
    source: str | Path,
    out: str | Path,
    *,
    format: str = "auto",
    allow_pickle: bool = False,
    size: int | None = None,
    quality: int | None = None,
    max_damaged: int = 10,
    workers: int | None = None,
    overwrite: bool = False,
) -> Packed:
    """Write a data set in any form that `open_data` reads to one file, a pack.

    Example:
        >>> pack("mini-imagenet", "mini.npz")  # doctest: +SKIP
        Packed(path=PosixPath('mini.npz'), images=60000, classes=100, ...)
        >>> data = open_data("mini.npz")  # doctest: +SKIP

    The pack has the images, labels, classes and the split of its source, in the same order: unless
    images are damaged or changed, training on it gives the same numbers. Each image is decoded once
    to check it, in parallel. With `size` or `quality`, and where the source is pickles or parquet
    files, images are held in a temporary file beside `out`, which takes as much room again.

    Args:
        source: a folder, or the file of a pack, a parquet file or a pickle.
        out: the file to write; its name ends in .npz.
        format: of the source, as for `open_data`.
        allow_pickle: permit reading pickles (by an unpickler that can only build arrays).
        size: pixels to which the shorter side of larger images is reduced (bicubic, then JPEG).
        quality: of JPEG, 1 to 95, to which all images are then encoded; None encodes at 95 what was
            reduced and copies the rest.
        max_damaged: how many images that do not decode may be left out, with a warning each.
        workers: processes that decode; None takes one per core.
        overwrite: replace `out` if it exists.

    Raises:
        FileExistsError: `out` exists.
        DamagedDataError: more than `max_damaged` images are damaged.
        OSError: the disk is full, or a file cannot be read or written.
        ValueError: the source is in no known form, or `out` does not end in .npz.
    """
    out = Path(out).expanduser()
    if out.suffix != ".npz":
        raise ValueError(f"A pack's name ends in .npz, so that it is recognised; {out} does not.")
    check_free(out, overwrite, "file")
    recipe = _Recipe(size, quality)
    _, listing = read_listing(Path(source).expanduser(), format, allow_pickle=allow_pickle)
    division = divide(listing)
    codes = _codes(listing, division)
    rows = np.flatnonzero(codes >= 0)
    out.parent.mkdir(parents=True, exist_ok=True)
    with room(out), tempfile.TemporaryFile(dir=out.parent) as held:
        found = _gather(listing.store, rows, recipe, held, max_damaged, workers)
        _check_split(found, listing, codes, division)
        check_room(out, int(found.sizes.sum()))
        with sole_writer(out), atomic_file(out) as file:
            _write_pack(file, found, listing, codes)
    return Packed(
        path=out,
        images=len(found.rows),
        classes=len(np.unique(listing.labels[found.rows])),
        bytes=out.stat().st_size,
        damaged=found.damaged,
        note=_note(listing, division, len(codes) - len(rows), len(found.damaged)),
    )


def pack_shards(
    source: str | Path,
    out: str | Path,
    shards: int,
    *,
    format: str = "auto",
    allow_pickle: bool = False,
    size: int | None = None,
    quality: int | None = None,
    max_damaged: int = 10,
    workers: int | None = None,
    overwrite: bool = False,
) -> Packed:
    """Write a data set as WebDataset shards: tar files that can be streamed, and an index.

    Example:
        >>> pack_shards("imagenet", "shards", 256, size=256)  # doctest: +SKIP
        >>> sorted(path.name for path in Path("shards").iterdir())  # doctest: +SKIP
        ['train-000000.tar', ..., 'train-000255.tar', 'train.json',
         'val-000000.tar', ..., 'val-000009.tar', 'val.json']

    An image `000000042.jpg` has its class in `000000042.cls`, a number. The index has the form of
    WebDataset's own (`wids`), with the number of images of each shard, and the classes' names.
    Images go to shards in a fixed random order, so that each shard is a sample of all classes.

    Args:
        source: as for `pack`.
        out: the folder to write.
        shards: number of training shards; validation gets its share, and at least one.
        format: as for `pack`.
        allow_pickle: as for `pack`.
        size: as for `pack`.
        quality: as for `pack`.
        max_damaged: as for `pack`.
        workers: as for `pack`.
        overwrite: as for `pack`; the whole folder is replaced.

    Raises:
        ValueError: there are fewer images than shards. Otherwise as for `pack`.
    """
    out = Path(out).expanduser()
    if shards < 1:
        raise ValueError(f"shards must be an int >= 1; got {shards}.")
    if out.suffix == ".npz":
        raise ValueError(
            f"Shards lie in a folder, and {out} is the name of a pack. Choose another name, or "
            "leave out the shards."
        )
    check_free(out, overwrite, "folder")
    recipe = _Recipe(size, quality)
    _, listing = read_listing(Path(source).expanduser(), format, allow_pickle=allow_pickle)
    division = divide(listing)
    rows = np.sort(np.concatenate([division.train, division.val]))
    if shards > len(division.train):
        raise ValueError(f"{len(division.train)} training images do not fill {shards} shards.")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Held from the beginning: of two that write one folder, the second is not to work in vain.
    with (
        room(out),
        atomic_folder(out) as folder,
        tempfile.TemporaryFile(dir=out.parent) as held,
    ):
        check_free(out, overwrite, "folder")  # one may have come, or come back, since
        found = _gather(listing.store, rows, recipe, held, max_damaged, workers)
        check_room(out, int(found.sizes.sum()) + 3072 * len(rows))
        names, numbers = number_classes(listing, rows)
        for name, side in (("train", division.train), ("val", division.val)):
            mine = np.flatnonzero(np.isin(found.rows, side))
            count = max(1, round(shards * len(side) / len(division.train)))
            labels = numbers[listing.labels[found.rows[mine]]]
            _write_shards(folder, name, found, mine, labels, names, min(count, len(mine)))
    return Packed(
        path=out,
        images=len(found.rows),
        classes=len(names),
        bytes=sum(path.stat().st_size for path in out.iterdir()),
        damaged=found.damaged,
        note=_note(listing, division, len(listing.labels) - len(rows), len(found.damaged)),
    )


# --- the split


def _codes(listing: Listing, division: Division) -> NDArray[np.int64]:
    """Return each image's number for the pack's `split`; -1 leaves it out.

    A split that the source has is kept as it is, test images included. One that was made is
    written down: it need not be made again, from images of which some may be missing.
    """
    codes = np.full(len(listing.labels), -1, dtype=np.int64)
    if division.held_out:
        for code, name in enumerate(_SPLITS):
            codes[listing.splits == name] = code
    else:
        codes[division.train], codes[division.val] = _SPLITS.index("train"), _SPLITS.index("val")
    return codes


def _check_split(
    found: _Gathered, listing: Listing, codes: NDArray[np.int64], before: Division
) -> None:
    """Refuse what would be split otherwise when it is read, for want of the damaged images."""
    kept, labels = codes[found.rows], listing.labels[found.rows]
    after = divide(
        Listing(
            store=listing.store,
            names=[""] * len(labels),
            labels=labels,
            classes=listing.classes,
            splits=np.array(_SPLITS)[kept],
        )
    )
    sides = zip((before.train, before.val), (after.train, after.val), strict=True)
    if any(not np.array_equal(b[np.isin(b, found.rows)], found.rows[a]) for b, a in sides):
        raise ValueError(
            "Without its damaged images, named above, the data set would be split otherwise: a "
            "class has none left to train on. Get them again."
        )


def _note(listing: Listing, division: Division, left_out: int, damaged: int) -> str:
    lost = f"that is with the {damaged:,} damaged ones" if damaged else ""
    spare = f"{left_out:,} images of no such split not packed" if left_out else ""
    return "; ".join(filter(None, (division.how, lost, spare, *listing.remarks))) + "."


# --- the first pass: decoding, and what is to be stored


@dataclass(frozen=True)
class _Recipe:
    """What to do to images: size and quality as for `pack`."""

    size: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {self.size}.")
        if self.quality is not None and not 1 <= self.quality <= 95:
            raise ValueError(f"quality must lie between 1 and 95, not {self.quality}.")

    def apply(self, image: Image.Image, data: bytes) -> bytes:
        """Return the bytes to store for an image and the bytes that it was decoded from."""
        short = min(image.size)
        if self.size is not None and short > self.size:
            # Integers, half away from zero: 500 x 375 at size 256 is 341 x 256.
            wide, high = ((2 * side * self.size + short) // (2 * short) for side in image.size)
            image = image.resize((wide, high), Image.Resampling.BICUBIC)
        elif self.quality is None:
            return data
        return encode(image, "JPEG", quality=self.quality or 95)


class _Checked(NamedTuple):
    """One image after the first pass; `data` only where it cannot be read again so cheaply."""

    size: int
    check: int
    suffix: str
    reason: str
    data: bytes


class _Checker(Dataset[_Checked]):
    def __init__(
        self, store: ImageStore, rows: NDArray[np.int64], recipe: _Recipe, send: bool
    ) -> None:
        self._store, self._rows, self._recipe, self._send = store, rows, recipe, send

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> _Checked:
        try:
            data = self._store.encoded(int(self._rows[index]))
            image = decode(data)
        except DamagedImageError as error:
            return _Checked(0, 0, "", str(error), b"")
        data = self._recipe.apply(image, data)
        with Image.open(io.BytesIO(data)) as header:
            form = header.format or ""
        suffix = _SUFFIX.get(form, form.lower())
        return _Checked(len(data), checksum(data), suffix, "", data if self._send else b"")


@dataclass(frozen=True)
class _Gathered:
    """The readable images of a listing, in the listing's order.

    Attributes:
        rows: their positions in the listing.
        sizes: bytes of each.
        checks: CRC-32 of each.
        suffixes: `"jpg"`, `"png"`, ... of each.
        damaged: places and reasons of those left out.
    """

    rows: NDArray[np.int64]
    sizes: NDArray[np.int64]
    checks: NDArray[np.uint32]
    suffixes: Sequence[str]
    damaged: tuple[str, ...]
    _store: ImageStore
    _held: BinaryIO | None
    _starts: NDArray[np.int64]

    def read(self, position: int) -> bytes:
        """Read one image again.

        Raises:
            ValueError: it is not what it was in the first pass.
        """
        row, size = int(self.rows[position]), int(self.sizes[position])
        if self._held is None:
            data = self._store.encoded(row)
        else:
            self._held.seek(int(self._starts[position]))
            data = self._held.read(size)
        if len(data) != size or checksum(data) != int(self.checks[position]):
            raise ValueError(f"{self._store.place(row)} changed while it was being packed.")
        return data


def _gather(
    store: ImageStore,
    rows: NDArray[np.int64],
    recipe: _Recipe,
    held: BinaryIO,
    max_damaged: int,
    workers: int | None,
) -> _Gathered:
    """Decode every image once, and note what can be read and what cannot.

    What is re-encoded, or cannot be read twice cheaply, is held in the open, empty file `held`.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or an int >= 0; got {workers}.")
    hold = recipe != _Recipe() or not store.direct
    damage = Damage(len(rows), max_damaged)
    sizes, checks = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.uint32)
    readable = np.ones(len(rows), dtype=bool)
    suffixes: list[str] = []
    damaged: list[str] = []
    checker = _Checker(store, rows, recipe, send=hold)
    for number, item in enumerate(progress(_run(checker, workers), len(rows), "checking", "img")):
        if item.reason:
            readable[number] = False
            place = store.place(int(rows[number]))
            damaged.append(f"{place} ({item.reason})")
            damage.record(number, place, item.reason, outcome="It is left out")
            continue
        sizes[number], checks[number] = item.size, item.check
        suffixes.append(item.suffix)
        held.write(item.data)
    held.flush()
    sizes = sizes[readable]
    return _Gathered(
        rows=rows[readable],
        sizes=sizes,
        checks=checks[readable],
        suffixes=suffixes,
        damaged=tuple(damaged),
        _store=store,
        _held=held if hold else None,
        _starts=np.cumsum(sizes) - sizes,
    )


def _run(checker: _Checker, workers: int | None) -> Iterator[_Checked]:
    if workers is None:
        workers = cores() if len(checker) >= _FEW else 0
    loader: DataLoader[Any] = DataLoader(
        checker,
        _BATCH,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=_quiet_worker,
    )
    for batch in loader:
        yield from batch


def _quiet_worker(worker: int) -> None:
    prepare_worker(worker)
    # The parent reports damage, once; Pillow's own remarks on odd files are not wanted twice.
    warnings.simplefilter("ignore")


# --- the second pass: writing


def _write_pack(
    file: BinaryIO, found: _Gathered, listing: Listing, codes: NDArray[np.int64]
) -> None:
    total = int(found.sizes.sum())
    names = [listing.names[row].encode("utf-8", "surrogateescape") for row in found.rows.tolist()]
    arrays = {
        "offsets": np.concatenate([[0], np.cumsum(found.sizes)]),
        "label": listing.labels[found.rows].astype(np.int32),
        "split": codes[found.rows].astype(np.uint8),
        "class_name": np.array(listing.classes),
        "name": np.array(names, dtype=bytes),
        "crc32": found.checks,
    }
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with _member(archive, "data") as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(member, header)
            for position in progress(range(len(found.rows)), len(found.rows), "writing", "img"):
                member.write(found.read(position))
        for name, array in arrays.items():
            with _member(archive, name) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    return archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True)


def _write_shards(
    folder: Path,
    name: str,
    found: _Gathered,
    positions: NDArray[np.int64],
    labels: NDArray[np.int64],
    classes: tuple[str, ...],
    shards: int,
) -> None:
    generator = torch.Generator().manual_seed(_ORDER_SEED)
    order = torch.randperm(len(positions), generator=generator).numpy()
    bar = progress(np.array_split(order, shards), shards, f"writing {name}", "shard")
    entries, number = [], 0
    for shard, part in enumerate(bar):
        path = folder / f"{name}-{shard:06d}.tar"
        with path.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w") as archive:
                for i in part.tolist():
                    position, label = int(positions[i]), str(labels[i]).encode()
                    _add(archive, f"{number:09d}.cls", label)
                    _add(archive, f"{number:09d}.{found.suffixes[position]}", found.read(position))
                    number += 1
            to_disk(file)
        entries.append({"url": path.name, "nsamples": len(part), "filesize": path.stat().st_size})
    index = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": name,
        "shardlist": entries,
        "classes": list(classes),
    }
    with (folder / f"{name}.json").open("w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        to_disk(file)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of a fixed time: the same content is the same file
    member.size, member.mode, member.uname, member.gname = len(data), 0o444, "bigdata", "bigdata"
    archive.addfile(member, io.BytesIO(data))
