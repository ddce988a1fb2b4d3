"""The pickle caches of mini-ImageNet: `mini-imagenet-cache-{train,val,test}.pkl`.

Each is a dict of `image_data`, uint8 (n, 84, 84, 3), and `class_dict`, the positions of each
class's images: `{"n01532829": [0, 1, ...]}`. They are read with an unpickler that builds arrays and
plain containers and refuses everything else (`maskdistill.data.pickles`).
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdistill.data.formats.listing import SPLIT_NAMES, Listing, encode, number_within_class
from maskdistill.data.pickles import load_arrays

_PREFIX = "mini-imagenet-cache-"


class ArrayStore:
    """Decoded images in one array per file."""

    direct: ClassVar[bool] = False

    def __init__(self, arrays: list[NDArray[np.uint8]], paths: list[Path]) -> None:
        self._arrays = arrays
        self._paths = [str(path) for path in paths]
        self._starts = np.cumsum([0] + [len(array) for array in arrays])

    def image(self, index: int) -> Image.Image:
        """Make one image of its pixels."""
        file, row = self._find(index)
        return Image.fromarray(self._arrays[file][row])

    def encoded(self, index: int) -> bytes:
        """Encode one image as PNG, which loses nothing."""
        return encode(self.image(index), "PNG")

    def place(self, index: int) -> str:
        """Give the file's path and the image's number in it."""
        file, row = self._find(index)
        return f"{self._paths[file]}, image {row}"

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, index - int(self._starts[file])


def misfit(path: Path) -> str:
    """Say why a path is not a pickle cache; nothing if it is."""
    if _files(path):
        return ""
    if path.is_dir():
        return f"no {_PREFIX}train.pkl, -val.pkl (or -validation.pkl) or -test.pkl in it"
    return "its name does not end in .pkl"


def read(path: Path) -> Listing:
    """List the images of pickle caches."""
    files = _files(path)
    caches = [_read_cache(file) for file in files]
    class_names = np.concatenate([names for _, names in caches])
    splits = [SPLIT_NAMES.get(file.stem.removeprefix(_PREFIX), "") for file in files]
    classes, inverse = np.unique(class_names, return_inverse=True)
    labels = inverse.astype(np.int64)
    return Listing(
        store=ArrayStore([images for images, _ in caches], files),
        names=number_within_class(labels),
        labels=labels,
        classes=tuple(map(str, classes)),
        splits=np.repeat(splits, [len(names) for _, names in caches]),
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [p for name in SPLIT_NAMES if (p := path / f"{_PREFIX}{name}.pkl").is_file()]
    return [path] if path.suffix == ".pkl" else []


def _read_cache(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.str_]]:
    """Read one cache: its images, and the name of each one's class."""
    content = load_arrays(path)
    # Python 2 wrote its strings as bytes.
    is_dict = isinstance(content, dict)
    cache = {_text(key): value for key, value in content.items()} if is_dict else {}
    if not {"image_data", "class_dict"} <= set(cache):
        found = f"the keys {sorted(cache)}" if cache else f"a {type(content).__name__}"
        raise ValueError(
            f"{path}: expected a dict with image_data and class_dict, the layout of "
            f"{_PREFIX}*.pkl; found {found}."
        )
    images = np.asarray(cache["image_data"])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"{path}: image_data must be uint8 (n, height, width, 3), not {images.dtype} "
            f"{images.shape}."
        )
    return images, _names_of_classes(cache["class_dict"], len(images), path)


def _names_of_classes(class_dict: object, count: int, path: Path) -> NDArray[np.str_]:
    if not isinstance(class_dict, dict) or not class_dict:
        raise ValueError(f"{path}: class_dict must name the images of each class.")
    names = np.zeros(count, dtype=object)
    for key, positions in class_dict.items():
        rows = np.asarray(positions)
        if rows.dtype.kind not in "iu" or not ((rows >= 0) & (rows < count)).all():
            raise ValueError(
                f"{path}: class_dict[{_text(key)!r}] must hold positions from 0 to {count - 1}."
            )
        names[rows] = _text(key)
    lost = np.flatnonzero(names == 0)
    if lost.size:
        raise ValueError(
            f"{path}: {lost.size} of {count} images are in no class, the first at {lost[0]}."
        )
    return names.astype(str)


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
