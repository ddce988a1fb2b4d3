"""The main job from its command line: what it writes, and what it refuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import timm
import torch
from PIL import Image

from maskdistill.cli import train as command
from maskdistill.evaluation.judge import forget_attention, read_attention, save_attention
from maskdistill.masking import BlockMasker
from maskdistill.policies import ViewPolicy
from maskdistill.training import job
from maskdistill.training.checkpoint import (
    checkpoint_files,
    choose_folder,
    hold_folder,
    latest_checkpoint,
)
from maskdistill.training.job import JobConfig, saved_config
from maskdistill.training.logging import read_metrics
from tests.training.forking import fork, wait

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "dino_tiny_miniimagenet.py"
SHARED = ROOT.parent / "shared" / "data"

TINY = [
    "--image-size", "16", "--patch-size", "4", "--local-size", "8", "--local-crops", "2",
    "--depth", "1", "--epochs", "2", "--batch-size", "8", "--out-dim", "32",
    "--hidden-dim", "32", "--workers", "0", "--evaluations", "1", "--device", "cpu",
]  # fmt: skip
FILES = {"config.json", "metrics.jsonl", "summary.json", "checkpoints", ".lock",
         "backbone.safetensors", "masks.png", "attention.png", "curves.png",
         "attention", "attention_strip.png"}  # fmt: skip

KS = (10, 20, 100, 200)


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


@pytest.mark.parametrize(
    ("arguments", "apply", "objective", "said"),
    [
        (["msn"], "drop", "msn", ""),
        (["dinov3"], "token", "dino+ibot+koleo", "objective has gram besides"),
        (["ibot", "--objective", "dino"], "token", "dino", "own objective is dino + ibot; this"),
    ],
)
def test_a_preset_says_policy_masker_application_and_objective(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    apply: str,
    objective: str,
    said: str,
) -> None:
    out = tmp_path / "run"
    assert run("--scenes", "40", "--preset", *arguments, "--out", str(out), "--max-steps", "1") == 0
    printed = capsys.readouterr().out
    assert f"masks by {apply}; objective {objective};" in printed
    assert said in printed
    summary = read(out / "summary.json")
    assert (summary["preset"], summary["apply"]) == (arguments[0], apply)
    assert summary["objective"] == objective
    names = {name for name in read_metrics(out / "metrics.jsonl")[-2] if name.startswith("loss_")}
    assert names == (
        {f"loss_{name}" for name in objective.split("+")} if "+" in objective else set()
    )
    if arguments == ["msn"]:
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
    for key in ("knn", "knn_random_init", "knn_raw_pixels", *(f"knn_{k}" for k in KS)):
        assert 0 <= summary[key] <= 1
    assert summary["knn_20"] == summary["knn"]
    assert 1 <= summary["effective_rank"] <= summary["knn_val_images"]
    (evaluation,) = (line for line in read_metrics(out / "metrics.jsonl") if "knn" in line)
    assert set(evaluation) == {"step", "knn", "knn_10", "knn_100", "knn_200", "effective_rank"}
    for key in ("attention_jaccard", "attention_jaccard_random_init"):
        assert 0 < summary[key]["mean_over_heads"] <= summary[key]["best_head"] < 1
    assert read(out / "config.json")["momentum"] is not None, "as resolved"
    latest_checkpoint(out)
    for picture in ("masks.png", "attention.png", "attention_strip.png", "curves.png"):
        with Image.open(out / picture) as image:
            assert image.width > 400


def test_the_backbone_loads_in_plain_timm(whole: Path) -> None:
    path = whole / "backbone.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        arguments = json.loads(file.metadata()["timm.create_model"])
    model = timm.create_model(**arguments, checkpoint_path=str(path)).eval()
    teacher = latest_checkpoint(whole).content["teacher"]
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


@contextlib.contextmanager
def after_step(step: int, event: Callable[[], None]) -> Iterator[None]:
    """Let something happen within a step, once."""
    real = job.Trainer._run_step

    def eventful(self: Any, *args: Any) -> Any:
        metrics = real(self, *args)
        if self.step + 1 == step:  # it is counted afterwards
            event()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job.Trainer, "_run_step", eventful)
        yield


def killed() -> None:
    raise KeyboardInterrupt


def test_resume_continues_an_unfinished_run(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped in the middle; then the same result as the run that was left alone."""
    out = tmp_path / "half"
    with after_step(6, lambda: signal.raise_signal(signal.SIGTERM)):
        assert run(*WHOLE, "--out", str(out)) == 143
    said = capfd.readouterr().err
    assert "stopped the run after step 6 of 10" in said
    assert f"--resume --out {out}" in said
    assert example("--out", str(out), "--resume") == 0  # the settings are the run's own
    assert f"resuming from step 6 of 10 ({out}" in capfd.readouterr().out
    assert_same_run(out, whole)


