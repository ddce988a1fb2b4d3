"""The commands `evaluate` and `attention`: what they print and write, and what they refuse."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskdistill import cli
from maskdistill.cli.backbones import _enlarged, _short
from maskdistill.data import Scenes
from maskdistill.evaluation import attention_quality, load_backbone
from maskdistill.evaluation.measures import MEASURES, measure
from maskdistill.training.job import open_images, saved_config
from tests.data.test_sources import write_class_folders

pytestmark = pytest.mark.filterwarnings("ignore:the best learning rate")
TINY = ("--image-size", "16", "--patch-size", "4", "--depth", "1", "--hidden-dim", "16",
        "--local-crops", "1", "--batch-size", "4", "--scenes", "55", "--max-steps", "1",
        "--evaluations", "0", "--workers", "0", "--device", "cpu")  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    assert cli.main(["train", *TINY, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def second(first: Path) -> Path:
    """Another run on the same images, with other weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    out = first.parent / "second"
    out.mkdir()
    shutil.copy(first / "config.json", out)
    with safe_open(first / "backbone.safetensors", framework="pt") as file:
        header = file.metadata()
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=generator)
        for name, weight in load_file(first / "backbone.safetensors").items()
    }
    save_file(weights, out / "backbone.safetensors", metadata=header)
    return out


