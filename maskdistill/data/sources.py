"""One door to image data in whichever form it lies on disk: `open_data`.

    data = open_data("mini-imagenet")       # CSV lists, class folders, parquet, a pack, pickles
    image, label = data.train[0]            # an RGB PIL image and an int
    print(data.note)                        # how the split was made

The forms are told apart and read in `maskdistill.data.formats`; the split, the numbering of the
classes and the care for damaged images are here, once for all of them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from maskdistill.data.formats import FORMS, Form, Listing
from maskdistill.data.formats.listing import DamagedImageError, check, contents

__all__ = [
    "Damage",
    "DamagedDataError",
    "DamagedImageWarning",
    "DataSplits",
    "ImageDataset",
    "open_data",
    "split_by_name",
]


class DamagedImageWarning(UserWarning):
    """An image could not be decoded, and another one stands in for it or it is left out."""


class DamagedDataError(RuntimeError):
    """More images are damaged than the run was told to put up with."""


class Damage:
    """The damaged images of a source: one flag each, in memory that all workers share.

    Flags and not a counter, so that an image that two workers meet counts once.

    Args:
        images: how many there are.
        limit: how many damaged ones to put up with.
    """

    def __init__(self, images: int, limit: int) -> None:
        if limit < 0:
            raise ValueError(f"max_damaged must be 0 or more, not {limit}.")
        self._flags = torch.zeros(images, dtype=torch.bool)
        self._flags.share_memory_()  # type: ignore[no-untyped-call, unused-ignore]
        self.limit = limit

    @property
    def count(self) -> int:
        """Count the damaged images met so far."""
        return int(self._flags.sum())

    def is_known(self, row: int) -> bool:
        """Tell whether an image has been found damaged."""
        return bool(self._flags[row])

    def record(
        self,
        row: int,
        place: str,
        reason: str,
        *,
        outcome: str = "Another one stands in for it",
        stacklevel: int = 4,
    ) -> None:
        """Note a damaged image and warn of it.

        Args:
            row: the image.
            place: where it lies, for people.
            reason: why it cannot be decoded.
            outcome: what became of it.
            stacklevel: of the warning; 4 is where a data set was indexed.

        Raises:
            DamagedDataError: this is one more than the limit.
        """
        self._flags[row] = True
        count = self.count
        if count > self.limit:
            raise DamagedDataError(
                f"{count} images are damaged, more than max_damaged={self.limit}; the last is "
                f"{place} ({reason}). The warnings above name the others. Get them again, or raise "
                "max_damaged if you can do without them."
            )
        so_far = f"{count} of at most {self.limit} so far"
        warnings.warn(
            f"Damaged image: {place} ({reason}). {outcome}; {so_far}.",
            DamagedImageWarning,
            stacklevel=stacklevel,
        )


_Rows = NDArray[np.int64]
"""Positions in a listing."""


@dataclass(frozen=True)
class DataSplits:
    """Training and validation images of the same classes.

    `classes` are sorted by name, and a label is a position in them. `format` is the form that was
    read, `note` one sentence on how the split was made.
    """

    train: ImageDataset
    val: ImageDataset
    classes: tuple[str, ...]
    format: str
    path: Path
    note: str


class ImageDataset(Dataset[tuple[Image.Image, int]]):
    """Images and labels, decoded when they are asked for; made by `open_data`.

    A damaged image is reported once, with its place, by a `DamagedImageWarning`. The next readable
    image of the data set stands in for it, with that image's own label. The count of damaged images
    is shared by the train and val sets and by all data-loading workers.

    Raises:
        DamagedDataError: on reading, when more than `max_damaged` images are damaged.
    """

    labels: NDArray[np.int64]

    def __init__(
        self, listing: Listing, rows: _Rows, labels: NDArray[np.int64], damage: Damage
    ) -> None:
        self.labels = labels
        self._store = listing.store
        self._rows = rows
        self._damage = damage

    def __len__(self) -> int:
        """Count the images, damaged ones included."""
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Read one image and its label."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"image {index} of a data set of {count}")
        for step in range(count):
            position = (index + step) % count
            image = self._read(int(self._rows[position]))
            if image is not None:
                return image, int(self.labels[position])
        raise DamagedDataError(f"None of the {count:,} images is readable: {self.damaged[0]}, ...")

    def encoded(self, index: int) -> bytes:
        """Return one image as the bytes of an image file (JPEG, PNG, ...), for other decoders.

        They are what lies there, whether it can be decoded or not; pixels are encoded as PNG.

        Raises:
            DamagedImageError: there are no bytes, or their checksum is another.
        """
        return self._store.encoded(int(self._rows[index]))

    @property
    def damaged(self) -> tuple[str, ...]:
        """Where the damaged images lie that were met so far."""
        return tuple(self._store.place(row) for row in self._rows if self._damage.is_known(row))

    def _read(self, row: int) -> Image.Image | None:
        if self._damage.is_known(row):
            return None
        try:
            return self._store.image(row)
        except DamagedImageError as error:
            self._damage.record(row, self._store.place(row), str(error))
            return None


def open_data(
    path: str | Path,
    format: str = "auto",
    *,
    allow_pickle: bool = False,
    max_damaged: int = 10,
) -> DataSplits:
    """Open image data in any of its on-disk forms, split for training and validation.

    Example:
        >>> data = open_data("mini-imagenet")  # doctest: +SKIP
        >>> len(data.train), len(data.val), len(data.classes)  # doctest: +SKIP
        (50000, 10000, 100)
        >>> data.note  # doctest: +SKIP
        '100 classes, 600 images each, re-split 500/100 per class because its splits share no
        classes.'

    A split of the source's own is kept if every class of its validation (or else test) images is
    trained on too. The few-shot splits of mini-ImageNet are not like that: k-NN and linear probes
    need the same classes on both sides. Then all classes are pooled, and of a class of n images
    round(n / 6) go to validation, those whose names have the smallest SHA-1: the same ones on every
    machine and in whatever order the files are listed.

    Args:
        path: a folder, or the file of a pack, a parquet file or a pickle.
        format: "auto", or one of "ravi-csv", "vinyals-csv", "imagefolder", "parquet", "pack",
            "pickle".
        allow_pickle: permit reading pickles (by an unpickler that can only build arrays).
        max_damaged: how many damaged images to put up with.

    Raises:
        FileNotFoundError: the path does not exist, or a CSV lists an image that does not.
        ValueError: the form is not recognised or not the one asked for, the files contradict
            themselves, or a pickle is read without `allow_pickle`.
    """
    if max_damaged < 0:  # before anything is read
        raise ValueError(f"max_damaged must be 0 or more, not {max_damaged}.")
    path = Path(path).expanduser()
    form, listing = read_listing(path, format, allow_pickle=allow_pickle)
    division = divide(listing)
    train, val = division.train, division.val
    kept, number_of = number_classes(listing, np.concatenate([train, val]))
    damage = Damage(len(listing.labels), max_damaged)
    return DataSplits(
        train=ImageDataset(listing, train, number_of[listing.labels[train]], damage),
        val=ImageDataset(listing, val, number_of[listing.labels[val]], damage),
        classes=kept,
        format=form.name,
        path=path,
        note="; ".join((f"{len(kept)} classes, {division.how}", *listing.remarks)) + ".",
    )


# --- the form


def read_listing(path: Path, format: str, *, allow_pickle: bool) -> tuple[Form, Listing]:
    """Recognise the form of a path, or check the one that was asked for, and list its images.

    Raises what `open_data` raises.
    """
    form = _choose_form(path, format)
    if form.name == "pickle" and not allow_pickle:
        raise ValueError(
            f"{path} holds pickles, and a pickle can run code when it is loaded. Pass "
            "allow_pickle=True (--allow-pickle on the command line) to read it with an unpickler "
            "that builds arrays and refuses everything else."
        )
    listing = form.read(path)
    check(listing, path)
    return form, listing


def _choose_form(path: Path, name: str) -> Form:
    names = [form.name for form in FORMS]
    if name not in ("auto", *names):
        raise ValueError(f"format={name!r} is unknown; choose auto, {', '.join(names)}.")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Pass the folder or file of your images.")
    for form in FORMS:
        if name == "auto" and not form.misfit(path):
            return form
        if name == form.name:
            if misfit := form.misfit(path):
                raise ValueError(
                    f"{path} is not of the format {name!r}: {misfit}. Wanted: {form.looks_like}."
                )
            return form
    raise ValueError(_unrecognised(path))


def _unrecognised(path: Path) -> str:
    lines = [f"{path} is in no form that open_data knows. It looked for:"]
    lines += [f"  {form.name}: {form.looks_like} ({form.misfit(path)})" for form in FORMS]
    if path.is_dir():
        lines.append(f"and found: {contents(path)}.")
        if any(path.glob("*.tar")):
            lines.append(
                "Tar files stream: give the folder as --shards, or to maskdistill.data.open_shards."
            )
        if inside := _forms_inside(path):
            lines.append(f"Did you mean {' or '.join(inside)}?")
    return "\n".join(lines)


def _forms_inside(folder: Path, limit: int = 20) -> list[str]:
    """Look one level down: archives often unpack to a folder in a folder."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    fits = [
        (entry, form.name) for entry in entries[:limit] for form in FORMS if not form.misfit(entry)
    ]
    return [f"{entry} ({name})" for entry, name in fits]


