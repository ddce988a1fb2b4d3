"""An unpickler that builds NumPy arrays and plain containers, and refuses everything else.

A pickle is a program: `pickle.load` imports what it names and calls what it says. The one here
never imports anything. A name that pickled arrays use is answered with a small function of this
module, which checks what it is given before NumPy sees it; any other name is an error before
anything runs.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskdistill.data.formats.listing import (
    SPLIT_NAMES,
    ImageStore,
    Listing,
    encode,
    number_labels,
    number_within_class,
)

_NUMBERS = "biuf"
"""The kinds of dtype that an array may have: bool, integer, unsigned, float. Never objects."""


class UnsafePickleError(ValueError):
    """A pickle names something that no array or plain container needs; nothing of it was run."""


def load_arrays(path: str | Path) -> Any:
    """Load a pickle of NumPy arrays of numbers in dicts, lists, tuples, strings and numbers.

    Pickles of Python 2 and 3 and of NumPy 1 and 2 are read, in any protocol. The strings of a
    Python 2 pickle come back as bytes.

    Raises:
        UnsafePickleError: the pickle names anything but what arrays and plain containers need.
        ValueError: the file is no pickle, is cut short, or holds an array that is not of numbers.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            # "bytes" leaves the pixels of a Python 2 pickle as they are, instead of making a string
            # of them and bytes of that.
            return _ArrayUnpickler(file, encoding="bytes").load()
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{path} {error}") from None
        except MemoryError:
            raise
        # Garbage can make an unpickler stumble over nearly anything.
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable pickle of arrays ({error or type(error).__name__}); is "
                "it whole?"
            ) from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 moved numpy.core to numpy._core.
        known = self._stand_ins().get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise UnsafePickleError(
                f"names {module}.{name}, which arrays and plain containers do not need. It may "
                "want to run code, and was stopped before it could. Get the data from a source "
                "that you trust, or in another form (images, parquet or a pack)."
            )
        return known

    def _stand_ins(self) -> dict[tuple[str, str], Callable[..., Any] | object]:
        # Methods, because a pickle can set attributes of the functions that it is given, but not of
        # bound methods.
        return {
            ("numpy", "ndarray"): _NDARRAY,
            ("numpy", "dtype"): self._dtype,
            ("numpy.core.multiarray", "_reconstruct"): self._empty,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy.core.numeric", "_frombuffer"): self._from_buffer,
            ("_codecs", "encode"): self._encode,
            ("__builtin__", "bytes"): self._no_bytes,
            ("collections", "OrderedDict"): dict,
        }

    def _dtype(self, code: str | bytes, *_: object) -> _DType:
        return _DType(code.decode("ascii") if isinstance(code, bytes) else code)

    def _empty(self, *_: object) -> _Array:
        return np.zeros(0, np.uint8).view(_Array)

    def _scalar(self, dtype: _DType, raw: bytes) -> Any:
        return np.frombuffer(raw, dtype.numpy(), count=1)[0].item()

    def _from_buffer(
        self, raw: bytes | bytearray, dtype: _DType, shape: tuple[int, ...], order: str
    ) -> Any:
        return np.frombuffer(raw, dtype.numpy()).reshape(shape, order="F" if order == "F" else "C")

    def _encode(self, text: str, encoding: str) -> bytes:
        # How protocol 2 writes bytes in Python 3; it never uses another encoding.
        if encoding != "latin1":
            raise ValueError(f"bytes encoded as {encoding!r}")
        return text.encode("latin1")

    def _no_bytes(self) -> bytes:
        return b""  # how protocol 2 writes them


_NDARRAY = object()
"""Stands for `numpy.ndarray`, which arrays name and never call."""


class _DType:
    """A dtype that is only written down; NumPy makes it once it is known to be one of numbers."""

    def __init__(self, code: str) -> None:
        self._code = code
        self._byte_order: Literal["<", ">", "|"] = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order: Any = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|"):
            raise ValueError(f"a dtype of byte order {order!r}")
        self._byte_order = order

    def numpy(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._code)
        if dtype.kind not in _NUMBERS:
            raise ValueError(f"an array of dtype {dtype}; only numbers are read")
        ordered: np.dtype[Any] = dtype.newbyteorder(self._byte_order)  # "|" leaves it as it is
        return ordered


class _Array(np.ndarray[Any, Any]):
    """An array that checks what it is filled with."""

    def __setstate__(self, state: Any, /) -> None:
        version, shape, dtype, is_fortran, raw = state
        numpy_dtype = dtype.numpy()
        wanted = math.prod(shape) * numpy_dtype.itemsize
        if min(shape, default=0) < 0 or not isinstance(raw, bytes) or len(raw) != wanted:
            raise ValueError(f"an array of shape {shape} without its {wanted} bytes")
        super().__setstate__((version, shape, numpy_dtype, is_fortran, raw))


_PREFIX = "mini-imagenet-cache-"


class ArrayStore(ImageStore):
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
        """Return the file's path and the image's number in it."""
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
    splits = [SPLIT_NAMES.get(file.stem.removeprefix(_PREFIX), "") for file in files]
    labels, classes = number_labels([name for _, names in caches for name in names])
    return Listing(
        store=ArrayStore([images for images, _ in caches], files),
        names=number_within_class(labels),
        labels=labels,
        classes=classes,
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
