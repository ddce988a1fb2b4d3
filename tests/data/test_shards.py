"""Shards: what is written and found, and what is missing, cut short or damaged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import gc
import http.server
import json
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from maskdistill.data import DamagedDataError, DamagedImageWarning, open_data, packing, writing
from maskdistill.data.packing import pack_shards
from maskdistill.data.shards import ShardError, Shards, open_shards, read_shard
from tests.data.test_packing import noise, small_files
from tests.data.test_sources import (
    CLASSES,
    WRITERS,
    contents,
    damage,
    encoded,
    file_name,
    identity,
    write_class_folders,
)
from tests.training.forking import KILLED, die, in_fork


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 15 training images in all, one of validation images."""
    root = tmp_path_factory.mktemp("shards")
    pack_shards(write_class_folders(root / "data"), root / "out", 4)
    return root / "out"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of them that may be damaged."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def seen(shards: Shards) -> list[tuple[int, int]]:
    return contents(shards.load())


# --- writing


@pytest.mark.parametrize("case", ["flat folders", "parquet", "pickles", "pack"])
def test_shards_hold_the_split_of_their_source(tmp_path: Path, case: str) -> None:
    name, write = WRITERS[case]
    options = {"allow_pickle": name == "pickle"}
    source = open_data(write(tmp_path / "data"), **options)
    done = pack_shards(source.path, tmp_path / "out", 4, **options)
    assert (done.images, done.classes) == (18, 3)
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    for split, images in (("train", source.train), ("val", source.val)):
        shards = open_shards(tmp_path / "out", split=split)
        assert shards.classes == CLASSES
        assert sorted(seen(shards)) == sorted(contents(images))
    assert open_shards(tmp_path / "out").counts.tolist() == [4, 4, 4, 3]


def test_every_shard_is_a_sample_of_the_classes(tmp_path: Path) -> None:
    pack_shards(write_class_folders(tmp_path / "data", count=24), tmp_path / "out", 4)
    shards = open_shards(tmp_path / "out")
    labels = np.split(shards.load().labels, shards.counts.cumsum()[:-1])
    assert all(np.bincount(part, minlength=3).min() >= 2 for part in labels)


def test_the_same_data_gives_the_same_shards(folder: Path, tmp_path: Path) -> None:
    pack_shards(write_class_folders(tmp_path / "data"), tmp_path / "out", 4)
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # it leaves its files open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_them(folder: Path) -> None:
    files = str(folder / "train-{000000..000003}.tar")
    data = wds.WebDataset(files, shardshuffle=False).decode("pil").to_tuple("jpg", "cls")
    found = [identity(image) for image, _ in data]
    assert found == seen(open_shards(folder))
    assert [label for _, label in data] == [c for c, _ in found]
    del data
    gc.collect()


def test_images_are_made_smaller(tmp_path: Path) -> None:
    pack_shards(write_class_folders(tmp_path / "data"), tmp_path / "out", 1, size=4)
    assert {image.size for image, _ in open_shards(tmp_path / "out").load()} == {(4, 4)}


