"""Weights in other code bases' layouts load into timm's models, and ours into plain timm.

The files are written here: a random timm model's state dict, renamed to the other layout by hand.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from maskdistill.models import MaskedViT
from maskdistill.models.speed import unfuse_attention
from maskdistill.models.weights import LoadedWeights, load_weights
from maskdistill.training import Trainer, latest_checkpoint
from maskdistill.training.job import JobConfig, _save_backbone
from tests.models.elsewhere import (
    V2,
    V2R,
    V3,
    State,
    as_is,
    compiled,
    dino_checkpoint,
    dinov2_chunks,
    dinov2_gated,
    dinov2_layout,
    dinov2_teacher,
    dinov3_checkpoint,
    dinov3_layout,
    flat,
    ibot_checkpoint,
    lightly_checkpoint,
    prefixed,
    shake,
    small_dinov2,
    small_dinov3,
    swiglu,
    timm_checkpoint,
    vit,
)
from tests.training.conftest import TINY, Noise, build, images  # noqa: F401  (fixtures)

needs_v3 = pytest.mark.skipif(not timm.is_model(V3), reason="timm has no DINOv3 models yet")

Case = tuple[Callable[..., nn.Module], Callable[[State], Any], str, str, bool]
CASES: dict[str, Case] = {  # model, file, layout, part, whether there is a mask token
    "timm": (vit, as_is, "timm", "", False),
    "timm checkpoint": (vit, timm_checkpoint, "timm", "state_dict_ema.", False),
    "compiled": (vit, compiled, "timm", "", False),
    "lightly": (vit, lightly_checkpoint, "dino", "state_dict.teacher_backbone.vit.", True),
    "dino": (vit, dino_checkpoint, "dino", "teacher.backbone.", False),
    "ibot": (vit, ibot_checkpoint, "ibot", "teacher.backbone.", True),
    "dinov2": (small_dinov2, dinov2_layout, "dinov2", "", True),
    "dinov2 chunks": (small_dinov2, dinov2_chunks, "dinov2", "", True),
    "dinov2 teacher": (small_dinov2, dinov2_teacher, "dinov2", "teacher.backbone.", True),
    "dinov2 registers": (lambda: small_dinov2(True), dinov2_layout, "dinov2", "", True),
    "dinov2 giant": (swiglu, dinov2_gated, "dinov2", "", True),
    "dinov3": (small_dinov3, dinov3_layout, "dinov3", "", True),
    "dinov3 no bias": (lambda: small_dinov3("vit_small_patch16_dinov3"), dinov3_layout,
                       "dinov3", "", True),
    "dinov3 plus": (lambda: small_dinov3("vit_small_plus_patch16_dinov3_qkvb"), dinov3_layout,
                    "dinov3", "", True),
    "dinov3 checkpoint": (small_dinov3, dinov3_checkpoint, "dinov3", "model.teacher.backbone.",
                          True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_layout_loads(name: str, tmp_path: Path) -> None:
    build_model, rename, layout, part, has_token = CASES[name]
    if layout == "dinov3" and not timm.is_model(V3):
        pytest.skip("timm has no DINOv3 models yet")
    source = shake(build_model())
    content = rename(source.state_dict())
    torch.save(content, tmp_path / "weights.pth")
    target = MaskedViT(shake(build_model()))
    report = load_weights(target, tmp_path / "weights.pth")

    loaded = target.backbone.state_dict()
    for key, value in source.state_dict().items():
        torch.testing.assert_close(loaded[key], value, atol=1e-6, rtol=0)
    x = torch.randn(2, 3, *source.patch_embed.img_size)
    torch.testing.assert_close(target(x), source(x), atol=1e-4, rtol=0)

    assert (report.layout, report.part, report.mask_token) == (layout, part, has_token)
    assert report.tensors == len(loaded) + has_token
    assert not report.resized
    tensors = flat(content)
    if has_token:
        keys = [k for k in tensors if k.endswith(("mask_token", "masked_embed"))]
        token = tensors[next(k for k in keys if k.startswith(part.removesuffix("vit.")))]
        assert torch.equal(target.mask_token.detach().flatten(), token.flatten())
    # What is neither loaded nor named is lost without a word.
    named = {key for key in tensors if key.startswith(part)} - report.left_out.keys()
    assert len(named) - len(loaded) <= 1 or layout == "dinov3"
    assert report.left_out.keys() <= tensors.keys()
    assert {k for k in tensors if not k.startswith(part)} - report.left_out.keys() <= {
        "state_dict.teacher_backbone.mask_token"
    }


@needs_v3
def test_what_dinov3_has_besides_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    state = dinov3_layout(shake(small_dinov3("vit_small_patch16_dinov3")).state_dict())
    report = load_weights(small_dinov3("vit_small_patch16_dinov3"), state)
    assert set(report.left_out.values()) == {
        "a mask token; wrap the model in MaskedViT(model, apply='token') to take it",
        "constants, which the model computes",
        "used in training only",
        "masks of biases, which are applied",
        "biases of zero, which the model does not have",
    }
    assert len(report.left_out) + report.tensors == len(state)
    assert capsys.readouterr().out == ""  # timm prints where biases are missing
    assert str(report).splitlines()[0] == "DINOv3: 32 tensors loaded"
    assert "left out: local_cls_norm.weight and 1 more (used in training only)" in str(report)


@pytest.mark.parametrize("nested", [dino_checkpoint, timm_checkpoint, lightly_checkpoint])
def test_the_role_chooses(nested: Callable[[State], Any]) -> None:
    content = nested(shake(vit()).state_dict())
    student, teacher = vit(), vit()
    parts = {
        load_weights(student, content, role="student").part,
        load_weights(teacher, content).part,
    }
    assert len(parts) == 2
    tensors = flat(content)
    for model, role in ((student, "student"), (teacher, "teacher")):
        part = load_weights(model, content, role=role).part
        assert torch.equal(model.norm.bias, tensors[f"{part}norm.bias"])
    with pytest.raises(ValueError, match="role must be one of teacher, student; got 'ema'"):
        load_weights(teacher, content, role="ema")


def test_a_role_that_is_not_there_or_there_twice() -> None:
    state = vit().state_dict()
    with pytest.raises(ValueError, match=r"no teacher, only student\.\*. Pass role='student'"):
        load_weights(vit(), {"student": state})
    two = {"teacher": prefixed(state, "a.") | prefixed(state, "b.")}
    with pytest.raises(ValueError, match=r"several .* teacher: teacher\.a\.\*, teacher\.b\.\*"):
        load_weights(vit(), two)
    assert load_weights(vit(), {"model": state}, role="student").part == "model."


# --- Other sizes


@pytest.mark.parametrize("layout", ["timm", "dinov2", "dinov2 registers"])
def test_other_image_and_patch_sizes(layout: str) -> None:
    """Positions and patch filters are resampled as timm does it."""
    if layout == "timm":
        source, target = vit(), vit(img_size=96, patch_size=8)
        content = source.state_dict()
    else:
        registers = layout.endswith("registers")
        source = small_dinov2(registers)
        target = small_dinov2(registers, img_size=98, patch_size=7)
        content = dinov2_layout(shake(source).state_dict())
    report = load_weights(target, content)
    assert report.resized.keys() == {"pos_embed", "patch_embed.proj.weight"}
    assert report.resized["pos_embed"][1] == tuple(target.pos_embed.shape)
    assert f"resized: pos_embed from (1, 17, {target.embed_dim}) to (1, " in str(report)

    expected = timm.models.vision_transformer.checkpoint_filter_fn(
        dict(source.state_dict()), target
    )
    for key, value in target.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0)


@needs_v3
def test_dinov3_at_another_patch_size() -> None:
    source, target = shake(small_dinov3()), small_dinov3(patch_size=8)
    report = load_weights(target, dinov3_layout(source.state_dict()))
    assert report.resized.keys() == {"patch_embed.proj.weight"}


def test_swin_at_another_size() -> None:
    """Any family of timm with a conversion of its own has it used."""
    name = "swin_tiny_patch4_window7_224"
    source = timm.create_model(name, num_classes=10, depths=(1, 1, 1, 1))
    target = timm.create_model(
        name, num_classes=0, depths=(1, 1, 1, 1), img_size=128, window_size=4
    )
    report = load_weights(MaskedViT(target, apply="pixel", patch_size=32), source.state_dict())
    assert report.resized["layers.0.blocks.0.attn.relative_position_bias_table"] == (
        (169, 3), (49, 3)
    )  # fmt: skip
    assert report.left_out["head.fc.weight"] == "heads, which the model does not have"


@pytest.mark.parametrize("tokens", [8, 32])
def test_positions_that_are_no_square(tokens: int) -> None:
    source = vit(img_size=(32, 16 * tokens // 2))
    with pytest.raises(ValueError, match=f"positions for {tokens} patches, which are no square"):
        load_weights(vit(), source.state_dict())
    same = vit(img_size=(32, 16 * tokens // 2))
    load_weights(same, source.state_dict())
    assert torch.equal(same.pos_embed, source.pos_embed)


# --- Mask tokens


def test_where_a_mask_token_goes() -> None:
    content = dinov2_layout(small_dinov2().state_dict())
    for apply in ("drop", "pixel"):
        report = load_weights(MaskedViT(small_dinov2(), apply=apply), content)
        assert report.left_out == {"mask_token": f"a mask token, and apply={apply!r} has none"}
    assert "wrap the model" in load_weights(small_dinov2(), content).left_out["mask_token"]

    target = MaskedViT(small_dinov2())
    nn.init.ones_(target.mask_token)
    content.pop("mask_token")
    assert not load_weights(target, content).mask_token
    assert target.mask_token.min() == 1  # kept where the file has none


def test_another_networks_mask_token_stays_out() -> None:
    """MAE's belongs to its decoder, whatever its width."""
    target = MaskedViT(vit())
    for width in (192, 64):
        content = {
            **vit().state_dict(),
            "mask_token": torch.ones(1, 1, width),
            "decoder_embed.weight": torch.ones(3, 3),
            "decoder_blocks.0.norm1.weight": torch.ones(3),
        }
        report = load_weights(target, {"model": content})
        assert not report.mask_token
        assert len(report.left_out) == 3
        assert not target.mask_token.any()


