"""Reading all images of a listing once: checked, made smaller if asked, and held for a second look.

What packs and shards have in common. The first pass runs in parallel and finds damaged images and
the others' sizes; the second, which writes, is a matter of copying bytes.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from maskdistill.data.damage import Damage
from maskdistill.data.formats.listing import DamagedImageError, ImageStore, decode, encode
from maskdistill.data.formats.mapped import checksum
from maskdistill.data.workers import prepare_worker

_BATCH = 32
_FEW = 512
"""Below this many images, starting worker processes costs more than it saves."""
_SUFFIX = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "PPM": "ppm"}


@dataclass(frozen=True)
class Recipe:
    """What to do to images: `Recipe(size=256, quality=90)`.

    Args:
        size: pixels of the shorter side of what is larger; None leaves sizes alone.
        quality: of JPEG, 1 to 95; None encodes at 95 what became smaller, and copies the rest.
    """

    size: int | None = None
    quality: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, not {self.size}.")
        if self.quality is not None and not 1 <= self.quality <= 95:
            raise ValueError(f"quality must lie between 1 and 95, not {self.quality}.")

    @property
    def changes(self) -> bool:
        """Whether it does anything at all."""
        return self.size is not None or self.quality is not None

    def apply(self, image: Image.Image, data: bytes) -> bytes:
        """Give the bytes to store for an image and the bytes that it was decoded from."""
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
        self, store: ImageStore, rows: NDArray[np.int64], recipe: Recipe, send: bool
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
class Gathered:
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


def gather(
    store: ImageStore,
    rows: NDArray[np.int64],
    *,
    recipe: Recipe,
    held: BinaryIO,
    max_damaged: int,
    workers: int | None,
) -> Gathered:
    """Decode every image once, and note what can be read and what cannot.

    What is re-encoded, or cannot be read twice cheaply, is held in a file meanwhile.

    Args:
        store: of the images.
        rows: which of them.
        recipe: what to do to them.
        held: an open, empty file to hold images in, such as `tempfile.TemporaryFile`.
        max_damaged: how many damaged images to leave out.
        workers: processes; None takes one per core, and none for a few images.

    Raises:
        DamagedDataError: more images are damaged.
        OSError: a source file cannot be read, or `held` not be written.
        ValueError: fewer than no workers.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be None or an int >= 0; got {workers}.")
    hold = recipe.changes or not store.direct
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
    return Gathered(
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
        worker_init_fn=_quiet_worker if workers else None,
    )
    for batch in loader:
        yield from batch


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quiet_worker(worker: int) -> None:
    prepare_worker(worker)
    # The parent reports damage, once; Pillow's own remarks on odd files are not wanted twice.
    warnings.simplefilter("ignore")


def progress(items: Any, total: int, what: str, unit: str) -> Any:
    """Show a progress bar on a terminal where tqdm is installed and it takes over a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, total=total, desc=what, unit=unit, delay=1, disable=None, leave=False)
