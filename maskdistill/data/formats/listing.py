"""What a reader of an on-disk form hands back: a `Listing`; and what the readers share.

What happens next (the split, the labels' numbers, damaged images) is the same for all forms and
lives in `maskdistill.data.sources`. So is the rule for what does not fit: a reader counts and names
in `Listing.remarks` what it does not use, and refuses, by the file's name, what it cannot read as
it was meant; `check` refuses what no form may hold. An image that does not decode is no reader's
business: it is found when it is read.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

SPLIT_NAMES = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""What people call the splits, and what we call them."""

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)


class DamagedImageError(Exception):
    """One image could not be decoded; the message says why."""


class ImageStore:
    """A place that holds encoded images, each known by its position.

    Attributes:
        direct: `encoded` reads the bytes of one image as they lie there, and nothing else, whatever
            the order; if not, all of them are better read once and in order.
    """

    direct: ClassVar[bool] = True

    def image(self, index: int) -> Image.Image:
        """Decode one image to RGB, or raise `DamagedImageError`."""
        # Read first, decode second: a file that has gone or may not be read is not a damaged image,
        # and its error must stop the run.
        return decode(self.encoded(index))

    def encoded(self, index: int) -> bytes:
        """Return one image as the bytes of an image file, or raise `DamagedImageError`."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """Say where an image lies, for people."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Listing:
    """All images of a source, with what its files say about them.

    Attributes:
        store: of the images.
        names: of each image within its class: the split rule hashes them, so they must not depend
            on the order of the files.
        labels: of each image; they index `classes`.
        classes: names.
        splits: `"train"`, `"val"`, `"test"` or `""` of each image, as the source has it.
        remarks: for the user: what was found and not used.
    """

    store: ImageStore
    names: Sequence[str]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    splits: NDArray[np.str_]
    remarks: tuple[str, ...] = ()


def check(listing: Listing, path: Path) -> None:
    """Refuse what no form may hold: nothing at all, or labels without a class.

    Raises:
        ValueError: it does.
    """
    labels, classes = listing.labels, len(listing.classes)
    if not len(labels):
        raise ValueError(f"{path} lists no images.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"{path}: labels from {labels.min()} to {labels.max()}, but {classes} class names."
        )


# --- images that are files


@dataclass(frozen=True)
class ImageFile:
    """One image that is a file of its own."""

    path: Path
    label: str
    split: str


class FileStore(ImageStore):
    """Images that are files."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(str(path) for path in paths)

    def encoded(self, index: int) -> bytes:
        """Read one file."""
        return Path(self._paths[index]).read_bytes()

    def place(self, index: int) -> str:
        """Return the file's path."""
        return self._paths[index]


def list_files(files: Sequence[ImageFile], remarks: tuple[str, ...] = ()) -> Listing:
    """Make the listing of images that are files."""
    labels, classes = number_labels([file.label for file in files])
    return Listing(
        store=FileStore(file.path for file in files),
        names=[file.path.name for file in files],
        labels=labels,
        classes=classes,
        splits=np.array([file.split for file in files]),
        remarks=remarks,
    )


def is_image_name(name: str) -> bool:
    """Tell whether a file name is an image's."""
    # Names that begin with a dot: macOS leaves a "._photo.jpg" beside every file of an archive.
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def contents(folder: Path, limit: int = 8) -> str:
    """List the first entries of a folder, for an error message."""
    names = sorted(
        entry.name + ("/" if entry.is_dir() else "")
        for entry in folder.iterdir()
        if not entry.name.startswith(".")
    )
    if not names:
        return "nothing: the folder is empty"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- names and numbers


def number_labels(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Turn each image's class name into labels and the sorted classes that they index."""
    classes, labels = np.unique(np.asarray(names, dtype=np.str_), return_inverse=True)
    return labels.astype(np.int64), tuple(map(str, classes))


def number_within_class(labels: NDArray[np.int64]) -> list[str]:
    """Name images that have no name by their position in their class: `"0"`, `"1"`, ..."""
    seen: dict[int, int] = {}
    names = []
    for label in labels.tolist():
        names.append(str(seen.get(label, 0)))
        seen[label] = seen.get(label, 0) + 1
    return names


def number_names(count: int) -> tuple[str, ...]:
    """Name classes that have only numbers, padded so that they sort as numbers: `"00"`, `"01"`."""
    width = len(str(max(count - 1, 0)))
    return tuple(f"{number:0{width}d}" for number in range(count))


# --- decoding


def decode(data: bytes) -> Image.Image:
    """Decode an encoded image to RGB, or raise `DamagedImageError`.

    Example:
        >>> decode(b"not an image")
        Traceback (most recent call last):
        ...
        maskdistill.data.formats.listing.DamagedImageError: not a kind of image that Pillow knows
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _to_rgb(image)
    except UnidentifiedImageError:
        raise DamagedImageError(
            "not a kind of image that Pillow knows" if data else "empty"
        ) from None
    except MemoryError:
        raise
    # Pillow's decoders report damage with whatever they stumble over: OSError, SyntaxError,
    # ValueError, struct.error, EOFError, IndexError, zlib.error, ...
    except Exception as error:
        raise DamagedImageError(str(error) or type(error).__name__) from error


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    """Encode an image as a file of the given form, such as `"PNG"`."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow warns about every palette image with a transparent colour that goes straight to RGB.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    # And it clips 16-bit greys at 255, which leaves a white image.
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
