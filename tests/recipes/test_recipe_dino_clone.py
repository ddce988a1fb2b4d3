"""The recipe in facebookresearch/dino itself, run as a user runs it.

Needs a clone at the recipe's commit, and is skipped without:

    MASKDISTILL_DINO=CLONE pytest tests/recipes/test_recipe_dino_clone.py
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import maskdistill as md

EXAMPLES = Path(__file__).parents[2] / "examples"
CLONE = Path(os.environ.get("MASKDISTILL_DINO") or "no-clone").resolve()

pytestmark = pytest.mark.skipif(
    not (CLONE / "main_dino.py").is_file(), reason="MASKDISTILL_DINO names no clone of DINO"
)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import recipe_dino

    return recipe_dino


def train(output: Path, *arguments: str) -> list[float]:
    """Run the example on the clone for two steps, and return the losses that it logged."""
    command = [sys.executable, str(EXAMPLES / "recipe_dino.py"), "--dino", str(CLONE)]
    command += ["--output", str(output), "--steps", "2", "--batch", "2", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not run.returncode, run.stdout + run.stderr
    log = (output / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["train_loss"] for line in log]


def checkpoint_in(output: Path) -> dict[str, Any]:
    return torch.load(output / "run" / "checkpoint.pth", weights_only=False)


@pytest.mark.parametrize("masker", ["RandomMasker(0.3)", "AttentionGuidedMasker(0.4)"])
def test_the_diff_is_of_the_clone(script: types.ModuleType, masker: str) -> None:
    diff = script.recipe("token", md.parse_masker(masker))
    text = (CLONE / "main_dino.py").read_text(encoding="utf-8")
    assert script.unified(text, script.apply_diff(diff, text)) == diff


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, Any]]:
    """The losses and the checkpoint of the original as it is."""
    output = tmp_path_factory.mktemp("plain")
    return train(output, "--unmodified"), checkpoint_in(output)


@pytest.mark.parametrize("apply", ["token", "drop", "pixel"])
def test_without_masks_it_trains_as_the_original(
    tmp_path: Path, plain: tuple[list[float], dict[str, Any]], apply: str
) -> None:
    losses, expected = plain
    assert train(tmp_path, "--masker", "NoMasker()", "--apply", apply) == losses
    saved = checkpoint_in(tmp_path)
    for role in ("student", "teacher"):
        assert all(torch.equal(saved[role][key], expected[role][key]) for key in expected[role])


@pytest.mark.parametrize("apply", ["token", "drop", "pixel"])
def test_it_trains_with_masks(
    tmp_path: Path, plain: tuple[list[float], dict[str, Any]], apply: str
) -> None:
    losses, expected = plain
    masked = train(tmp_path, "--apply", apply)
    assert torch.tensor(masked).isfinite().all()
    assert masked[0] != losses[0]
    saved = checkpoint_in(tmp_path)
    for role, prefix in (("student", "module."), ("teacher", "")):
        token = {f"{prefix}backbone.mask_token"} if apply == "token" else set()
        assert saved[role].keys() == expected[role].keys() | token
        assert all(saved[role][key].abs().sum() > 0 for key in token)  # it was zero


def test_its_evaluation_loads_the_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, "--masker", "AttentionGuidedMasker(0.4)")
    code = (
        "import sys, utils, vision_transformer as vits\n"
        "vit = vits.vit_tiny(patch_size=16, num_classes=0)\n"
        "utils.load_pretrained_weights(vit, sys.argv[1], 'teacher', 'vit_tiny', 16)\n"
    )
    checkpoint = tmp_path / "run" / "checkpoint.pth"
    told = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        cwd=CLONE, capture_output=True, text=True, check=True,
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"},
    ).stdout  # fmt: skip
    assert "missing_keys=[]" in told
    unexpected = set(re.findall(r"'([\w.]+)'", told.split("unexpected_keys=")[1]))
    assert {key.split(".")[0] for key in unexpected} == {"mask_token", "head"}


def test_it_trains_in_two_processes(tmp_path: Path) -> None:
    masked = train(tmp_path, "--processes", "2")
    assert torch.tensor(masked).isfinite().all()
