"""Parquet files in the layout of the Hugging Face Hub, as `timm/mini-imagenet` has it.

    mini-imagenet/data/train-00000-of-00013.parquet, validation-*.parquet, test-*.parquet

Columns: `image`, a struct of `bytes` (an encoded image) and `path`; `label`, an integer (whose
names stand in the schema's metadata) or a string. The split is read off the file's name, or its
folder's.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from maskdistill.data.formats.listing import (
    SPLIT_NAMES,
    DamagedImageError,
    ImageStore,
    Listing,
    number_labels,
    number_names,
    number_within_class,
)

_GROUPS_KEPT = 2
"""Row groups kept in memory per process: enough to read in order; a group is about 10 MB."""


class ParquetStore(ImageStore):
    """Encoded images in the row groups of parquet files.

    Files are mapped into memory and opened on first use; neither an open file nor a cached group
    goes with a pickled copy. An image costs the reading of its row group (usually 100 images)
    unless it is one of the last two used.
    """

    direct: ClassVar[bool] = False

    def __init__(self, files: list[Path], group_rows: list[list[int]]) -> None:
        self._files = [str(file) for file in files]
        self._groups = [(f, g) for f, rows in enumerate(group_rows) for g in range(len(rows))]
        self._starts = np.cumsum([0] + [count for rows in group_rows for count in rows])
        self._forget()

    def encoded(self, index: int) -> bytes:
        """Read one image's bytes, or raise `DamagedImageError` where there are none."""
        group, row = self._find(index)
        data: bytes | None = self._read(group)[row].as_py()["bytes"]
        if data is None:
            raise DamagedImageError("the file holds no bytes for it")
        return data

    def place(self, index: int) -> str:
        """Return the file's path, and the image's row group and row."""
        group, row = self._find(index)
        file, number = self._groups[group]
        return f"{self._files[file]}, row group {number}, row {row}"

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": self._files, "_groups": self._groups, "_starts": self._starts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._open: dict[int, Any] = {}
        self._cache: OrderedDict[int, Any] = OrderedDict()

    def _find(self, index: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def _read(self, group: int) -> Any:
        if group not in self._cache:
            file, number = self._groups[group]
            if file not in self._open:
                self._open[file] = _open(Path(self._files[file]))
            # No threads: the data-loading workers are parallel already.
            table = self._open[file].read_row_group(
                number, columns=["image.bytes"], use_threads=False
            )
            self._cache[group] = table.column("image")
            if len(self._cache) > _GROUPS_KEPT:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


def misfit(path: Path) -> str:
    """Say why a path is not parquet; nothing if it is."""
    if _files(path):
        return ""
    return "no *.parquet file in it" if path.is_dir() else "its name does not end in .parquet"


def read(path: Path) -> Listing:
    """List the images of parquet files."""
    files = _files(path)
    readers = [_open(file) for file in files]
    for file, reader in zip(files, readers, strict=True):
        _check_columns(file, reader.schema_arrow)
    counts = [reader.metadata.num_rows for reader in readers]
    labels, classes = _labels(files, readers)
    names = [name for reader in readers for name in _image_paths(reader)]
    return Listing(
        store=ParquetStore(files, [_group_rows(reader) for reader in readers]),
        names=[str(name) for name in names] if all(names) else number_within_class(labels),
        labels=labels,
        classes=classes,
        splits=np.repeat([_split_of(file) for file in files], counts),
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    depths = ("*.parquet", "*/*.parquet", "*/*/*.parquet")
    return sorted(file for depth in depths for file in path.glob(depth))


def _open(path: Path) -> Any:
    try:
        import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError(
            f'Reading {path} needs pyarrow: pip install "maskdistill[train]"'
        ) from error
    try:
        return pq.ParquetFile(path, memory_map=True)
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} is not a readable parquet file ({error}). Was its download cut short, or is "
            "it a Git LFS pointer (then: git lfs pull)?"
        ) from error


def _check_columns(file: Path, schema: Any) -> None:
    import pyarrow as pa

    image = schema.field("image").type if "image" in schema.names else pa.null()
    has_bytes = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
    if not has_bytes or "label" not in schema.names:
        found = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise ValueError(
            f"{file}: expected the columns image (a struct with bytes) and label, found {found}."
        )


def _group_rows(reader: Any) -> list[int]:
    metadata = reader.metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _image_paths(reader: Any) -> list[str | None]:
    image = reader.schema_arrow.field("image").type
    if image.get_field_index("path") < 0:
        return [None] * int(reader.metadata.num_rows)
    column = reader.read(columns=["image.path"], use_threads=False).column("image")
    return [entry["path"] for entry in column.to_pylist()]


def _labels(files: list[Path], readers: list[Any]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Read the label column of all files: the labels, and the classes that they index."""
    values: list[int | str] = []
    for file, reader in zip(files, readers, strict=True):
        column = reader.read(columns=["label"], use_threads=False).column("label").to_pylist()
        if strange := [v for v in column if not isinstance(v, int | str)]:
            raise ValueError(f"{file}: a label must be an integer or a string, not {strange[0]!r}.")
        values += column
    if values and isinstance(values[0], str):
        return number_labels([str(value) for value in values])
    labels = np.array(values, dtype=np.int64)
    names = _class_label_names(readers[0].schema_arrow)
    return labels, names or number_names(int(labels.max(initial=-1)) + 1)


def _class_label_names(schema: Any) -> tuple[str, ...]:
    """Find the names of a Hugging Face ClassLabel; nothing if the schema has none."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get("label", {})
    return tuple(map(str, feature.get("names", ())))


def _split_of(file: Path) -> str:
    for text in (file.stem, file.parent.name):
        if match := re.match(r"(train|validation|val|test)(?![A-Za-z])", text):
            return SPLIT_NAMES[match[1]]
    return ""
