"""`pack`: the data set in the pack is the source's own, and nothing half-written is ever seen."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import resource
import signal
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskdistill.data import DamagedDataError, DamagedImageWarning, open_data, writing
from maskdistill.data.formats.packs import NpzBytes
from maskdistill.data.packing import pack
from maskdistill.data.sources import DataSplits
from tests.data.test_sources import (
    CLASSES,
    WRITERS,
    all_numbers,
    contents,
    damage,
    encoded,
    file_name,
    pack_arrays,
    write_class_folders,
)

fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this platform has no fork"
)


def bytes_of(data: DataSplits) -> list[bytes]:
    return [part.encoded(i) for part in (data.train, data.val) for i in range(len(part))]


def noise(path: Path, size: tuple[int, int], seed: int = 0, **options: Any) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def data_place(path: Path) -> tuple[int, int]:
    """Find where the images' bytes begin in a pack, and how many there are."""
    data = NpzBytes(path, "data")
    return data._start, len(data)


# --- the same data


@pytest.mark.parametrize("case", ["ravi", "few-shot folders", "parquet", "pickles", "pack"])
def test_a_pack_is_its_source(tmp_path: Path, case: str) -> None:
    name, write = WRITERS[case]
    options = {"allow_pickle": name == "pickle"}
    source = open_data(write(tmp_path / "data"), **options)
    done = pack(source.path, tmp_path / "packed.npz", **options)
    packed = open_data(done.path)
    assert (done.images, done.classes, done.damaged) == (18, 3, ())
    assert done.bytes == done.path.stat().st_size
    assert (packed.format, packed.classes) == ("pack", source.classes)
    assert contents(packed.train) == contents(source.train)  # in the same order
    assert contents(packed.val) == contents(source.val)
    assert bytes_of(packed) == bytes_of(source)