def test_shards_are_replaced_on_request_only(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "data")
    pack_shards(source, tmp_path / "out", 4)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        pack_shards(source, tmp_path / "out", 2)
    pack_shards(source, tmp_path / "out", 2, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").glob("train*")) == [
        "train-000000.tar",
        "train-000001.tar",
        "train.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_what_fails_leaves_the_older_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_class_folders(tmp_path / "data")
    pack_shards(source, tmp_path / "out", 4)
    before = seen(open_shards(tmp_path / "out"))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", stop)
    with pytest.raises(KeyboardInterrupt):
        pack_shards(source, tmp_path / "out", 2, overwrite=True)
    assert seen(open_shards(tmp_path / "out")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def killed_before(function: Any, name: str) -> Any:
    """Let a kill come before a function of files gets at one of a name."""
    return lambda *args, **options: (
        die() if Path(args[-1]).name == name else function(*args, **options)
    )


@pytest.mark.parametrize(
    ("module", "function", "name", "left"),
    [
        (os, "replace", "out.replaced", 4),
        (Path, "replace", "out", 4),  # the older shards are out of the way, the newer not there yet
        (shutil, "rmtree", "out.replaced", 2),
    ],
)
def test_a_kill_while_shards_are_replaced(
    tmp_path: Path, module: Any, function: str, name: str, left: int
) -> None:
    source, out = write_class_folders(tmp_path / "data"), tmp_path / "out"
    pack_shards(source, out, 4)

    def killed() -> None:
        setattr(module, function, killed_before(getattr(module, function), name))
        pack_shards(source, out, 2, overwrite=True)

    assert in_fork(killed) == KILLED
    with pytest.raises(FileExistsError, match="overwrite=True"):
        pack_shards(source, out, 3)
    assert len(list(out.glob("train-*.tar"))) == left, "one whole set or the other"
    pack_shards(source, out, 3, overwrite=True)
    assert len(list(out.glob("train-*.tar"))) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_what_people_keep_beside_shards_stays(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "data")
    pack_shards(source, tmp_path / "elsewhere", 4)
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "out.old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    for shards in (1, 2):
        pack_shards(source, tmp_path / "out", shards, overwrite=True)
    for folder, shards in (("elsewhere", 4), ("out.old", 4), ("out", 2)):
        assert len(list((tmp_path / folder).glob("train-*.tar"))) == shards
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("ends", [contextlib.nullcontext(), pytest.raises(OSError, match="bad")])
def test_two_cannot_write_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: Any
) -> None:
    source, out = write_class_folders(tmp_path / "data"), tmp_path / "out"
    with ends, writing.atomic_folder(out) as folder:
        (folder / "first").touch()
        with monkeypatch.context() as patch:
            patch.setattr(packing, "_gather", lambda *_, **__: pytest.fail("it began to work"))
            with pytest.raises(FileExistsError, match=r"Another process is writing .*out right"):
                pack_shards(source, out, 4)
        assert [path.name for path in folder.iterdir()] == ["first"]
        if not isinstance(ends, contextlib.nullcontext):
            raise OSError("bad disk")
    pack_shards(source, out, 4, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]


def test_shards_that_came_meanwhile_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_class_folders(tmp_path / "data"), tmp_path / "out"
    real = packing.divide

    def slow(listing: Any) -> Any:
        with writing.atomic_folder(out) as folder:
            (folder / "another's").touch()
        return real(listing)

    monkeypatch.setattr(packing, "divide", slow)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        pack_shards(source, out, 4)
    assert [path.name for path in out.iterdir()] == ["another's"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="without locks"):
        pack_shards(write_class_folders(tmp_path / "data"), tmp_path / "out", 4)
    assert len(seen(open_shards(tmp_path / "out"))) == 15


@pytest.mark.parametrize(
    ("name", "shards", "workers", "message"),
    [
        ("out", 16, None, "15 training images do not fill 16 shards"),
        ("out", 0, None, "shards must be an int >= 1; got 0"),
        ("out.npz", 2, None, "out.npz is the name of a pack"),
        ("out", 2, -2, "workers must be None or an int >= 0; got -2"),
    ],
)
def test_shards_that_cannot_be(
    tmp_path: Path, name: str, shards: int, workers: int | None, message: str
) -> None:
    source = write_class_folders(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        pack_shards(source, tmp_path / name, shards, workers=workers)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_full_disk(tmp_path: Path) -> None:
    """Nor does the half-written tar file complain when it is forgotten."""
    for i in range(6):
        noise(tmp_path / "data" / "ab"[i % 2] / f"{i}.png", (60, 60), seed=i)
    with pytest.raises(OSError, match="no room left while writing .*out"), small_files():
        pack_shards(tmp_path / "data", tmp_path / "out", 1)
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_damaged_images_are_left_out(tmp_path: Path) -> None:
    source = write_class_folders(tmp_path / "data")
    held_out = contents(open_data(source).val)
    victim = next((0, n) for n in range(6) if (0, n) not in held_out)
    damage(source / "n01" / file_name("n01", victim[1]))
    with pytest.warns(DamagedImageWarning, match="It is left out"):
        done = pack_shards(source, tmp_path / "out", 2)
    assert done.images == 17
    assert victim not in seen(open_shards(tmp_path / "out"))
    assert sorted(seen(open_shards(tmp_path / "out", split="val"))) == sorted(held_out)


def test_without_webdataset_it_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ImportError, match=r'pip install "maskdistill\[shards\]"'):
        open_shards(folder)


# --- finding


def test_every_way_to_name_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = seen(open_shards(folder))
    pattern = str(folder / "train-{000000..000003}.tar")
    files = [str(path) for path in sorted(folder.glob("train*.tar"))]
    commands = [f"pipe:cat {file}" for file in files]
    for where, options in (
        (str(folder / "train.json"), {}),
        (pattern, {}),  # counted from the headers
        (files, {}),
        (pattern, {"index": folder / "train.json"}),
        (commands, {"index": folder / "train.json"}),
        (f"pipe:cat {pattern}", {"index": str(folder / "train.json")}),
    ):
        shards = open_shards(where, **options)
        assert shards.counts.tolist() == [4, 4, 4, 3], where
        assert seen(shards) == wanted, where
        assert shards.classes == (CLASSES if options or where == str(folder / "train.json") else ())
    monkeypatch.chdir(folder.parent)
    assert seen(open_shards("out")) == wanted


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(copy: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(copy))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


def test_shards_of_a_server(server: str, copy: Path) -> None:
    shards = open_shards(f"{server}/train.json")
    assert shards.urls[3] == f"{server}/train-000003.tar"
    assert seen(shards) == seen(open_shards(copy))
    pattern = f"{server}/train-{{000000..000003}}.tar"
    with pytest.raises(ValueError, match="train-000000.tar needs an index"):
        open_shards(pattern)
    assert seen(open_shards(pattern, index=f"{server}/train.json")) == seen(shards)
    (copy / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match=f"{server}/train-000002.tar failed"):
        shards.load()
    with pytest.raises(ShardError, match=f"index {server}/other.json cannot be read"):
        open_shards(f"{server}/other.json")


def test_a_command_that_fails_half_way_is_no_damage(copy: Path) -> None:
    file = copy / "train-000000.tar"
    half = f"pipe:head -c 3000 {file}; exit 7"
    shards = open_shards(
        [half, *map(str, sorted(copy.glob("train*.tar"))[1:])], index=copy / "train.json"
    )
    with pytest.raises(ShardError, match="head -c 3000 .* failed"):
        shards.load()
    # Stopping early on purpose is no failure.
    assert len(list(read_shard(f"pipe:cat {file} {file}", [0]))) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1]", "is not an index of shards"),
        ("{", "is not an index of shards"),
        ('{"shardlist": []}', "lists no shards"),
        ('{"shardlist": [{"url": "a.tar"}]}', "KeyError: 'nsamples'"),
        ('{"shardlist": [{"url": "a.tar", "nsamples": -1}]}', "fewer than 0"),
        ('{"shardlist": [{"url": "pipe:rm -r x", "nsamples": 1}]}', "'pipe:rm -r x', which is not"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        open_shards(tmp_path)


def test_what_does_not_fit_or_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test.json does not exist .it has train, val"):
        open_shards(folder, split="test")
    with pytest.raises(FileNotFoundError, match="it has no index"):
        open_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no index"):
        open_shards(tmp_path / "train.json")
    with pytest.raises(ValueError, match="lists 4 shards, but 1 are named"):
        open_shards(str(folder / "train-000000.tar"), index=folder / "train.json")
    with pytest.raises(ValueError, match="is an index itself"):
        open_shards(folder, index=folder / "train.json")
    with pytest.raises(ValueError, match="max_damaged must be 0 or more"):
        open_shards(folder, max_damaged=-1)


def test_open_data_points_at_the_door_for_shards(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"as --shards, or to maskdistill.data.open_shards"):
        open_data(folder)


# --- damage


def test_a_shard_that_was_cut_short_loses_its_last_images(copy: Path) -> None:
    before = seen(open_shards(copy))
    shard = copy / "train-000001.tar"
    with tarfile.open(shard) as archive:
        third = archive.getmembers()[5]  # .cls and .jpg each: the third image's file
    shard.write_bytes(shard.read_bytes()[: third.offset_data + 100])
    with pytest.warns(DamagedImageWarning, match="It is left out; [12] of at most 10") as caught:
        data = open_shards(copy).load()
    assert ["train-000001.tar, image 2 " in str(caught[0].message), len(caught)] == [True, 2]
    assert caught[0].filename == __file__
    assert contents(data) == [*before[:6], *before[8:]]
    assert [c for c, _ in before[:6] + before[8:]] == data.labels.tolist()
    with pytest.warns(DamagedImageWarning), pytest.raises(DamagedDataError, match="max_damaged=1"):
        open_shards(copy, max_damaged=1).load()
    assert contents(open_shards(copy, max_damaged=0).load(6)) == before[:6]


def test_lost_images_and_those_that_do_not_decode_are_counted_together(copy: Path) -> None:
    before = seen(open_shards(copy))
    shard = copy / "train-000001.tar"
    with tarfile.open(shard) as archive:
        first, last = archive.getmembers()[1], archive.getmembers()[7]
    content = bytearray(shard.read_bytes()[: last.offset_data + 100])
    content[first.offset_data : first.offset_data + 20] = bytes(20)
    shard.write_bytes(content)
    with pytest.warns(DamagedImageWarning, match="image 3 .*; 1 of at most 2"):
        data = open_shards(copy, max_damaged=2).load()
    with pytest.warns(DamagedImageWarning, match="image 0 .*stands in for it; 2 of at most 2"):
        found = [identity(image) for image, _ in data]
    assert found == [*before[:4], before[5], *before[5:7], *before[8:]]
    assert data.damaged == (f"{shard}, image 0",)


def test_a_header_with_a_flipped_bit_ends_the_shard(copy: Path) -> None:
    shard = copy / "train-000001.tar"
    with tarfile.open(shard) as archive:
        second = archive.getmembers()[2]
    content = bytearray(shard.read_bytes())
    content[second.offset + 3] ^= 1
    shard.write_bytes(content)
    assert [image.position for image in read_shard(str(shard), range(4))] == [0]


def test_a_file_that_is_no_tar_has_lost_all(copy: Path) -> None:
    (copy / "train-000001.tar").write_bytes(b"<html>not found</html>" * 100)
    assert not list(read_shard(str(copy / "train-000001.tar"), range(4)))
    lost = open_shards(str(copy / "train-000001.tar"), index=_index(copy / "one.json", [4]))
    with (
        pytest.warns(DamagedImageWarning),
        pytest.raises(DamagedDataError, match=r"None of the 4 .*train-000001.tar, image 0"),
    ):
        lost.load()


def _index(path: Path, counts: list[int]) -> Path:
    shards = [{"url": f"{n}.tar", "nsamples": count} for n, count in enumerate(counts)]
    path.write_text(json.dumps({"shardlist": shards}))
    return path


def test_a_shard_without_images_is_passed_over(copy: Path) -> None:
    files = [str(copy / f"train-00000{n}.tar") for n in (0, 1, 2)]
    shards = open_shards(files, index=_index(copy / "some.json", [4, 0, 4]))
    before = seen(open_shards(copy))
    assert seen(shards) == before[:4] + before[8:12]


def test_shards_of_others(tmp_path: Path) -> None:
    """Folders in the tar, other suffixes, compression, no classes, files that are not images."""
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, data in (
            ("x/1.PNG", encoded(0, 1)),
            ("x/1.json", b"{}"),
            ("x/2.txt", b"no image"),
            ("x/3.png", encoded(0, 3)),
            ("x/3.cls", b"2\n"),
        ):
            (tmp_path / "file").write_bytes(data)
            archive.add(tmp_path / "file", name)
    shards = open_shards(str(tmp_path / "a.tar.gz"))
    assert len(shards) == 3
    with pytest.warns(DamagedImageWarning, match="image 1 .*It is left out"):
        data = shards.load()
    assert data.labels.tolist() == [-1, 2]
    assert [identity(image) for image, _ in data] == [(0, 1), (0, 3)]


def test_loading_takes_no_more_than_asked(folder: Path) -> None:
    shards = open_shards(folder)
    everything = seen(shards)
    for limit in (0, 3, 4, 9, 15, 99):
        assert contents(shards.load(limit)) == everything[:limit]
    assert isinstance(shards.load(1)[0][0], Image.Image)
    assert isinstance(shards.load(1).encoded(0), bytes)
