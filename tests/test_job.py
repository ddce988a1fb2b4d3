"""The main job from its command line: what it writes, and what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from PIL import Image

from maskdistill import cli, job
from maskdistill.job import JobConfig

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "dino_tiny_miniimagenet.py"
SHARED = ROOT.parent / "shared" / "data"

TINY = [
    "--image-size", "16", "--patch-size", "4", "--local-size", "8", "--local-crops", "2",
    "--depth", "1", "--epochs", "2", "--batch-size", "8", "--out-dim", "32",
    "--hidden-dim", "32", "--workers", "0", "--evaluations", "1", "--device", "cpu",
]  # fmt: skip
FILES = {"config.json", "metrics.jsonl", "summary.json", "checkpoint.pt", "backbone.safetensors",
         "masks.png", "attention.png", "curves.png"}  # fmt: skip


def run(*arguments: str) -> int:
    """Run the example on tiny settings; return the exit code."""
    return example(*TINY, *arguments)


def example(*arguments: str) -> int:
    """Run the example as its user would; return the exit code."""
    argv = ["dino_tiny_miniimagenet.py", *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def written(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir() if not p.name.startswith("events.")}


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    random = np.random.RandomState(0)
    for name in ("cat", "dog", "owl"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = random.randint(0, 255, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_a_preset_says_policy_masker_and_application(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("--scenes", "40", "--preset", "msn", "--out", str(out), "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert "MSN has another objective" in said
    assert "masks by drop" in said
    summary = read(out / "summary.json")
    assert (summary["preset"], summary["apply"]) == ("msn", "drop")
    assert summary["masker"] == "RandomMasker(0.15).shared()"
    assert example("--resume", "--out", str(out), "--device", "cpu") == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ibott"], "Did you mean ibot?"),
        (["adios"], "needs a network"),
        (["ibot", "--masker", "NoMasker()"], "leave out --masker"),
        (["msn", "--apply", "pixel"], "leave out --apply"),
        (["mae"], '--policy asymmetric --masker "RandomMasker(0.75)" --apply drop'),
        (["hpm"], "SignalMasker"),
    ],
)
def test_a_preset_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run("--scenes", "40", "--out", str(tmp_path / "run"), "--preset", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_on_the_built_in_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert run("--scenes", "40", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "built-in scenes" in said
    assert "--data PATH" in said
    assert "RandomMasker(0.3)   clean" in said, "the policy's table"
    assert written(out) == FILES
    summary = read(out / "summary.json")
    assert summary["steps"] == 10
    assert summary["policy"] == "asymmetric"
    assert summary["masker"] == "RandomMasker(0.3)"
    assert summary["images_per_second"] > 0
    for key in ("knn", "knn_random_init", "knn_raw_pixels"):
        assert 0 <= summary[key] <= 1
    for key in ("attention_jaccard", "attention_jaccard_random_init"):
        assert 0 < summary[key]["mean_over_heads"] <= summary[key]["best_head"] < 1
    assert read(out / "config.json")["momentum"] is not None, "as resolved"
    torch.load(out / "checkpoint.pt", weights_only=True)
    for picture in ("masks.png", "attention.png", "curves.png"):
        with Image.open(out / picture) as image:
            assert image.width > 400


def test_the_backbone_loads_in_plain_timm(tmp_path: Path) -> None:
    assert run("--scenes", "40", "--out", str(tmp_path / "run")) == 0
    path = tmp_path / "run" / "backbone.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["timm.create_model"])
    model = timm.create_model(**arguments, checkpoint_path=str(path)).eval()
    teacher = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["teacher"]
    x = torch.randn(2, 3, 16, 16)
    again = timm.create_model(**arguments).eval()
    prefix = "backbone."
    again.load_state_dict(
        {
            name.removeprefix(prefix): value
            for name, value in teacher.items()
            if name.startswith(prefix) and name != prefix + "mask_token"
        }
    )
    assert torch.equal(model(x), again(x))


def test_on_a_folder_of_images(folder_of_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run("--data", str(folder_of_images), "--out", str(out), "--max-steps", "3") == 0
    summary = read(out / "summary.json")
    assert summary["steps"] == 3
    assert "attention_jaccard" not in summary, "there are no object masks"
    assert written(out) == FILES


def test_resume_continues_an_unfinished_run(tmp_path: Path) -> None:
    """Killed after a checkpoint; then the same result as the run that was left alone."""
    arguments = ("--scenes", "40", "--checkpoint-every", "4")
    assert run(*arguments, "--out", str(tmp_path / "whole")) == 0

    real = job.Trainer._check_finite
    with pytest.MonkeyPatch.context() as patch:

        def killed(self: Any, *args: Any) -> None:
            real(self, *args)
            if self.step == 6:
                raise KeyboardInterrupt

        patch.setattr(job.Trainer, "_check_finite", killed)
        assert run(*arguments, "--out", str(tmp_path / "half")) == 130
    assert (
        example("--out", str(tmp_path / "half"), "--resume") == 0
    )  # the settings are the run's own
    whole, half = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        for name in ("whole", "half")
    )
    for name, value in whole["teacher"].items():
        assert torch.equal(half["teacher"][name], value), name
    summaries = [read(tmp_path / name / "summary.json") for name in ("whole", "half")]
    for key in ("knn", "knn_random_init", "attention_jaccard", "steps"):
        assert summaries[0][key] == summaries[1][key]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--policy", "none"),
        ("--policy", "symmetric", "--masker", "BlockMasker(0.4)", "--apply", "drop"),
        ("--policy", "student-all-views", "--masker", "RandomMasker(0.5).sometimes(0.5)"),
        ("--masker", "AttentionGuidedMasker(0.5, temperature=1.0)", "--apply", "pixel"),
    ],
    ids=["none", "drop", "all views", "attention"],
)
def test_policies_and_maskers_by_name(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    out = tmp_path / "run"
    assert run("--scenes", "40", "--max-steps", "2", "--out", str(out), *arguments) == 0
    assert written(out) == FILES
    used = read(out / "summary.json")["masker"]
    assert used == (
        "NoMasker()" if "none" in arguments else arguments[arguments.index("--masker") + 1]
    )


def test_a_model_without_a_class_token(tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = ("--model", "vit_base_patch16_siglip_224")
    assert run("--scenes", "40", "--max-steps", "1", "--out", str(out), *model) == 0
    assert written(out) == FILES, "the attention is that of its attention pooling"
    assert "attention_jaccard" in read(out / "summary.json")


def test_a_model_without_attention(tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = ("--model", "efficientvit_b0", "--image-size", "64", "--local-size", "32")
    assert run("--scenes", "40", "--max-steps", "1", "--out", str(out), *model,
               "--patch-size", "32", "--depth", "None", "--drop-path", "0") == 0  # fmt: skip
    assert written(out) == FILES - {"attention.png"}
    assert "attention_jaccard" not in read(out / "summary.json")


# --- What is refused, before anything is written


def refused(
    out: Path, capsys: pytest.CaptureFixture[str], message: str, *arguments: str, code: int = 2
) -> None:
    capsys.readouterr()
    assert run("--scenes", "40", "--out", str(out), *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err, captured.err
    assert "Traceback" not in captured.err
    assert not out.exists(), "something was written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--masker", "RandomMasker(1.5)"), "must lie in [0, 1]"),
        (("--masker", "RandonMasker(0.5)"), "Did you mean RandomMasker"),
        (("--masker", "__import__('os')"), "unknown masker '__import__'"),
        (("--image-size", "30"), "multiple of patch_size"),
        (("--model", "resnet18"), "cannot be built for images of 16x16"),
        (("--model", "no_such_vit"), "timm knows no model"),
        (("--batch-size", "4096"), "do not fill one step"),
        (("--device", "cuda:7" if not torch.cuda.is_available() else "tpu"), "device"),
        (("--policy", "symmetric", "--masker", "AttentionGuidedMasker(0.3)"), "cannot get"),
        (("--apply", "drop", "--masker", "RandomMasker(0.3).sometimes(0.5)"), "same number"),
        (("--data", "no/such/folder"), "no/such/folder"),
        (("--resume",), "to resume"),
    ],
)
def test_settings_that_cannot_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    refused(tmp_path / "run", capsys, message, *arguments)


def test_data_that_cannot_be_read(
    tmp_path: Path, folder_of_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    refused(out, capsys, "empty", "--data", str(empty))
    missing = tmp_path / "missing"
    (missing / "images").mkdir(parents=True)
    (missing / "train.csv").write_text("filename,label\nn0153282900000005.jpg,n01532829\n")
    refused(out, capsys, "train.csv", "--data", str(missing))
    caches = tmp_path / "caches"
    caches.mkdir()
    (caches / "mini-imagenet-cache-train.pkl").write_bytes(b"")
    refused(out, capsys, "--allow-pickle", "--data", str(caches))


def test_damaged_images_stop_the_run_beyond_a_limit(
    tmp_path: Path, folder_of_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0", "1", "2"):
        path = folder_of_images / "cat" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    data = ("--data", str(folder_of_images), "--out", str(tmp_path / "run"))
    with pytest.warns(UserWarning, match="cat"):
        assert run(*data, "--max-damaged", "1") == 1
    assert "damaged" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="cat"):
        assert run(*data[:2], "--out", str(tmp_path / "again"), "--max-damaged", "3") == 0


def test_an_output_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "run", capsys, "cannot write to", "--max-steps", "1")
    monkeypatch.setattr(job.os, "access", lambda path, mode: False)
    refused(tmp_path / "run", capsys, "is not writable", "--max-steps", "1")


def test_a_finished_run_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("--scenes", "40", "--max-steps", "1", "--out", str(out)) == 0
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert run("--scenes", "40", "--max-steps", "1", "--out", str(out)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before


def test_a_refused_resumption_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run("--scenes", "40", "--max-steps", "2", "--out", str(out)) == 0
    before = {p: p.read_bytes() for p in out.iterdir()}
    again = ("--out", str(out), "--resume")
    assert example(*again, "--lr", "0.1") == 2
    assert "lr was 0.008 and is 0.1" in capsys.readouterr().err
    (out / "checkpoint.pt").write_bytes(before[out / "checkpoint.pt"][:500])
    assert example(*again) == 2
    assert "truncated" in capsys.readouterr().err
    (out / "checkpoint.pt").write_bytes(before[out / "checkpoint.pt"])
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_without_an_output_folder_each_run_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("--scenes", "40", "--max-steps", "1") == 0
    names = {p.name for p in (tmp_path / "runs").iterdir()}
    assert names == {"dino-asymmetric-seed0", "dino-asymmetric-seed0-2"}


@pytest.mark.parametrize("arguments", [[], ["--seed", "3"], ["--data", "x"], ["--data=x"]])
def test_the_bare_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README has it, without any argument."""
    ran: list[JobConfig] = []
    monkeypatch.setattr(cli, "run_job", ran.append)
    assert example(*arguments) == 0
    assert ran[0].data == (Path("x") if len(arguments) and "data" in arguments[0] else None)
    assert ran[0].image_size == (32 if ran[0].data is None else 64)


def test_help_teaches_and_needs_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["--data", "x", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            cli.train(JobConfig(epochs=4), JobConfig(epochs=77), description="Train.", argv=argv)
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert "--masker" in said
        assert ("77" in said) == ("--data" in argv), "defaults are those of the data"


# --- On real images, where they are


@pytest.mark.parametrize("name", ["mini_imagenet_csv", "mini64_100c.npz"])
def test_on_real_mini_imagenet(name: str, tmp_path: Path) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"the real data {name} is not beside the project")
    limits = ("--max-steps", "2", "--knn-train", "200", "--knn-val", "100")
    assert run("--data", str(SHARED / name), "--out", str(tmp_path / "run"), *limits) == 0
    assert read(tmp_path / "run" / "summary.json")["steps"] == 2