def test_a_masked_vit_saves_what_loads(tmp_path: Path) -> None:
    """State dicts of the adapter itself, with its mask token; of Eva too, which timm would take for
    a checkpoint of another kind."""
    for name in ("vit_tiny_patch16_224", "eva02_tiny_patch14_224"):
        settings = {"depth": 2, "num_classes": 0}
        source, target = (MaskedViT(shake(timm.create_model(name, **settings))) for _ in "ab")
        nn.init.normal_(source.mask_token)
        torch.save(source.state_dict(), tmp_path / "vit.pth")
        assert load_weights(target, tmp_path / "vit.pth").mask_token
        for key, value in source.state_dict().items():
            assert torch.equal(target.state_dict()[key], value)


# --- What does not fit


def state_of(model: nn.Module) -> State:
    return {k: v.clone() for k, v in model.state_dict().items()}


def refused(model: nn.Module, content: Any, **settings: Any) -> str:
    """Return the message, having looked that nothing was loaded."""
    before = state_of(model)
    with pytest.raises(ValueError, match=".") as caught:
        load_weights(model, content, **settings)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    return str(caught.value)


MISFITS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], str]] = {
    "no registers": (small_dinov2, lambda: dinov2_layout(small_dinov2(True).state_dict()), V2R),
    "registers": (lambda: small_dinov2(True), lambda: dinov2_layout(small_dinov2().state_dict()),
                  V2),
    "dinov2 in a plain vit": (lambda: vit("vit_small_patch16_224"),
                              lambda: dinov2_teacher(small_dinov2().state_dict()), V2),
    "width": (vit, lambda: dino_checkpoint(vit("vit_small_patch16_224").state_dict()),
              "vit_small_patch16_224"),
    "patches": (lambda: vit("vit_small_patch16_224"),
                lambda: vit("vit_base_patch8_224").state_dict(), "vit_base_patch8_224"),
    "depth": (lambda: vit(depth=1), lambda: vit(depth=2).state_dict(), "vit_tiny_patch16_224"),
    "dinov3 in a vit": (lambda: vit("vit_small_patch16_224"),
                        lambda: dinov3_layout(small_dinov3().state_dict()), V3),
    "dinov3 with biases": (lambda: small_dinov3("vit_small_patch16_dinov3"),
                           lambda: dinov3_layout(shake(small_dinov3()).state_dict()), V3),
    "dinov3 in dinov2": (small_dinov2, lambda: dinov3_layout(
        small_dinov3("vit_small_patch16_dinov3").state_dict()), "vit_small_patch16_dinov3"),
    "dinov2 in dinov3": (small_dinov3, lambda: dinov2_layout(small_dinov2().state_dict()), V2),
}  # fmt: skip


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_names_the_model_that_fits(name: str) -> None:
    build_model, make_content, fitting = MISFITS[name]
    if "dinov3" in name and not timm.is_model(V3):
        pytest.skip("timm has no DINOv3 models yet")
    shaken = "dinov3" in name and fitting == V3
    content = make_content()
    if shaken:
        content = {
            k: torch.ones_like(v) if k.endswith("qkv.bias") else v for k, v in content.items()
        }
    message = refused(build_model(), content)
    assert message.endswith("Nothing was loaded.")
    call = re.search(r"build timm\.create_model\('(\w+)', num_classes=0(.*?)\)\.", message)
    assert call is not None, message
    assert call[1] == fitting
    extra = eval(f"dict({call[2].lstrip(', ')})", {})
    model = timm.create_model(call[1], num_classes=0, **extra)
    assert load_weights(model, content).tensors == len(model.state_dict())


