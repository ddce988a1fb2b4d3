"""The single-file pack: a whole data set of encoded images in one .npz file.

Arrays (`numpy.load(path, allow_pickle=False)` reads them; N images, C classes):

| array        | type, shape      | what                                                  |
|--------------|------------------|-------------------------------------------------------|
| `data`       | uint8 (bytes,)   | the encoded images (JPEG, PNG, WebP, ...), end to end |
| `offsets`    | integer (N + 1,) | image `i` is `data[offsets[i]:offsets[i + 1]]`        |
| `label`      | integer (N,)     | class of each image, from 0 to C - 1                  |
| `split`      | integer (N,)     | optional: 0 train, 1 val, 2 test                      |
| `wnid`       | text (C,)        | optional: the classes' names as WordNet ids           |
| `class_name` | text (C,)        | optional: the classes' names, if there is no `wnid`   |

WordNet ids come first because they are what the other forms of mini-ImageNet call a class, so that
a class has the same number in all of them. Other arrays are left alone.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdistill.data.formats.listing import (
    Listing,
    decode,
    number_names,
    number_within_class,
)

_REQUIRED = ("data", "offsets", "label")
_SPLITS = np.array(["train", "val", "test"])


class PackStore:
    """Encoded images end to end in one array.

    The bytes are read once. Forked workers share them; spawned ones get a copy each.
    """

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64], path: Path) -> None:
        self._data = data
        self._offsets = offsets
        self._path = str(path)

    def image(self, index: int) -> Image.Image:
        """Decode one image to RGB, or raise `DamagedImageError`."""
        return decode(self._data[self._offsets[index] : self._offsets[index + 1]].tobytes())

    def place(self, index: int) -> str:
        """Give the pack's path and the image's number in it."""
        return f"{self._path}, image {index}"


def misfit(path: Path) -> str:
    """Say why a path is not a pack; nothing if it is."""
    if path.suffix != ".npz":
        return "it is a folder" if path.is_dir() else "its name does not end in .npz"
    try:
        file = _open(path)
    except ValueError as error:
        return str(error)
    with file:
        missing = [name for name in _REQUIRED if name not in file]
        if missing:
            return f"it has no array {' or '.join(missing)}, only {', '.join(file)}"
    return ""


def read(path: Path) -> Listing:
    """List the images of a pack."""
    try:
        with _open(path) as file:
            data, offsets = np.asarray(file["data"]), file["offsets"].astype(np.int64)
            labels = file["label"].astype(np.int64)
            splits = _SPLITS[_checked_splits(file["split"], path)] if "split" in file else None
            classes = _class_names(file, labels)
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again.") from error
    _check(data, offsets, labels, splits, classes, path)
    return Listing(
        store=PackStore(data, offsets, path),
        names=number_within_class(labels),
        labels=labels,
        classes=classes,
        splits=np.full(len(labels), "") if splits is None else splits,
    )


def _open(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle, and say so
        raise ValueError(f"{path} is not a readable .npz file; is it whole?")
    return np.load(path, allow_pickle=False)


def _class_names(file: Any, labels: NDArray[np.int64]) -> tuple[str, ...]:
    for key in ("wnid", "class_name"):
        if key in file:
            return tuple(map(str, file[key]))
    return number_names(int(labels.max(initial=-1)) + 1)


def _checked_splits(split: NDArray[Any], path: Path) -> NDArray[np.int64]:
    strange = sorted(set(np.unique(split).tolist()) - {0, 1, 2})
    if strange:
        raise ValueError(f"{path}: split holds {strange[0]!r}; it may hold 0, 1 and 2 only.")
    return split.astype(np.int64)


def _check(
    data: NDArray[Any],
    offsets: NDArray[np.int64],
    labels: NDArray[np.int64],
    splits: NDArray[np.str_] | None,
    classes: tuple[str, ...],
    path: Path,
) -> None:
    count = len(labels)
    wrong = ""
    if data.dtype != np.uint8 or data.ndim != 1:
        wrong = f"data must be uint8 (bytes,), not {data.dtype} {data.shape}"
    elif count == 0:
        wrong = "it holds no images"
    elif offsets.shape != (count + 1,):
        wrong = f"{count} labels need {count + 1} offsets, not {offsets.shape}"
    elif splits is not None and splits.shape != (count,):
        wrong = f"{count} labels need {count} splits, not {splits.shape}"
    elif offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets) < 0).any():
        wrong = f"offsets must rise from 0 to at most {len(data)}, the length of data"
    elif labels.min() < 0 or labels.max() >= len(classes):
        wrong = f"labels from {labels.min()} to {labels.max()}, but {len(classes)} class names"
    if wrong:
        raise ValueError(f"{path} is not a valid pack: {wrong}.")