# --- the split


class Division(NamedTuple):
    """The training and the validation rows of a listing, and how they were chosen.

    `held_out` is the source's own split that validates, `"val"` or `"test"`; `""` means that all
    images were split anew. `how` says it for people.
    """

    train: _Rows
    val: _Rows
    held_out: str
    how: str


def divide(listing: Listing) -> Division:
    """Choose the training and the validation rows, and say how."""
    labels, splits = listing.labels, listing.splits
    train = np.flatnonzero(splits == "train")
    for held_out in ("val", "test"):
        val = np.flatnonzero(splits == held_out)
        if len(train) and len(val) and set(labels[val]) <= set(labels[train]):
            spare = len(labels) - len(train) - len(val)
            left = f", {spare:,} other images left out" if spare else ""
            how = (
                f"{len(train):,} train and {len(val):,} {held_out} images as the source splits them"
            )
            return Division(train, val, held_out, how + left)
    train, val = split_by_name(listing.names, labels)
    if not len(val):
        raise ValueError(
            f"No class has two images (found {len(labels)} images of {len(listing.classes)} "
            "classes), so none can be held out for validation."
        )
    how = f"{_how_many(labels)} because {_why_resplit(labels, splits)}"
    return Division(train, val, "", how)


def split_by_name(names: Sequence[str], labels: NDArray[np.int64]) -> tuple[_Rows, _Rows]:
    """Split every class 5:1 by a hash of its images' names.

    Of a class of n images, round(n / 6) are held out, and at least one if there are two. An image's
    side depends on the names in its class and on nothing else.

    Example:
        >>> train, val = split_by_name([f"{i}.jpg" for i in range(12)], np.repeat([0, 1], 6))
        >>> len(train), len(val)
        (10, 2)
    """
    digests = [
        hashlib.sha1(name.encode("utf-8", "surrogateescape"), usedforsecurity=False).digest()
        for name in names
    ]
    members: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels.tolist()):
        members[label].append(row)
    held_out = np.zeros(len(labels), dtype=bool)
    for rows in members.values():
        rows.sort(key=lambda row: digests[row])
        held_out[rows[: _held_out_count(len(rows))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _held_out_count(images: int) -> int:
    rounded = (images + 3) // 6  # half away from zero, as everywhere in this library
    return rounded if images < 2 else max(1, rounded)


def _how_many(labels: NDArray[np.int64]) -> str:
    counts = np.bincount(labels)
    least, most = int(counts[counts > 0].min()), int(counts.max())
    if least < most:
        return f"{least} to {most} images each, re-split 5:1 per class"
    val = _held_out_count(most)
    return f"{most} images each, re-split {most - val}/{val} per class"


def _why_resplit(labels: NDArray[np.int64], splits: NDArray[np.str_]) -> str:
    train, others = set(labels[splits == "train"]), set(labels[splits != "train"])
    if not train or not others:
        return "the source has no split into training and validation images"
    if train & others:
        return "its splits share only some of the classes"
    return "its splits share no classes"


def number_classes(listing: Listing, rows: _Rows) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Sort the classes that have images, and map the listing's numbers to theirs."""
    present = np.unique(listing.labels[rows]).tolist()
    ordered = sorted(present, key=lambda number: listing.classes[number])
    number_of = np.full(len(listing.classes), -1, dtype=np.int64)
    number_of[ordered] = np.arange(len(ordered))
    return tuple(listing.classes[number] for number in ordered), number_of