def numbers(printed: str) -> dict[str, list[str]]:
    """Read a table: by title, its cells."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in printed.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


# --- evaluate


def test_a_run_is_measured_on_its_own_images(
    first: Path, second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = ("knn", "attention")
    command = ("evaluate", first, second, "--measures", *groups)
    code, printed, complaints = run(capsys, *command)
    assert (code, complaints) == (0, "")
    assert printed.startswith("55 built-in scenes, and 11 more.\nMeasured on 11 validation")
    table = numbers(printed)
    assert re.search(r"^ +first +second +random weights$", printed, re.MULTILINE)
    config = saved_config(first)
    images, _ = open_images(config, config.image_size)
    for place, vit in ((0, load_backbone(first)), (1, load_backbone(second))):
        found = measure(vit, images, 16, groups=groups)
        for name, value in found.values.items():
            one = MEASURES[name]
            title = f"{one.title} ({one.unit})" if one.unit else one.title
            assert table[title][place] == one.shown(value), name
    assert table["20-NN accuracy (%)"][0] != table["20-NN accuracy (%)"][2]
    again = run(capsys, *command)[1]
    assert again == printed


def test_json_and_csv_say_the_same(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = [tmp_path / "deep" / f"scores.{suffix}" for suffix in ("json", "csv")]
    wanted = ("--measures", "knn_20", "shuffling")
    code, printed, _ = run(capsys, "evaluate", first, *wanted, "--json", "--out", outs[0])
    found = json.loads(printed)
    assert code == 0
    assert list(found["backbones"]) == ["first", "random weights"]
    own = found["backbones"]["first"]
    assert own["source"] == str(first)
    assert list(own["values"]) == ["knn_20", "shuffling"]
    assert own["curves"]["shuffling"][0] == [1, 2, 4, 8, 16]
    assert [b["random_weights"] for b in found["backbones"].values()] == [False, True]
    assert found["image_size"] == 16
    assert json.loads(outs[0].read_text()) == found
    code, printed, _ = run(capsys, "evaluate", first, *wanted, "--no-baseline", "--out", outs[1])
    assert printed.endswith(f"\n{outs[1]}\n")
    head, line = csv.reader(outs[1].read_text().splitlines())
    assert head == ["backbone", "source", "random_weights", "knn_20", "shuffling"]
    assert line[:3] == ["first", str(first), "0"]
    assert [float(cell) for cell in line[3:]] == list(own["values"].values())


def test_other_images_and_a_named_model(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_class_folders(tmp_path / "data")
    code, printed, _ = run(
        capsys, "evaluate", first, "vit_tiny_patch16_224", "--image-size", "16", "--patch-size",
        "8", "--data", tmp_path / "data", "--measures", "knn", "occlusion", "discovery", "--json",
    )  # fmt: skip
    found = json.loads(printed)
    assert code == 0
    assert "18 images" in found["data"] or "imagefolder" in found["data"]
    # A named model without weights is its own random one.
    assert list(found["backbones"]) == ["first", "vit_tiny_patch16_224", "random weights"]
    assert found["backbones"]["vit_tiny_patch16_224"]["random_weights"]
    own = found["backbones"]["first"]
    assert set(own["values"]) == {"knn_10", "knn_20", "knn_100", "knn_200", "occlusion_random"}
    assert "no object masks" in own["skipped"]["discovery"]


def test_a_guide_and_dropped_tokens(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_class_folders(tmp_path / "data")
    code, printed, _ = run(
        capsys, "evaluate", first, "--guide", second, "--fill", "drop", "--data",
        tmp_path / "data", "--measures", "occlusion", "stability", "--no-baseline",
    )  # fmt: skip
    assert code == 0
    assert "accuracy under occlusion, salient first (%)" in printed
    assert "left out: stability, of first: patches that are dropped" in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "give at least one backbone"),
        (("FIRST", "--measures", "knm"), "no measure 'knm'. Did you mean knn"),
        (("FIRST", "--out", "x.txt"), "--out must end in .json or .csv; got x.txt."),
        (("nothing",), "'nothing' is no file, no folder and no model of timm"),
        (("vit_tiny_patch16_24",), "Did you mean vit_tiny_patch16_224"),
        (("empty",), "holds no teacher to load"),
        (("strange.pt",), "strange.pt"),
        (("FIRST", "FIRST"), "is given twice"),
        (("FIRST", "vit_tiny_patch16_224"), "--image-size"),
        (("FIRST", "elsewhere"), "trained on different images"),
        (("FIRST", "--data", "plain"), "plain"),
        (("FIRST", "--data", "missing"), "missing does not exist"),
        (("FIRST", "--train-limit", "0"), "must be >= 1"),
        (("FIRST", "--device", "abacus"), "--device abacus cannot be used"),
        (("FIRST", "--guide", "nothing"), "'nothing' is no file"),
    ],
)
def test_what_cannot_be_evaluated(
    first: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    torch.save({"some.weight": torch.zeros(3, 4)}, "strange.pt")
    shutil.copytree(first, "elsewhere")
    config = json.loads(Path("elsewhere/config.json").read_text())
    Path("elsewhere/config.json").write_text(json.dumps(config | {"scenes": 99}))
    Path("plain").mkdir()
    Image.new("RGB", (20, 20), "red").save("plain/red.png")  # of no class
    before = sorted(Path().rglob("*"))
    given = [str(first) if argument == "FIRST" else argument for argument in arguments]
    code, printed, complaints = run(capsys, "evaluate", *given)
    assert (code, printed) == (2, "")
    assert complaints.startswith("error: ")
    assert reason in complaints
    assert sorted(Path().rglob("*")) == before


def test_names_are_as_short_as_they_can_be() -> None:
    assert list(_short(["runs/a", "runs/b/"])) == ["a", "b"]
    assert list(_short(["x/run/one.pt", "y/run/one.pt"])) == ["x/run/one.pt", "y/run/one.pt"]
    assert list(_short(["one", "x/one"])) == ["one", "x/one"]


# --- attention


def test_attention_prints_the_quality(
    first: Path, second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--limit", "22", "--seeds", "3", "--no-discovery")
    code, printed, complaints = run(capsys, "attention", first, second, *options)
    assert (code, complaints) == (0, "")
    scenes = Scenes(22, size=16, split="val")
    images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous()
    masks = torch.from_numpy(scenes.masks)
    expected = [
        attention_quality(load_backbone(run), images, masks, seeds=(3,), discovery=False)
        for run in (first, second)
    ]
    assert printed == (f"22 built-in scenes.\n\nfirst\n{expected[0]}\n\nsecond\n{expected[1]}\n")
    printed = run(capsys, "attention", first, second, *options, "--json")[1]
    found = json.loads(printed)
    assert list(found) == ["first", "second"]
    assert found["first"]["model"] == dataclasses.asdict(expected[0].model)
    assert found["second"]["random_init"] == found["first"]["random_init"]
    assert found["second"]["source"] == str(second)


def test_masks_of_ones_own(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = Scenes(4, size=48, split="val")
    for name, pixels in (("images", scenes.images), ("masks", scenes.masks)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(pixels[i]).save(tmp_path / name / f"{i}.png")
    command = ("attention", first, "--data", tmp_path, "--seeds", "0", "--limit", "3")
    code, printed, _ = run(capsys, *command)
    assert code == 0
    assert printed.startswith("3 images of a folder of images and masks, 0 left out.\n")
    half = numbers(printed)["jaccard head mean"][0]
    most = numbers(run(capsys, *command, "--mass", "0.9")[1])["jaccard head mean"][0]
    assert half != most


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_sheet_of_all_backbones(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    out = tmp_path / "deep" / f"sheet.{suffix}"
    code, printed, _ = run(
        capsys, "attention", first, second, "--limit", "5", "--images", "3", "--seeds", "0",
        "--no-discovery", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert printed.endswith(f"\n\n{out}\n")
    if suffix == "svg":
        text = out.read_text()
        assert text.count("<image") >= 9  # three images, by themselves and below each backbone
        assert "second" in text
    else:
        assert out.stat().st_size > 1000


def test_each_head_over_plain_images(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        Image.new("RGB", (50, 90), (90 * i, 0, 255)).save(tmp_path / f"{i}.png")
    out = tmp_path / "heads.png"
    for resize in ("squeeze", "crop"):
        code, printed, complaints = run(
            capsys, "attention", first, "--data", tmp_path, "--heads", "--images", "2", "--out",
            out, "--resize", resize,
        )  # fmt: skip
        assert (code, printed, complaints) == (0, f"{out}\n", "")
        assert np.asarray(Image.open(out)).std() > 0
        out.unlink()


def test_models_of_several_patch_sizes_share_a_sheet(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (50, 90), "red").save(tmp_path / "red.png")
    out = tmp_path / "out" / "sheet.png"
    command = ("attention", first, "vit_tiny_patch16_224", "--data", tmp_path)
    assert run(capsys, *command, "--image-size", "32", "--out", out)[0] == 0
    assert out.is_file()
    coarse = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    fine = _enlarged(coarse, (2, 2), (2, 4), "this")
    assert fine[0, 0].tolist() == coarse[0, 0, [0, 0, 1, 1, 2, 2, 3, 3]].tolist()
    with pytest.raises(ValueError, match="this has 2x2 patches, which do not fit"):
        _enlarged(coarse, (2, 2), (3, 3), "this")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--heads",), "say where with --out"),
        (("SECOND", "--heads", "--out", "x.png"), "one backbone's; got 2"),
        (("--out", "x.bmp"), "--out must end in .png, .pdf or .svg; got x.bmp."),
        (("--images", "0"), "--images must be an int >= 1"),
        (("--data", "plain"), "draw them with --out"),
        (("--data", "missing"), "in no form that open_masks knows"),
        (("--data", "broken", "--out", "x.png"), "cannot be read as an image"),
        (("--data", "unlike"), "they must be alike"),
        (("--mass", "1.5"), "mass must be in (0, 1]"),
    ],
)
def test_what_has_no_attention(
    first: Path,
    second: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("plain", "broken", "unlike/images", "unlike/masks"):
        Path(folder).mkdir(parents=True)
    red = Image.new("RGB", (20, 20), "red")
    for file in ("plain/a.png", "unlike/images/a.png"):
        red.save(file)
    Image.new("L", (20, 30), 255).save("unlike/masks/a.png")
    Path("broken/a.png").write_bytes(b"no image")
    before = sorted(Path().rglob("*"))
    given: list[Any] = [second if argument == "SECOND" else argument for argument in arguments]
    code, _, complaints = run(capsys, "attention", first, *given)
    assert code == 2
    assert complaints.count("\n") == 1
    assert reason in complaints
    assert sorted(Path().rglob("*")) == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "attention"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert f"usage: maskdistill {command}" in capsys.readouterr().out
