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
from typing import Any, Literal

import numpy as np

_NUMBERS = "biuf"
"""The kinds of dtype that an array may have: bool, integer, unsigned, float. Never objects."""


class UnsafePickleError(ValueError):
    """A pickle names something that no array or plain container needs; nothing of it was run.

    Example:
        >>> load_arrays("evil.pkl")  # doctest: +SKIP
        Traceback (most recent call last):
        ...
        maskdistill.data.pickles.UnsafePickleError: evil.pkl names posix.system, ...
    """


def load_arrays(path: str | Path) -> Any:
    """Load a pickle of NumPy arrays of numbers in dicts, lists, tuples, strings and numbers.

    Pickles of Python 2 and 3 and of NumPy 1 and 2 are read, in any protocol. The strings of a
    Python 2 pickle come back as bytes.

    Example:
        >>> cache = load_arrays("mini-imagenet-cache-train.pkl")  # doctest: +SKIP
        >>> cache["image_data"].shape  # doctest: +SKIP
        (38400, 84, 84, 3)

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