WHOLE = ("--scenes", "40", "--checkpoint-every", "4", "--log-every", "5")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(*WHOLE, "--out", str(out)) == 0
    return out


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = latest_checkpoint(a).content, latest_checkpoint(b).content
    for role in ("student", "teacher", "objective"):
        for name, value in theirs[role].items():
            assert torch.equal(ours[role][name], value), name
    summaries = [read(out / "summary.json") for out in (a, b)]
    for key in (
        "knn",
        "knn_100",
        "knn_random_init",
        "attention_jaccard",
        "effective_rank",
        "steps",
    ):
        assert summaries[0][key] == summaries[1][key]
    lines = [read_metrics(out / "metrics.jsonl") for out in (a, b)]
    for line in (*lines[0], *lines[1]):
        line.pop("images_per_second", None)
    assert lines[0] == lines[1]


def assert_same_attention(out: Path, whole: Path, earlier: set[int], later: set[int]) -> None:
    """Compare what was kept over training, but for what one of the runs kept before its end."""
    (ours, kept), (theirs, wanted) = read_attention(out), read_attention(whole)
    assert set(kept) == {0, 10} | earlier, f"of {later} there is nothing until it comes again"
    assert ours.shape == (8, 3, 16, 16), "as many as there are to judge by"
    assert torch.equal(ours, theirs)
    for step, attention in wanted.items():
        assert attention.shape == (8, 3, 16), "images, heads, patches"
        assert torch.equal(kept[step], attention)
    assert not torch.equal(wanted[0], wanted[10])
    assert float(wanted[10].sum(dim=2).max()) <= 1.01, "the rest is the class token's own"


def test_attention_over_training_is_there_or_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no snapshots"):
        read_attention(tmp_path)
    images, attention = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.rand(2, 3, 16)
    for step in (20, 100, 3):
        save_attention(tmp_path, step, attention / step, images)
    kept = read_attention(tmp_path)[1]
    assert list(kept) == [3, 20, 100]
    torch.testing.assert_close(kept[20], attention / 20, rtol=1e-3, atol=1e-6)
    forget_attention(tmp_path, 20)
    assert list(read_attention(tmp_path)[1]) == [3, 20]
    forget_attention(tmp_path, None)  # a new run has images of its own
    assert not list((tmp_path / "attention").iterdir())


def test_damaged_attention_is_left_out(tmp_path: Path) -> None:
    """As a crash of the machine may leave it; the images come back with the next snapshot."""
    images, attention = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.rand(2, 3, 16)
    for step in (0, 20, 100):
        save_attention(tmp_path, step, attention, images)
    folder = tmp_path / "attention"
    (folder / "step-00000020.safetensors").write_bytes(b"x" * 10)
    with pytest.warns(UserWarning, match=r"step-00000020\.safetensors is damaged"):
        assert list(read_attention(tmp_path)[1]) == [0, 100]
    (folder / "step-00000020.safetensors").unlink()
    (folder / "images.safetensors").write_bytes(b"x" * 10)
    with (
        pytest.warns(UserWarning, match=r"images\.safetensors is damaged"),
        pytest.raises(FileNotFoundError, match="no snapshots"),
    ):
        read_attention(tmp_path)
    with pytest.warns(UserWarning, match=r"images\.safetensors is damaged"):
        save_attention(tmp_path, 120, attention, images)
    assert torch.equal(read_attention(tmp_path)[0], images)


SMALL: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "depth": 1, "local_crops": 2, "hidden_dim": 32,
    "batch_size": 8, "max_steps": 2, "scenes": 44, "evaluations": 0, "device": "cpu", "workers": 0,
}  # fmt: skip


def test_a_policy_in_the_place_of_the_named_one(tmp_path: Path) -> None:
    """The settings name another, so the file says which it was; it is read all the same."""
    config = JobConfig(**SMALL, out=tmp_path / "run")
    policy = ViewPolicy.local_only(BlockMasker(0.4))
    job.run_job(config, policy)
    kept = read(tmp_path / "run" / "config.json")
    assert kept["policy"] == "asymmetric", "as the settings say"
    assert kept["policy_used"] == repr(policy) == read(tmp_path / "run/summary.json")["policy"]
    assert saved_config(tmp_path / "run").out == config.out


