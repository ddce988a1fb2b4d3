"""Backbones from runs, from files of several code bases, and from timm, ready to be evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import maskdistill as md
from maskdistill.evaluation.backbones import load_backbone
from maskdistill.training.checkpoint import checkpoint_files
from tests.models.elsewhere import (
    dino_checkpoint,
    dinov2_layout,
    ibot_checkpoint,
    shake,
    small_dinov2,
    vit,
)
from tests.training.conftest import build, images  # noqa: F401  (fixtures)


def outputs(model: nn.Module, size: int) -> Tensor:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(x)
    return found


# --- Runs


@pytest.fixture
def run(build: Any, tmp_path: Path) -> tuple[Any, Path]:  # noqa: F811
    trainer = build(max_steps=8, apply="drop")
    trainer.fit(tmp_path, progress_bar=False)
    return trainer, tmp_path


def test_a_run_by_its_folder_or_a_checkpoint(run: tuple[Any, Path]) -> None:
    trainer, folder = run
    teacher, student = trainer.teacher.backbone.eval(), trainer.state.student_net.backbone.eval()
    newest = checkpoint_files(folder)[0]
    for source in (folder, str(folder), folder / "checkpoints", newest):
        loaded = load_backbone(source)
        torch.testing.assert_close(outputs(loaded, 16), outputs(teacher, 16))
        assert not loaded.training
        assert loaded.apply_mask == "drop", "as in the run"
    torch.testing.assert_close(
        outputs(load_backbone(folder, role="student"), 16), outputs(student, 16)
    )
    assert load_backbone(newest, apply="token").apply_mask == "token"
    larger = load_backbone(newest, image_size=32)
    assert outputs(larger, 32).shape == (2, 192)
    assert larger.grid(32, 32) == (8, 8)


def test_a_damaged_checkpoint_is_passed_over(run: tuple[Any, Path]) -> None:
    _, folder = run
    newest, *older = checkpoint_files(folder)
    newest.write_bytes(newest.read_bytes()[:-7])
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged .* passed over"):
        loaded = load_backbone(folder)
    torch.testing.assert_close(outputs(loaded, 16), outputs(load_backbone(older[0]), 16))
    with pytest.raises(ValueError, match="is damaged: its checksum does not match"):
        load_backbone(newest)
    for path in older:
        path.unlink()
    with (
        pytest.warns(UserWarning, match="passed over"),
        pytest.raises(ValueError, match="only damaged checkpoints"),
    ):
        load_backbone(folder)


def test_the_backbone_that_a_run_leaves(tmp_path: Path) -> None:
    model = shake(vit(img_size=32, patch_size=8))
    arguments = {"model_name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "depth": 2,
                 "num_classes": 0, "dynamic_img_size": True}  # fmt: skip
    path = tmp_path / "backbone.safetensors"
    save_file(model.state_dict(), path, metadata={"timm.create_model": json.dumps(arguments)})
    for source in (path, tmp_path):
        assert torch.equal(outputs(load_backbone(source), 32), outputs(model, 32))
    assert outputs(load_backbone(path, image_size=64), 64).shape == (2, 192)
    assert load_backbone(path, patch_size=16).patch_size == (16, 16)
    with pytest.raises(ValueError, match="holds the teacher alone; give the folder"):
        load_backbone(path, role="student")
    with pytest.raises(ValueError, match="holds no student to load"):
        load_backbone(tmp_path, role="student")


# --- Files from elsewhere


@pytest.mark.parametrize("write", [dict, dino_checkpoint, ibot_checkpoint])
def test_files_of_dinos_family(tmp_path: Path, write: Any) -> None:
    """Their backbones alone, and their training checkpoints; small, in patches of 8."""
    settings = {"img_size": 48, "patch_size": 8, "depth": 3, "num_classes": 0}
    model = shake(timm.create_model("vit_small_patch16_224", dynamic_img_size=True, **settings))
    path = tmp_path / "checkpoint.pth"
    torch.save(write(model.state_dict()), path)
    loaded = load_backbone(path)
    assert torch.equal(outputs(loaded, 48), outputs(model, 48))
    assert loaded.grid(48, 48) == (6, 6)
    assert outputs(load_backbone(path, image_size=32), 32).shape == (2, 384)


def test_the_students_side_of_a_checkpoint(tmp_path: Path) -> None:
    model = shake(vit())
    content = dino_checkpoint(model.state_dict())
    torch.save(content, tmp_path / "checkpoint.pth")
    teacher, student = (load_backbone(tmp_path / "checkpoint.pth", role=role)
                        for role in ("teacher", "student"))  # fmt: skip
    assert torch.equal(outputs(teacher, 64), outputs(model, 64))
    assert not torch.equal(outputs(student, 64), outputs(model, 64))


@pytest.mark.parametrize("registers", [False, True])
def test_files_of_dinov2(tmp_path: Path, registers: bool) -> None:
    model = shake(small_dinov2(registers))
    torch.save(dinov2_layout(model.state_dict()), tmp_path / "dinov2.pth")
    loaded = load_backbone(tmp_path / "dinov2.pth")
    torch.testing.assert_close(outputs(loaded, 56), outputs(model, 56), rtol=1e-4, atol=1e-5)


def test_a_named_model_for_a_file(tmp_path: Path) -> None:
    """Where the shapes would say another one: this has a second token that stands before."""
    settings = {"img_size": 32, "patch_size": 8, "num_classes": 0}
    model = shake(timm.create_model("deit_tiny_distilled_patch16_224", **settings))
    torch.save(model.state_dict(), tmp_path / "deit.pth")
    loaded = load_backbone(
        tmp_path / "deit.pth", model="deit_tiny_distilled_patch16_224", image_size=32, patch_size=8
    )
    assert torch.equal(outputs(loaded, 32), outputs(model, 32))


def test_an_unknown_layout_is_told(tmp_path: Path) -> None:
    torch.save({"stem.weight": torch.ones(3, 2), "top": torch.ones(1)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match="no model is known") as error:
        load_backbone(tmp_path / "net.pth")
    for part in ("2 tensors: stem.weight (3, 2), top (1,)", "Can be read: a run's folder",
                 "facebookresearch/dino", "load_backbone(file, model='...')"):  # fmt: skip
        assert part in str(error.value)
    state = {f"vit.{k}": v for k, v in vit(embed_dim=96, num_heads=3).state_dict().items()}
    torch.save(state, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="The file holds 2 blocks of width 96"):
        load_backbone(tmp_path / "narrow.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
        load_backbone(tmp_path / "text.pth")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no teacher to load.*Found: nothing"):
        load_backbone(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.pth"):
        load_backbone(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_backbone(tmp_path / "gone", model="vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="weights of its own; leave out pretrained"):
        load_backbone(tmp_path / "text.pth", pretrained=True)


# --- timm


def test_a_model_of_timm_by_name() -> None:
    state = torch.get_rng_state()
    first, same, other = (
        load_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=1, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(outputs(first, 32), outputs(same, 32))
    assert not torch.equal(outputs(first, 32), outputs(other, 32))
    assert first.grid(64, 32) == (8, 4), "other sizes too"
    assert 0.01 < float(first.backbone.cls_token.detach().std()) < 0.03, "as the trainer starts"
    swin = load_backbone("swin_tiny_patch4_window7_224", apply="pixel")
    assert swin.embed(torch.zeros(1, 3, 224, 224)).shape == (1, 768)
    assert isinstance(first, md.MaskedViT)


def test_what_timm_does_not_have() -> None:
    with pytest.raises(ValueError, match="Did you mean vit_tiny_patch16_224"):
        load_backbone("vit_tiny_patch16_225")
    with pytest.raises(ValueError, match="does not take .*depth=3"):
        load_backbone("swin_tiny_patch4_window7_224", depth=3)
    with pytest.raises(ValueError, match="timm has no weights of vit_small_patch16_18x2_224"):
        load_backbone("vit_small_patch16_18x2_224", depth=1, pretrained=True)


def test_other_colours_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a download: what timm would have returned, with weights that say their colours."""
    create = timm.create_model

    def downloaded(name: str, pretrained: bool = False, **settings: Any) -> nn.Module:
        model: Any = create(name, pretrained=False, **settings)
        model.pretrained_cfg = {**model.pretrained_cfg, **colours}
        return model  # type: ignore[no-any-return]

    monkeypatch.setattr(timm, "create_model", downloaded)
    colours: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.warns(UserWarning, match=r"statistics=\(\(0.5, 0.5, 0.5\)") as caught:
        load_backbone("vit_tiny_patch16_224", pretrained=True, depth=1)
    assert caught[0].filename == __file__, "told to whoever called"
    colours = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    load_backbone("vit_tiny_patch16_224", pretrained=True, depth=1)
