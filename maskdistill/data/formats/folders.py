"""Images in one folder per class, with or without a folder per split above them.

    data/<class>/*.jpg                            flat
    data/{train,val,test}/<class>/*.jpg           with splits

A folder `validation` is read as `val`. A class's images lie directly in its folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from maskdistill.data.formats.listing import (
    SPLIT_NAMES,
    ImageFile,
    Listing,
    is_image_name,
    list_files,
)

_ClassFolders = dict[Path, list[str]]
"""The image names in each class's folder."""


def misfit(path: Path) -> str:
    """Say why a path is not an image folder; nothing if it is."""
    if not path.is_dir():
        return "it is a file, not a folder"
    folders = [folder for split in _splits(path).values() for folder in split]
    if not folders:
        return "none of its sub-folders holds images"
    if len({folder.name for folder in folders}) < 2:
        return f"only one sub-folder, {folders[0].name}/, holds images; two classes are the least"
    return ""


def read(path: Path) -> Listing:
    """List the images of an image folder."""
    splits = _splits(path)
    files = [
        ImageFile(folder / name, folder.name, split)
        for split, folders in splits.items()
        for folder, names in folders.items()
        for name in names
    ]
    return list_files(files, _left_out(path, splits))


def _splits(path: Path) -> dict[str, _ClassFolders]:
    """Find the class folders of each split; the split of a flat folder is `""`."""
    splits: dict[str, _ClassFolders] = {}
    for folder in _subfolders(path):
        if folder.name in SPLIT_NAMES and (classes := _class_folders(folder)):
            splits.setdefault(SPLIT_NAMES[folder.name], {}).update(classes)
    if "train" in splits:
        return splits
    # Class folders on top with a stray test/ beside them are a flat folder: one of the copies of
    # mini-ImageNet that go round is like that.
    flat = _class_folders(path)
    return {"": flat} if flat else splits


def _left_out(path: Path, splits: dict[str, _ClassFolders]) -> tuple[str, ...]:
    top = {folder.relative_to(path).parts[0] for folders in splits.values() for folder in folders}
    others = [folder.name + "/" for folder in _subfolders(path) if folder.name not in top]
    return (f"folders left out: {', '.join(others)}",) if others else ()


def _class_folders(path: Path) -> _ClassFolders:
    found = {folder: _image_names(folder) for folder in _subfolders(path)}
    return {folder: names for folder, names in found.items() if names}


def _subfolders(path: Path) -> list[Path]:
    with os.scandir(path) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if entry.is_dir() and not entry.name.startswith(".")
        )


def _image_names(folder: Path) -> list[str]:
    return sorted(filter(is_image_name, os.listdir(folder)))