def test_without_matplotlib_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(ImportError, match=r'matplotlib.*pip install "maskdistill\[train\]"'):
        job.run_job(JobConfig(**SMALL, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_same_command_again_goes_on(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a scheduler runs it after a preemption, whether or not the run had begun or is done."""
    out = tmp_path / "run"
    command = (*WHOLE, "--out", str(out), "--auto-resume")
    with after_step(6, killed):
        assert run(*command) == 130
    images, kept = read_attention(out)
    for step in (3, 6):  # as an evaluation there leaves it
        save_attention(out, step, kept[0] * step / 10, images)
    assert run(*command) == 0
    assert "resuming from step 4 of 10" in capsys.readouterr().out
    assert_same_run(out, whole)
    assert_same_attention(out, whole, earlier={3}, later={6})
    assert run(*command) == 0
    assert "resuming from step 10 of 10" in capsys.readouterr().out
    assert_same_run(out, whole)
    assert run("--scenes", "40", "--auto-resume") == 2
    assert "--auto-resume needs --out" in capsys.readouterr().err


def test_a_restart_by_torchrun_finds_its_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No --out is given; another run has begun meanwhile, and is not mistaken for ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    with after_step(6, killed):
        assert run(*WHOLE) == 130
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert run(*WHOLE, "--max-steps", "1") == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "ours")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert run(*WHOLE) == 0
    assert "resuming from step 4 of 10" in capsys.readouterr().out
    assert_same_run(tmp_path / "runs" / "dino-asymmetric-seed0", whole)


def test_a_masker_by_name(tmp_path: Path) -> None:
    out, masker = tmp_path / "run", "AttentionGuidedMasker(0.5, temperature=1.0)"
    arguments = ("--masker", masker, "--apply", "pixel")
    assert run("--scenes", "40", "--max-steps", "2", "--out", str(out), *arguments) == 0
    assert written(out) == FILES
    assert read(out / "summary.json")["masker"] == masker


def test_a_model_without_a_class_token(tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = ("--model", "vit_base_patch16_siglip_224")
    assert run("--scenes", "40", "--max-steps", "1", "--out", str(out), *model) == 0
    assert written(out) == FILES, "the attention is that of its attention pooling"
    assert "attention_jaccard" in read(out / "summary.json")


@pytest.mark.skipif(torch.__version__ < "2.7", reason="no autocast on the meta device before")
def test_a_model_without_attention(tmp_path: Path) -> None:
    out = tmp_path / "run"
    model = ("--model", "efficientvit_b0", "--image-size", "64", "--local-size", "32")
    assert run("--scenes", "40", "--max-steps", "1", "--out", str(out), *model,
               "--patch-size", "32", "--depth", "None", "--drop-path", "0") == 0  # fmt: skip
    assert written(out) == FILES - {"attention.png", "attention", "attention_strip.png"}
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


@pytest.mark.filterwarnings("always::UserWarning")
def test_damaged_images_stop_the_run_beyond_a_limit(
    tmp_path: Path, folder_of_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0", "1", "2"):
        path = folder_of_images / "cat" / f"{name}.png"
        path.write_bytes(path.read_bytes()[:200])
    data = ("--data", str(folder_of_images), "--out", str(tmp_path / "run"))
    assert run(*data, "--max-damaged", "1") == 1
    assert "stopped: 2 images are damaged" in capsys.readouterr().err
    assert (
        run(*data[:2], "--out", str(tmp_path / "again"), "--max-damaged", "3", "--max-steps", "1")
        == 0
    )
    said = [line for line in capsys.readouterr().err.splitlines() if "Damaged image" in line]
    assert len(said) == 3
    assert all(line.startswith("warning: Damaged image: ") and "cat" in line for line in said)
    log = (tmp_path / "again" / "warnings.log").read_text().splitlines()
    assert len(log) == 3
    assert all(re.match(r"[-\dT:+]{25} DamagedImageWarning: Damaged image: ", line) for line in log)


def test_an_output_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "run", capsys, "cannot write to", "--max-steps", "1")
    monkeypatch.setattr("maskdistill.training.checkpoint.os.access", lambda path, mode: False)
    refused(tmp_path / "run", capsys, "is not writable", "--max-steps", "1")


def test_weights_and_biases_that_are_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(tmp_path / "run", capsys, "pip install wandb", "--wandb", "masks")


def test_a_finished_run_is_not_overwritten(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir() if p.name != ".lock"}
    assert run(*WHOLE, "--out", str(whole)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in whole.iterdir() if p.name != ".lock"} == before


def test_a_refused_resumption_loses_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "run")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    again = ("--out", str(out), "--resume")
    assert example(*again, "--lr", "0.1") == 2
    assert "lr was 0.008 and is 0.1" in capsys.readouterr().err
    checkpoints = {p: p.read_bytes() for p in checkpoint_files(out)}
    for path, content in checkpoints.items():
        path.write_bytes(content[:500])
    assert example(*again) == 2
    said = capsys.readouterr().err
    assert all(f"{path.name} was skipped" in said for path in checkpoints)
    for path, content in checkpoints.items():
        path.write_bytes(content)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_run_without_its_settings(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are given again, and compared with those in the checkpoint."""
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "config.json").write_text("{")
    assert example("--out", str(out), "--resume") == 2
    assert "Remove it and give all settings again, with --resume" in capsys.readouterr().err
    (out / "config.json").unlink()
    assert run("--scenes", "40", "--seed", "1", "--out", str(out), "--resume") == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert run(*WHOLE, "--out", str(out), "--resume") == 0
    assert_same_run(out, whole)


def test_a_run_is_resumed_from_another_folder(
    tmp_path: Path, folder_of_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder_of_images.parent)
    data, out = ("--data", folder_of_images.name), ("--out", str(tmp_path / "run"))
    with after_step(1, lambda: signal.raise_signal(signal.SIGTERM)):
        assert run(*data, *out, "--max-steps", "2") == 143
    monkeypatch.chdir(tmp_path)
    assert example(*out, "--resume") == 0


def test_the_command_to_go_on_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["my script.py", "--epochs", "3"])
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3.12")
    assert command._again(Path("r")) == "python3.12 'my script.py' --resume --out r"
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    said = command._again(Path("r"))
    assert said == "torchrun --nproc-per-node 4 'my script.py' --resume --out r"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert "the other options that torchrun had, on every node" in command._again(Path("r"))
    said = command._again(Path("r"), "maskdistill train")
    assert said.endswith("-m maskdistill train --resume --out r")
    monkeypatch.delenv("WORLD_SIZE")
    assert command._again(Path("r"), "maskdistill train") == "maskdistill train --resume --out r"


def test_no_room_before_the_first_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    out = tmp_path / "run"
    assert run("--scenes", "40", "--max-steps", "1", "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert f"no room left while writing into {out}" in said
    assert "--auto-resume" in said


def test_a_peer_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]")
    assert not command._lost_a_peer(gone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command._lost_a_peer(gone)
    assert not command._lost_a_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other one has not come to its first checkpoint. Its end, however sudden, frees it."""
    out = tmp_path / "run"

    def other_run() -> None:
        with hold_folder(out):
            (tmp_path / "begun").touch()
            time.sleep(60)

    other = fork(other_run)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    for more in ((), ("--auto-resume",)):
        assert run("--scenes", "40", "--out", str(out), *more) == 2
        assert f"{out} is in use: process {other} on" in capsys.readouterr().err
    assert written(out) == {".lock"}
    os.kill(other, signal.SIGKILL)
    wait(other)
    with hold_folder(out):
        pass


def test_without_an_output_folder_each_run_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first", "first-2"):
        folder, resuming = choose_folder(None, "first")
        assert (folder, resuming) == (Path("runs") / name, False)
        folder.mkdir(parents=True)


@pytest.mark.parametrize("arguments", [[], ["--seed", "3"], ["--data", "x"], ["--data=x"]])
def test_the_bare_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README has it, without any argument."""
    ran: list[JobConfig] = []
    monkeypatch.setattr(job, "run_job", ran.append)
    assert example(*arguments) == 0
    assert ran[0].data == (Path("x") if len(arguments) and "data" in arguments[0] else None)
    assert ran[0].image_size == (32 if ran[0].data is None else 64)


def test_help_teaches_and_needs_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["--data", "x", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            command.train(
                JobConfig(epochs=4), JobConfig(epochs=77), description="Train.", argv=argv
            )
        assert stopped.value.code == 0
        said = capsys.readouterr().out
        assert "--masker" in said
        assert ("77" in said) == ("--data" in argv), "defaults are those of the data"


# --- On real images, where they are


def test_on_real_mini_imagenet(tmp_path: Path) -> None:
    name = "mini_imagenet_csv"
    if not (SHARED / name).exists():
        pytest.skip(f"the real data {name} is not beside the project")
    limits = ("--max-steps", "2", "--knn-train", "200", "--knn-val", "100")
    assert run("--data", str(SHARED / name), "--out", str(tmp_path / "run"), *limits) == 0
    assert read(tmp_path / "run" / "summary.json")["steps"] == 2
