"""The command `maskdistill`: what it prints and writes, its exit codes, what it does not import."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskdistill as md
from maskdistill import cli
from maskdistill.cli.backbones import _enlarged, _short
from maskdistill.data import Scenes, open_data
from maskdistill.evaluation import attention_quality, load_backbone
from maskdistill.evaluation.measures import MEASURES, measure
from maskdistill.training.job import open_images, saved_config
from tests.data.test_sources import damage, file_name, write_class_folders, write_pickles

pytestmark = pytest.mark.filterwarnings("ignore:the best learning rate")
PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"
COMMANDS = ("train", "evaluate", "attention", "compare", "show", "models", "pack")
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


# --- All commands


def test_help_is_light() -> None:
    """It imports nothing that takes longer than torch."""
    code = """if True:
        import sys
        from maskdistill import cli
        for command in sys.argv[1:]:
            try:
                cli.main([command, "--help"] if command else ["--help"])
            except SystemExit as error:
                assert error.code == 0
        print(*sorted({name.split(".")[0] for name in sys.modules}))"""
    done = subprocess.run(
        [sys.executable, "-c", code, "", *COMMANDS], capture_output=True, text=True, check=True
    )
    *printed, modules = done.stdout.splitlines()
    assert "maskdistill" in modules.split()
    heavy = {"timm", "torchvision", "webdataset", "pyarrow", "matplotlib", "scipy", "tensorboard"}
    assert not heavy & set(modules.split())
    for command in COMMANDS:
        assert f"usage: maskdistill {command}" in "\n".join(printed)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[1] == f"maskdistill {md.__version__}\n"


def test_without_tyro_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main([]) == 2
    assert 'pip install "maskdistill[train]"' in capsys.readouterr().err


def test_python_m_maskdistill_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskdistill", "pack", "nothing", "p.npz"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("maskdistill", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: nothing does not exist")


def test_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskdistill.data.packing.pack", interrupted)
    write_class_folders(tmp_path / "data")
    code, _, complaints = run(capsys, "pack", tmp_path / "data", tmp_path / "p.npz")
    assert (code, complaints) == (130, "interrupted\n")


def test_a_program_error_is_no_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("maskdistill.data.packing.pack", broken)
    write_class_folders(tmp_path / "data")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["pack", str(tmp_path / "data"), str(tmp_path / "p.npz")])


def test_the_page_shows_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    pair = r"```console\n([^`]*)```\n\n```text\n([^`]*)```"
    blocks = re.findall(pair, PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    for command, printed in blocks:
        name, *arguments = shlex.split(command, comments=True)
        assert name == "maskdistill"
        assert run(capsys, *arguments) == (0, printed, "")


@pytest.fixture
def workplace(first: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs, a third one on other images, and data of which little is right."""
    monkeypatch.chdir(tmp_path)
    for name, run_ in (("FIRST", first), ("SECOND", second)):
        Path(name).symlink_to(run_)
    shutil.copytree(first, "elsewhere")
    config = json.loads(Path("elsewhere/config.json").read_text())
    Path("elsewhere/config.json").write_text(json.dumps(config | {"scenes": 99}))
    for folder in ("empty", "plain", "broken", "unlike/images", "unlike/masks"):
        Path(folder).mkdir(parents=True)
    for file in ("plain/a.png", "unlike/images/a.png"):
        Image.new("RGB", (20, 20), "red").save(file)
    Image.new("L", (20, 30), 255).save("unlike/masks/a.png")
    Path("broken/a.png").write_bytes(b"no image")
    torch.save({"some.weight": torch.zeros(3, 4)}, "strange.pt")
    write_pickles(tmp_path / "caches")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("pack nothing p.npz", "nothing does not exist"),
        ("pack caches p.npz", "--allow-pickle on the command line"),
        ("pack caches p.npz --allow-pickle --format pack", "not of the format 'pack'"),
        ("pack caches p.npz --allow-pickle --quality 101", "quality must lie between"),
        ("pack caches p.tar", "name ends in .npz"),
        ("pack caches out --allow-pickle --shards 99", "do not fill 99 shards"),
        ("show BlockMaskr(0.4)", "BlockMaskr"),
        ("show RandomMasker(1.4)", "must lie in [0, 1]"),
        ("show RandomMasker(0.4) --grid 14by14", "--grid must be patch rows x columns"),
        ("show RandomMasker(0.4) --grid 0x3", "--grid must be patch rows x columns"),
        ("show RandomMasker(0.4) --samples 0", "--samples must be an int >= 1; got 0"),
        ("show SignalMasker(0.4,'loss')", "needs loss, which only images or a network can give"),
        ("show RandomMasker(0.4) --image x.png", "say where with --out"),
        ("show RandomMasker(0.4) --image x.png --out y.png", "cannot be read as an image"),
        ("models resnet*", "no transformer of timm matches 'resnet*'"),
        ("evaluate", "give at least one backbone"),
        ("evaluate FIRST --measures knm", "no measure 'knm'. Did you mean knn"),
        ("evaluate FIRST --measures SECOND", "SECOND is no measure but a path"),
        ("evaluate FIRST --out x.txt", "--out must end in .json or .csv; got x.txt."),
        ("evaluate nothing", "'nothing' is no file, no folder and no model of timm"),
        ("evaluate vit_tiny_patch16_24", "Did you mean vit_tiny_patch16_224"),
        ("evaluate empty", "holds no teacher to load"),
        ("evaluate strange.pt", "strange.pt"),
        ("evaluate FIRST FIRST", "is given twice"),
        ("evaluate FIRST vit_tiny_patch16_224", "--image-size"),
        ("evaluate FIRST elsewhere", "trained on different images"),
        ("evaluate FIRST --data plain", "plain"),
        ("evaluate FIRST --data missing", "missing does not exist"),
        ("evaluate FIRST --train-limit 0", "must be >= 1"),
        ("evaluate FIRST --device abacus", "--device abacus cannot be used"),
        ("evaluate FIRST --guide nothing", "'nothing' is no file"),
        ("attention FIRST --heads", "say where with --out"),
        ("attention FIRST SECOND --heads --out x.png", "one backbone's; got 2"),
        ("attention FIRST --out x.bmp", "--out must end in .png, .pdf or .svg; got x.bmp."),
        ("attention FIRST --images 0", "--images must be an int >= 1"),
        ("attention FIRST --data plain", "draw them with --out"),
        ("attention FIRST --data missing", "in no form that open_masks knows"),
        ("attention FIRST --data broken --out x.png", "cannot be read as an image"),
        ("attention FIRST --data unlike", "they must be alike"),
        ("attention FIRST --mass 1.5", "mass must be in (0, 1]"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    command: str, reason: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(workplace.rglob("*"))
    code, _, complaints = run(capsys, *command.split())
    assert code == 2
    assert complaints.startswith("error: ")
    assert complaints.count("\n") == 1 or "It looked for:" in complaints
    assert reason in complaints
    assert sorted(workplace.rglob("*")) == before


# --- pack


def test_pack_writes_a_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_class_folders(tmp_path / "data")
    out = tmp_path / "p.npz"
    code, printed, complaints = run(capsys, "pack", tmp_path / "data", out)
    assert (code, complaints) == (0, "")
    assert printed.startswith(
        f"{out}: 18 images of 3 classes, 0.0 MiB; 6 images each, re-split 5/1"
    )
    assert open_data(out).format == "pack"
    code, printed, complaints = run(capsys, "pack", tmp_path / "data", out)
    assert (code, printed) == (2, "")
    assert complaints == (
        f"error: {out} exists. Pass overwrite=True (--overwrite on the command line) to replace "
        "it.\n"
    )
    assert run(capsys, "pack", tmp_path / "data", out, "--overwrite", "--size", "4")[0] == 0
    assert open_data(out).train[0][0].size == (4, 4)


def test_pack_writes_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from maskdistill.data.shards import open_shards

    write_class_folders(tmp_path / "data")
    code, printed, _ = run(capsys, "pack", tmp_path / "data", tmp_path / "out", "--shards", "3")
    assert code == 0
    assert printed.startswith(f"{tmp_path / 'out'}: 18 images of 3 classes")
    assert open_shards(tmp_path / "out").counts.tolist() == [5, 5, 5]


def test_damaged_images_are_warned_of_in_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_class_folders(tmp_path / "data")
    for n in range(2):
        damage(tmp_path / "data" / "n02" / file_name("n02", n))
    code, printed, complaints = run(capsys, "pack", tmp_path / "data", tmp_path / "p.npz")
    lines = complaints.splitlines()
    assert (code, len(lines)) == (0, 2)
    assert all(line.startswith(f"warning: Damaged image: {tmp_path}") for line in lines)
    assert printed.endswith("2 damaged images were left out.\n")
    code, printed, complaints = run(
        capsys, "pack", tmp_path / "data", tmp_path / "q.npz", "--max-damaged", "1"
    )
    assert (code, printed) == (1, "")
    assert "stopped: 2 images are damaged, more than max_damaged=1" in complaints


# --- show


def test_show_draws_what_the_masker_draws(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, complaints = run(
        capsys, "show", "BlockMasker(0.4)", "--grid", "6x8", "--seed", "3"
    )
    assert (code, complaints) == (0, "")
    generator = torch.Generator().manual_seed(3)
    masks = md.BlockMasker(0.4)(4, (6, 8), generator=generator).view(4, 6, 8)
    lines = printed.splitlines()
    assert lines[0] == "BlockMasker(0.4) on 6x8 patches"
    drawn = [line.split("   ") for line in lines[2:8]]
    for sample in range(4):
        cells = [[row[sample][2 * x] == "█" for x in range(8)] for row in drawn]
        assert cells == masks[sample].tolist()
    assert lines[8].split("   ")[0].rstrip() == "19/48 hidden"
    assert "hidden share of 2,000 draws: always 39.6%" in printed
    again = run(capsys, "show", "BlockMasker(0.4)", "--grid", "6x8", "--seed", "3")[1]
    assert again == printed


def test_show_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    masker = "RandomMasker(0.25).sometimes(0.5)"
    code, printed, _ = run(capsys, "show", masker, "--grid", "4", "--samples", "3", "--json")
    found = json.loads(printed)
    assert code == 0
    assert found["masker"] == masker
    assert np.shape(found["masks"]) == (3, 4, 4)
    assert np.shape(found["hidden_probability"]) == (4, 4)
    assert found["hidden_share"]["least"] == 0
    assert found["hidden_share"]["most"] == 0.25
    assert found["hidden_share"]["mean"] == pytest.approx(0.125, abs=0.01)


def test_show_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (50, 90), "red").save(tmp_path / "red.png")
    out = tmp_path / "deep" / "masks.png"
    code, printed, _ = run(
        capsys, "show", "AttentionGuidedMasker(0.3)", "--image", tmp_path / "red.png", "--out", out
    )
    assert code == 0
    assert "(for the attention: a round blob in the middle)" in printed
    assert printed.endswith(f"{out}\n")
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert (pixels == (255, 0, 0)).all(axis=-1).mean() > 0.1


# --- models, train


def test_models_says_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "models", "swin_tiny_patch4_window7_224", "--why")
    head, row, _, why = printed.splitlines()
    assert code == 0
    assert head.split() == [
        "model",
        "image",
        "patch",
        "token",
        "drop",
        "attention",
        "other",
        "sizes",
    ]
    assert row.split()[:5] == ["swin_tiny_patch4_window7_224", "224x224", "32x32", "yes", "no"]
    assert why.startswith("swin_tiny_patch4_window7_224, drop: SwinTransformer")
    code, printed, _ = run(capsys, "models", "vit_tiny_patch16_224", "--json")
    assert json.loads(printed)["drop"] is True


def test_train_writes_what_the_job_writes(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (first / "summary.json").is_file()
    code, _, complaints = run(capsys, "train", "--out", first / "nothing", "--resume")
    assert code == 2
    assert "no config.json" in complaints


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


def test_a_sheet_of_all_backbones(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "sheet.svg"
    code, printed, _ = run(
        capsys, "attention", first, second, "--limit", "5", "--images", "3", "--seeds", "0",
        "--no-discovery", "--out", out,
    )  # fmt: skip
    assert code == 0
    assert printed.endswith(f"\n\n{out}\n")
    text = out.read_text()
    assert text.count("<image") >= 9  # three images, by themselves and below each backbone
    assert "second" in text


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