def test_a_misfit_lists_five_keys() -> None:
    small = timm.create_model("vit_small_patch16_224", num_classes=0)
    message = refused(vit(), small.state_dict())
    assert message.startswith("the mapping (timm) does not fit vit_tiny_patch16_224: ")
    assert "unknown to the model: blocks.2.norm1.weight, blocks.2.norm1.bias" in message
    assert "of another shape: cls_token (1, 1, 384) instead of (1, 1, 192), " in message
    assert len(re.findall(r"blocks\.\d|cls_token|pos_embed|patch_embed", message)) == 5
    assert re.search(r"and \d+ more", message)


def test_a_classifier() -> None:
    message = refused(vit(num_classes=10), vit().state_dict())
    assert "missing: head.weight, head.bias." in message
    assert "num_classes=0, load, then call reset_classifier" in message
    assert "head.weight (7, 192) instead of (10, 192)" in refused(
        vit(num_classes=10), vit(num_classes=7).state_dict()
    )
    report = load_weights(vit(), vit(num_classes=7).state_dict())
    assert report.left_out.keys() == {"head.weight", "head.bias"}
    same = vit(num_classes=7)
    report = load_weights(same, vit(num_classes=7).state_dict())
    assert not report.left_out


def test_a_bias_that_the_model_lacks_is_no_spare_part() -> None:
    assert "unknown to the model: blocks.0.attn.qkv.bias" in refused(
        vit(qkv_bias=False), vit().state_dict()
    )
    assert "missing: blocks.0.attn.qkv.bias" in refused(vit(), vit(qkv_bias=False).state_dict())


