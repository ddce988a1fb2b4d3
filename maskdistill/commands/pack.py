"""``maskdistill pack``: a data set in one file, or in shards."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from maskdistill.commands.said import plain_warning


def pack(
    source: Path,
    out: Path,
    /,
    shards: int | None = None,
    format: str = "auto",
    allow_pickle: bool = False,
    size: int | None = None,
    quality: int | None = None,
    max_damaged: int = 10,
    workers: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn a data set into one file that opens by memory map, or into shards that stream.

    The pack has the images, the classes and the split of its source. Encoded images are copied as
    they are; each is decoded once to check it. docs/data.md describes forms, packs and shards.

    Args:
        source: folder or file of images, in any form that --data takes.
        out: the file to write, NAME.npz; with --shards, the folder.
        shards: write WebDataset shards instead: so many for training, their share for validation.
        format: auto, or the form of the source by name.
        allow_pickle: permit reading pickles (by an unpickler that can only build arrays).
        size: pixels to which the shorter side of larger images is reduced.
        quality: of JPEG, to which all images are then encoded; without it, at 95 what was reduced.
        max_damaged: how many images that do not decode may be left out.
        workers: processes that decode; without it, one per core.
        overwrite: replace OUT if it exists.
    """
    from maskdistill.data import packing

    options: dict[str, Any] = {
        "format": format, "allow_pickle": allow_pickle, "size": size, "quality": quality,
        "max_damaged": max_damaged, "workers": workers, "overwrite": overwrite,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = plain_warning
        packed = (
            packing.pack(source, out, **options)
            if shards is None
            else packing.pack_shards(source, out, shards, **options)
        )
    print(
        f"{packed.path}: {packed.images:,} images of {packed.classes} classes, "
        f"{packed.bytes / 2**20:,.1f} MiB; {packed.note}"
    )
    if packed.damaged:
        print(f"{len(packed.damaged)} damaged images were left out.")