def test_workers_change_nothing(tmp_path: Path) -> None:
    source = WRITERS["parquet"][1](tmp_path / "data")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork
        files = [pack(source, tmp_path / f"{n}.npz", workers=n).path for n in (0, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_numpy_reads_a_pack(tmp_path: Path) -> None:
    pack(WRITERS["flat folders"][1](tmp_path / "data"), tmp_path / "p.npz")
    with zipfile.ZipFile(tmp_path / "p.npz") as archive:
        assert archive.testzip() is None
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
    with np.load(tmp_path / "p.npz") as file:
        assert file["offsets"][-1] == len(file["data"])
        assert file["class_name"].tolist() == list(CLASSES)
        assert file["name"][7] == file_name("n02", 1).encode()
        assert np.bincount(file["split"]).tolist() == [15, 3]


def test_a_split_of_the_source_is_kept_with_its_test_images(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        write_class_folders(tmp_path / "data" / split, count=count)
    source = open_data(tmp_path / "data")
    pack(source.path, tmp_path / "p.npz")
    packed = open_data(tmp_path / "p.npz")
    assert packed.note == source.note
    assert contents(packed.val) == contents(source.val)
    with np.load(tmp_path / "p.npz") as file:
        assert np.bincount(file["split"]).tolist() == [12, 6, 9]


def test_a_test_split_that_validates_still_does(tmp_path: Path) -> None:
    for split, wnids in (("train", CLASSES[:2]), ("val", CLASSES), ("test", CLASSES[:2])):
        write_class_folders(tmp_path / "data" / split, wnids)
    source = open_data(tmp_path / "data")
    assert "test images as the source splits them" in source.note
    pack(source.path, tmp_path / "p.npz")
    assert open_data(tmp_path / "p.npz").note == source.note


def test_names_decide_the_split_of_a_pack_without_one(tmp_path: Path) -> None:
    source = open_data(WRITERS["flat folders"][1](tmp_path / "data"))
    pack(source.path, tmp_path / "p.npz")
    arrays = dict(np.load(tmp_path / "p.npz"))
    del arrays["split"]
    np.savez(tmp_path / "q.npz", **arrays)
    assert contents(open_data(tmp_path / "q.npz").val) == contents(source.val)
    del arrays["name"]
    np.savez(tmp_path / "r.npz", **arrays)
    assert contents(open_data(tmp_path / "r.npz").val) != contents(source.val)


# --- smaller


def test_larger_images_become_smaller_and_the_others_are_copied(tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise(tmp_path / "data" / name / "wide.png", (50, 37))
        noise(tmp_path / "data" / name / "small.png", (20, 90), seed=1)
    pack(tmp_path / "data", tmp_path / "p.npz", size=20)
    data = open_data(tmp_path / "p.npz")
    images = {image.size: i for i, (image, _) in enumerate(data.train)}
    images |= {image.size: i + 2 for i, (image, _) in enumerate(data.val)}
    assert set(images) == {(27, 20), (20, 90)}
    files = bytes_of(data)
    assert files[images[20, 90]] == (tmp_path / "data/a/small.png").read_bytes()
    wide = Image.open(io.BytesIO(files[images[27, 20]]))
    original = Image.open(tmp_path / "data/a/wide.png").resize((27, 20), Image.Resampling.BICUBIC)
    assert wide.format == "JPEG"
    grey, wanted = (np.asarray(one.convert("L"), float) for one in (wide, original))
    assert np.abs(grey - wanted).mean() < 5  # JPEG keeps brightness better than colour


def test_a_quality_is_that_of_every_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for i in range(2):
            noise(tmp_path / "data" / name / f"{i}.jpg", (40, 40), seed=i, quality=95)
    sizes = {}
    for quality in (30, 90):
        done = pack(tmp_path / "data", tmp_path / f"{quality}.npz", quality=quality)
        sizes[quality] = sum(map(len, bytes_of(open_data(done.path))))
    assert sizes[30] < 0.6 * sizes[90] < sum(p.stat().st_size for p in tmp_path.glob("data/*/*"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"size": 0}, "size must be at least 1 pixel, not 0"),
        ({"quality": 0}, "quality must lie between 1 and 95, not 0"),
        ({"quality": 100}, "not 100"),
    ],
)
def test_a_recipe_that_cannot_be(tmp_path: Path, options: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        pack(tmp_path, tmp_path / "p.npz", **options)


# --- damage


def test_damaged_images_are_left_out_and_the_others_stay_where_they_were(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data", count=12)
    before = open_data(tmp_path / "data")
    train, val = contents(before.train), contents(before.val)
    lost = [train[3], train[20], val[1]]
    for c, n in lost:
        damage(tmp_path / "data" / CLASSES[c] / file_name(CLASSES[c], n))
    with pytest.warns(DamagedImageWarning, match="It is left out; [123] of at most 3") as caught:
        done = pack(tmp_path / "data", tmp_path / "p.npz", max_damaged=3)
    assert len(caught) == len(done.damaged) == 3
    assert file_name(CLASSES[lost[0][0]], lost[0][1]) in done.damaged[0]
    after = open_data(tmp_path / "p.npz")
    assert contents(after.train) == [one for one in train if one not in lost]
    assert contents(after.val) == [one for one in val if one not in lost]


def test_too_many_damaged_images_leave_nothing(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data")
    for n in range(3):
        damage(tmp_path / "data" / "n02" / file_name("n02", n))
    with (
        pytest.warns(DamagedImageWarning),
        pytest.raises(DamagedDataError, match="3 images are damaged, more than max_damaged=2"),
    ):
        pack(tmp_path / "data", tmp_path / "p.npz", max_damaged=2)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_split_that_damage_would_change_is_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "data" / "train", count=2)
    write_class_folders(tmp_path / "data" / "val", count=1)
    for path in (tmp_path / "data/train/n03").iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(DamagedImageWarning),
        pytest.raises(ValueError, match="would be split otherwise"),
    ):
        pack(tmp_path / "data", tmp_path / "p.npz")


def test_a_file_that_changes_meanwhile_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_class_folders(tmp_path / "data")
    victim = tmp_path / "data" / "n02" / file_name("n02", 2)
    monkeypatch.setattr(
        "maskdistill.data.packing.check_room", lambda *_: victim.write_bytes(encoded(0, 0))
    )
    with pytest.raises(ValueError, match=f"{victim.name} changed while it was being packed"):
        pack(tmp_path / "data", tmp_path / "p.npz")
    assert not list(tmp_path.glob("p.npz*"))


# --- writing


def test_a_pack_that_exists_is_replaced_on_request_only(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "data")
    out = tmp_path / "new" / "p.npz"  # its folder is made
    pack(source, out)
    inode = out.stat().st_ino
    with pytest.raises(FileExistsError, match="Pass overwrite=True"):
        pack(source, out)
    reader = open_data(out).train
    before = contents(reader)
    write_class_folders(tmp_path / "other", count=3)
    pack(tmp_path / "other", out, overwrite=True)
    assert out.stat().st_ino != inode
    assert contents(reader) == before  # who has the old one open keeps it
    assert len(open_data(out).train) == 6


@pytest.mark.parametrize("name", ["p.zip", "p"])
def test_a_name_that_would_not_be_recognised(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name ends in .npz"):
        pack(tmp_path, tmp_path / name)


def test_a_folder_in_the_place(tmp_path: Path) -> None:
    (tmp_path / "p.npz").mkdir()
    with pytest.raises(FileExistsError, match="is not a file"):
        pack(write_class_folders(tmp_path / "data"), tmp_path / "p.npz", overwrite=True)


@contextmanager
def small_files() -> Iterator[None]:
    """Let no file grow beyond 8 KiB, as on a disk that is full then.

    Around the call alone: pytest's own output may be a file, and longer than that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("options", [{}, {"quality": 95}], ids=["pack", "held images"])
def test_a_full_disk(tmp_path: Path, options: dict[str, int]) -> None:
    for name in ("a", "b"):
        for i in range(3):
            noise(tmp_path / "data" / name / f"{i}.png", (40, 40), seed=i)
    message = "no room left while writing .*p.npz.*nothing of it was kept"
    with pytest.raises(OSError, match=message), small_files():
        pack(tmp_path / "data", tmp_path / "p.npz", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_disk_without_room_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_class_folders(tmp_path / "data")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match=r"p.npz needs about 0 MiB, and 0 MiB are free") as caught:
        pack(source, tmp_path / "p.npz")
    assert caught.value.errno == errno.ENOSPC


def _packs_and_dies(source: Path, out: Path) -> None:
    def die(file: Any) -> None:
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    writing.to_disk = die  # at the very end: all is written, nothing has its name
    pack(source, out, overwrite=True)


@fork
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_leaves_the_older_pack(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "data")
    out = tmp_path / "p.npz"
    pack(write_class_folders(tmp_path / "other", count=2), out)
    before = out.read_bytes()
    child = multiprocessing.get_context("fork").Process(target=_packs_and_dies, args=(source, out))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert out.read_bytes() == before
    assert (tmp_path / "p.npz.tmp").stat().st_size > 2000
    pack(source, out, overwrite=True)
    assert not (tmp_path / "p.npz.tmp").exists()
    assert len(open_data(out).train) == 15


def test_two_cannot_write_one_pack(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    with (
        writing.sole_writer(out),
        pytest.raises(FileExistsError, match="Another process is writing"),
    ):
        pack(write_class_folders(tmp_path / "data"), out)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# --- reading


def test_a_pack_is_mapped_and_its_pickle_is_small(tmp_path: Path) -> None:
    for name in ("a", "b"):
        noise(tmp_path / "data" / name / "0.png", (300, 300))
        noise(tmp_path / "data" / name / "1.png", (300, 300), seed=1)
    pack(tmp_path / "data", tmp_path / "p.npz")
    train = open_data(tmp_path / "p.npz").train
    assert train._store._data.mapped  # type: ignore[attr-defined]
    # The flags of damaged images are shared memory; the rest is what a spawned worker is sent.
    copy = pickle.dumps(train._store)
    assert len(copy) < 2000 < (tmp_path / "p.npz").stat().st_size
    assert pickle.loads(copy).encoded(1) == train._store.encoded(1)


def test_opening_reads_no_images(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    pack(write_class_folders(tmp_path / "data"), out)
    start, length = data_place(out)
    content = bytearray(out.read_bytes())
    content[start : start + length] = bytes(length)
    out.write_bytes(content)
    data = open_data(out, max_damaged=100)  # would fail if they were looked at
    with pytest.warns(DamagedImageWarning), pytest.raises(DamagedDataError, match="None of the"):
        data.train[0]


def test_one_flipped_bit_is_one_damaged_image(tmp_path: Path) -> None:
    out = tmp_path / "p.npz"
    # A flip in a bitmap's pixels decodes without complaint: only the checksum can tell.
    for name in ("a", "b"):
        for i in range(2):
            noise(tmp_path / "data" / name / f"{i}.bmp", (30, 30), seed=i)
    pack(tmp_path / "data", out)
    start, length = data_place(out)
    content = bytearray(out.read_bytes())
    content[start + length - 500] ^= 1  # in the last image
    out.write_bytes(content)
    data = open_data(out)
    with pytest.warns(DamagedImageWarning, match="image 3 .its checksum does not match") as caught:
        _ = [data.train[i] for i in range(2)], [data.val[i] for i in range(2)]
    assert len(caught) == 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_packs_of_others_are_read_mapped_where_they_can_be(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "p.npz", **pack_arrays(all_numbers()), wnid=np.array(CLASSES))
    train = open_data(tmp_path / "p.npz").train
    assert train._store._data.mapped == (save is np.savez)  # type: ignore[attr-defined]
    assert contents(pickle.loads(pickle.dumps(train))) == contents(train)


def test_a_pickled_copy_notices_another_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", data=np.arange(200, dtype=np.uint8))
    data = NpzBytes(tmp_path / "p.npz", "data")
    assert (len(data), data[65:68], data[:0], data[190:999]) == (
        200,
        b"ABC",
        b"",
        bytes(range(190, 200)),
    )
    copy = pickle.dumps(data)
    np.savez(tmp_path / "p.npz", data=np.arange(100, dtype=np.uint8))
    with pytest.raises(ValueError, match="p.npz was changed since it was opened"):
        pickle.loads(copy)
