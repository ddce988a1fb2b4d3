"""One array of bytes in an .npz file, mapped into memory where it lies there uncompressed."""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""A zip member's header: signature, what the central directory has too, two lengths."""

_AT_ONCE = 1 << 24
"""Bytes that are read at a time to check a file."""


class NpzBytes:
    """The bytes of one array of an .npz file: `NpzBytes(path, "data")[10:20]`.

    What lies in the file uncompressed is mapped: opening reads nothing, all processes share one
    copy, and the system drops what it needs the memory for. What is compressed is read into memory.
    A pickled copy holds the path alone and opens the file again.

    Example:
        >>> np.savez("pets.npz", data=np.arange(200, dtype=np.uint8))  # doctest: +SKIP
        >>> data = NpzBytes("pets.npz", "data")  # doctest: +SKIP
        >>> len(data), data[65:68]  # doctest: +SKIP
        (200, b'ABC')

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