def test_integers_are_no_weights() -> None:
    content = {k: (v * 100).to(torch.int8) for k, v in vit().state_dict().items()}
    assert "of another type: cls_token torch.int8 instead of torch.float32" in refused(
        vit(), content
    )


@needs_v3
def test_dinov3_that_timm_cannot_compute() -> None:
    content = dinov3_layout(small_dinov3().state_dict())
    for key in [k for k in content if k.endswith("bias_mask")]:
        content[key] = torch.ones_like(content[key])
    assert "has a bias of the keys, blocks.0.attn.qkv.bias" in refused(small_dinov3(), content)

    content = dinov3_layout(small_dinov3().state_dict())
    content["rope_embed.periods"] = 10000 ** (torch.arange(16) / 16)
    assert "other rotary periods than the model's: rope_embed.periods" in refused(
        small_dinov3(), content
    )
    content = dinov3_layout(small_dinov3().state_dict()) | {"cls_norm.weight": torch.ones(384)}
    assert "unknown to the model: cls_norm.weight" in refused(small_dinov3(), content)


def test_an_older_timm_without_dinov3(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        "storage_tokens": torch.zeros(1, 4, 384),
        "patch_embed.proj.weight": torch.zeros(384, 3, 16, 16),
        "blocks.11.norm1.weight": torch.zeros(384),
    }
    monkeypatch.setattr(timm, "is_model", lambda name: False)
    message = refused(vit(), state)
    assert "which is vit_small_patch16_dinov3; timm " in message
    assert "DINOv3's models came with timm 1.0.20" in message


