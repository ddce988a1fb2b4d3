"""The single-file pack: a whole data set of encoded images in one .npz file.

`data` (uint8) holds the encoded images end to end, `offsets` (N + 1) where each begins and ends,
`label` (N) their classes; `split`, `wnid`, `class_name`, `name` and `crc32` are optional. The table
of the arrays is in docs/data.md. `maskdistill.data.packing` writes `data` uncompressed, so that it
can be mapped into memory.
"""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from maskdistill.data.formats.listing import (
    DamagedImageError,
    ImageStore,
    Listing,
    number_names,
    number_within_class,
)

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""A zip member's header: signature, what the central directory has too, two lengths."""

_AT_ONCE = 1 << 24
"""Bytes that are read at a time to check a file."""


class NpzBytes:
    """The bytes of one array of an .npz file: `NpzBytes(path, "data")[10:20]`.

    What lies in the file uncompressed is mapped: opening reads nothing, all processes share one
    copy, and the system drops what it needs the memory for. What is compressed is read into memory.
    A pickled copy holds the path alone and opens the file again.

    Attributes:
        dtype: of the array; slices mean what they say for uint8 alone.
        shape: of the array.
        mapped: whether the file is mapped.

    Raises:
        KeyError: the file has no such array.
        ValueError: the file is not what it was when the pickled copy was made.
        zipfile.BadZipFile: the file is damaged.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    mapped: bool
    _data: mmap.mmap | bytes

    def __init__(self, path: str | Path, name: str) -> None:
        self._path, self._name = os.path.abspath(path), f"{name}.npy"
        self._stamp = _stamp(self._path)
        self._open()

    def __getitem__(self, part: slice) -> bytes:
        """Copy a part; the slice counts bytes and has no step."""
        start, stop, _ = part.indices(len(self))
        return self._data[self._start + start : self._start + stop]

    def __len__(self) -> int:
        """Count the bytes."""
        return self._length

    def check(self) -> None:
        """Read the array once and compare it with the checksum of the zip file.

        Raises:
            zipfile.BadZipFile: they differ.
        """
        with zipfile.ZipFile(self._path) as archive, archive.open(self._name) as member:
            while member.read(_AT_ONCE):
                pass

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_name": self._name, "_stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if _stamp(self._path) != self._stamp:
            raise ValueError(f"{self._path} was changed since it was opened; open it again.")
        self._open()

    def _open(self) -> None:
        with zipfile.ZipFile(self._path) as archive:
            info = archive.getinfo(self._name)
            self.mapped = info.compress_type == zipfile.ZIP_STORED
            if not self.mapped:
                with archive.open(info) as member:
                    self.shape, self.dtype = _read_header(member)
                    self._data, self._start = member.read(), 0
                self._length = len(self._data)
                return
        with open(self._path, "rb") as file:
            begin = _payload(file, info)
            file.seek(begin)
            self.shape, self.dtype = _read_header(file)
            self._start = file.tell()
            self._length = info.file_size - (self._start - begin)
            if self._start + self._length > os.fstat(file.fileno()).st_size:
                raise zipfile.BadZipFile(f"{self._name} ends beyond the end of the file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def checksum(data: bytes) -> int:
    """Return the CRC-32 of some bytes, which every accidental change of up to 4 bytes changes."""
    return zlib.crc32(data)


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _payload(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Find where a member's own bytes begin."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no header where {info.filename} should begin")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    return int(info.header_offset + _LOCAL_HEADER.size + name + extra)


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    return shape, dtype


_REQUIRED = ("data", "offsets", "label")
_SPLITS = np.array(["train", "val", "test"])


class PackStore(ImageStore):
    """Encoded images end to end in one array, which all processes share where it is mapped.

    With `checks`, the CRC-32 of each image, an image is compared with its own when it is read.
    """

    def __init__(
        self,
        data: NpzBytes,
        offsets: NDArray[np.int64],
        checks: NDArray[np.uint32] | None,
        path: Path,
    ) -> None:
        self._data = data
        self._offsets = offsets
        self._checks = checks
        self._path = str(path)

    def encoded(self, index: int) -> bytes:
        """Read one image's bytes, or raise `DamagedImageError` if their checksum is another."""
        data = self._data[int(self._offsets[index]) : int(self._offsets[index + 1])]
        if self._checks is not None and checksum(data) != int(self._checks[index]):
            raise DamagedImageError("its checksum does not match, so the pack is damaged there")
        return data

    def place(self, index: int) -> str:
        """Return the pack's path and the image's number in it."""
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
        data = NpzBytes(path, "data")
        with _open(path) as file:
            offsets, labels = file["offsets"].astype(np.int64), file["label"].astype(np.int64)
            splits = _SPLITS[_checked_splits(file["split"], path)] if "split" in file else None
            names = file.get("name")
            checks = file.get("crc32")
            classes = _class_names(file, labels)
        if checks is None and data.mapped:
            data.check()  # once as a whole, since no image can be checked when it is read
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); get it again.") from error
    per_image = {"splits": splits, "names": names, "checksums in crc32": checks}
    _check(data, offsets, len(labels), per_image, path)
    return Listing(
        store=PackStore(data, offsets, checks, path),
        names=number_within_class(labels) if names is None else _text(names),
        labels=labels,
        classes=classes,
        splits=np.full(len(labels), "") if splits is None else splits,
    )


def _text(names: NDArray[Any]) -> list[str]:
    if names.dtype.kind != "S":
        return [str(name) for name in names]
    # surrogateescape: the names of files are not always text.
    return [name.decode("utf-8", "surrogateescape") for name in names.tolist()]


def _open(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # np.load would take it for a pickle, and say so
        raise ValueError(f"{path} is not a readable .npz file; is it whole?")
    return np.load(path, allow_pickle=False)


def _class_names(file: Any, labels: NDArray[np.int64]) -> tuple[str, ...]:
    # WordNet ids first: the other forms of mini-ImageNet call a class so, and number it alike.
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
    data: NpzBytes,
    offsets: NDArray[np.int64],
    count: int,
    per_image: dict[str, NDArray[Any] | None],
    path: Path,
) -> None:
    wrong = ""
    if data.dtype != np.uint8 or len(data.shape) != 1:
        wrong = f"data must be uint8 (bytes,), not {data.dtype} {data.shape}"
    elif offsets.shape != (count + 1,):
        wrong = f"{count} labels need {count + 1} offsets, not {offsets.shape}"
    elif strange := [
        f"{what}, not {array.shape}"
        for what, array in per_image.items()
        if array is not None and array.shape != (count,)
    ]:
        wrong = f"{count} labels need {count} {strange[0]}"
    elif offsets[0] < 0 or offsets[-1] > len(data) or (np.diff(offsets) < 0).any():
        wrong = f"offsets must rise from 0 to at most {len(data)}, the length of data"
    if wrong:
        raise ValueError(f"{path} is not a valid pack: {wrong}.")
