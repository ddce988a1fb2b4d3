"""The forms in which mini-ImageNet, and data laid out like it, lie on disk.

One module per form. Each has a `misfit`, which says in words why a path is not of that form (and
nothing if it is), and a `read`, which makes a `Listing` of it. Detection, and the message when it
fails, both come from `misfit`, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from maskdistill.data.formats import csv_lists, folders, packs, parquet_files, pickles
from maskdistill.data.formats.listing import Listing

__all__ = ["FORMS", "Form", "Listing"]


@dataclass(frozen=True)
class Form:
    """One on-disk form: its name, what it looks like, how to tell and how to read it."""

    name: str
    looks_like: str
    misfit: Callable[[Path], str]
    read: Callable[[Path], Listing]


# In the order in which they are tried. A folder that holds images and pickles of them is read as
# images: pickles come last because they alone need the user's consent.
FORMS = (
    Form(
        "ravi-csv",
        "train.csv, val.csv, test.csv with the header filename,label and the images in images/",
        partial(csv_lists.misfit, label_column="label"),
        partial(csv_lists.read, label_column="label"),
    ),
    Form(
        "vinyals-csv",
        "the same with the header filename,class",
        partial(csv_lists.misfit, label_column="class"),
        partial(csv_lists.read, label_column="class"),
    ),
    Form(
        "imagefolder",
        "one folder of images per class, or train/, val/, test/ with such folders in them",
        folders.misfit,
        folders.read,
    ),
    Form(
        "parquet",
        "train-*.parquet, validation-*.parquet, test-*.parquet with the columns image and label",
        parquet_files.misfit,
        parquet_files.read,
    ),
    Form(
        "pack",
        "one .npz file with the arrays data, offsets and label",
        packs.misfit,
        packs.read,
    ),
    Form(
        "pickle",
        "mini-imagenet-cache-{train,val,test}.pkl",
        pickles.misfit,
        pickles.read,
    ),
)
