"""Images listed in CSV files: the splits of Ravi & Larochelle and of Vinyals et al.

    mini-imagenet/
      train.csv  val.csv  test.csv      header "filename,label" (Ravi) or "filename,class" (Vinyals)
      images/                           the images; they may also lie beside the CSV files

The splits of both are of classes: no class is in two of them. Vinyals' `trainval.csv` repeats two
of the others and is not read.
"""

from __future__ import annotations

import csv
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maskdistill.data.formats.listing import ImageFile, Listing, list_files

_SPLITS = ("train", "val", "test")


def misfit(path: Path, label_column: str) -> str:
    """Say why a path holds no CSV lists with this column of labels; nothing if it does."""
    if not path.is_dir():
        return "it is a file, not a folder"
    tables = _tables(path)
    if not tables:
        return "no train.csv, val.csv or test.csv in it"
    _, header = next(_lines(tables[0]), (1, []))
    if not {"filename", label_column} <= set(header):
        return f"{tables[0].name} has the header {','.join(header)!r}"
    return ""


def read(path: Path, label_column: str) -> Listing:
    """List the images of CSV files with the columns `filename` and this one."""
    roots = (path / "images", path)
    names_in = functools.cache(_names_in)  # each folder is listed once, not asked for each file
    files: dict[Path, ImageFile] = {}
    missing: list[_Row] = []
    rows = repeated = 0
    for table in _tables(path):
        for row in _rows(table, label_column):
            rows += 1
            places = (root / row.filename for root in roots)
            found = next((file for file in places if file.name in names_in(file.parent)), None)
            if found is None:
                missing.append(row)
            elif found not in files:
                files[found] = ImageFile(found, row.label, table.stem)
            elif files[found].label == row.label:
                repeated += 1  # kept once: two copies could land on the two sides of the split
            else:
                raise ValueError(
                    f"{row.where}: {row.filename!r} is of class {row.label!r} here, but of class "
                    f"{files[found].label!r} in an earlier row. An image has one class."
                )
    if missing:
        raise FileNotFoundError(_missing_message(missing, rows, path))
    remarks = (f"{repeated:,} repeated CSV rows counted once",) if repeated else ()
    return list_files(list(files.values()), remarks)


class _Row(NamedTuple):
    filename: str
    label: str
    where: str


def _tables(folder: Path) -> list[Path]:
    paths = (folder / f"{split}.csv" for split in _SPLITS)
    return [path for path in paths if path.is_file()]


def _rows(table: Path, label_column: str) -> Iterator[_Row]:
    lines = _lines(table)
    _, header = next(lines, (1, []))
    if not {"filename", label_column} <= set(header):
        raise ValueError(
            f"{table}: expected a header with the columns filename and {label_column}, found "
            f"{','.join(header)!r}. Ravi & Larochelle's lists have 'filename,label', Vinyals' have "
            "'filename,class'."
        )
    name_at, label_at = header.index("filename"), header.index(label_column)
    for number, cells in lines:
        where = f"{table}, line {number}"
        if len(cells) != len(header):
            raise ValueError(
                f"{where}: expected {len(header)} cells as in the header, found {len(cells)}: "
                f"{','.join(cells)!r}."
            )
        row = _Row(cells[name_at], cells[label_at], where)
        if not row.filename or not row.label:
            raise ValueError(
                f"{where}: expected a file name and a label, found {','.join(cells)!r}."
            )
        yield row


def _lines(table: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and cells of every row that is not blank."""
    # utf-8-sig: spreadsheets write a byte-order mark. surrogateescape: a name in another encoding
    # then still equals the name that the file system reports.
    with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file)
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                yield reader.line_num, stripped


def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder)) if folder.is_dir() else frozenset()


def _missing_message(missing: list[_Row], rows: int, folder: Path) -> str:
    first = missing[0]
    return (
        f"{first.where}: there is no file {first.filename!r} in {folder / 'images'} or {folder} "
        f"({len(missing):,} of the {rows:,} rows have no file). Add the missing images, or take "
        "their rows out of the CSV."
    )
