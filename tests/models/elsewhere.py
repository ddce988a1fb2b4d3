"""Weights as other code bases write them: timm's own state dicts, renamed by hand."""

from __future__ import annotations

import argparse
from typing import Any

import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
V2, V2R = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
V3 = "vit_small_patch16_dinov3_qkvb"


def shake(model: nn.Module) -> nn.Module:
    """Fill every parameter, so that no zero or one hides a mistake."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.05)
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
                parameter.add_(1)
            elif "gamma" in name:
                parameter.uniform_(0.1, 1)
    return model.eval()


def vit(name: str = "vit_tiny_patch16_224", **changes: Any) -> nn.Module:
    settings = {"img_size": 64, "depth": 2, "num_classes": 0, "dynamic_img_size": True}
    return timm.create_model(name, **{**settings, **changes}).eval()


def small_dinov2(registers: bool = False, **changes: Any) -> nn.Module:
    name = f"vit_small_patch14_{'reg4_' * registers}dinov2"
    return vit(name, **{"img_size": 56, **changes})


def swiglu(**changes: Any) -> nn.Module:
    """DINOv2's giant, with fewer and narrower blocks."""
    small = {"embed_dim": 96, "num_heads": 3, "img_size": 56}
    return vit("vit_giant_patch14_reg4_dinov2", **{**small, **changes})


def small_dinov3(name: str = V3, **changes: Any) -> nn.Module:
    return timm.create_model(
        name, depth=2, num_classes=0, **{"global_pool": "token", **changes}
    ).eval()


# --- From timm's layout to others'


def as_is(state: State) -> State:
    return dict(state)


def dinov2_layout(state: State, chunks: int = 0, gated: bool = False) -> State:
    out: State = {"mask_token": torch.randn(1, state["cls_token"].shape[-1])}
    blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    for key, value in state.items():
        if gated:
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if chunks and key.startswith("blocks."):
            number = int(key.split(".")[1])
            key = key.replace("blocks.", f"blocks.{number // (blocks // chunks)}.", 1)
        out[key] = value
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
        position = torch.randn(1, 1, out["cls_token"].shape[-1])
        out["pos_embed"] = torch.cat([position, out["pos_embed"]], dim=1)
        out["cls_token"] = out["cls_token"] - position
    return out


def dinov2_chunks(state: State) -> State:
    return dinov2_layout(state, chunks=2)


def dinov2_gated(state: State) -> State:
    return dinov2_layout(state, chunks=2, gated=True)


def dinov3_layout(state: State) -> State:
    width = state["cls_token"].shape[-1]
    out: State = {
        "mask_token": torch.randn(1, width),
        "rope_embed.periods": (100 ** (torch.arange(16) / 16)).bfloat16(),
        "local_cls_norm.weight": torch.randn(width),
        "local_cls_norm.bias": torch.randn(width),
    }
    for key, value in state.items():
        key = key.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        if "blocks.0.mlp.fc1_g.weight" in state:
            key = key.replace("fc1_g", "w1").replace("fc1_x", "w2").replace("mlp.fc2", "mlp.w3")
        if key.endswith("attn.qkv.weight"):
            none = torch.zeros(width)
            q, v = (state.get(key.replace("qkv.weight", f"{x}_bias"), none) for x in "qv")
            bias = key.replace("weight", "bias")
            out[bias] = torch.cat([q, torch.randn(width), v])  # masked, whatever it is
            out[f"{bias}_mask"] = torch.cat([none + 1, none, none + 1])
        if not key.endswith(("q_bias", "v_bias")):
            out[key.replace("reg_token", "storage_tokens")] = value
    return out


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def dino_heads(prefix: str) -> State:
    names = ("mlp.0.weight", "mlp.0.bias", "last_layer.weight_g", "last_layer.weight_v")
    return {f"{prefix}head.{name}": torch.randn(3, 3) for name in names}


def dino_checkpoint(state: State) -> dict[str, Any]:
    """As main_dino.py writes it: the student is in DDP, the teacher is not."""
    other = {k: torch.randn_like(v) for k, v in state.items()}
    return {
        "student": prefixed(other, "module.backbone.") | dino_heads("module."),
        "teacher": prefixed(state, "backbone.") | dino_heads(""),
        "optimizer": {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", global_crops_scale=(0.4, 1.0)),
        "dino_loss": {"center": torch.randn(1, 3)},
        "fp16_scaler": None,
    }


def ibot_checkpoint(state: State) -> dict[str, Any]:
    checkpoint = dino_checkpoint(state)
    checkpoint["ibot_loss"] = checkpoint.pop("dino_loss")
    checkpoint["teacher"]["backbone.masked_embed"] = torch.randn(1, state["cls_token"].shape[-1])
    return checkpoint


def dinov2_teacher(state: State) -> dict[str, Any]:
    heads = {"dino_head.mlp.0.weight": torch.randn(3, 3), "ibot_head.mlp.0.weight": torch.randn(3)}
    return {"teacher": prefixed(dinov2_chunks(state), "backbone.") | heads}


def dinov3_checkpoint(state: State) -> dict[str, Any]:
    """As their checkpointer names it; the EMA is there twice, and Gram's old teacher too."""
    layout = dinov3_layout(state)
    other = {k: torch.randn_like(v) for k, v in layout.items()}
    return {
        "model": prefixed(other, "student.backbone.")
        | prefixed(layout, "teacher.backbone.")
        | prefixed(layout, "model_ema.backbone.")
        | prefixed(other, "gram_teacher.backbone.")
        | {"teacher.dino_head.mlp.0.weight": torch.randn(3)},
        "iteration": 3,
    }


def timm_checkpoint(state: State) -> dict[str, Any]:
    other = {k: torch.randn_like(v) for k, v in state.items()}
    return {"epoch": 3, "arch": "vit", "state_dict": other, "state_dict_ema": state}


def lightly_checkpoint(state: State) -> dict[str, Any]:
    """A Lightning module with lightly's names, its mask token beside timm's model."""
    other = prefixed(state, "student_backbone.vit.")
    other = {k: torch.randn_like(v) for k, v in other.items()}
    token = {"teacher_backbone.mask_token": torch.randn(1, 1, state["cls_token"].shape[-1])}
    return {"state_dict": prefixed(state, "teacher_backbone.vit.") | token | other | dino_heads("")}


def compiled(state: State) -> State:
    return prefixed(
        {k.replace("attn.", "_checkpoint_wrapped_module.attn."): v for k, v in state.items()},
        "_orig_mod.",
    )


def flat(content: Any, prefix: str = "") -> State:
    found: State = {}
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
    return found