def test_hugging_faces_keys() -> None:
    content = {
        "embeddings.cls_token": torch.zeros(1, 1, 192),
        "encoder.layer.0.attention.attention.query.weight": torch.zeros(192, 192),
    }
    assert "Hugging Face transformers" in refused(vit(), content)
    assert "Its layout is not known" in refused(vit(), {"weight": torch.zeros(3)})


# --- Files


def test_kinds_of_files(tmp_path: Path) -> None:
    """By what is in them, whatever their names."""
    state = shake(vit()).state_dict()
    torch.save(state, tmp_path / "a.bin")
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "misnamed.pth")
    for path in (*tmp_path.iterdir(), str(tmp_path / "a.bin")):
        target = vit()
        assert load_weights(target, path).layout == "timm"
        assert torch.equal(target.norm.bias, state["norm.bias"])


class Harmful:
    """Would leave a file behind when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_weights(vit(), path)
    assert "is a folder" in refused(vit(), tmp_path)

    torch.save({**vit().state_dict(), "args": Harmful(tmp_path / "harm")}, path)
    message = refused(vit(), path)
    assert "could run code and was not called" in message
    assert "asks for" in message
    assert "open" in message
    assert not (tmp_path / "harm").exists()

    whole = tmp_path / "whole.pth"
    torch.save(vit().state_dict(), whole)
    save_file(vit().state_dict(), tmp_path / "whole.safetensors")
    for content in (
        whole.read_bytes()[:5000],
        (tmp_path / "whole.safetensors").read_bytes()[:5000],
        b"not weights at all, but a text",
        pickle.dumps({"a": 1}, protocol=4),
    ):
        path.write_bytes(content)
        message = refused(vit(), path)
        assert "cannot be read as a file of weights" in message or "no tensors" in message
    path.write_bytes(b"")
    assert "is empty" in refused(vit(), path)
    torch.save([torch.zeros(1)], path)
    assert "holds a list, not a mapping" in refused(vit(), path)
    torch.save({"epoch": 3, "model": {"a": "b"}}, path)
    assert "holds no tensors (epoch is a int, model is a dict)" in refused(vit(), path)


def test_sources_and_models_of_other_kinds() -> None:
    assert "holds no tensors: it is empty" in refused(vit(), {})
    assert "must be the path of a file or a mapping" in refused(vit(), vit())
    assert "on the meta device" in refused(vit(), {"norm.weight": torch.zeros(3, device="meta")})
    with pytest.raises(ValueError, match=r"must be a torch.nn.Module; got str"):
        load_weights("vit", {})  # type: ignore[arg-type]
    hollow = vit().to("meta")
    with pytest.raises(ValueError, match=r"meta device and has no memory .* model\.to_empty"):
        load_weights(hollow, vit().state_dict())


# --- The model stays as it is otherwise


def test_dtype_and_gradients_stay() -> None:
    source = shake(vit())
    half = {k: v.half() for k, v in source.state_dict().items()}
    target = MaskedViT(vit().bfloat16().requires_grad_(False).train())
    parameters = list(target.parameters())
    load_weights(target, half)
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    assert not any(p.requires_grad for p in target.backbone.parameters())
    assert not target.mask_token.requires_grad, "of a frozen model"
    assert target.training
    expected = source.state_dict()["norm.bias"].half().bfloat16()
    assert torch.equal(target.backbone.norm.bias, expected)

    trained = dict(source.named_parameters())  # with gradients, as no state dict has them
    target = vit(img_size=96)
    load_weights(target, trained)
    assert target.pos_embed.is_leaf


def test_through_wrappers() -> None:
    source = shake(vit())
    inner = MaskedViT(vit())
    load_weights(torch.compile(inner), source.state_dict())
    assert torch.equal(inner.backbone.norm.bias, source.norm.bias)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        inner = MaskedViT(vit())
        load_weights(DistributedDataParallel(inner), source.state_dict())
    finally:
        dist.destroy_process_group()
    assert torch.equal(inner.backbone.norm.bias, source.norm.bias)


def test_a_model_that_is_not_timms() -> None:
    """Its own files load; there is no conversion, and a misfit is refused."""

    class Own(nn.Module):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.mask_token = nn.Parameter(torch.randn(1, width))
            self.patch_embed = nn.Conv2d(3, width, 4, 4)

    source, target = Own(), Own()
    report = load_weights(target, {"teacher": prefixed(source.state_dict(), "backbone.")})
    assert report.tensors == 3
    assert torch.equal(target.mask_token, source.mask_token)
    assert "of another shape" in refused(Own(4), source.state_dict())


# --- Trained here


def test_what_is_trained_here_loads_everywhere(build: Any, tmp_path: Path) -> None:  # noqa: F811
    trainer: Trainer = build(max_steps=2)
    trainer.fit(tmp_path)
    teacher, student = trainer.teacher.backbone, trainer.state.student_net.backbone
    teacher.eval()
    nn.init.normal_(teacher.mask_token)
    config = JobConfig(**{**TINY, "max_steps": 2})
    _save_backbone(teacher.backbone.state_dict(), config, tmp_path / "backbone.safetensors")
    torch.save(teacher.backbone.state_dict(), tmp_path / "backbone.pth")
    x = torch.randn(2, 3, 16, 16)

    def fresh() -> nn.Module:
        model = timm.create_model(
            config.model, img_size=16, patch_size=4, depth=2, num_classes=0, dynamic_img_size=True
        ).eval()
        unfuse_attention(model)  # as the trainer does on a CPU, so that the last bit is the same
        return model

    for state in (load_file(tmp_path / "backbone.safetensors"),
                  torch.load(tmp_path / "backbone.pth", weights_only=True)):  # fmt: skip
        plain = fresh()
        plain.load_state_dict(state, strict=True)
        assert torch.equal(plain(x), teacher(x))
    plain = fresh()
    assert load_weights(plain, tmp_path / "backbone.safetensors").left_out == {}
    assert torch.equal(plain(x), teacher(x))

    for role, net in (("teacher", trainer.teacher.backbone), ("student", student)):
        wrapped = MaskedViT(fresh())
        report = load_weights(wrapped, latest_checkpoint(tmp_path).path, role=role)
        assert report.layout == "maskdistill"
        assert report.mask_token
        assert torch.equal(wrapped(x), net.eval()(x))


def test_checkpoints_from_before_the_prefix_went(tmp_path: Path) -> None:
    """The adapter's keys once had a second backbone., and its token stood beside."""
    source = shake(vit())
    content = {
        "teacher": prefixed(source.state_dict(), "backbone.backbone.")
        | {"backbone.mask_token": torch.ones(1, 1, 192)},
    }
    target = MaskedViT(vit())
    assert load_weights(target, content).part == "teacher.backbone.backbone."
    assert target.mask_token.min() == 1
    assert torch.equal(target.backbone.norm.bias, source.norm.bias)


def test_the_report_reads_well() -> None:
    report = load_weights(MaskedViT(vit()), dino_checkpoint(vit().state_dict()))
    assert isinstance(report, LoadedWeights)
    assert str(report).splitlines() == [
        "facebookresearch/dino checkpoint, from teacher.backbone.*: 30 tensors loaded",
        "left out: student.module.backbone.cls_token and 39 more (not of the teacher's backbone)",
    ]
    assert json.loads(json.dumps(report.left_out)) == report.left_out


def test_a_checkpoint_with_a_command_line_and_numbers_of_numpy(tmp_path: Path) -> None:
    """As facebookresearch/dino writes them: learning rates come from a NumPy schedule."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    content = {
        "teacher": {f"backbone.{key}": value for key, value in model.state_dict().items()},
        "args": argparse.Namespace(lr=np.float64(5e-4)),
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3), "decay": np.float32(0.04)}]},
        "epoch": np.int64(3),
    }
    torch.save(content, tmp_path / "checkpoint.pth")
    again = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    load_weights(again, tmp_path / "checkpoint.pth")
    assert torch.equal(again.pos_embed, model.pos_embed)
