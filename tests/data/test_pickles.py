"""The restricted unpickler: reads every pickle of arrays, runs no other."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from maskdistill.data.formats.pickles import UnsafePickleError, load_arrays

IMAGES = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3)


def _load(tmp_path: Path, pickled: bytes) -> object:
    path = tmp_path / "cache.pkl"
    path.write_bytes(pickled)
    return load_arrays(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        IMAGES,
        np.asfortranarray(IMAGES),
        np.arange(5, dtype=">i4"),
        np.linspace(0, 1, 4, dtype=np.float32),
        np.zeros((0, 3), dtype=np.int64),
        np.array([True, False]),
    ],
    ids=["uint8", "fortran", "big-endian", "float", "empty", "bool"],
)
def test_arrays_come_back_from_every_protocol(
    tmp_path: Path, array: np.ndarray, protocol: int
) -> None:
    loaded = _load(tmp_path, pickle.dumps({"a": array}, protocol))
    np.testing.assert_array_equal(np.asarray(loaded["a"]), array)
    assert loaded["a"].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")


def test_plain_containers_and_scalars_come_back(tmp_path: Path) -> None:
    value = {"n01": [0, 1], "n02": (np.int64(2), 3.5, None, True, b"raw", "text")}
    assert _load(tmp_path, pickle.dumps(value, 2)) == value
    assert _load(tmp_path, pickle.dumps(OrderedDict(value))) == value


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_both_homes_of_numpys_core_are_known(tmp_path: Path, core: str) -> None:
    pickled = pickle.dumps(IMAGES, 2)
    names = {b"numpy._core.multiarray", b"numpy.core.multiarray"}
    written = next(name for name in sorted(names) if name in pickled)
    moved = pickled.replace(written, core.encode() + b".multiarray")
    np.testing.assert_array_equal(np.asarray(_load(tmp_path, moved)), IMAGES)


def test_python_2_pickle(tmp_path: Path) -> None:
    cache = _load(tmp_path, python_2_cache(IMAGES, {"n01532829": [0], "n13133613": [1]}))
    assert set(cache) == {b"image_data", b"class_dict"}
    np.testing.assert_array_equal(np.asarray(cache[b"image_data"]), IMAGES)
    assert cache[b"class_dict"] == {b"n01532829": [0], b"n13133613": [1]}


def python_2_cache(images: np.ndarray, class_dict: dict[str, list[int]]) -> bytes:
    """Write a cache as Python 2's cPickle does at protocol 2: strings are bytes there."""

    def text(value: str) -> bytes:
        return b"U" + bytes([len(value)]) + value.encode()

    def shape(value: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"K" + bytes([n]) for n in value) + b"t"

    dtype = b"cnumpy\ndtype\n" + text("u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text("|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
    array += b"K\x00\x85" + text("b") + b"\x87R"
    array += b"(K\x01" + shape(images.shape) + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    lists = b"".join(
        text(name) + b"](" + b"".join(b"K" + bytes([n]) for n in rows) + b"e"
        for name, rows in class_dict.items()
    )
    body = text("image_data") + array + text("class_dict") + b"}(" + lists + b"u"
    return b"\x80\x02}(" + body + b"u."


class _Runs:
    """Pickles to a call."""

    def __init__(self, function: object, *args: object) -> None:
        self._call = (function, args)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self._call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_calls_the_system_is_refused_and_does_not_run(
    tmp_path: Path, protocol: int
) -> None:
    marker = tmp_path / "ran"
    call = _Runs(os.system, f"echo > {marker}")
    pickled = pickle.dumps({"image_data": IMAGES, "class_dict": {"a": call}}, protocol)
    with pytest.raises(UnsafePickleError, match=rf"cache\.pkl names {os.name}\.system"):
        _load(tmp_path, pickled)
    assert not marker.exists()
    # The same bytes do run in the standard unpickler, so the test above can fail.
    pickle.loads(pickled)
    assert marker.exists()


@pytest.mark.parametrize(
    "call",
    [
        _Runs(eval, "1"),
        _Runs(getattr, "text", "upper"),
        _Runs(__import__, "this"),
        _Runs(np.load, "file.npy"),
        _Runs(np.fromfile, "file.npy"),
        _Runs(io.open, "file"),
        np.load,
        _Runs,
        Path("file"),
    ],
    ids=["eval", "getattr", "import", "loading", "fromfile", "open", "function", "class", "path"],
)
def test_any_other_name_is_refused(tmp_path: Path, call: object) -> None:
    with pytest.raises(UnsafePickleError, match="arrays and plain containers do not need"):
        _load(tmp_path, pickle.dumps(call))


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b"no pickle at all",
        pickle.dumps(IMAGES)[:-20],
        pickle.dumps(IMAGES, 2).replace(b"latin1", b"utf-16"),
        # numpy.ndarray(...) called, and an attribute set on what stands for a function.
        b"\x80\x02cnumpy\nndarray\nK\x08\x85R.",
        b"\x80\x02c_codecs\nencode\nN}X\x08\x00\x00\x00__code__K\x01s\x86b.",
    ],
    ids=["empty", "garbage", "cut", "codec", "call-array", "set-code"],
)
def test_what_is_no_pickle_of_numbers_is_an_error_with_the_path(
    tmp_path: Path, pickled: bytes
) -> None:
    with pytest.raises(ValueError, match=r"cache\.pkl is not a readable pickle of arrays"):
        _load(tmp_path, pickled)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    "array",
    [np.array([{}, None]), np.array(["text"]), np.zeros(2, "M8[s]"), np.zeros(2, "i4,f4")],
    ids=["objects", "text", "dates", "records"],
)
def test_only_arrays_of_numbers_are_read(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    with pytest.raises(ValueError, match="only numbers are read"):
        _load(tmp_path, pickle.dumps(array, protocol))


@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (-2, -27), (2, 3, 3, 2)])
def test_an_array_whose_shape_is_not_that_of_its_bytes_is_an_error(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    class Lying:
        def __reduce__(self) -> object:
            function, args, state = IMAGES.__reduce__()
            return function, args, (state[0], shape, *state[2:])

    with pytest.raises(ValueError, match="without its"):
        _load(tmp_path, pickle.dumps(Lying(), 4))
