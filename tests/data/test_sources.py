"""`open_data`: every form is recognised, read, split and numbered alike; faults are explained."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from maskdistill.data.sources import (
    DamagedDataError,
    DamagedImageWarning,
    DataSplits,
    ImageDataset,
    open_data,
    split_by_name,
)

CLASSES = ("n01", "n02", "n03")
PER_CLASS = 6
FEW_SHOT = {"train": ("n01",), "val": ("n02",), "test": ("n03",)}
RESPLIT = "3 classes, 6 images each, re-split 5/1 per class because "


# --- small data in every form. An image's colour says what it is: red = class, green = number.


def picture(class_number: int, number: int) -> Image.Image:
    """Make the image that `identity` recognises."""
    return Image.new("RGB", (8, 8), (40 * class_number, 10 * number, 128))


def identity(image: Image.Image) -> tuple[int, int]:
    """Tell class and number of an image, through the losses of a JPEG."""
    red, green, _ = np.asarray(image, dtype=float).mean(axis=(0, 1))
    return round(red / 40), round(green / 10)


def encoded(class_number: int, number: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(class_number, number).save(buffer, form)
    return buffer.getvalue()


def file_name(wnid: str, number: int) -> str:
    return f"{wnid}{number:08d}.jpg"


def write_csv(
    root: Path, *, header: str = "filename,label", images: str = "images", blank: bool = False
) -> Path:
    (root / images).mkdir(parents=True, exist_ok=True)
    for split, wnids in FEW_SHOT.items():
        rows = [header]
        for wnid in wnids:
            for number in range(PER_CLASS):
                name = file_name(wnid, number)
                picture(CLASSES.index(wnid), number).save(root / images / name, quality=95)
                rows.append(f"{name},{wnid}")
        if blank:
            rows.insert(3, "")
        (root / f"{split}.csv").write_text("\r\n".join(rows) + "\r\n")
    return root


def write_class_folders(root: Path, wnids: tuple[str, ...] = CLASSES, count: int = 6) -> Path:
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for number in range(count):
            picture(CLASSES.index(wnid), number).save(
                root / wnid / file_name(wnid, number), quality=95
            )
    return root


def write_few_shot_folders(root: Path) -> Path:
    for split, wnids in FEW_SHOT.items():
        write_class_folders(root / split, wnids)
    return root


def write_pickles(root: Path, val: str = "val") -> Path:
    root.mkdir()
    for split, wnids in FEW_SHOT.items():
        numbers = [(CLASSES.index(wnid), n) for wnid in wnids for n in range(PER_CLASS)]
        images = np.stack([np.asarray(picture(*number)) for number in numbers])
        class_dict = {
            wnid: list(range(k * PER_CLASS, (k + 1) * PER_CLASS)) for k, wnid in enumerate(wnids)
        }
        name = f"mini-imagenet-cache-{val if split == 'val' else split}.pkl"
        content = {"image_data": images, "class_dict": class_dict}
        (root / name).write_bytes(pickle.dumps(content, 2))
    return root


def write_parquet(
    file: Path,
    numbers: list[tuple[int, int]],
    *,
    names: tuple[str, ...] | None = CLASSES,
    text_labels: bool = False,
    paths: bool = True,
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [
        {"bytes": encoded(c, n), "path": file_name(CLASSES[c], n) if paths else None}
        for c, n in numbers
    ]
    labels = [CLASSES[c] if text_labels else c for c, _ in numbers]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, image_type), "label": pa.array(labels)})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, file, row_group_size=4)


def all_numbers(count: int = PER_CLASS) -> list[tuple[int, int]]:
    return [(c, n) for n in range(count) for c in range(len(CLASSES))]


def write_few_shot_parquet(root: Path) -> Path:
    for split, wnids in FEW_SHOT.items():
        numbers = [(CLASSES.index(wnid), n) for wnid in wnids for n in range(PER_CLASS)]
        write_parquet(root / "data" / f"{split}-00000-of-00001.parquet", numbers)
    return root


def pack_arrays(numbers: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    images = [encoded(c, n) for c, n in numbers]
    return {
        "data": np.frombuffer(b"".join(images), np.uint8),
        "offsets": np.cumsum([0] + [len(image) for image in images]),
        "label": np.array([c for c, _ in numbers], dtype=np.int16),
    }


def write_pack(root: Path) -> Path:
    root.mkdir()
    np.savez(root / "pack.npz", **pack_arrays(all_numbers()), wnid=np.array(CLASSES))
    return root / "pack.npz"


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "ravi": ("ravi-csv", write_csv),
    "images beside the csv": ("ravi-csv", lambda root: write_csv(root, images=".")),
    "vinyals": ("vinyals-csv", lambda root: write_csv(root, header="filename,class", blank=True)),
    "flat folders": ("imagefolder", write_class_folders),
    "few-shot folders": ("imagefolder", write_few_shot_folders),
    "pickles": ("pickle", write_pickles),
    "pickles, validation": ("pickle", lambda root: write_pickles(root, "validation")),
    "parquet": ("parquet", write_few_shot_parquet),
    "pack": ("pack", write_pack),
}


def contents(dataset: ImageDataset) -> list[tuple[int, int]]:
    """Read a whole data set and check every label against what the image shows."""
    seen = []
    for index in range(len(dataset)):
        image, label = dataset[index]
        assert image.mode == "RGB"
        assert type(label) is int
        assert label == identity(image)[0] == dataset.labels[index]
        seen.append(identity(image))
    return seen


# --- every form


@pytest.mark.parametrize("case", WRITERS)
def test_every_form_is_detected_read_and_resplit(tmp_path: Path, case: str) -> None:
    name, write = WRITERS[case]
    data = open_data(write(tmp_path / "data"), allow_pickle=name == "pickle")
    assert data.format == name
    assert data.classes == CLASSES
    assert data.note.startswith(RESPLIT)
    assert data.train.labels.dtype == np.int64
    train, val = contents(data.train), contents(data.val)
    assert sorted(train + val) == sorted(all_numbers())
    assert [c for c, _ in sorted(val)] == [0, 1, 2]


@pytest.mark.parametrize("case", ["flat folders", "parquet", "pickles", "pack"])
def test_a_data_set_survives_pickling(tmp_path: Path, case: str) -> None:
    name, write = WRITERS[case]
    data = open_data(write(tmp_path / "data"), allow_pickle=name == "pickle")
    before = contents(data.train)  # opens parquet files, which must not go along
    assert contents(pickle.loads(pickle.dumps(data.train))) == before


def test_the_same_files_are_held_out_in_every_form_that_names_them(tmp_path: Path) -> None:
    forms = ("ravi", "flat folders", "few-shot folders", "parquet")
    opened = [open_data(WRITERS[form][1](tmp_path / form)) for form in forms]
    held_out = {tuple(sorted(contents(data.val))) for data in opened}
    assert len(held_out) == 1


def test_an_image_level_split_is_kept(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", count=4)
    write_class_folders(tmp_path / "validation", count=2)
    write_class_folders(tmp_path / "test", count=3)
    data = open_data(tmp_path)
    assert data.format == "imagefolder"
    assert sorted(contents(data.train)) == sorted(all_numbers(4))
    assert sorted(contents(data.val)) == sorted(all_numbers(2))
    assert data.note == (
        "3 classes, 12 train and 6 val images as the source splits them, 9 other images left out."
    )


def test_test_images_validate_where_there_are_no_others(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", count=4)
    write_class_folders(tmp_path / "test", count=2)
    data = open_data(tmp_path)
    assert sorted(contents(data.val)) == sorted(all_numbers(2))
    assert "12 train and 6 test images" in data.note


def test_a_split_whose_val_lacks_a_class_is_kept(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", count=4)
    write_class_folders(tmp_path / "val", ("n01", "n03"), count=2)
    data = open_data(tmp_path)
    assert (len(data.train), data.classes) == (12, CLASSES)
    assert {c for c, _ in contents(data.val)} == {0, 2}


def test_splits_that_share_some_classes_are_pooled(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", ("n01", "n02"))
    write_class_folders(tmp_path / "val", ("n02", "n03"))
    data = open_data(tmp_path)
    assert (len(data.train), len(data.val)) == (20, 4)
    assert "6 to 12 images each" in data.note
    assert "share only some of the classes" in data.note


def test_class_folders_with_a_stray_test_folder_are_flat(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    write_class_folders(tmp_path / "test", ("n01",))
    (tmp_path / "n01" / "._n0100000001.jpg").write_bytes(b"macOS leaves these")
    data = open_data(tmp_path)
    assert sorted(contents(data.train) + contents(data.val)) == sorted(all_numbers())
    assert data.note.endswith("; folders left out: test/.")


def test_parquet_keeps_its_split_and_reads_any_row(tmp_path: Path) -> None:
    numbers = all_numbers()
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", numbers[:8])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", numbers[8:15])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", numbers[15:])
    data = open_data(tmp_path)
    assert contents(data.train) == numbers[:15]
    assert contents(data.val) == numbers[15:]
    order = np.random.default_rng(0).permutation(15).tolist()
    assert [identity(data.train[i][0]) for i in order] == [numbers[i] for i in order]


@pytest.mark.parametrize(
    ("options", "classes"),
    [
        ({"text_labels": True, "names": None}, CLASSES),
        ({"names": None, "paths": False}, ("0", "1", "2")),
        ({"names": ("c", "b", "a")}, ("a", "b", "c")),
        ({"names": (*CLASSES, "n04")}, CLASSES),
    ],
    ids=["text", "numbers", "unsorted names", "an absent class"],
)
def test_parquet_labels(tmp_path: Path, options: dict, classes: tuple[str, ...]) -> None:
    write_parquet(tmp_path / "all.parquet", all_numbers(), **options)
    data = open_data(tmp_path / "all.parquet")
    assert data.classes == classes
    turned = classes[0] == "a"  # sorting by name turns the numbers round
    for image, label in (data.train[i] for i in range(len(data.train))):
        assert label == (2 - identity(image)[0] if turned else identity(image)[0])


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this platform has no fork"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_forked_workers_read_parquet_that_their_parent_has_open(tmp_path: Path) -> None:
    train = open_data(write_few_shot_parquet(tmp_path)).train
    expected = contents(train)
    loader: DataLoader = DataLoader(
        train, 4, num_workers=2, multiprocessing_context="fork", collate_fn=identities_of
    )
    assert [identity for batch in loader for identity in batch] == expected


def identities_of(batch: list[tuple[Image.Image, int]]) -> list[tuple[int, int]]:
    return [identity(image) for image, _ in batch]


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_few_shot_parquet(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "maskdistill\[train\]"'):
        open_data(root)


def test_a_pack_keeps_its_split(tmp_path: Path) -> None:
    numbers = all_numbers()
    split = np.array([0] * 12 + [1] * 6)
    np.savez(tmp_path / "p.npz", **pack_arrays(numbers), split=split, class_name=["b", "c", "a"])
    data = open_data(tmp_path / "p.npz")
    assert data.classes == ("a", "b", "c")
    assert [identity(data.val[i][0]) for i in range(6)] == numbers[12:]
    assert data.val.labels.tolist() == [1, 2, 0] * 2


def test_a_pack_without_names_numbers_its_classes(tmp_path: Path) -> None:
    arrays = pack_arrays(all_numbers(8)[:22])
    arrays["label"] = np.arange(22) // 2
    np.savez(tmp_path / "p.npz", **arrays)
    data = open_data(tmp_path / "p.npz")
    assert data.classes == tuple(f"{number:02d}" for number in range(11))
    assert (len(data.train), len(data.val)) == (11, 11)


def test_a_csv_that_a_spreadsheet_saved(tmp_path: Path) -> None:
    root = write_csv(tmp_path)
    for table in root.glob("*.csv"):
        table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())  # a byte-order mark
    assert len(open_data(root).train) == 15


def test_a_csv_row_that_comes_twice_counts_once(tmp_path: Path) -> None:
    root = write_csv(tmp_path)
    with (root / "test.csv").open("a") as file:
        file.write(f"{file_name('n01', 0)},n01\n")
    data = open_data(root)
    assert len(data.train) + len(data.val) == 18
    assert "1 repeated CSV rows counted once" in data.note


# --- the split rule


@pytest.mark.parametrize(
    ("images", "held_out"), [(1, 0), (2, 1), (3, 1), (8, 1), (9, 2), (10, 2), (600, 100)]
)
def test_one_image_in_six_is_held_out(images: int, held_out: int) -> None:
    names = [f"{number}.jpg" for number in range(images)]
    train, val = split_by_name(names, np.zeros(images, dtype=np.int64))
    assert (len(train), len(val)) == (images - held_out, held_out)
    assert sorted([*train, *val]) == list(range(images))


def test_the_split_is_the_same_everywhere_and_in_any_order() -> None:
    names = [file_name("n01532829", number) for number in range(1, 25)]
    labels = np.zeros(24, dtype=np.int64)
    _, val = split_by_name(names, labels)
    # Written down once: a change here moves images between people's training and validation sets.
    expected = [file_name("n01532829", number) for number in GOLDEN]
    assert [names[i] for i in val] == expected
    order = np.random.default_rng(0).permutation(24)
    shuffled = [names[i] for i in order]
    _, val = split_by_name(shuffled, labels)
    assert sorted(shuffled[i] for i in val) == expected


GOLDEN = (8, 10, 15, 19)


# --- damaged images


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def folders_with_damage(root: Path, numbers: tuple[int, ...]) -> Path:
    """Write two classes of 12 images with a split of their own, so that positions are known."""
    for split in ("train", "val"):
        write_class_folders(root / split, ("n01", "n02"), count=12)
    for number in numbers:
        damage(root / "train" / "n01" / file_name("n01", number))
    return root


def test_a_damaged_image_is_reported_once_and_the_next_one_stands_in(tmp_path: Path) -> None:
    train = open_data(folders_with_damage(tmp_path, (3, 4, 11))).train
    with pytest.warns(DamagedImageWarning) as caught:
        image, label = train[3]
    assert (identity(image), label) == ((0, 5), 0)
    assert [file_name("n01", n) in str(w.message) for n, w in zip((3, 4), caught, strict=True)]
    assert all(w.filename == __file__ for w in caught)
    with pytest.warns(DamagedImageWarning, match="3 of at most 10"):
        image, label = train[11]
    assert (identity(image), label) == ((1, 0), 1)  # the stand-in's own label
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert identity(train[3][0]) == (0, 5)
    assert [Path(place).name for place in train.damaged] == [
        file_name("n01", n) for n in (3, 4, 11)
    ]


def test_too_many_damaged_images_stop_the_run(tmp_path: Path) -> None:
    train = open_data(folders_with_damage(tmp_path, (0, 2, 4)), max_damaged=2).train
    with pytest.warns(DamagedImageWarning):
        _ = train[0], train[2]
    with pytest.raises(DamagedDataError, match=r"3 images .* more than max_damaged=2") as caught:
        train[4]
    assert file_name("n01", 4) in str(caught.value)


def test_train_and_val_share_one_count(tmp_path: Path) -> None:
    root = folders_with_damage(tmp_path, (0,))
    damage(root / "val" / "n01" / file_name("n01", 0))
    data = open_data(root, max_damaged=1)
    with pytest.warns(DamagedImageWarning):
        _ = data.train[0]
    with pytest.raises(DamagedDataError):
        data.val[0]


def test_nothing_readable_is_an_error_and_not_an_endless_search(tmp_path: Path) -> None:
    write_class_folders(tmp_path, ("n01", "n02"), count=2)
    for path in tmp_path.glob("*/*.jpg"):
        path.write_bytes(b"")
    train = open_data(tmp_path).train
    with (
        pytest.warns(DamagedImageWarning, match="empty"),
        pytest.raises(DamagedDataError, match="None of the 2 images is readable"),
    ):
        train[0]


def four_damaged(root: Path) -> Path:
    folders_with_damage(root, (0, 6))
    for number in (2, 8):  # images 14 and 20
        damage(root / "train" / "n02" / file_name("n02", number))
    return root


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this platform has no fork"
)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_share_one_count(tmp_path: Path) -> None:
    root = four_damaged(tmp_path)
    damage(root / "val" / "n01" / file_name("n01", 0))
    data = open_data(root, max_damaged=4)
    # Batches of 6 take turns: worker 0 meets the damaged images 0 and 14, worker 1 meets 6 and 20.
    loader: DataLoader = DataLoader(
        data.train, 6, num_workers=2, multiprocessing_context="fork", collate_fn=identities_of
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedImageWarning)  # forked workers inherit this
        assert sum(map(len, loader)) == 24
    assert len(data.train.damaged) == 4
    with pytest.raises(DamagedDataError, match="5 images are damaged"):
        data.val[0]


def test_a_spawned_worker_shares_the_count(tmp_path: Path) -> None:
    train = open_data(four_damaged(tmp_path)).train
    # How a data set reaches a spawned worker, without the seconds that starting one takes.
    workers_copy = pickle.loads(ForkingPickler.dumps(train))
    with pytest.warns(DamagedImageWarning):
        _ = workers_copy[0], workers_copy[14]
    assert len(train.damaged) == 2


@pytest.mark.parametrize("form", ["pack", "parquet"])
def test_damage_inside_a_container_is_reported_with_its_place(tmp_path: Path, form: str) -> None:
    if form == "pack":
        arrays = pack_arrays(all_numbers())
        arrays["data"] = arrays["data"].copy()
        arrays["data"][arrays["offsets"][4] : arrays["offsets"][5]] = 0
        np.savez(tmp_path / "p.npz", **arrays)
        data, place = open_data(tmp_path / "p.npz"), "p.npz, image 4 "
    else:
        images = [{"bytes": encoded(n % 3, n // 3), "path": None} for n in range(18)]
        images[6]["bytes"] = None
        table = pa.table({"image": images, "label": [n % 3 for n in range(18)]})
        pq.write_table(table, tmp_path / "p.parquet", row_group_size=4)
        data, place = open_data(tmp_path / "p.parquet"), "p.parquet, row group 1, row 2 "
    with pytest.warns(DamagedImageWarning) as caught:
        _ = [split[index] for split in (data.train, data.val) for index in range(len(split))]
    assert [place in str(warning.message) for warning in caught] == [True]


def test_a_file_that_goes_during_the_run_is_no_damaged_image(tmp_path: Path) -> None:
    train = open_data(write_class_folders(tmp_path / "data")).train
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="n01"):
        train[0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    write_class_folders(tmp_path, ("n01", "n02"), count=2)
    grey = Image.new("L", (8, 8), 255 if mode == "1" else 77)
    if mode == "P":
        image = Image.merge("LA", (grey, grey)).convert("RGBA").quantize(4)
        assert "transparency" in image.info or image.has_transparency_data
    elif mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 77 * 257, dtype=np.uint16))
    else:
        image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    assert image.mode == mode
    for path in tmp_path.glob("*/*.jpg"):
        image.save(path.with_suffix(".tif" if mode == "CMYK" else ".png"))
        path.unlink()
    got, _ = open_data(tmp_path).train[0]
    assert got.mode == "RGB"
    assert got.getpixel((4, 4)) == ((255,) * 3 if mode == "1" else (77,) * 3)


@pytest.mark.parametrize("index", [5, -6])
def test_an_index_out_of_range(tmp_path: Path, index: int) -> None:
    data = open_data(write_class_folders(tmp_path, ("n01", "n02"), count=3))
    assert len(data.train) == 4
    with pytest.raises(IndexError):
        data.train[index]


# --- errors are for people


def error_of(path: Path, format: str = "auto", kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        open_data(path, format)
    return str(caught.value)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "nowhere does not exist" in error_of(tmp_path / "nowhere", kind=FileNotFoundError)


def test_an_unknown_format_name(tmp_path: Path) -> None:
    assert "choose auto, ravi-csv" in error_of(tmp_path, "lmdb")


def test_an_empty_folder_lists_what_was_looked_for(tmp_path: Path) -> None:
    message = error_of(tmp_path)
    for wanted in ("filename,label", "filename,class", "folder of images per class", ".npz"):
        assert wanted in message
    assert "found: nothing: the folder is empty" in message


def test_a_folder_in_a_folder_is_pointed_at(tmp_path: Path) -> None:
    inner = write_class_folders(tmp_path / "mini-imagenet")
    (tmp_path / "README").touch()
    message = error_of(tmp_path)
    assert "and found: README, mini-imagenet/" in message
    assert f"Did you mean {inner} (imagefolder)?" in message


def test_images_without_their_csv_are_not_taken_for_a_class(tmp_path: Path) -> None:
    root = write_csv(tmp_path)
    for table in root.glob("*.csv"):
        table.unlink()
    assert "only one sub-folder, images/, holds images" in error_of(root)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vinyals-csv", "train.csv has the header 'filename,label'"),
        ("imagefolder", "only one sub-folder"),
        ("parquet", "no *.parquet file in it"),
        ("pack", "it is a folder"),
        ("pickle", "no mini-imagenet-cache-train.pkl"),
    ],
)
def test_a_format_that_does_not_fit_says_why(tmp_path: Path, name: str, reason: str) -> None:
    message = error_of(write_csv(tmp_path), name)
    assert f"is not of the format {name!r}: {reason}" in message


@pytest.mark.parametrize("table", ["train.csv", "test.csv"])
def test_a_csv_with_another_header(tmp_path: Path, table: str) -> None:
    root = write_csv(tmp_path)
    lines = (root / table).read_text().splitlines()
    (root / table).write_text("\n".join(["image,wnid", *lines[1:]]))
    message = error_of(root)
    assert table in message
    assert "'image,wnid'" in message
    assert "filename,label" in message


def test_a_csv_row_without_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    root = write_csv(tmp_path, header="filename,class", blank=True)
    (root / "images" / file_name("n02", 4)).unlink()
    message = error_of(root, kind=FileNotFoundError)
    with (root / "val.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    line = lines.index([file_name("n02", 4), "n02"]) + 1
    assert f"val.csv, line {line}: there is no file '{file_name('n02', 4)}'" in message
    assert "1 of the 18 rows" in message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a.jpg", "expected 2 cells"),
        (",n01", "expected a file name and a label"),
        (f"{file_name('n01', 0)},n02", "of class 'n01' in an earlier row"),
    ],
)
def test_a_csv_row_that_is_wrong(tmp_path: Path, row: str, reason: str) -> None:
    root = write_csv(tmp_path)
    with (root / "train.csv").open("a") as file:
        file.write(row + "\n")
    message = error_of(root)
    assert "train.csv, line 8: " in message
    assert reason in message


def test_a_pickle_needs_the_users_consent(tmp_path: Path) -> None:
    message = error_of(write_pickles(tmp_path / "data"))
    assert "allow_pickle=True" in message
    assert "--allow-pickle" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "found a list"),
        ({"images": 1, "labels": 2}, r"found the keys \['images', 'labels'\]"),
        ({"image_data": np.zeros((2, 3)), "class_dict": {"a": [0, 1]}}, "must be uint8"),
        ({"image_data": np.zeros((2, 4, 4, 3), "u1"), "class_dict": {"a": [0, 2]}}, "from 0 to 1"),
        ({"image_data": np.zeros((2, 4, 4, 3), "u1"), "class_dict": {"a": [0]}}, "in no class"),
    ],
)
def test_a_pickle_of_something_else(tmp_path: Path, content: object, reason: str) -> None:
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=reason):
        open_data(path, allow_pickle=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"label": None}, "it has no array label"),
        ({"label": np.array([0, 1, 9] * 6)}, "labels from 0 to 9, but 3 class names"),
        ({"label": np.array([0, 1, 2])}, "3 labels need 4 offsets"),
        ({"split": np.array([0, 1, 7] * 6)}, "split holds 7"),
        ({"split": np.array([0, 1])}, "18 labels need 18 splits"),
        ({"crc32": np.zeros(3, np.uint32)}, "18 labels need 18 checksums in crc32, not (3,)"),
        ({"name": np.array([b"a"])}, "18 labels need 18 names, not (1,)"),
        ({"offsets": np.arange(19)[::-1]}, "offsets must rise"),
        ({"data": np.zeros((2, 2), np.uint8)}, "data must be uint8"),
    ],
)
def test_a_pack_that_contradicts_itself(tmp_path: Path, change: dict, reason: str) -> None:
    arrays = pack_arrays(all_numbers()) | {"wnid": np.array(CLASSES)} | change
    arrays = {name: array for name, array in arrays.items() if array is not None}
    np.savez(tmp_path / "p.npz", **arrays)
    assert reason in error_of(tmp_path / "p.npz")


@pytest.mark.parametrize("name", ["p.npz", "p.parquet"])
def test_a_file_that_was_cut_short(tmp_path: Path, name: str) -> None:
    if name == "p.npz":
        np.savez(tmp_path / name, **pack_arrays(all_numbers()))
    else:
        write_parquet(tmp_path / name, all_numbers())
    damage(tmp_path / name)
    message = error_of(tmp_path / name)
    assert f"{name} is not a readable" in message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_pack_with_a_flipped_bit(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "p.npz", **pack_arrays(all_numbers()))
    content = bytearray((tmp_path / "p.npz").read_bytes())
    content[300] ^= 1  # inside the first array, data
    (tmp_path / "p.npz").write_bytes(content)
    assert "p.npz is damaged (" in error_of(tmp_path / "p.npz")


def test_parquet_without_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b""], "target": [0]}), tmp_path / "train.parquet")
    message = error_of(tmp_path)
    assert "expected the columns image (a struct with bytes) and label" in message
    assert "found image: binary, target: int64" in message


def test_single_images_cannot_be_split(tmp_path: Path) -> None:
    assert "No class has two images" in error_of(write_class_folders(tmp_path, count=1))


def test_a_negative_limit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_damaged must be 0 or more"):
        open_data(tmp_path, max_damaged=-1)


# --- the real data, where it is


def real(name: str) -> Path:
    for parent in Path(__file__).resolve().parents:
        path = parent / "shared" / "data" / name
        if path.exists():
            return path
    pytest.skip(f"shared/data/{name} is not beside this repository (real images, not published)")


def check_images(data: DataSplits, size: int) -> None:
    for dataset in (data.train, data.val):
        for index in range(0, len(dataset), len(dataset) // 50):
            image, label = dataset[index]
            assert (image.size, image.mode) == ((size, size), "RGB")
            assert label == dataset.labels[index]


@pytest.mark.filterwarnings("error")
def test_real_mini_imagenet_csv() -> None:
    data = open_data(real("mini_imagenet_csv"))
    assert data.format == "ravi-csv"
    assert (data.classes[0], data.classes[-1]) == ("n01532829", "n13133613")
    assert np.bincount(data.train.labels).tolist() == [8] * 100
    assert np.bincount(data.val.labels).tolist() == [2] * 100
    check_images(data, 84)


@pytest.mark.filterwarnings("error")
def test_real_mini_imagenet_pack() -> None:
    data = open_data(real("mini64_100c.npz"))
    assert (len(data.train), len(data.val), len(data.classes)) == (49_987, 9_997, 100)
    assert (data.format, data.classes) == ("pack", open_data(real("mini_imagenet_csv")).classes)
    check_images(data, 64)


@pytest.mark.filterwarnings("error")
def test_real_cifar_pack() -> None:
    data = open_data(real("transfer_cifar10.npz"))
    assert (len(data.train), len(data.val)) == (5_000, 1_000)
    assert data.classes[:2] == ("airplane", "automobile")
    check_images(data, 32)


def test_the_folder_around_the_real_data_points_at_its_parts() -> None:
    message = error_of(real("mini_imagenet_csv").parent)
    assert "mini_imagenet_csv (ravi-csv)" in message
    assert "mini64_100c.npz (pack)" in message
