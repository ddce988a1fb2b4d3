"""Shards: what is written and found, and what is missing, cut short or damaged."""

from __future__ import annotations

import functools
import gc
import http.server
import json
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

from maskdistill.data import DamagedDataError, DamagedImageWarning, open_data
from maskdistill.data.packing import pack_shards
from maskdistill.data.shards import ShardError, Shards, open_shards, read_shard
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


@pytest.mark.parametrize("shards", [0, 16])
def test_more_shards_than_images(tmp_path: Path, shards: int) -> None:
    source = write_class_folders(tmp_path / "data")
    with pytest.raises(ValueError, match=f"15 training images do not fill {shards} shards"):
        pack_shards(source, tmp_path / "out", shards)


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
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for call in (
        lambda: open_shards(folder),
        lambda: pack_shards(folder, tmp_path / "out", 2),
    ):
        with pytest.raises(ImportError, match=r'pip install "maskdistill\[shards\]"'):
            call()


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


def test_a_missing_shard_is_named(copy: Path) -> None:
    shards = open_shards(copy)
    (copy / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match="train-000002.tar cannot be opened"):
        shards.load()


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
    with pytest.raises(ValueError, match="read by maskdistill.data.shards.open_shards"):
        open_data(folder)


# --- damage


def test_a_shard_that_was_cut_short_loses_its_last_images(copy: Path) -> None:
    before = seen(open_shards(copy))
    shard = copy / "train-000001.tar"
    with tarfile.open(shard) as archive:
        third = archive.getmembers()[5]  # .cls and .jpg each: the third image's file
    shard.write_bytes(shard.read_bytes()[: third.offset_data + 100])
    data = open_shards(copy).load()
    with pytest.warns(DamagedImageWarning) as caught:
        found = [identity(image) for image, _ in data]
    assert ["train-000001.tar, image 2 " in str(caught[0].message), len(caught)] == [True, 2]
    assert found == [*before[:6], before[8], before[8], *before[8:]]
    with pytest.warns(DamagedImageWarning), pytest.raises(DamagedDataError, match="max_damaged=1"):
        list(open_shards(copy, max_damaged=1).load())


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
    data = shards.load()
    assert data.labels.tolist() == [-1, -1, 2]
    assert [identity(data[i][0]) for i in (0, 2)] == [(0, 1), (0, 3)]
    with pytest.warns(DamagedImageWarning, match="image 1 "):
        assert identity(data[1][0]) == (0, 3)


def test_loading_takes_no_more_than_asked(folder: Path) -> None:
    shards = open_shards(folder)
    everything = seen(shards)
    for limit in (0, 3, 4, 9, 15, 99):
        assert contents(shards.load(limit)) == everything[:limit]
    assert isinstance(shards.load(1)[0][0], Image.Image)
    assert isinstance(shards.load(1).encoded(0), bytes)
