"""The command `maskdistill`: what it prints, its exit codes, and what it does not import."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import maskdistill as md
from maskdistill import cli
from maskdistill.data import open_data
from tests.data.test_sources import damage, file_name, write_class_folders, write_pickles


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


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


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("nothing", "p.npz"), "error: nothing does not exist"),
        (("caches", "p.npz"), "--allow-pickle on the command line"),
        (("caches", "p.npz", "--allow-pickle", "--format", "pack"), "not of the format 'pack'"),
        (("caches", "p.npz", "--allow-pickle", "--quality", "101"), "quality must lie between"),
        (("caches", "p.tar"), "name ends in .npz"),
        (("caches", "out", "--allow-pickle", "--shards", "99"), "do not fill 99 shards"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pickles(tmp_path / "caches")
    code, printed, complaints = run(capsys, "pack", *arguments)
    assert (code, printed, complaints.count("\n")) == (2, "", 1)
    assert reason in complaints


def test_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("maskdistill.data.packing.gather", interrupted)
    write_class_folders(tmp_path / "data")
    code, _, complaints = run(capsys, "pack", tmp_path / "data", tmp_path / "p.npz")
    assert (code, complaints) == (130, "interrupted\n")
    assert not list(tmp_path.glob("p.npz*"))


def test_a_program_error_is_no_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("maskdistill.data.packing.gather", broken)
    write_class_folders(tmp_path / "data")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["pack", str(tmp_path / "data"), str(tmp_path / "p.npz")])


def test_without_tyro_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main([]) == 2
    assert 'pip install "maskdistill[train]"' in capsys.readouterr().err


def test_help_imports_no_more_than_the_library_does() -> None:
    code = """if True:
        import sys
        from maskdistill import cli
        try:
            cli.main(sys.argv[1:])
        except SystemExit as error:
            print(error.code, *sorted({name.split(".")[0] for name in sys.modules}))"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    exit_code, *modules = done.stdout.splitlines()[-1].split()
    assert exit_code == "0"
    assert "maskdistill" in modules
    assert not {"timm", "torchvision", "PIL", "webdataset", "pyarrow", "matplotlib"} & set(modules)
    assert "pack" in done.stdout


def test_python_m_maskdistill_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["maskdistill", "pack", "nothing", "p.npz"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("maskdistill", run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: nothing does not exist")


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
    code, printed, _ = run(
        capsys,
        "show",
        "RandomMasker(0.25).sometimes(0.5)",
        "--grid",
        "4",
        "--samples",
        "3",
        "--json",
    )
    found = json.loads(printed)
    assert code == 0
    assert found["masker"] == "RandomMasker(0.25).sometimes(0.5)"
    assert np.shape(found["masks"]) == (3, 4, 4)
    assert np.shape(found["hidden_probability"]) == (4, 4)
    assert found["hidden_share"]["least"] == 0
    assert found["hidden_share"]["most"] == 0.25
    assert found["hidden_share"]["mean"] == pytest.approx(0.125, abs=0.01)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_show_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    Image.new("RGB", (50, 90), "red").save(tmp_path / "red.png")
    out = tmp_path / "deep" / f"masks.{suffix}"
    code, printed, _ = run(
        capsys, "show", "AttentionGuidedMasker(0.3)", "--image", tmp_path / "red.png", "--out", out
    )
    assert code == 0
    assert "(for the attention: a round blob in the middle)" in printed
    assert printed.endswith(f"{out}\n")
    if suffix == "svg":
        assert "<svg" in out.read_text()
    else:
        pixels = np.asarray(Image.open(out).convert("RGB"))
        assert (pixels == (255, 0, 0)).all(axis=-1).mean() > 0.1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("BlockMaskr(0.4)",), "BlockMaskr"),
        (("RandomMasker(1.4)",), "must lie in [0, 1]"),
        (("RandomMasker(0.4)", "--grid", "14by14"), "--grid must be patch rows x columns"),
        (("RandomMasker(0.4)", "--grid", "0x3"), "--grid must be patch rows x columns"),
        (("RandomMasker(0.4)", "--samples", "0"), "--samples must be an int >= 1; got 0"),
        (("SignalMasker(0.4, 'loss')",), "needs loss, which only images or a network can give"),
        (("RandomMasker(0.4)", "--image", "x.png"), "say where with --out"),
        (("RandomMasker(0.4)", "--image", "x.png", "--out", "y.png"), "cannot be read as an image"),
    ],
)
def test_what_cannot_be_shown(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, complaints = run(capsys, "show", *arguments)
    assert (code, complaints.count("\n")) == (2, 1)
    assert reason in complaints
    assert not list(tmp_path.iterdir())


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
    code, _, complaints = run(capsys, "models", "resnet*")
    assert code == 2
    assert "no transformer of timm matches 'resnet*'" in complaints


def test_train_is_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ("--image-size", "16", "--patch-size", "4", "--depth", "1", "--hidden-dim", "16",
            "--local-crops", "1", "--batch-size", "4", "--scenes", "22", "--max-steps", "1",
            "--evaluations", "0", "--workers", "0", "--device", "cpu")  # fmt: skip
    code, printed, _ = run(capsys, "train", *tiny, "--out", tmp_path / "run")
    assert code == 0
    assert "k-NN accuracy" in printed
    assert (tmp_path / "run" / "summary.json").is_file()
    code, _, complaints = run(capsys, "train", "--out", tmp_path / "nothing", "--resume")
    assert code == 2
    assert "no config.json" in complaints


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[1] == f"maskdistill {md.__version__}\n"
    for command in ("train", "evaluate", "attention", "compare", "show", "models", "pack"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        assert f"usage: maskdistill {command}" in printed


PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"


def test_the_page_shows_what_the_commands_print(capsys: pytest.CaptureFixture[str]) -> None:
    pair = r"```console\n([^`]*)```\n\n```text\n([^`]*)```"
    blocks = re.findall(pair, PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 3
    for command, printed in blocks:
        name, *arguments = shlex.split(command, comments=True)
        assert name == "maskdistill"
        assert run(capsys, *arguments) == (0, printed, "")
